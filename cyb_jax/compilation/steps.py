"""The programs of a run, compiled for chips that are described only: the training step, the evaluation of a batch, and
the sampler's step.

No data, tokenizer or weights are needed: shapes are the config's.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from cyb_jax import configs, training
from cyb_jax.compilation import STEPS
from cyb_jax.compilation.hlo import traffic
from cyb_jax.compilation.memory import CLASSES, memory_by_class, refused_bytes
from cyb_jax.compilation.roofline import MODEL, roofline
from cyb_jax.compilation.topologies import open_topology
from cyb_jax.configs import Config
from cyb_jax.costs import flops
from cyb_jax.costs.flops import Chip
from cyb_jax.decoder import splash
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator
from cyb_jax.generation.options import plan
from cyb_jax.generation.sampler import Sampler
from cyb_jax.methods import Method
from cyb_jax.methods.paused import PausedMethod
from cyb_jax.partitioning.mesh import data_shards, make_mesh, replicated
from cyb_jax.studies.resolution import resolve
from cyb_jax.training.estimate import Knob, Outline

# Rows that are decoded together where it isn't said, or as many as there are devices with rows of their own.
_DECODED_ROWS = 8
# Of the kernels of splash attention, matrix products for each of the forward pass; XLA makes two.
_KERNEL_BACKWARD, _XLA_BACKWARD = 7 / 2, 2


def for_tpu(source: Mapping[str, Any]) -> Config:
  """Freezes a nested config as a TPU would, whatever this process runs on: 'auto' means bfloat16.

  Raises:
    InputError: see `studies.resolution.resolve`.
  """
  source = copy.deepcopy(configs.to_dict(source))
  precision = source.get("precision")
  if isinstance(precision, dict) and precision.get("activations", "auto") == "auto":
    precision["activations"] = "bfloat16"
  return resolve(source)


def compile_steps(
  source: Mapping[str, Any],
  topology: str,
  steps: Sequence[str] = STEPS,
  *,
  decode_batch: int = 0,
  hlo: str = "",
  verify: bool = False,
) -> dict[str, Any]:
  """Compiles for a topology, and says what that will take there.

  Args:
    source: a nested config.
    topology: 'v5e:4x4' and the like, see `topologies.SLICES`.
    steps: some of STEPS.
    decode_batch: rows that are decoded together; 0: eight, or as many as the batch is split into, if that is more.
    hlo: a folder that the optimised HLO of each step is written into, NAME.txt; '': none.
    verify: whether advice is compiled too, change by change.

  Returns:
    What the program prints; see README.md.

  Raises:
    InputError: bad input; nothing was compiled.
  """
  # What is timed is compilation, not a look-up in a cache. JAX asks once, at its first compilation, whatever that is.
  jax.config.update("jax_enable_compilation_cache", False)
  config = for_tpu(source)
  devices = open_topology(topology)
  chip = flops.chip(devices[0])
  # Where the tokenizer isn't there its size may not be known: then shapes are the decoder's own.
  vocab_size, vocabulary_from = training.vocabulary(config)
  run = training.outline(config, vocab_size, devices=devices)
  method, data = run.method, config.data
  compiling = {
    "train": functools.partial(_train, run),
    "evaluate": functools.partial(_evaluate, run),
    "decode": functools.partial(_decode, run, decode_batch),
  }
  programs = {step: compiling[step]() for step in steps}
  records, seconds = {}, {}
  for step, program in programs.items():
    start = time.perf_counter()
    with jax.default_matmul_precision(config.precision.matmul):
      records[step] = _record(program, chip, f"{hlo}/{step}.txt" if hlo else None)
    seconds[step] = time.perf_counter() - start
    logging.info("%s", _told(step, records[step], chip, seconds[step]))
  tokens = data.batch_size * data.sequence_length
  slots = method.train_slots(data.sequence_length) / data.sequence_length
  costs = training.costs_per_token(method, data.sequence_length)
  totals = {kind: {count: cost["total"] for count, cost in of.items()} for kind, of in costs.items()}
  peaks = [record["memory"]["peak"] for record in records.values()]
  fits = all(record["fits"] for record in records.values())
  result = {
    "method": method.name,
    "topology": topology,
    "chip": devices[0].device_kind,
    "devices": len(devices),
    "hosts": len({device.process_index for device in devices}),
    "strategy": config.parallelism.strategy,
    "mesh": dict(run.mesh.shape),
    "fits": fits,
    "peak_bytes": None if None in peaks else max(peaks),
    "hbm_bytes": chip.hbm_bytes,
    "vocabulary": {"size": method.vocab_size, "rows": method.decoder.config.vocab_size, "from": vocabulary_from},
    "parameters": training.count_parameters(method)["total"],
    "state_bytes": _state_bytes(run),
    "activations": config.activation_dtype,
    "remat": method.decoder.config.remat,
    "accumulate": config.optimizer.accumulate,
    "per_step": {"tokens": tokens, "slots": tokens * slots},
    "flops_per_token": totals,
    "flops_per_slot": {kind: {name: value / slots for name, value in of.items()} for kind, of in totals.items()},
    **records,
    "advice": None if fits else _advice(run, records),
    "model": MODEL,
    "timing": {"compile_seconds": seconds},
  }
  if verify and not fits:
    result["advice"] = _verified(source, result, topology, decode_batch)
  return result


@dataclasses.dataclass(frozen=True)
class _Program:
  """A step to be compiled.

  Attributes:
    compile: does it.
    devices: that it runs on.
    flops: executed in all of them together, given whether attention is a kernel.
    tokens: that it works on.
    about: what else is to be told.
  """

  compile: Callable[[], jax.stages.Compiled]
  devices: int
  flops: Callable[[bool], float]
  tokens: int
  about: Mapping[str, Any]


def _train(run: Outline) -> _Program:
  data = run.config.data

  def compiled() -> jax.stages.Compiled:
    with _under(run):
      return run.strategy.compile_abstract(run.batch)

  def cost(kernel: bool) -> float:
    executed = run.method.train_cost(data.sequence_length, executed=True)
    if kernel:
      forwards = 1 + (run.method.decoder.config.remat != "none")
      products = (forwards + _KERNEL_BACKWARD) / (forwards + _XLA_BACKWARD)
      attention = executed.attention * products * _kernel_keys(run.method, data.sequence_length)
      executed = dataclasses.replace(executed, attention=attention)
    return data.batch_size * data.sequence_length * executed.total

  return _Program(compiled, run.mesh.size, cost, data.batch_size * data.sequence_length, {"rows": data.batch_size})


def _evaluate(run: Outline) -> _Program:
  config, method = run.config, run.evaluated
  rows, length = config.evaluation_rows, config.data.sequence_length
  batch = training.abstract_batch(config, rows)
  evaluator = Evaluator(method, run.mesh)

  def compiled() -> jax.stages.Compiled:
    with jax.set_mesh(run.mesh):
      return evaluator.compile_abstract(_params(run), batch)

  def cost(kernel: bool) -> float:
    executed = method.forward_cost(length, executed=True)
    if kernel:
      executed = dataclasses.replace(executed, attention=executed.attention * _kernel_keys(method, length))
    return rows * length * method.passes * executed.total

  return _Program(compiled, run.mesh.size, cost, rows * length, {"rows": rows})


def _decode(run: Outline, rows: int) -> _Program:
  """One iteration of the sampler's loop; its cache has room for a window of tokens with all their pauses.

  Where parameters are sharded over the mesh they stay so, and rows lie over the batch's axes; else one device decodes.
  """
  config, method, mesh = run.config, run.evaluated, run.mesh
  if not method.decodes:
    raise InputError(f"--steps: 'decode', but method {method.name!r} doesn't run slot by slot; leave it out")
  sampler = Sampler(method)
  sharded = config.parallelism.strategy == "jit" and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
  shards = data_shards(mesh) if sharded else 1
  rows = rows or max(_DECODED_ROWS, shards)
  if rows % shards:
    raise InputError(f"--decode_batch: {rows} rows don't divide over {shards} devices; give a multiple of that")
  length = config.data.sequence_length
  decoding = plan(method, sampler.options)
  capacity = (length - 1) * (decoding.num_slots if decoding.keeps_pauses else 1) + decoding.num_slots
  at_once = decoding.num_slots if decoding.parallel or decoding.in_turn else 1

  def compiled() -> jax.stages.Compiled:
    if sharded:
      with jax.set_mesh(mesh):
        return sampler.compile_abstract(_params(run), rows, length, functools.partial(_rows_over, mesh))
    here = SingleDeviceSharding(mesh.devices.flat[0])
    # A mesh of one device tells what is compiled for.
    one = make_mesh(configs.ParallelismConfig(), [mesh.devices.flat[0]])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), _params(run))
    with jax.set_mesh(one):
      return sampler.compile_abstract(params, rows, length, lambda axis: here)

  def cost(kernel: bool) -> float:
    del kernel  # a few queries against a cache are XLA's
    slots = rows * at_once
    read = rows if decoding.in_turn else slots
    return flops.slot_flops(method.cache_config, slots=slots, keys=slots * capacity, slots_read=read)

  about = {
    "rows": rows,
    "capacity": capacity,
    "slots_at_once": at_once,
    "parameters": "sharded as in training" if sharded else "whole on one device",
  }
  return _Program(compiled, mesh.size if sharded else 1, cost, rows, about)


def _kernel_keys(method: Method, tokens: int) -> float:
  """The keys that the kernels multiply a query with, as a share of those that XLA does."""
  if isinstance(method, PausedMethod) and method.hides_pauses:
    return splash.executed_keys(tokens * method.num_slots, method.num_slots) / (tokens + method.num_slots - 1)
  if not method.one_pass:
    return 1.0  # of several passes, or rows, no one share: counted as XLA's
  slots = method.train_slots(tokens)
  return splash.executed_keys(slots) / slots


def _under(run: Outline):
  """The mesh that jit is traced under; pmap makes its own."""
  return jax.set_mesh(run.mesh) if run.config.parallelism.strategy == "jit" else contextlib.nullcontext()


def _params(run: Outline) -> PyTree:
  """The parameters to be read: where training has them, or everywhere."""
  everywhere = replicated(run.mesh)
  local = run.config.parallelism.strategy == "pmap"
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere if local else x.sharding),
    run.strategy.abstract().params,
  )


def _rows_over(mesh: Mesh, axis: int) -> Sharding:
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ("data", "fsdp")) if axis >= 0 else PartitionSpec())


def _state_bytes(run: Outline) -> int:
  state = run.strategy.abstract()
  return training.bytes_per_device((state.params, state.opt_state))


def _record(program: _Program, chip: Chip, path: str | None) -> dict[str, Any]:
  try:
    compiled = program.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    needed, limit = refused_bytes(str(error))
    room = limit or chip.hbm_bytes
    memory = dict.fromkeys(CLASSES) | {"peak": needed}
    over = None if needed is None else needed - room
    said = str(error).strip().splitlines()[0]
    return {"fits": False, "memory": memory, "hbm_bytes": room, "over_bytes": over, "refused": said, **program.about}
  text = compiled.as_text()
  if path is not None:
    with open(path, "w") as file:
      file.write(text)
  memory, moved = memory_by_class(compiled), traffic(text)
  kernel = "tpu_custom_call" in text
  each = program.flops(kernel) / program.devices
  bound = roofline(chip, each, moved)
  return {
    "fits": memory["peak"] <= chip.hbm_bytes,
    "memory": memory,
    "hbm_bytes": chip.hbm_bytes,
    "over_bytes": max(0, memory["peak"] - chip.hbm_bytes),
    **program.about,
    "devices": program.devices,
    "attention": "kernel" if kernel else "xla",
    "collectives": moved.by_kind(),
    "sent_bytes": moved.sent,
    "hbm_traffic_bytes": moved.hbm_bytes,
    "open_loops": moved.open_loops,
    "flops": each,
    "arithmetic_intensity": each / moved.hbm_bytes,
    "step_seconds": bound.seconds,
    "bound": bound.bound,
    "seconds": dataclasses.asdict(bound),
    "tokens_per_second": program.tokens / bound.seconds,
  }


def _told(step: str, record: Mapping[str, Any], chip: Chip, seconds: float) -> str:
  peak = record["memory"]["peak"]
  size = "more than the chip has" if peak is None else f"{peak / 2**30:.2f} GiB"
  return f"{step}: {size} of {chip.hbm_bytes / 2**30:.2f}, compiled in {seconds:.0f} s"


def _advice(run: Outline, records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
  """What would help, most first; `flags`: where flags alone do it."""
  over = {step: record for step, record in records.items() if not record["fits"]}
  peak = max((record["memory"]["peak"] or 0 for record in over.values()), default=0) or None
  state = run.strategy.abstract()
  held = training.bytes_per_device((state.params, state.opt_state))
  held += training.bytes_per_device(training.trained_part(state.params, run.method.is_trained))
  knobs = training.knobs(run.config, held, peak, run.mesh.size)
  if set(over) == {"decode"}:  # no part of the batch is worked on, nothing is kept for a gradient
    knobs = [Knob("a smaller --decode_batch"), *(knob for knob in knobs if "parallelism.fsdp" in knob.fields)]
  return [
    {"change": knob.told, "flags": [f"--config.{name}={value}" for name, value in knob.fields.items()] or None}
    for knob in knobs
  ]


def _verified(
  source: Mapping[str, Any], result: Mapping[str, Any], topology: str, decode_batch: int
) -> list[dict[str, Any]]:
  """The advice, each change that flags do compiled by itself: whether the steps that don't fit then do."""
  over = [step for step in STEPS if step in result and not result[step]["fits"]]
  tried = []
  for change in result["advice"]:
    found = {}
    if change["flags"]:
      changed = copy.deepcopy(configs.to_dict(source))
      for flag in change["flags"]:
        name, _, value = flag.removeprefix("--config.").partition("=")
        part, field = name.split(".")
        changed[part][field] = int(value) if value.isdecimal() else value
      again = compile_steps(changed, topology, over, decode_batch=decode_batch)
      found = {"fits": again["fits"], "peak_bytes": again["peak_bytes"]}
    tried.append(change | found)
  return tried
