"""Estimates the costs of a run before it starts: parameters, memory and FLOPs, by component.

The training step is compiled for the devices of this process from shapes. No state is allocated, and nothing is
written.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from cyb_jax.configs import Config
from cyb_jax.costs.flops import Cost
from cyb_jax.costs.memory import bytes_per_device, count_parameters, program_memory
from cyb_jax.data import TokenStore
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained
from cyb_jax.methods import Method
from cyb_jax.methods.parameters import trained_part
from cyb_jax.partitioning.mesh import data_shards
from cyb_jax.training.layout import mesh_of_run, methods_of_run, strategy_of_run
from cyb_jax.training.run_data import abstract_batch, find_store, num_steps, open_batches, vocabulary
from cyb_jax.training.step import TrainState
from cyb_jax.training.strategies import Strategy


@dataclasses.dataclass(frozen=True)
class Outline:
  """A run on given devices, described by shapes.

  Attributes:
    config: the config of the run.
    mesh: the mesh of the devices.
    method: the method of a training step.
    evaluated: the method of an evaluation, see `layout.methods_of_run`.
    strategy: the strategy of the run.
    batch: shapes and dtypes of a global training batch.
  """

  config: Config
  mesh: Mesh
  method: Method
  evaluated: Method
  strategy: Strategy
  batch: Mapping[str, jax.ShapeDtypeStruct]


def outline(
  config: Config, vocab_size: int | None, *, steps: int = 1, devices: Sequence[jax.Device] | None = None
) -> Outline:
  """Computes the outline of a run on devices, by default all devices; nothing is allocated or compiled.

  Args:
    config: the validated config.
    vocab_size: the size of the vocabulary; None means the number of rows of the decoder's tables.
    steps: the length of the schedule; it does not affect shapes.
    devices: the devices, which may be descriptions of devices that this machine lacks, see `cyb_jax.compilation`.

  Raises:
    InputError: sizes are incompatible with each other or with the devices.
  """
  mesh = mesh_of_run(config, devices)
  method, evaluated = methods_of_run(config, vocab_size, mesh)
  strategy = strategy_of_run(config, method, mesh, steps)
  return Outline(config, mesh, method, evaluated, strategy, abstract_batch(config, config.data.batch_size))


def dry_run(config: Config) -> dict[str, Any]:
  """Estimates the costs of a run with this config on the devices of this process.

  Returns:
    - `vocabulary`: its `size` (None if unknown), the source of the size (`from`), and the `rows` of the tables.
    - `steps`: the number of steps of the run, and its source `steps_from`; None if it depends on unprepared data.
    - `parameters`: see `count_parameters`.
    - `memory`: the memory of the training step, see `memory_of`.
    - `flops`: `per_token`, the FLOPs per real token of `forward` (an evaluation) and `train` (a training step), each as
      `model` and as `executed` FLOPs (see `cyb_jax.costs.flops`), by component; `per_step` and `run`, the FLOPs of a
      training step and of all steps.
    - `advice`: changes that would help if the device's memory is insufficient, otherwise None.
    - `timing`: `compile_seconds`.

  Raises:
    InputError: sizes are incompatible with each other, the devices or the data.
  """
  mesh_of_run(config)  # errors in the batch size are reported before errors in the data
  try:
    if config.init_from:
      pretrained.open_pretrained(config.init_from)
  except InputError as error:
    logging.warning("%s; the shapes of the config are used", error)
  store = find_store(config)
  vocab_size, vocabulary_from = vocabulary(config, store)
  steps, steps_from = _steps(config, store)
  run = outline(config, vocab_size, steps=steps or 1)
  start = time.perf_counter()
  program = _compiled(run)
  seconds = time.perf_counter() - start
  method, mesh = run.method, run.mesh
  memory = memory_of(run.strategy.abstract(), method, run.batch, data_shards(mesh), program, mesh.devices.flat[0])
  return {
    "method": method.name,
    "weights": config.tuning.weights,
    "devices": mesh.size,
    "device": mesh.devices.flat[0].device_kind,
    "strategy": config.parallelism.strategy,
    "vocabulary": {"size": method.vocab_size, "rows": method.decoder.config.vocab_size, "from": vocabulary_from},
    "steps": steps,
    "steps_from": steps_from,
    **_work(config, method, steps),
    "parameters": count_parameters(method),
    "memory": memory,
    "flops": _flops(config, method, steps),
    "advice": _advice(config, memory, mesh.size, refused=program is None),
    "timing": {"compile_seconds": seconds},
  }


def _compiled(run: Outline) -> jax.stages.Compiled | None:
  """The compiled training step; None if compilation fails because the device has too little memory."""
  with jax.default_matmul_precision(run.config.precision.matmul):
    try:
      return run.strategy.compile_abstract(run.batch)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      logging.warning("the step doesn't compile: %s", str(error).strip().splitlines()[0])
      return None


def _work(config: Config, method: Method, steps: int | None) -> dict[str, Any]:
  """`per_step` and `run`: the numbers of tokens and slots that training processes."""
  data = config.data
  per_step = {
    "tokens": data.batch_size * data.sequence_length,
    "slots": data.batch_size * method.costs(data.sequence_length).train_slots,
  }
  return {"per_step": per_step, "run": _of_run(per_step, steps)}


def _flops(config: Config, method: Method, steps: int | None) -> dict[str, Any]:
  data = config.data
  costs = costs_per_token(method, data.sequence_length)
  tokens = data.batch_size * data.sequence_length
  per_step = {kind: tokens * cost["total"] for kind, cost in costs["train"].items()}
  return {"per_token": costs, "per_step": per_step, "run": _of_run(per_step, steps)}


def _of_run(per_step: Mapping[str, float], steps: int | None) -> dict[str, float] | None:
  return None if steps is None else {kind: steps * value for kind, value in per_step.items()}


def memory_of(
  state: TrainState,
  method: Method,
  batch: Mapping[str, jax.ShapeDtypeStruct],
  shards: int,
  program: jax.stages.Compiled | None,
  device: jax.Device,
) -> dict[str, int | None]:
  """Bytes on each device while a step runs.

  Args:
    state: shapes, dtypes and shardings of the global state.
    method: the method of the run.
    batch: shapes and dtypes of the global batch.
    shards: the number of parts into which the batch is split.
    program: the compiled step; None if it doesn't compile.
    device: the device whose limit is reported.

  Returns:
    - `parameters`, `moments` (the optimizer state), `batch`, `temporaries` (XLA's intermediate values) and `other`
      (metrics, counters, results that replace no argument): their sum is `peak`.
    - `gradients`: the gradients of the trained parameters; a part of `temporaries`.
    - `limit`: the device's memory for programs.
    A number is None if the backend does not report it.
  """
  parts = {
    "parameters": bytes_per_device(state.params),
    "moments": bytes_per_device(state.opt_state),
    "batch": sum(math.prod(x.shape) * x.dtype.itemsize for x in batch.values()) // shards,
  }
  used = program_memory(program) if program is not None else None
  temporaries = other = peak = None
  if used is not None:
    temporaries, peak = used.temporaries, used.peak
    other = peak - temporaries - sum(parts.values())
  gradients = bytes_per_device(trained_part(state.params, method.is_trained))
  limit = (device.memory_stats() or {}).get("bytes_limit")
  return parts | {
    "temporaries": temporaries, "other": other, "peak": peak, "gradients": gradients, "limit": limit,
  }  # fmt: skip


def costs_per_token(method: Method, length: int) -> dict[str, dict[str, dict[str, float]]]:
  """FLOPs per real token of a window of `length` tokens, by component and in `total`.

  `forward` (an evaluation) and `train` (a training step) each have `model` FLOPs and `executed` FLOPs.
  """
  costs = method.costs(length)
  return {
    "forward": {"model": _by_component(costs.forward), "executed": _by_component(costs.forward_executed)},
    "train": {"model": _by_component(costs.train), "executed": _by_component(costs.train_executed)},
  }


def _by_component(cost: Cost) -> dict[str, float]:
  return {name: float(value) for name, value in (*vars(cost).items(), ("total", cost.total))}


def _steps(config: Config, store: TokenStore | None) -> tuple[int | None, str | None]:
  if config.train.steps or not config.train.epochs:
    return config.train.steps, "train.steps"
  if store is None:
    return None, None
  return num_steps(config, open_batches(config, store)), f"train.epochs of the token store in {store.path}"


def _advice(config: Config, memory: Mapping[str, int | None], devices: int, *, refused: bool) -> str | None:
  peak, limit = memory["peak"], memory["limit"]
  if not refused and (peak is None or limit is None or peak <= limit):
    return None
  state = memory["parameters"] + memory["moments"] + memory["gradients"]
  found = [knob.description for knob in knobs(config, state, peak, devices)]
  needs = f"needs {peak:,} bytes" if peak is not None else "doesn't compile"
  available = f"has {limit:,}" if limit is not None else "has too little memory for it"
  return f"the step {needs} and each device {available}; changes that help, most effective first: {', '.join(found)}"


@dataclasses.dataclass(frozen=True)
class Knob:
  """A change of a config that reduces the memory of a step.

  Attributes:
    description: a description of the change.
    fields: the new values by field, 'a.b'; empty if the change would change the experiment.
  """

  description: str
  fields: Mapping[str, int | str] = dataclasses.field(default_factory=dict)


def knobs(config: Config, held: int, peak: int | None, devices: int) -> list[Knob]:
  """The changes that reduce the memory of a step, the most effective first.

  Args:
    config: the config of the step.
    held: bytes of parameters, optimizer state and gradients on a device.
    peak: bytes that the step needs on a device; None if unknown.
    devices: the number of devices.
  """
  data, optimizer, parallelism = config.data, config.optimizer, config.parallelism
  jit = parallelism.strategy == "jit"
  shards = devices // parallelism.tensor
  # The next larger number of parts that divides the windows of a shard.
  windows = data.batch_size // shards
  parts = next((n for n in range(optimizer.accumulate + 1, windows + 1) if windows % n == 0), None)
  activations = [
    (Knob("decoder.remat = 'full'", {"decoder.remat": "full"}), config.decoder.get("remat") != "full"),
    (
      Knob(f"optimizer.accumulate above {optimizer.accumulate}", {"optimizer.accumulate": parts} if parts else {}),
      optimizer.accumulate < data.batch_size,
    ),
    (Knob("a smaller data.batch_size or data.sequence_length"), True),
  ]
  # With f32 activations, a program creates f32 copies of the weights.
  params = config.precision.params if config.activation_dtype == "bfloat16" else ""
  state = [
    (Knob("tuning.weights = 'lora'"), config.tuning.weights == "all"),
    (
      Knob("precision.params = 'bfloat16'", {"precision.params": "bfloat16"}),
      config.tuning.weights != "all" and params == "float32",
    ),
    (
      Knob("precision.params = 'int8'", {"precision.params": "int8"}),
      config.tuning.weights != "all" and params in ("float32", "bfloat16"),
    ),
    (
      Knob(
        f"parallelism.fsdp = {devices}",
        {"parallelism.data": 1, "parallelism.fsdp": devices, "parallelism.tensor": 1},
      ),
      devices > 1 and jit and parallelism.fsdp < devices,
    ),
  ]
  state_first = peak is None or held > peak / 2
  return [knob for knob, helps in (state + activations if state_first else activations + state) if helps]
