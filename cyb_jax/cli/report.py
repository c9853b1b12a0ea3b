"""Reports on a run, or compares several runs: writes an HTML file, its figures, and a JSON file of the numbers.

cyb-report --workdir=DIR [--split=test] [--checkpoint=best] [--limit=100] [--text] [--text_windows=3]
cyb-report --compare=DIR,DIR,... [--output=DIR] [--base=PATH or --base=PATH,,...]
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax import command_line, storage
from cyb_jax.cli import flag_values, launching, models, splits, terminal
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from cyb_jax.data import TokenStore
  from cyb_jax.methods import Method
  from cyb_jax.report.coloured import Window
  from cyb_jax.report.comparison import Candidate, Group
  from cyb_jax.runs import Run


# The keys of statistics.json. A file that lacks a key was written by another version.
_PARTS = {
  "num_slots", "tokens", "perplexity", "latency", "training_latency", "calibration", "curves", "self_paced", "types",
  "autoregressive", "word_position", "word_class", "frequency", "difficulty", "groups",
}  # fmt: skip


# Evaluating token by token takes longer than evaluating a window at once, so the number of windows is limited.
_SELF_PACED_WINDOWS = 256
_SELF_PACED_KEYS = ("perplexity", "constant_perplexity", "mean_pauses", "context_pauses", "tokens")


def define_flags() -> None:
  models.define_run_flags(several_bases=True)
  splits.define_reading_flags()
  command_line.define_paths("compare", None, "Instead of --workdir: the folders of runs to compare.")
  command_line.define_path("output", None, "The report's folder; not given: WORKDIR/report, or report with --compare.")
  flags.DEFINE_integer("text_windows", 3, "The number of text windows shown in colour, evenly spaced over the split.")
  flags.DEFINE_bool("text", False, "Also print the coloured text.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  flag_values.check_not_negative("limit", "batch_size", "text_windows")
  if args.compare and args.workdir:
    raise InputError(f"--compare: {','.join(args.compare)!r}, but --workdir = {args.workdir!r} is also given; give one")
  if args.compare:
    return _compare(list(args.compare))
  return _report(flag_values.required_flag("workdir", "give the run's folder, or several with --compare"))


def _report(workdir: str) -> dict[str, Any]:
  from cyb_jax import jsonl
  from cyb_jax.checkpointing.workdir import checkpoints_in, read_config
  from cyb_jax.interop import pretrained
  from cyb_jax.report import coloured, output, single
  from cyb_jax.training.metrics import read_metrics

  args = flags.FLAGS
  if args.text and not args.text_windows:
    raise InputError("--text: set, but --text_windows is 0; give --text_windows of at least 1")
  read_config(workdir)  # a folder without a run is reported first
  folder = output.check_output(args.output or os.path.join(workdir, "report"))
  mesh = splits.reading_mesh()
  if len(args.base) > 1:
    raise InputError(f"--base: {','.join(args.base)!r} has {len(args.base)} paths, but --workdir is one run; give one")
  base = args.base[0] if args.base else ""
  run = pretrained.load_run(workdir, flag_values.checkpoint_flag(), mesh, base=base, base_option="--base")
  store = splits.open_store(run.config, run.meta)
  windows = coloured.read_windows(run, mesh, store, split=args.split, limit=args.limit or None, count=args.text_windows)
  checkpoint = checkpoints_in(workdir, read_only=True).fingerprint(run.step)
  statistics = recorded_statistics(workdir, checkpoint) or _statistics(run, mesh, store, checkpoint)
  html, pictures = single.build(run.config.source, run.meta, statistics, read_metrics(workdir), windows)
  output.check_size(html)
  files = {"index.html": html, "statistics.json": jsonl.dumps(statistics, indent=2) + "\n", **pictures}
  output.write_folder(folder, files | coloured.files(windows))
  _send_to_trackers(run, workdir, folder)
  if args.text:
    _print(windows)
  return {
    "report": str(folder / "index.html"),
    "figures": sorted(pictures),
    "bytes": len(html.encode()),
    "perplexity": statistics["perplexity"]["mixture"],
    "mean_pauses": (statistics["latency"] or {"mean_pauses": 0.0})["mean_pauses"],
    "step": statistics["step"],
    "split": statistics["split"],
  }


def _send_to_trackers(run: Run, workdir: str, folder: storage.Place) -> None:
  """Passes the report on to the trackers that have the run's metrics, unless the run is being trained."""
  from cyb_jax.checkpointing.workdir import Lock
  from cyb_jax.training import trackers

  try:
    with Lock(workdir):
      trackers.log_report(run.config.train.trackers, storage.place(workdir), folder)
  except InputError as error:
    logging.info("the report is not sent to trackers: %s", error)


def _compare(workdirs: list[str]) -> dict[str, Any]:
  from cyb_jax import jsonl
  from cyb_jax.checkpointing.workdir import read_config
  from cyb_jax.report import coloured, comparison, output, side_by_side

  args = flags.FLAGS
  if len(workdirs) < 2:
    raise InputError(f"--compare: {workdirs[0]!r} is a single folder; give at least two, separated by commas")
  if args.text:
    raise InputError("--text: --compare prints no text; omit --text, or report on one run with --workdir")
  for workdir in workdirs:
    read_config(workdir)
  folder = output.check_output(args.output or "report")
  # Errors in configs and checkpoints are reported before anything is computed.
  unread = [_candidate(workdir, None) for workdir in workdirs]
  comparison.check_comparable(unread)
  comparison.group_runs(unread)
  bases = _bases(unread)
  candidates = [_candidate(workdir, bases) for workdir in workdirs]
  comparison.check_comparable(candidates)
  groups = comparison.group_runs(candidates)
  numbers = comparison.compare(groups)
  windows = _windows(side_by_side.pausing_group(groups), bases)
  html, pictures = side_by_side.build(groups, numbers, windows)
  output.check_size(html)
  files = {"index.html": html, "comparison.json": jsonl.dumps(numbers, indent=2) + "\n", **pictures}
  output.write_folder(folder, files | coloured.files(windows))
  return {
    "report": str(folder / "index.html"),
    "figures": sorted(pictures),
    "bytes": len(html.encode()),
    "groups": [
      {"label": row["label"], "perplexity": row["perplexity"]["mean"], "seeds": len(row["workdirs"])}
      for row in numbers["groups"]
    ],
    "split": numbers["split"],
  }


def _bases(candidates: Sequence[Candidate]) -> dict[str, str]:
  """The place of the base of each run by its folder, as the flag `--base` has them; '': where its config.json says.

  Raises:
    InputError: the flag has another number of paths, or no run needs its path.
  """
  given = flags.FLAGS.base
  if len(given) == 1:
    frozen = [x.workdir for x in candidates if "base" in x.meta]
    if not frozen and given[0]:
      raise InputError(f"--base: {given[0]!r} is given, but the checkpoints of all runs have all parameters; omit it")
    return dict.fromkeys((x.workdir for x in candidates), "") | dict.fromkeys(frozen, given[0])
  if given and len(given) != len(candidates):
    raise InputError(
      f"--base: {','.join(given)!r} has {len(given)} paths, but --compare has {len(candidates)} folders; give one path"
      " for all runs with a frozen decoder, or one for each folder, '' where the run's config.json is right"
    )
  return {x.workdir: base for x, base in itertools.zip_longest(candidates, given, fillvalue="")}


def _windows(group: Group | None, bases: Mapping[str, str]) -> list[Window]:
  """Windows of text, as the first run of a group evaluates them; `bases`: see `_bases`."""
  from cyb_jax.interop import pretrained
  from cyb_jax.report import coloured

  args = flags.FLAGS
  if group is None or not args.text_windows:
    return []
  mesh = splits.reading_mesh()
  workdir = group.runs[0].workdir
  run = pretrained.load_run(workdir, flag_values.checkpoint_flag(), mesh, base=bases[workdir], base_option="--base")
  store = splits.open_store(run.config, run.meta)
  return coloured.read_windows(run, mesh, store, split=args.split, limit=args.limit or None, count=args.text_windows)


def _report_folder(workdir: str) -> storage.Place:
  return storage.place(workdir) / "report"


def _candidate(workdir: str, bases: Mapping[str, str] | None) -> Candidate:
  """A run with its statistics.

  Statistics in the folder of its own report are reused if they have the same checkpoint, split and limit.

  Args:
    workdir: the run's folder.
    bases: see `_bases`; None: the statistics are not read but empty.
  """
  from cyb_jax import configs, jsonl, runs
  from cyb_jax.checkpointing.workdir import checkpoints_in, read_config
  from cyb_jax.interop import pretrained
  from cyb_jax.report.comparison import Candidate
  from cyb_jax.training.metrics import read_metrics

  checkpoints = checkpoints_in(workdir, read_only=True)
  step = checkpoints.find(flag_values.checkpoint_flag(), quick=True)
  meta = checkpoints.meta(step)
  if bases is None:
    return Candidate(workdir, configs.migrated(read_config(workdir)), meta, {}, [])
  checkpoint = checkpoints.fingerprint(step)
  statistics = recorded_statistics(workdir, checkpoint)
  if statistics is None:
    mesh = splits.reading_mesh()
    run = pretrained.load_run(workdir, step, mesh, base=bases[workdir], base_option="--base")
    statistics = _statistics(run, mesh, splits.open_store(run.config, run.meta), checkpoint)
    path = _report_folder(workdir) / "statistics.json"
    # An existing report folder without these statistics belongs to another report; the statistics are then not saved.
    try:
      storage.make_new(path.parent)
      storage.atomic_write(path, jsonl.dumps(statistics, indent=2) + "\n")
    except FileExistsError:
      pass
    except OSError as error:
      logging.warning("%s can't be written, so it will be computed again: %s", path, error.strerror or error)
  # The checkpoint may not be the last one, so only metrics up to its step are used.
  rows = (row for row in read_metrics(workdir) if row["split"] == "validation" and row["step"] <= step)
  validation = [row for row in rows if row.get("omega") is None]
  vocab_size = runs.load_tokenizer(workdir).vocab_size
  source = configs.migrated(read_config(workdir))
  return Candidate(workdir, source, meta, statistics, validation, vocab_size)


def recorded_statistics(workdir: str, checkpoint: str) -> dict[str, Any] | None:
  """The statistics.json of a run's own report, if its checkpoint, split and limit match; otherwise None.

  Args:
    workdir: the run's folder.
    checkpoint: the fingerprint of the checkpoint; split and limit are those of the flags.
  """
  from cyb_jax import configs, jsonl
  from cyb_jax.checkpointing.workdir import read_config

  limit = flags.FLAGS.limit or None
  try:
    found = jsonl.loads(storage.read_bytes(_report_folder(workdir) / "statistics.json"))
    same = _PARTS <= set(found) and found["checkpoint"] == checkpoint and found["split"] == flags.FLAGS.split
    method = configs.freeze(configs.migrated(read_config(workdir))).build_method()
    paced = found["num_slots"] > 1 and _is_self_paced(method)
    same &= not paced or found["self_paced"] is not None
    # A limit that excludes no window is recorded as None.
    same &= found["limit"] == limit or (found["limit"] is None and limit >= found["windows"])
  except (OSError, ValueError, KeyError, TypeError):
    return None
  if same:
    logging.info("statistics.json of %s has the same checkpoint, split and limit, so it is reused", workdir)
  return found if same else None


def _is_self_paced(method: Method) -> bool:
  """Whether a method decides the number of slots of each token, and can be evaluated in a self-paced context."""
  from cyb_jax.methods import Adaptive, CachedDecoding

  return isinstance(method, Adaptive) and isinstance(method, CachedDecoding)


def _statistics(run: Run, mesh: Mesh, store: TokenStore, checkpoint: str) -> dict[str, Any]:
  """The content of statistics.json."""
  import jax

  from cyb_jax.evaluation import (
    AUTOREGRESSIVE_WINDOWS,
    Evaluator,
    PauseStatistics,
    evaluate_split,
    read_autoregressively,
    statistics_of_split,
  )

  args = flags.FLAGS
  options = {"split": args.split, "step": run.step, "batch_size": splits.rows_at_once(run.config, mesh)}
  with jax.default_matmul_precision(run.config.precision.matmul):
    found = statistics_of_split(
      PauseStatistics(run.method, mesh, run.tokenizer),
      run.params,
      store,
      run.config,
      limit=args.limit or None,
      **options,
    )
    if run.method.num_slots > 1 and _is_self_paced(run.method):
      windows = min(found["windows"], _SELF_PACED_WINDOWS)
      paced = evaluate_split(
        Evaluator(run.method, mesh, context="self_paced"),
        run.params,
        store,
        run.config,
        meta=run.meta,
        limit=windows,
        **options,
      )
      found["self_paced"] = {"windows": windows} | {name: paced[name] for name in _SELF_PACED_KEYS}
    found["autoregressive"] = read_autoregressively(
      Evaluator(run.method, mesh),
      run.params,
      store,
      run.config,
      split=args.split,
      windows=min(found["windows"], AUTOREGRESSIVE_WINDOWS),
      batch_size=options["batch_size"],
    )
  return found | {"checkpoint": checkpoint}


def _print(windows: Sequence[Window]) -> None:
  from cyb_jax.report import coloured

  columns = max(shutil.get_terminal_size().columns, 20)
  terminal.show(coloured.to_terminal(windows, columns, colour=terminal.shows_colour()))


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main, interrupted="ended; an earlier report is unchanged, and the same command starts again")


if __name__ == "__main__":
  run()
