"""What a run will take before it takes it: parameters, memory and FLOPs, by component.

The step that training would run is compiled for the devices at hand from shapes alone; nothing of the state is
allocated, and nothing is written.
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
from cyb_jax.costs.memory import bytes_per_device, program_memory
from cyb_jax.data import TokenStore
from cyb_jax.errors import InputError
from cyb_jax.interop import pretrained
from cyb_jax.methods import Method
from cyb_jax.methods.parameters import count_parameters, trained_part
from cyb_jax.partitioning.mesh import check_batch, data_shards, make_mesh
from cyb_jax.training.optimizer import make_optimizer
from cyb_jax.training.run_data import abstract_batch, find_store, num_steps, open_batches, vocabulary
from cyb_jax.training.step import TrainState
from cyb_jax.training.strategies import Strategy, build_strategy


@dataclasses.dataclass(frozen=True)
class Outline:
  """A run on some devices, of shapes alone.

  Attributes:
    config: of the run.
    mesh: the devices.
    method: of a training step; `evaluated`: of an evaluation, which runs under jit whatever the strategy.
    strategy: that of the config.
    batch: shapes and dtypes of a whole training batch.
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
  """Lays a run out over devices, all that there are by default; nothing is allocated or compiled.

  Args:
    config: validated.
    vocab_size: None: as many as the decoder has rows.
    steps: of the schedule; changes no shape.
    devices: they may be ones that are described only, see `cyb_jax.compilation`.

  Raises:
    InputError: sizes that don't fit each other or the devices.
  """
  mesh = make_mesh(config.parallelism, devices)
  shards = data_shards(mesh)
  check_batch(config.data.batch_size, shards * config.optimizer.accumulate)
  local = config.parallelism.strategy == "pmap"
  evaluated = config.build_method(vocab_size, data_shards=shards)
  method = config.build_method(vocab_size, data_shards=1) if local else evaluated
  width, new_rate = method.decoder.config.d_model, config.tuning.new_rate
  optimizer = make_optimizer(config.optimizer, steps, width, new_rate=new_rate)
  strategy = build_strategy(config, method, optimizer, mesh)
  return Outline(config, mesh, method, evaluated, strategy, abstract_batch(config, config.data.batch_size))


def dry_run(config: Config) -> dict[str, Any]:
  """What a run of this config takes on these devices.

  Returns:
    - `vocabulary`: its `size`, where that is known `from`, and the `rows` of the tables.
    - `steps`: of the run, and where they are known `steps_from`; None where only the data could tell.
    - `parameters`: see `count_parameters`.
    - `memory`: of the training step, see `memory_of`.
    - `flops`: `per_token`, per real token: `forward` (of an evaluation) and `train` (a step), each counted as the
      `model`'s and as `executed` (see `cyb_jax.costs.flops`), by component; `per_step` and `run`, of the training
      steps.
    - `advice`: what would help where the device's memory doesn't suffice, else None.
    - `timing`: `compile_seconds`.

  Raises:
    InputError: sizes that don't fit each other, the devices or the data.
  """
  data = config.data
  # Before the data is looked for.
  shards = data_shards(make_mesh(config.parallelism))
  check_batch(data.batch_size, shards * config.optimizer.accumulate)
  try:
    if config.init_from:
      pretrained.open_pretrained(config.init_from)
  except InputError as error:
    logging.warning("%s; shapes are those of the config", error)
  store = find_store(config)
  vocab_size, vocabulary_from = vocabulary(config, store)
  steps, steps_from = _steps(config, store)
  run = outline(config, vocab_size, steps=steps or 1)
  mesh, method, strategy, batch = run.mesh, run.method, run.strategy, run.batch
  state = strategy.abstract()
  start, program = time.perf_counter(), None
  with jax.default_matmul_precision(config.precision.matmul):
    try:
      program = strategy.compile_abstract(batch)
    except jax.errors.JaxRuntimeError as error:  # some compilers refuse what the device has no room for
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      logging.warning("the step doesn't compile: %s", str(error).strip().splitlines()[0])
  seconds = time.perf_counter() - start
  memory = memory_of(state, method, batch, shards, program, mesh.devices.flat[0])
  tokens = data.batch_size * data.sequence_length
  slots = data.batch_size * method.train_slots(data.sequence_length)
  costs = costs_per_token(method, data.sequence_length)
  per_step = {kind: tokens * cost["total"] for kind, cost in costs["train"].items()}
  return {
    "method": method.name,
    "weights": config.tuning.weights,
    "devices": mesh.size,
    "device": mesh.devices.flat[0].device_kind,
    "strategy": config.parallelism.strategy,
    "vocabulary": {"size": method.vocab_size, "rows": method.decoder.config.vocab_size, "from": vocabulary_from},
    "steps": steps,
    "steps_from": steps_from,
    "per_step": {"tokens": tokens, "slots": slots},
    "run": None if steps is None else {"tokens": steps * tokens, "slots": steps * slots},
    "parameters": count_parameters(method),
    "memory": memory,
    "flops": {
      "per_token": costs,
      "per_step": per_step,
      "run": None if steps is None else {kind: steps * cost for kind, cost in per_step.items()},
    },
    "advice": _advice(config, memory, mesh.size, refused=program is None),
    "timing": {"compile_seconds": seconds},
  }


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
    state: shapes, dtypes and shardings, logical.
    method: the run's.
    batch: shapes and dtypes, of the whole batch.
    shards: into how many parts the batch is split.
    program: the compiled step; None: it doesn't compile.
    device: whose limit is told.

  Returns:
    - `parameters`, `moments` (all of the optimizer's state), `batch`, `temporaries` (what XLA says that the program
      works with), `other` (metrics, counters, results that have no place of their own): together they are `peak`.
    - `gradients`: of what is trained; a part of `temporaries`.
    - `limit`: what the device has for programs, where it tells.
    None where the backend doesn't tell.
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
  """`forward` and `train`, each as the `model` needs and as `executed`, by component and in `total`."""
  return {
    kind: {"model": _by_component(cost(length)), "executed": _by_component(cost(length, executed=True))}
    for kind, cost in (("forward", method.forward_cost), ("train", method.train_cost))
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
  held = memory["parameters"] + memory["moments"] + memory["gradients"]
  found = [knob.told for knob in knobs(config, held, peak, devices)]
  needs = f"needs {peak:,} bytes" if peak is not None else "doesn't compile"
  room = f"has {limit:,}" if limit is not None else "has too little memory for it"
  return f"the step {needs} and each device {room}; what helps, most first: {', '.join(found)}"


@dataclasses.dataclass(frozen=True)
class Knob:
  """A change of a config that takes memory down.

  Attributes:
    told: in words.
    fields: values by field, 'a.b': what to try; none where that would be another experiment.
  """

  told: str
  fields: Mapping[str, int | str] = dataclasses.field(default_factory=dict)


def knobs(config: Config, held: int, peak: int | None, devices: int) -> list[Knob]:
  """What would help a step that a device has no room for, most first.

  Args:
    config: of the step.
    held: bytes of parameters, optimizer state and gradients on a device.
    peak: bytes that the step needs there; None: not known.
    devices: how many there are.
  """
  data, optimizer, parallelism = config.data, config.optimizer, config.parallelism
  jit = parallelism.strategy == "jit"
  shards = devices // parallelism.tensor
  # The next number of parts that leaves every shard whole windows.
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
  # Of activations in f32 a program makes copies of bfloat16 weights in f32.
  shrinks = config.precision.params == "float32" and config.activation_dtype == "bfloat16"
  state = [
    (Knob("tuning.weights = 'lora'"), config.tuning.weights == "all"),
    (
      Knob("precision.params = 'bfloat16'", {"precision.params": "bfloat16"}),
      config.tuning.weights != "all" and shrinks,
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
