"""Compares methods under one budget, or several: equal tokens, equal training FLOPs, equal inference FLOPs. Or runs a
planned study.

    cyb-study --workdir=runs/compare --jobs=2
    cyb-study --workdir=runs/compare --settings=baseline,ap,deeper@ap --rates=2e-3,4e-3 --seeds=5
    cyb-study --workdir=runs/compare --equal=tokens,training_flops,inference_flops
    cyb-study --workdir=runs/smoke --smoke --jobs=2    every method once, to see the machinery run

It trains every setting at every rate with seed 0, and, while the best one is the lowest or the highest, at half or
twice that rate. It takes the rate with the lowest validation perplexity, trains it with the other seeds (a seed is an
initialisation and an order of the data), evaluates these runs on the test split, evaluates adaptive methods in a
self-paced context too, and writes a report of each run (cyb-report, of the validation split) and one of all runs.

--equal: `tokens`, the same number of steps for all; `training_flops`, as many steps as cost what --steps of --reference
do, with the schedule scaled to them; `inference_flops`, for every setting that costs more than a plain model at
inference, additional plain models that are deeper or wider and cost the same (deeper@SETTING, wider@SETTING; one pair
for settings that agree within 2%), at equal tokens. The match is to all slots of the setting, and for a method without
a cache to a whole window that is read at once; `matched.mismatch_measured` is how far off that is from the measured
cost of inference. Runs that two budgets have in common are run once.

The results are printed, a table and on the last line JSON, and written to WORKDIR: comparison.json, comparison.md,
index.html with plots of perplexity against FLOPs of training and of inference (pareto_*.png), report/index.html. The
same command continues a study that was interrupted or in which a run has failed.

    cyb-study --plan=scratch --jobs=2                  a planned study, or what is left of it (cyb_jax/studies/plans.py)
    cyb-study --plan=scratch --status                  what is done, running and missing, and about how long it takes
    cyb-study --plan=scratch --table                   its tables, as far as there are results

A plan fixes settings, fields, steps, seeds and rates. Each finished run is an entry of one JSON file, --results, and is
never run again: with this file a study goes on in any folder. Runs in progress are continued from --workdir.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from cyb_jax import command_line
from cyb_jax.cli import flag_values, launching, terminal
from cyb_jax.errors import InputError, Interrupted
from cyb_jax.studies import settings
from cyb_jax.studies.options import BUDGETS, Options

# The values of flags under --smoke, each of which may be given another value.
SMOKE: dict[str, Any] = {
  "size": "nano",
  "fields": [
    "data.tokenizer=sentencepiece:1024",
    "train.last_eval_limit=256",
    "train.trackers=",
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
_OPTIONS = (
  "config", "rates", "seeds", "steps", "jobs", "report", "search", "equal", "reference", "size", "fields", "test",
  "self_paced",
)  # fmt: skip
# Flags that go with --plan; it fixes all others.
_PLANNED = ("plan", "workdir", "jobs", "results", "status", "table")


def define_flags() -> None:
  command_line.define_path("workdir", None, "The study's folder; each run has its own in it.")
  flags.DEFINE_string("config", "experiments/quickstart.py", "The experiment that settings are arguments of.")
  flags.DEFINE_list("settings", [], "Settings of experiments/README.md, deeper@SETTING too; none: one of each method.")
  flags.DEFINE_string("size", "", "A decoder preset, the experiment's second argument; '': its own.")
  flags.DEFINE_list("fields", [], "Fields of every run's config, such as data.sequence_length=128.")
  flags.DEFINE_list("equal", ["tokens"], f"What the runs have alike, some of {', '.join(BUDGETS)}.")
  flags.DEFINE_string("reference", settings.PLAIN, "The setting whose --steps are the budget of training FLOPs.")
  flags.DEFINE_list("rates", "1e-3,2e-3", "Learning rates that each setting's search for its best one starts with.")
  flags.DEFINE_bool("search", True, "Whether rates beyond the given ones are tried while the best one is at their end.")
  flags.DEFINE_integer("seeds", 3, "The number of seeds that each setting is trained with.")
  flags.DEFINE_integer("steps", 400, "Steps of the reference: where tokens are equal, of every run.")
  flags.DEFINE_bool("test", True, "Whether the test split is read at the end; else validation is what is compared.")
  flags.DEFINE_integer("self_paced", 256, "Windows that adaptive models also read at their own pace; 0: none.")
  flags.DEFINE_bool("report", True, "Whether reports are written, of the validation split.")
  flags.DEFINE_integer("jobs", 1, "Runs at a time; each is bound to its share of the CPU's cores.")
  flags.DEFINE_string(
    "plan", "", "A planned study, scratch or finetune, which fixes all flags above but --workdir and --jobs."
  )
  command_line.define_path(
    "results", "", "With --plan, its results; '': experiments/results/PLAN.json of the checkout."
  )
  flags.DEFINE_bool("status", False, "With --plan: print what is done, running and missing, and run nothing.")
  flags.DEFINE_bool("table", False, "With --plan: print its tables as Markdown, and run nothing.")
  flags.DEFINE_bool(
    "smoke", False, f"A study of minutes: {', '.join(f'--{name}={value}' for name, value in SMOKE.items())}, where they"
    " aren't given. It shows the machinery, not the science."
  )  # fmt: skip


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  if args["plan"].present:
    return _planned(args.plan)
  for name in ("results", "status", "table"):
    if args[name].present:
      raise InputError(f"--{name}: goes with --plan; a study without a plan has its results in its --workdir")
  from cyb_jax.studies import study

  values = {name: args[name].value for name in _OPTIONS}
  if args.smoke:
    values |= {name: chosen for name, chosen in SMOKE.items() if not args[name].present}
  folder = pathlib.Path(flag_values.required_flag("workdir", "name the study's folder"))
  options = Options(
    settings=list(args.settings) or settings.representatives(), note=_SMOKE_NOTE if args.smoke else None, **values
  )
  try:
    return study.run(folder, options, show=terminal.show)
  except KeyboardInterrupt:
    raise Interrupted("interrupted; the same command goes on") from None


def _planned(name: str) -> dict[str, Any]:
  """Runs what is left of a planned study, or shows its state or its tables."""
  from cyb_jax.studies import planned, planned_status, planned_tables, plans
  from cyb_jax.studies.results_file import ResultsFile

  args = flags.FLAGS
  plan = plans.find(name)
  for flag in (*_OPTIONS, "settings", "smoke"):
    if args[flag].present and flag not in _PLANNED:
      raise InputError(f"--{flag}: the plan {name!r} fixes it; leave it out, or leave out --plan")
  if args.jobs < 1:
    raise InputError(f"--jobs: {args.jobs} must be at least 1")
  if args.status and args.table:
    raise InputError("--table: --status is given too; give one of them")
  folder = pathlib.Path(args.workdir or f"runs/study-{name}").absolute()
  path = pathlib.Path(args.results) if args.results else planned.default_results(plan, folder)
  results = ResultsFile(path, plan)
  if args.status:
    text, state = planned_status.status(plan, folder, results.runs, args.jobs)
    terminal.show(text)
    return state
  if args.table:
    numbers = planned_tables.table(plan, results.runs, results.documents)
    terminal.show(planned_tables.text(plan, numbers))
    return numbers
  try:
    return planned.run(plan, folder, results, args.jobs)
  except KeyboardInterrupt:
    raise Interrupted("interrupted; the same command goes on") from None


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main)


if __name__ == "__main__":
  run()
