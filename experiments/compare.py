"""Methods side by side: equal tokens, the rate tuned per method on validation, several seeds, test once.

    python experiments/compare.py --workdir=runs/compare --jobs=2
    python experiments/compare.py --workdir=runs/compare --settings=baseline,ap --rates=2e-3,4e-3 --seeds=5

Trains every setting at every rate with seed 0, and, while the best one is the lowest or the highest, at half or twice
that; takes the rate with the lowest validation perplexity, trains it with the other seeds (a seed is an initialisation
and an order of the data), evaluates these runs on the test split, gives each its report (cyb-report, of the validation
split) and all of them one side by side, and prints a table and, on the last line, JSON. All is in WORKDIR too:
comparison.json, comparison.md, report/index.html. A study that was interrupted goes on: run the same command again.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import math
import os
import pathlib
import queue
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from cyb_jax import jsonl, programs, settings
from cyb_jax.errors import InputError
from cyb_jax.storage import write_whole

# Beyond the rates that are given, in factors of two.
MAX_EXTENSIONS = 4
SETTINGS = "baseline,tbys3,ap,ap_unit,constant_stop,mean_slots"


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "The study's folder; each run has its own in it.")
  flags.DEFINE_string("config", "experiments/quickstart.py", "The experiment that settings are arguments of.")
  flags.DEFINE_list("settings", SETTINGS, "Settings of experiments/README.md.")
  flags.DEFINE_list("rates", "1e-3,2e-3", "Learning rates that each setting's search for its best one starts with.")
  flags.DEFINE_bool("search", True, "Whether rates beyond the given ones are tried while the best one is at their end.")
  flags.DEFINE_integer("seeds", 3, "Seeds.")
  flags.DEFINE_integer("steps", 400, "Steps of every run: the same tokens for all.")
  flags.DEFINE_bool("report", True, "Whether reports are written, of the validation split.")
  flags.DEFINE_integer("jobs", 1, "Runs at a time; each is bound to its share of the CPU's cores.")


class Study:
  """The runs of a comparison, each in a folder named by what it is."""

  def __init__(self, folder: pathlib.Path, config: str, steps: int, jobs: int, *, search: bool = True):
    self.folder, self.config, self.steps, self.search = folder, config, steps, search
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    self._cores: queue.Queue[list[int]] = queue.Queue()
    for job in range(jobs):
      self._cores.put(cores[job::jobs])
    self._pool = concurrent.futures.ThreadPoolExecutor(jobs)

  def map(self, function, items: Sequence[tuple]) -> list[Any]:
    return list(self._pool.map(lambda item: function(*item), items))

  def tune(self, setting: str, rates: Sequence[float]) -> dict[float, float]:
    """Validation perplexity by rate, the best one with a worse one on either side where that can be had."""
    found = {rate: self._perplexity(setting, rate) for rate in rates}
    for _ in range(MAX_EXTENSIONS if self.search else 0):
      best = _best(found)
      if best == min(found):
        extra = best / 2
      elif best == max(found):
        extra = best * 2
      else:
        break
      found[extra] = self._perplexity(setting, extra)
    if _best(found) in (min(found), max(found)):
      logging.warning("%s: the best rate, %g, is the last that was tried on its side", setting, _best(found))
    return found

  def _perplexity(self, setting: str, rate: float) -> float:
    perplexity = self.train(setting, rate, 0)["perplexity"]
    return math.inf if perplexity is None else perplexity

  def train(self, setting: str, rate: float, seed: int) -> dict[str, Any]:
    """The validation record of a run, trained where it isn't yet."""
    workdir = self._workdir(setting, rate, seed)
    # A file of its own: evaluation.json is that of whichever program ran last.
    path = workdir / "validation.json"
    if path.exists():
      return json.loads(path.read_text())
    record = self._program(
      "train",
      f"--config={self.config}:{setting}",
      f"--workdir={workdir}",
      f"--config.optimizer.learning_rate={rate:g}",
      f"--config.train.seed={seed}",
      f"--config.data.seed={seed}",
      f"--config.train.steps={self.steps}",
      "--config.train.eval_every=0",
    )
    write_whole(path, jsonl.dumps(record, indent=2) + "\n")
    return record

  def test(self, setting: str, rate: float, seed: int) -> dict[str, Any]:
    """The test record of a run that was trained."""
    workdir = self._workdir(setting, rate, seed)
    path = workdir / "test.json"
    if path.exists():
      return json.loads(path.read_text())
    record = self._program("evaluate", f"--workdir={workdir}", "--split=test")
    write_whole(path, jsonl.dumps(record, indent=2) + "\n")
    return record

  def report(self, setting: str, rate: float, seed: int) -> None:
    """A run's own report, where it has none yet."""
    workdir = self._workdir(setting, rate, seed)
    if not (workdir / "report" / "index.html").exists():
      self._program("report", f"--workdir={workdir}")

  def report_all(self, runs: Sequence[tuple[str, float, int]]) -> str:
    """The path of the page that shows runs side by side, whose own reports are there."""
    folders = ",".join(str(self._workdir(*run)) for run in runs)
    return self._program("report", f"--compare={folders}", f"--output={self.folder / 'report'}")["report"]

  def _workdir(self, setting: str, rate: float, seed: int) -> pathlib.Path:
    return self.folder / setting / f"rate{rate:g}-seed{seed}"

  def _program(self, name: str, *options: str) -> dict[str, Any]:
    cores = self._cores.get()
    try:
      logging.info("%s %s", name, " ".join(options))
      command = [sys.executable, "-m", f"cyb_jax.{name}", *options]
      bind = (lambda: os.sched_setaffinity(0, cores)) if cores else None
      done = subprocess.run(command, capture_output=True, text=True, preexec_fn=bind)
    finally:
      self._cores.put(cores)
    said = done.stderr.strip().splitlines()[-1:]
    if name == "train" and done.returncode == 1 and "train.max_skipped" in "".join(said):
      logging.warning("%s", said[0])
      return {"perplexity": None}  # a rate at which it diverges
    if done.returncode:
      raise programs.Failed(f"{' '.join(command)} ended with {done.returncode}: {''.join(said)}", {"failed": options})
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  result = run(
    pathlib.Path(programs.required_flag("workdir", "name the study's folder")),
    args.config,
    list(args.settings),
    list(args.rates),
    seeds=args.seeds,
    steps=args.steps,
    jobs=args.jobs,
    report=args.report,
    search=args.search,
  )
  sys.stdout.write(_table(result["rows"]) + "\n")
  return result


def run(
  folder: pathlib.Path,
  config: str,
  chosen: list[str],
  given: list[str],
  *,
  seeds: int,
  steps: int,
  jobs: int,
  report: bool = True,
  search: bool = True,
) -> dict[str, Any]:
  """What comparison.json holds; `chosen`: settings, `given`: rates, the rest as the flags.

  Raises:
    InputError: a bad flag, or a folder that holds another study.
    Failed: a program has failed.
  """
  for name, value in (("seeds", seeds), ("steps", steps), ("jobs", jobs)):
    if value < 1:
      raise InputError(f"--{name}: {value} must be at least 1")
  try:
    rates = [float(rate) for rate in given]
  except ValueError:
    raise InputError(f"--rates: {','.join(given)!r} aren't all numbers") from None
  if not rates or not all(0 < rate < math.inf for rate in rates):
    raise InputError(f"--rates: {','.join(given)!r} must be positive numbers")
  if not chosen or len(set(chosen)) < len(chosen):
    raise InputError(f"--settings: {','.join(chosen)!r} must be settings of experiments/README.md, each once")
  for setting in chosen:
    settings.parse(setting, setting="", size="tiny", regime="1x1")
  if report and importlib.util.find_spec("matplotlib") is None:
    raise InputError("--report: needs matplotlib, which isn't installed; pip install 'cyb_jax[report]', or --noreport")
  _claim(folder, {"config": config, "steps": steps})
  study = Study(folder, config, steps, jobs, search=search)
  logging.info(
    "%d settings: the best of %d rates%s each, then %d seeds, then test%s",
    len(chosen), len(rates), f", and of up to {MAX_EXTENSIONS} beyond," * search, seeds, " and reports" * report,
  )  # fmt: skip
  found = dict(zip(chosen, study.map(study.tune, [(setting, rates) for setting in chosen])))
  best = {setting: _best(by_rate) for setting, by_rate in found.items()}
  for setting, rate in best.items():
    if found[setting][rate] == math.inf:
      raise InputError(f"--rates: {setting} diverges at {', '.join(f'{r:g}' for r in found[setting])}; give lower ones")
  runs = [(setting, best[setting], seed) for setting in chosen for seed in range(seeds)]
  study.map(study.train, runs)
  tested = dict(zip(runs, study.map(study.test, runs)))
  rows = [
    _row(setting, best[setting], [tested[setting, best[setting], seed] for seed in range(seeds)])
    | {"validation_by_rate": {f"{rate:g}": found[setting][rate] for rate in sorted(found[setting])}}
    for setting in chosen
  ]
  result = {"study": config, "steps": steps, "seeds": seeds, "rows": rows}
  write_whole(folder / "comparison.md", _table(rows))
  write_whole(folder / "comparison.json", jsonl.dumps(result, indent=2) + "\n")
  if report:
    study.map(study.report, runs)
    # With one run there is nothing to put side by side.
    result["report"] = study.report_all(runs) if len(runs) > 1 else None
    write_whole(folder / "comparison.json", jsonl.dumps(result, indent=2) + "\n")
  return result


def _best(perplexity_by_rate: dict[float, float]) -> float:
  """The rate of the lowest perplexity; of equals (that diverge, say) the lowest."""
  return min(perplexity_by_rate, key=lambda rate: (perplexity_by_rate[rate], rate))


def _claim(folder: pathlib.Path, study: dict[str, Any]) -> None:
  """Runs are found again by setting, rate and seed: whatever else they hang on is the folder's.

  Raises:
    InputError: the folder holds runs of another study.
  """
  path = folder / "study.json"
  if path.exists():
    for name, value in json.loads(path.read_text()).items():
      if study[name] != value:
        raise InputError(
          f"--{name}: {study[name]!r}, but {folder} holds a study with {value!r}; take another --workdir"
        )
  folder.mkdir(parents=True, exist_ok=True)
  write_whole(path, jsonl.dumps(study) + "\n")


def _row(setting: str, rate: float, records: list[dict[str, Any]]) -> dict[str, Any]:
  perplexities = [record["perplexity"] for record in records]
  pauses = [record["mean_pauses"] for record in records]
  first = records[0]
  return {
    "setting": setting,
    "learning_rate": rate,
    "perplexity": statistics.mean(perplexities),
    "perplexity_seeds": perplexities,
    "perplexity_deviation": statistics.stdev(perplexities) if len(perplexities) > 1 else None,
    "mean_pauses": statistics.mean(pauses),
    "latency": [statistics.mean(shares) for shares in zip(*(record["latency"] for record in records))],
    "slot_perplexity": [statistics.mean(slots) for slots in zip(*(record["slot_perplexity"] for record in records))],
    "train_tokens": first["train_tokens"],
    "train_slots": first["train_slots"],
    "train_flops": first["train_flops"],
  }


def _table(rows: list[dict[str, Any]]) -> str:
  lines = [
    "| setting | rate | test perplexity | by slot | mean pauses | mean of s | train tokens | train TFLOPs |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    deviation = row["perplexity_deviation"]
    spread = f" +- {deviation:.1f}" if deviation is not None else ""
    slots = " ".join(f"{p:.1f}" for p in row["slot_perplexity"])
    latency = " ".join(f"{s:.3f}".lstrip("0") for s in row["latency"])
    lines.append(
      f"| `{row['setting']}` | {row['learning_rate']:g} | {row['perplexity']:.1f}{spread} | {slots} |"
      f" {row['mean_pauses']:.2f} | {latency} | {row['train_tokens']:,} | {row['train_flops'] / 1e12:.1f} |"
    )
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  define_flags()
  programs.launch(main)
