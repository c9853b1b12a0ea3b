"""Methods side by side under one budget, or several: equal tokens, equal training FLOPs, equal inference FLOPs.

    python experiments/compare.py --workdir=runs/compare --jobs=2
    python experiments/compare.py --workdir=runs/compare --settings=baseline,ap,deeper@ap --rates=2e-3,4e-3 --seeds=5
    python experiments/compare.py --workdir=runs/compare --equal=tokens,training_flops,inference_flops
    python experiments/compare.py --workdir=runs/smoke --smoke --jobs=2    every method once, to see the machinery run

Trains every setting at every rate with seed 0, and, while the best one is the lowest or the highest, at half or twice
that; takes the rate with the lowest validation perplexity, trains it with the other seeds (a seed is an initialisation
and an order of the data), evaluates these runs on the test split, reads those that decide when they stop at their own
pace too, gives each run its report (cyb-report, of the validation split) and all of them one side by side.

--equal: `tokens`, the same steps for all; `training_flops`, as many steps as cost what --steps of --reference do, the
schedule with them; `inference_flops`, beside every setting that costs more than a plain model at inference, plain
models as deep or as wide as costs the same (deeper@SETTING, wider@SETTING; one pair for settings that agree within 2%),
at equal tokens. Matching is to all slots that the setting has, and where it has no cache to a whole window read at
once; how far off that is from what its inference was seen to take is `matched.mismatch_measured`. Runs that two
budgets have in common are run once.

What comes out is printed, a table and on the last line JSON, and lies in WORKDIR: comparison.json, comparison.md,
index.html with plots of perplexity against FLOPs of training and of inference (pareto_*.png), report/index.html. A
study that was interrupted, or in which a run has failed, goes on: run the same command again.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags, logging

from cyb_jax import command_line, jsonl
from cyb_jax.cli import flag_values, launching
from cyb_jax.errors import Failed, InputError, Interrupted
from cyb_jax.storage import atomic_write
from cyb_jax.studies import settings

# Beyond the rates that are given, in factors of two.
MAX_EXTENSIONS = 4
BUDGETS = ("tokens", "training_flops", "inference_flops")
# Costs that agree within so much are one cost, and what they are compared with is one model.
_ALIKE = 0.02
# Flags of --smoke, each of which may be given another value.
SMOKE: dict[str, Any] = {
  "size": "nano",
  "fields": [
    "data.tokenizer=sentencepiece:1024",
    "train.last_eval_limit=256",
    "train.tensorboard=False",
    *(f"decoder.{name}={value}" for name, value in settings.PONDER_DECODER.items()),
  ],
  "equal": list(BUDGETS),
  "rates": ["4e-3"],
  "search": False,
  "seeds": 2,
  "steps": 150,
  "test": False,
  "report": False,
  "self_paced": 64,
}
_SMOKE_NOTE = (
  "A smoke study: it shows that all methods run, are counted and come out side by side. After so few tokens, at one"
  " rate for all, the perplexities say nothing about the methods."
)

_MATCHED_NOTE = (
  "Matched to: what a deeper or wider plain model costs as much as, and by how much it costs more or less. Matching is"
  " to all slots that a setting has; measured: against what its inference was seen to take."
)


def define_flags() -> None:
  flags.DEFINE_string("workdir", None, "The study's folder; each run has its own in it.")
  flags.DEFINE_string("config", "experiments/quickstart.py", "The experiment that settings are arguments of.")
  flags.DEFINE_list("settings", [], "Settings of experiments/README.md, deeper@SETTING too; none: one of each method.")
  flags.DEFINE_string("size", "", "A decoder preset, the experiment's second argument; '': its own.")
  flags.DEFINE_list("fields", [], "Fields of every run's config, such as data.sequence_length=128.")
  flags.DEFINE_list("equal", ["tokens"], f"What the runs have alike, some of {', '.join(BUDGETS)}.")
  flags.DEFINE_string("reference", settings.PLAIN, "The setting whose --steps are the budget of training FLOPs.")
  flags.DEFINE_list("rates", "1e-3,2e-3", "Learning rates that each setting's search for its best one starts with.")
  flags.DEFINE_bool("search", True, "Whether rates beyond the given ones are tried while the best one is at their end.")
  flags.DEFINE_integer("seeds", 3, "Seeds.")
  flags.DEFINE_integer("steps", 400, "Steps of the reference: where tokens are equal, of every run.")
  flags.DEFINE_bool("test", True, "Whether the test split is read in the end; else validation is what is compared.")
  flags.DEFINE_integer("self_paced", 256, "Windows that models which decide also read at their own pace; 0: none.")
  flags.DEFINE_bool("report", True, "Whether reports are written, of the validation split.")
  flags.DEFINE_integer("jobs", 1, "Runs at a time; each is bound to its share of the CPU's cores.")
  flags.DEFINE_bool(
    "smoke", False, f"A study of minutes: {', '.join(f'--{name}={value}' for name, value in SMOKE.items())}, where they"
    " aren't given. It shows the machinery, not the science."
  )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Model:
  """What a setting is under the study's config.

  Attributes:
    method: its name.
    step_flops: of a training step.
    inference_flops: of a token, all slots run; where there is no cache, in a window that is read at once.
    paced: whether it decides itself how long it takes over a token.
    identity: of the config as it is trained; settings that have it in common are the same runs.
    costs: of its rows; `evaluation.report.trade_off.Costs`.
    start: how its decoder starts, and whether its head is tied, which at few tokens may matter more than the method.
  """

  method: str
  step_flops: float
  inference_flops: float
  paced: bool = False
  identity: str = ""
  costs: Any = None
  start: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Entry:
  """A row of the comparison: a setting for so many steps, run with every seed.

  Attributes:
    setting: that it is trained with.
    steps: of training.
    equal: the budgets that ask for it: of inference FLOPs, where it belongs to a pair that is matched.
    also: further settings that are the same under this config.
  """

  setting: str
  steps: int
  equal: tuple[str, ...]
  also: tuple[str, ...] = ()


def partners(chosen: Sequence[str], models: Mapping[str, Model]) -> dict[str, list[str]]:
  """The settings that cost more than a plain model at inference, by the first of those that cost about the same."""
  plain = models[settings.PLAIN]
  found: dict[str, list[str]] = {}
  for setting in chosen:
    cost = models[setting].inference_flops
    if models[setting].method == plain.method or cost <= (1 + _ALIKE) * plain.inference_flops:
      continue
    first = next((f for f in found if abs(cost / models[f].inference_flops - 1) <= _ALIKE), setting)
    found.setdefault(first, []).append(setting)
  return found


def plan(
  chosen: Sequence[str], equal: Sequence[str], steps: int, reference: str, models: Mapping[str, Model]
) -> list[Entry]:
  """The rows of a comparison, each once, in the order of the budgets.

  Args:
    chosen: settings.
    equal: some of BUDGETS.
    steps: of the reference.
    reference: a setting.
    models: by setting; of the partners' deeper and wider ones too, where inference FLOPs are to be equal.

  Raises:
    InputError: a budget that doesn't suffice for a step.
  """
  matched = partners(chosen, models) if "inference_flops" in equal else {}
  belong = {setting for settings_alike in matched.values() for setting in settings_alike}
  asked: list[tuple[str, int, str]] = []
  for budget in equal:
    if budget != "training_flops":
      # A setting that nothing is matched to is run all the same, at equal tokens.
      within = belong if budget == "inference_flops" else chosen
      asked += [(setting, steps, budget if setting in within else "tokens") for setting in chosen]
    else:
      total = steps * models[reference].step_flops
      # The quotient of equal numbers may come out just below a whole one.
      counts = {setting: math.floor(total / models[setting].step_flops + 1e-9) for setting in chosen}
      for setting, count in counts.items():
        if count < 1:
          needed = math.ceil(models[setting].step_flops / models[reference].step_flops - 1e-9)
          raise InputError(
            f"--steps: {steps} of {reference!r} are {total:.3g} training FLOPs, a budget too small for one step of"
            f" {setting!r}, which takes {models[setting].step_flops:.3g}; give at least {needed}"
          )
      asked += [(setting, count, budget) for setting, count in counts.items()]
    if budget == "inference_flops":
      asked += [(f"{how}@{first}", steps, budget) for first in matched for how in settings.DIRECTIONS]
  rows: dict[tuple[str, int], Entry] = {}
  for setting, count, budget in asked:
    place = models[setting].identity or setting, count
    row = rows.get(place) or Entry(setting, count, ())
    also = (*row.also, setting) if setting not in (row.setting, *row.also) else row.also
    rows[place] = Entry(row.setting, count, tuple(dict.fromkeys((*row.equal, budget))), also)
  return list(rows.values())


class Study:
  """The runs of a comparison, each in a folder named by what it is."""

  def __init__(
    self,
    folder: pathlib.Path,
    config: str,
    steps: int,
    jobs: int,
    *,
    search: bool = True,
    size: str = "",
    fields: Sequence[str] = (),
  ):
    self.folder, self.config, self.steps, self.search = folder, config, steps, search
    self.size, self.fields = size, list(fields)
    self.failures: list[str] = []
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    self._cores: queue.Queue[list[int]] = queue.Queue()
    for job in range(jobs):
      self._cores.put(cores[job::jobs])
    self._pool = concurrent.futures.ThreadPoolExecutor(jobs)
    # Runs that differ in their seeds are one program, compiled once.
    self._environment = {"JAX_COMPILATION_CACHE_DIR": str((folder / ".compiled").absolute())} | os.environ

  def map(self, function: Callable[..., Any], items: Sequence[tuple]) -> list[Any]:
    """What the function gives for each of the items; None where a program has failed, which is noted."""
    futures = [self._pool.submit(function, *item) for item in items]
    results = []
    try:
      for future in futures:
        try:
          results.append(future.result())
        except Failed as error:
          logging.warning("%s", error)
          self.failures.append(str(error))
          results.append(None)
    except BaseException:
      # What runs gets a terminal's interrupt too, and saves.
      self._pool.shutdown(cancel_futures=True)
      raise
    return results

  def tune(self, entry: Entry, rates: Sequence[float]) -> dict[float, float]:
    """Validation perplexity by rate, the best one with a worse one on either side where that can be had.

    Raises:
      Failed: it diverges at all of them.
    """
    found = {rate: self._perplexity(entry, rate) for rate in rates}
    for _ in range(MAX_EXTENSIONS if self.search else 0):
      best = _best(found)
      if best == min(found):
        extra = best / 2
      elif best == max(found):
        extra = best * 2
      else:
        break
      found[extra] = self._perplexity(entry, extra)
    if found[_best(found)] == math.inf:
      tried = ", ".join(f"{rate:g}" for rate in found)
      raise Failed(f"--rates: {self.label(entry)} diverges at {tried}; give lower ones", {})
    if self.search and _best(found) in (min(found), max(found)):
      logging.warning("%s: the best rate, %g, is the last that was tried on its side", self.label(entry), _best(found))
    return found

  def _perplexity(self, entry: Entry, rate: float) -> float:
    from cyb_jax.report import trade_off

    return trade_off.compared_perplexity(self.train(entry, rate, 0))

  def train(self, entry: Entry, rate: float, seed: int) -> dict[str, Any]:
    """The validation record of a run, trained where it isn't yet; its perplexity is None where it diverges."""
    workdir = self._workdir(entry, rate, seed)
    start = time.monotonic()

    def train() -> dict[str, Any]:
      record = self._program(
        "train",
        f"--config={self.config}:{self.argument(entry.setting)}",
        f"--workdir={workdir}",
        *(f"--config.{field}" for field in self.fields),
        f"--config.optimizer.learning_rate={rate:g}",
        f"--config.train.seed={seed}",
        f"--config.data.seed={seed}",
        f"--config.train.steps={entry.steps}",
        "--config.train.eval_every=0",
      )
      seconds = time.monotonic() - start
      told = self.label(entry), rate, seed, record["perplexity"], seconds
      logging.info("%s, rate %g, seed %d: perplexity %s, %.0f s", *told)
      return record

    # A file of its own: evaluation.json is that of whichever program ran last.
    return _kept(workdir / "validation.json", train)

  def evaluate(self, entry: Entry, rate: float, seed: int, split: str, windows: int | None) -> dict[str, Any]:
    """A record of a run that was trained; of so many windows in a self-paced context, or (None) of the split whole."""
    workdir = self._workdir(entry, rate, seed)
    options = [f"--workdir={workdir}", f"--split={split}"]
    if windows is None:
      return _kept(workdir / f"{split}.json", lambda: self._program("evaluate", *options))
    options += ["--context=self_paced", f"--limit={windows}"]
    return _kept(workdir / f"self_paced-{split}-{windows}.json", lambda: self._program("evaluate", *options))

  def finish(self, entry: Entry, rate: float, seed: int, test: bool, paced: int) -> tuple[dict[str, Any], Any]:
    """(the record that is compared, that of a self-paced context or None) of a run, trained where it isn't yet; of one
    that diverges (None, None).

    Raises:
      Failed: a program has failed.
    """
    from cyb_jax.report import trade_off

    record = self.train(entry, rate, seed)
    split = "test" if test else "validation"
    if test and record["perplexity"] is not None:
      record = self.evaluate(entry, rate, seed, split, None)
    if trade_off.compared_perplexity(record) == math.inf:
      logging.warning("%s diverges at rate %g with seed %d: the row is of the others", self.label(entry), rate, seed)
      return None, None
    return record, self.evaluate(entry, rate, seed, split, paced) if paced else None

  def report(self, entry: Entry, rate: float, seed: int) -> None:
    """A run's own report, where it has none yet."""
    workdir = self._workdir(entry, rate, seed)
    if not (workdir / "report" / "index.html").exists():
      self._program("report", f"--workdir={workdir}")

  def report_all(self, runs: Sequence[tuple[Entry, float, int]]) -> str:
    """The path of the page that shows runs side by side, whose own reports are there."""
    folders = ",".join(str(self._workdir(*run)) for run in runs)
    return self._program("report", f"--compare={folders}", f"--output={self.folder / 'report'}")["report"]

  def argument(self, setting: str) -> str:
    return f"{setting},{self.size}" if self.size else setting

  def label(self, entry: Entry) -> str:
    return entry.setting if entry.steps == self.steps else f"{entry.setting}, {entry.steps:,} steps"

  def _workdir(self, entry: Entry, rate: float, seed: int) -> pathlib.Path:
    steps = "" if entry.steps == self.steps else f"steps{entry.steps}-"
    return self.folder / entry.setting.replace("/", "-") / f"{steps}rate{rate:g}-seed{seed}"

  def _program(self, name: str, *options: str) -> dict[str, Any]:
    cores = self._cores.get()
    try:
      logging.info("%s %s", name, " ".join(options))
      program = ["-m", f"cyb_jax.cli.{name}", *options]
      command = [sys.executable, "-c", _BEGIN, ",".join(map(str, cores)), *program]
      done = subprocess.run(command, capture_output=True, text=True, env=self._environment)
    finally:
      self._cores.put(cores)
    said = done.stderr.strip().splitlines()[-1:]
    if name == "train" and done.returncode == 1 and "train.max_skipped" in "".join(said):
      logging.warning("%s", said[0])
      return {"perplexity": None}  # a rate at which it diverges
    if done.returncode:
      raise Failed(f"python {' '.join(program)} ended with {done.returncode}: {''.join(said)}", {})
    return json.loads(done.stdout.strip().splitlines()[-1])


# Of a run's process, before it becomes the program: its cores; and where the study is killed it ends too, or it would
# hold its folder. Not between fork and exec, since the study itself has threads of jax.
_BEGIN = """
import ctypes, os, signal, sys
if sys.argv[1]:
  os.sched_setaffinity(0, map(int, sys.argv[1].split(",")))
if sys.platform == "linux":
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def _kept(path: pathlib.Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
  """What a file holds, made and written where it isn't there."""
  if path.exists():
    return json.loads(path.read_text())
  record = make()
  atomic_write(path, jsonl.dumps(record, indent=2) + "\n")
  return record


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  value = {name: args[name].value for name in args}
  if args.smoke:
    value |= {name: chosen for name, chosen in SMOKE.items() if not args[name].present}
  try:
    result = run(
      pathlib.Path(flag_values.required_flag("workdir", "name the study's folder")),
      args.config,
      list(args.settings) or settings.representatives(),
      list(value["rates"]),
      note=_SMOKE_NOTE if args.smoke else None,
      **{
        name: value[name]
        for name in (
          "seeds", "steps", "jobs", "report", "search", "equal", "reference", "size", "fields", "test", "self_paced",
        )
      },
    )  # fmt: skip
  except KeyboardInterrupt:
    raise Interrupted("interrupted; the same command goes on") from None
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
  equal: Sequence[str] = ("tokens",),
  reference: str = settings.PLAIN,
  size: str = "",
  fields: Sequence[str] = (),
  test: bool = True,
  self_paced: int = 0,
  note: str | None = None,
) -> dict[str, Any]:
  """What comparison.json holds; `chosen`: settings, `given`: rates, `note`: a sentence about it, the rest as the flags.

  Raises:
    InputError: a bad flag, or a folder that holds another study; nothing was run.
    Failed: a program has failed, or a row diverges with all seeds; its result is that of the others, whose rows were
      written.
  """
  rates = _check(chosen, given, seeds=seeds, steps=steps, jobs=jobs, equal=equal, self_paced=self_paced)
  for setting in (*chosen, reference):
    settings.check(setting)
  # That it can't be drawn is to be told now.
  from cyb_jax.report import side_by_side  # noqa: F401

  study = Study(folder, config, steps, jobs, search=search, size=size, fields=fields)
  models = {setting: _model(study, setting) for setting in dict.fromkeys((*chosen, reference, settings.PLAIN))}
  shared = partners(chosen, models) if "inference_flops" in equal else {}
  models |= {
    name: _model(study, name) for first in shared for name in (f"{how}@{first}" for how in settings.DIRECTIONS)
  }
  entries = plan(chosen, equal, steps, reference, models)
  uneven = _uneven(models, reference)
  if uneven:
    logging.warning("%s", uneven)
  note = " ".join(filter(None, (note, uneven))) or None
  _claim(folder, {"config": config, "steps": steps, "size": size, "fields": list(fields)})
  logging.info(
    "%d rows: the best of %d rates%s each, then %d seeds%s%s: %s",
    len(entries), len(rates), f", and of up to {MAX_EXTENSIONS} beyond," * search, seeds, ", then test" * test,
    " and reports" * report, "; ".join(study.label(entry) for entry in entries),
  )  # fmt: skip
  found = dict(zip(entries, study.map(study.tune, [(entry, rates) for entry in entries])))
  best = {entry: _best(by_rate) for entry, by_rate in found.items() if by_rate}
  runs = [(entry, rate, seed) for entry, rate in best.items() for seed in range(seeds)]
  paced = {entry: self_paced if models[entry.setting].paced else 0 for entry in entries}
  read = dict(zip(runs, study.map(study.finish, [(*run, test, paced[run[0]]) for run in runs])))
  done = [entry for entry in best if all(read[entry, best[entry], seed] for seed in range(seeds))]
  runs = [run for run in runs if run[0] in done and read[run][0] is not None]
  for entry in [entry for entry in done if entry not in {run[0] for run in runs}]:
    study.failures.append(f"{study.label(entry)} diverges at rate {best[entry]:g} with all seeds; give lower --rates")
    done.remove(entry)
  result = {"study": config, "size": size or None, "fields": list(fields), "equal": list(equal), "reference": reference}
  result |= {"steps": steps, "seeds": seeds, "split": "test" if test else "validation", "note": note}
  if done:
    pairs = {entry: [read[run] for run in runs if run[0] == entry] for entry in done}
    result["rows"] = _write(study, result, pairs, models, shared, best, found)
    if report:
      study.map(study.report, runs)
      # With one run there is nothing to put side by side.
      page = study.map(lambda: study.report_all(runs), [()])[0] if len(runs) > 1 and not study.failures else None
      result["report"] = page
      atomic_write(folder / "comparison.json", jsonl.dumps(result, indent=2) + "\n")
  if study.failures:
    raise Failed(
      f"{len(study.failures)} of the study's programs failed, the first: {study.failures[0]}. The rows of the others"
      " are written, and the same command goes on with what is left",
      result | {"failed": study.failures},
    )
  return result


def _check(
  chosen: list[str], given: list[str], *, seeds: int, steps: int, jobs: int, equal: Sequence[str], self_paced: int
) -> list[float]:
  """The rates.

  Raises:
    InputError: a bad flag.
  """
  for name, value in (("seeds", seeds), ("steps", steps), ("jobs", jobs)):
    if value < 1:
      raise InputError(f"--{name}: {value} must be at least 1")
  if self_paced < 0:
    raise InputError(f"--self_paced: {self_paced} is negative; 0 reads nothing at a model's own pace")
  try:
    rates = [float(rate) for rate in given]
  except ValueError:
    raise InputError(f"--rates: {','.join(given)!r} aren't all numbers") from None
  if not rates or not all(0 < rate < math.inf for rate in rates):
    raise InputError(f"--rates: {','.join(given)!r} must be positive numbers")
  if not chosen or len(set(chosen)) < len(chosen):
    raise InputError(f"--settings: {','.join(chosen)!r} must be settings of experiments/README.md, each once")
  if not equal or len(set(equal)) < len(equal) or not set(equal) <= set(BUDGETS):
    raise InputError(f"--equal: {','.join(equal)!r} must be some of {', '.join(BUDGETS)}, each once")
  return rates


def _model(study: Study, setting: str) -> Model:
  """A setting under the study's config.

  Raises:
    InputError: there is no such config, or it refuses the setting.
  """
  from cyb_jax import configs
  from cyb_jax.report.trade_off import Costs
  from cyb_jax.studies import matching
  from cyb_jax.studies.resolution import resolve

  path = pathlib.Path(study.config)
  if not path.exists():  # the programs find it there too
    path = pathlib.Path(__file__).parent / path.name
  if not path.is_file():
    raise InputError(f"--config: {study.config} is not there; experiments/README.md lists the configs")
  spec = importlib.util.spec_from_file_location(f"_study_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  source = command_line.override(module.get_config(study.argument(setting)), study.fields)
  config = resolve(source)
  rows = matching.vocabulary(config)
  method, costs = config.build_method(rows), Costs.of(config, rows)
  return Model(
    method=config.method.name,
    step_flops=config.data.batch_size * config.data.sequence_length * costs.train,
    inference_flops=costs.inference,
    paced=method.decides and method.decodes and method.num_slots > 1,
    identity=configs.to_json(config),
    costs=costs,
    start=tuple(getattr(method.decoder.config, name) for name in settings.PONDER_DECODER),
  )


def _uneven(models: Mapping[str, Model], reference: str) -> str | None:
  """A sentence on settings whose decoder starts otherwise than the reference's; None where there is none."""
  others = [name for name, model in models.items() if model.start != models[reference].start]
  if not others:
    return None
  fields = ",".join(f"decoder.{name}={value}" for name, value in settings.PONDER_DECODER.items())
  return (
    f"{', '.join(others)}: the decoder starts otherwise than that of {reference}, which alone changes perplexity; with"
    f" --fields={fields} all start as PonderLM-2's does."
  )


def _best(perplexity_by_rate: dict[float, float]) -> float:
  """The rate of the lowest perplexity; of equals (that diverge, say) the lowest."""
  return min(perplexity_by_rate, key=lambda rate: (perplexity_by_rate[rate], rate))


def _claim(folder: pathlib.Path, study: dict[str, Any]) -> None:
  """Runs are found again by setting, steps, rate and seed: whatever else they hang on is the folder's.

  Raises:
    InputError: the folder holds runs of another study.
  """
  path = folder / "study.json"
  if path.exists():
    # An older version had neither sizes nor fields.
    for name, value in ({"size": "", "fields": []} | json.loads(path.read_text())).items():
      if study[name] != value:
        raise InputError(
          f"--{name}: {study[name]!r}, but {folder} holds a study with {value!r}; take another --workdir"
        )
  folder.mkdir(parents=True, exist_ok=True)
  atomic_write(path, jsonl.dumps(study) + "\n")


def _write(
  study: Study,
  result: dict[str, Any],
  pairs: Mapping[Entry, Sequence[tuple[dict[str, Any], Any]]],
  models: Mapping[str, Model],
  shared: Mapping[str, Sequence[str]],
  best: Mapping[Entry, float],
  found: Mapping[Entry, Mapping[float, float]],
) -> list[dict[str, Any]]:
  """The rows of comparison.json, written with the table and the plots; `pairs`: by row and seed, see `Study.finish`."""
  from cyb_jax.report import page, side_by_side, trade_off

  outcomes = [
    trade_off.Outcome.of(
      study.label(entry),
      [record | {"method": models[entry.setting].method} for record, _ in of_seeds],
      models[entry.setting].costs,
      [paced for _, paced in of_seeds if paced],
    )
    for entry, of_seeds in pairs.items()
  ]
  rows = []
  costs = {
    (setting, entry.steps): outcome.inference_flops
    if outcome.blockwise_inference_flops is None
    else outcome.blockwise_inference_flops
    for entry, outcome in zip(pairs, outcomes)
    for setting in (entry.setting, *entry.also)
  }
  for (entry, of_seeds), described in zip(pairs.items(), trade_off.describe(outcomes)):
    by_rate = found[entry]
    rows.append(
      {"setting": entry.setting, "also": list(entry.also), "equal": list(entry.equal), "steps": entry.steps}
      | {"seeds": len(of_seeds), "diverged": result["seeds"] - len(of_seeds), "learning_rate": best[entry]}
      | described
      | _means([record for record, _ in of_seeds])
      | {"matched": _matched(entry, models, shared, costs)}
      | {"validation_by_rate": {f"{rate:g}": by_rate[rate] for rate in sorted(by_rate)}}
    )
  beside = {
    "equal": [", ".join(budget.replace("_flops", " FLOPs") for budget in row["equal"]) for row in rows],
    "rate": [f"{row['learning_rate']:g}" for row in rows],
    "also": [", ".join(row["also"]) for row in rows],
    "matched to": [_told_match(row["matched"]) for row in rows],
    "diverged": [f"{row['diverged']} of {result['seeds']} seeds" if row["diverged"] else "" for row in rows],
  }
  # What no row has needs no column.
  beside = {name: column for name, column in beside.items() if any(column)}
  table = trade_off.markdown(*trade_off.table(outcomes, beside))
  notes = [note for note in (result["note"], trade_off.NOTE) if note]
  if any(outcome.blockwise for outcome in outcomes):
    notes.append(trade_off.BLOCKWISE)
  if any(row["matched"] for row in rows):
    notes.append(_MATCHED_NOTE)
  slots = _slots_table(study, pairs, rows)
  text = "\n".join([f"Read on the {result['split']} split.", "", table, *(f"{note}\n" for note in notes), slots])
  section = side_by_side.trade_offs(outcomes, beside)
  if any(row["matched"] for row in rows):
    section = dataclasses.replace(section, body=section.body + page.paragraph(_MATCHED_NOTE, "note"))
  header = page.paragraph(result["note"] or "") * bool(result["note"])
  header += page.paragraph(
    f"{study.config}, {result['seeds']} seeds, read on the {result['split']} split. Equal: {', '.join(result['equal'])}"
    f" (the budget: {study.steps:,} steps of {result['reference']})."
  )
  atomic_write(study.folder / "index.html", page.document("Methods side by side", header, [section]))
  for picture in section.pictures:
    atomic_write(study.folder / f"{picture.name}.png", picture.png)
  atomic_write(study.folder / "comparison.md", text)
  atomic_write(study.folder / "comparison.json", jsonl.dumps(result | {"rows": rows}, indent=2) + "\n")
  sys.stdout.write(text + "\n")
  return rows


def _matched(
  entry: Entry,
  models: Mapping[str, Model],
  shared: Mapping[str, Sequence[str]],
  costs: Mapping[tuple[str, int], float],
) -> dict[str, Any] | None:
  """What a grown plain model is matched to, and how far off it is.

  Args:
    entry: a row.
    models, shared: see `_write`.
    costs: inference FLOPs a token of the rows as they were measured, by setting and steps; where there is no cache, of
      a window that is read at once.

  Returns:
    None where it is no such model. `mismatch`: of what is counted with all slots, which is what is matched;
    `mismatch_measured`: of what inference of that setting was seen to take in its row. None: not known.
  """
  match = settings.parse_match(entry.setting)
  if match is None:
    return None
  off = measured = None
  if match.setting in models:
    name = "inference_flops" if match.measure == "inference" else "step_flops"
    off = getattr(models[entry.setting], name) / getattr(models[match.setting], name) - 1
  seen = costs.get((match.setting, entry.steps))
  if match.measure == "inference" and seen is not None:
    measured = costs[entry.setting, entry.steps] / seen - 1
  others = shared.get(match.setting, [match.setting]) if match.measure == "inference" else [match.setting]
  return {"settings": list(others), "measure": match.measure, "mismatch": off, "mismatch_measured": measured}


def _told_match(found: Mapping[str, Any] | None) -> str:
  """Such as 'ap, va_uniform (+0.4%, measured +12.0%)'."""
  if found is None:
    return ""
  off, measured = found["mismatch"], found["mismatch_measured"]
  told = [f"{off:+.1%}"] if off is not None else []
  # Where all slots are run it is the same once more.
  if measured is not None and (off is None or abs(measured - off) > 1e-6):
    told.append(f"measured {measured:+.1%}")
  return ", ".join(found["settings"]) + (f" ({', '.join(told)})" if told else "")


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What else of the evaluations a row holds, the mean over seeds."""

  def by_slot(name: str) -> list[float] | None:
    found = [record.get(name) for record in records]
    return None if None in found else [statistics.mean(values) for values in zip(*found)]

  first = records[0]
  return {
    "latency": by_slot("latency"),
    "slot_perplexity": by_slot("slot_perplexity"),
    "train_tokens": first["train_tokens"],
    "train_slots": first["train_slots"],
    "train_flops": first["train_flops"],
  }


def _slots_table(study: Study, entries: Mapping[Entry, Any], rows: Sequence[dict[str, Any]]) -> str:
  """Of methods whose slots can be read: each alone, and how often it is."""
  from cyb_jax.report import trade_off

  lines = []
  for entry, row in zip(entries, rows):
    if len(row["latency"] or []) > 1:
      slots = " ".join(f"{p:.1f}" for p in row["slot_perplexity"] or [])
      latency = " ".join(f"{s:.3f}".lstrip("0") for s in row["latency"])
      lines.append((study.label(entry), slots, latency))
  header = ("runs", "perplexity by slot", "mean of s")
  return trade_off.markdown(header, lines) if lines else ""


if __name__ == "__main__":
  define_flags()
  launching.launch(main)
