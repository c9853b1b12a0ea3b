"""Compares methods under one or more budgets: equal tokens, equal training FLOPs, equal inference FLOPs. Or runs a
planned study.

    cyb-study --workdir=runs/compare --jobs=2
    cyb-study --workdir=runs/compare --settings=baseline,ap,deeper@ap --rates=2e-3,4e-3 --seeds=5
    cyb-study --workdir=runs/compare --equal=tokens,training_flops,inference_flops
    cyb-study --workdir=runs/smoke --smoke --jobs=2    every method once, as a test of the programs

The study trains every setting at every rate with seed 0. While the best rate is the lowest or the highest one, it also
trains at half or twice that rate. It selects the rate with the lowest validation perplexity, trains at this rate with
the other seeds (a seed determines the initialisation and the order of the data), and evaluates these runs on the test
split; adaptive methods are also evaluated in a self-paced context. It writes a report of each run (cyb-report, of the
validation split) and a report of all runs.

--equal: `tokens`: all runs have the same number of steps; `training_flops`: the number of steps of each run is such
that its training FLOPs equal those of --steps of --reference, and the schedule is scaled accordingly;
`inference_flops`: for every setting that costs more than a plain model at inference, deeper and wider plain models of
the same inference cost are also trained, at equal tokens (deeper@SETTING, wider@SETTING; one pair for settings that
agree within 2%). The cost that is matched is the cost of all slots of the setting, or, for a method without a cache, of
a window that is computed at once; `matched.mismatch_measured` is the difference from the measured inference cost. A run
that several budgets share is run once.

The results are printed as a table and, on the last line, as JSON. They are also written to WORKDIR: comparison.json,
comparison.md, index.html with plots of perplexity against FLOPs of training and of inference (pareto_*.png), and
report/index.html. The same command continues a study that was interrupted or in which a run has failed.

    cyb-study --plan=scratch --jobs=2                  runs or continues a planned study (cyb_jax/studies/plans.py)
    cyb-study --plan=scratch --status                  prints the finished, running and missing runs, and the time left
    cyb-study --plan=scratch --table                   prints the tables of the available results
    cyb-study --plan=gpu --costs                       prints the training FLOPs of the plan's runs
    cyb-study --plan=gpu --stores=DIR                  trains on token stores of a pack (experiments/gpu_pack.py)

A plan fixes settings, fields, steps, seeds and rates. Each finished run is an entry of one JSON file, --results, and is
never run again, so the study can be continued in any folder with this file. Runs in progress are continued from
--workdir.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from cyb_jax import command_line
from cyb_jax.cli import flag_values, launching, terminal
from cyb_jax.errors import InputError
from cyb_jax.studies import settings
from cyb_jax.studies.options import BUDGETS, Options

# The values of flags under --smoke; the command line overrides them.
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
  "A smoke study: it tests that all methods can be trained, evaluated and compared. After so few tokens and at a single"
  " learning rate, the perplexities allow no conclusions about the methods."
)
_OPTIONS = (
  "config", "rates", "seeds", "steps", "jobs", "report", "search", "equal", "reference", "size", "fields", "test",
  "self_paced",
)  # fmt: skip
# Flags that may be combined with --plan, which fixes all others.
_PLANNED_ONLY = ("results", "stores", "status", "table", "costs", "flops_per_second", "dry_run")
_PLANNED = ("plan", "workdir", "jobs", *_PLANNED_ONLY)

# What a signal means.
INTERRUPTED = "ended; the finished runs are kept, and the same command continues"


def define_flags() -> None:
  command_line.define_path("workdir", None, "The study's folder, which contains the folders of its runs.")
  flags.DEFINE_string("config", "experiments/quickstart.py", "The experiment, whose first argument is a setting.")
  flags.DEFINE_list("settings", [], "Settings, see cyb-train --list_settings; none: one of each method.")
  flags.DEFINE_string("size", "", "A decoder preset, the experiment's second argument; '': the experiment's default.")
  flags.DEFINE_list("fields", [], "Fields of every run's config, such as data.sequence_length=128.")
  flags.DEFINE_list("equal", ["tokens"], f"The budgets that are equal for all runs, some of {', '.join(BUDGETS)}.")
  flags.DEFINE_string("reference", settings.PLAIN, "The setting whose --steps define the budget of training FLOPs.")
  flags.DEFINE_list("rates", "1e-3,2e-3", "The learning rates with which each setting's search starts.")
  flags.DEFINE_bool("search", True, "Whether further rates are tried while the best one is the lowest or the highest.")
  flags.DEFINE_integer("seeds", 3, "The number of seeds with which each setting is trained.")
  flags.DEFINE_integer("steps", 400, "The number of steps of the reference; if tokens are equal, of every run.")
  flags.DEFINE_bool("test", True, "Whether the runs are compared on the test split; otherwise on the validation split.")
  flags.DEFINE_integer("self_paced", 256, "Windows on which adaptive models are evaluated self-paced; 0: none.")
  flags.DEFINE_bool("report", True, "Whether reports of the validation split are written.")
  flags.DEFINE_integer(
    "jobs", 1, "The number of concurrent runs, between which the CPU's cores and a GPU's memory are divided."
  )
  flags.DEFINE_string(
    "plan", "", "A planned study, scratch, finetune or gpu, which fixes all flags above except --workdir and --jobs."
  )
  command_line.define_path(
    "results", "", "With --plan, the file of its results; '': experiments/results/PLAN.json of the checkout."
  )
  command_line.define_path("stores", "", "With --plan=gpu, the folder of the token stores of a pack.")
  flags.DEFINE_bool("status", False, "With --plan: only print the finished, running and missing runs.")
  flags.DEFINE_bool("table", False, "With --plan: only print its tables as Markdown.")
  flags.DEFINE_bool("costs", False, "With --plan: only print the training FLOPs of its rows.")
  flags.DEFINE_float(
    "flops_per_second", 0.0, "With --costs: model FLOPs per second, for an estimate of the training time; 0: none."
  )
  flags.DEFINE_bool(
    "dry_run", False, "With --plan: a tiny model and two steps of training instead, as a test of programs and data."
  )
  flags.DEFINE_bool(
    "smoke", False, f"A study of minutes, with {', '.join(f'--{name}={value}' for name, value in SMOKE.items())} unless"
    " they are given. It tests the programs; its results allow no conclusions."
  )  # fmt: skip


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  if args["plan"].present:
    return _planned(args.plan)
  for name in _PLANNED_ONLY:
    if args[name].present:
      raise InputError(f"--{name}: it requires --plan; a study without a plan writes its results to --workdir")
  from cyb_jax.studies import study

  values = {name: args[name].value for name in _OPTIONS}
  if args.smoke:
    values |= {name: chosen for name, chosen in SMOKE.items() if not args[name].present}
  folder = pathlib.Path(flag_values.required_flag("workdir", "give the study's folder"))
  options = Options(
    settings=list(args.settings) or settings.representatives(), note=_SMOKE_NOTE if args.smoke else None, **values
  )
  return study.run(folder, options, show=terminal.show)


def _planned(name: str) -> dict[str, Any]:
  """Runs the missing runs of a planned study, or prints its state or its tables."""
  from cyb_jax.studies import planned, planned_costs, planned_status, planned_tables, plans
  from cyb_jax.studies.results_file import ResultsFile

  args = flags.FLAGS
  plan = plans.dry_run(plans.find(name)) if args.dry_run else plans.find(name)
  for flag in (*_OPTIONS, "settings", "smoke"):
    if args[flag].present and flag not in _PLANNED:
      raise InputError(f"--{flag}: the plan {name!r} fixes it; omit it, or omit --plan")
  if args.jobs < 1:
    raise InputError(f"--jobs: {args.jobs} must be at least 1")
  _check_printed()
  if args.costs:
    counted = planned_costs.costs(plan, args.flops_per_second or None)
    terminal.show(planned_costs.text(counted))
    return counted
  folder = pathlib.Path(args.workdir or f"runs/study-{plan.name}").absolute()
  default = folder / "results.json" if args.dry_run else planned.default_results(plan, folder)
  path = pathlib.Path(args.results) if args.results else default
  results = ResultsFile(path, plan)
  if args.status:
    text, state = planned_status.status(plan, folder, results.runs, args.jobs)
    terminal.show(text)
    return state
  if args.table:
    numbers = planned_tables.table(plan, results.runs, results.documents)
    terminal.show(planned_tables.text(plan, numbers))
    return numbers
  stores = planned.check_stores(plan, args.stores)
  return planned.run(plan, folder, results, args.jobs, stores)


def _check_printed() -> None:
  """Raises InputError if more than one of --status, --table and --costs is given, or a rate that is not used."""
  args = flags.FLAGS
  given = [name for name in ("status", "table", "costs") if args[name].value]
  if len(given) > 1:
    raise InputError(f"--{given[1]}: --{given[0]} is also given; give one of them")
  rate = args.flops_per_second
  if rate < 0:
    raise InputError(f"--flops_per_second: {rate:g} must not be negative")
  if rate and not args.costs:
    raise InputError(f"--flops_per_second: {rate:g} is only used by --costs; give both, or omit it")


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main, interrupted=INTERRUPTED)


if __name__ == "__main__":
  run()
