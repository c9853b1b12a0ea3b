"""Compares one training step on every mesh of the available devices, and with pmap, with a step on one device."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags, logging
from ml_collections import config_flags

from cyb_jax import command_line
from cyb_jax.errors import Failed, InputError

if TYPE_CHECKING:
  import jax
  from jaxtyping import PyTree

  from cyb_jax.configs import Config
  from cyb_jax.training.step import TrainState

TOLERANCE = 1e-5

# The kv heads don't divide over all meshes, and the readout has several chunks.
_TINY = {
  "method": {"pauses": 2, "pause_input": "token+pause"},
  "decoder": {"num_layers": 1, "d_model": 32, "num_heads": 8, "num_kv_heads": 2, "head_size": 8, "mlp_size": 64},
  "data": {"sequence_length": 16, "batch_size": 16},
  "parallelism": {"chunk_size": 64},
}


def define_flags() -> None:
  flags.DEFINE_integer("devices", 0, "The number of simulated CPU devices; 0: the devices of the machine.")
  flags.DEFINE_integer("vocabulary", 0, "The vocabulary size; 0: 1,000.")
  config_flags.DEFINE_config_file("config", None, "The config of the step; without it a tiny model.")


def sharding() -> dict[str, Any]:
  """Runs the same step on random tokens, in f32 with exact matrix products.

  Returns:
    `devices`, `tolerance`, `within` (for all rows), `rows`, `timing`. A row has `strategy`, the mesh (`data`, `fsdp`,
    `tensor`), `loss_deviation` and `gradient_deviation`, the largest relative deviations from one device (of a
    gradient, relative to the largest number of its array), `parameter_bytes` and `moment_bytes` on each device, and
    `within`.

  Raises:
    Failed: a deviation exceeds the tolerance.
    InputError: a flag is invalid, or the batch does not divide over the devices.
  """
  count, vocabulary = flags.FLAGS.devices, flags.FLAGS.vocabulary or 1000
  if count < 0:
    raise InputError(f"--devices: {count} must not be negative")
  if vocabulary < 2:
    raise InputError(f"--vocabulary: {vocabulary} must be at least 2")
  if count:
    _make_devices(count)
  import jax

  from cyb_jax.partitioning.mesh import check_batch

  start = time.perf_counter()
  config = _config()
  devices = len(jax.devices())
  if count and devices != count:
    raise InputError(f"--devices: {count}, but jax has already started with {devices} devices")
  check_batch(config.data.batch_size, devices * config.optimizer.accumulate)
  reference = _step(config, vocabulary, {}, jax.devices()[:1])
  rows = [reference.row({}, reference)]
  for mesh in _meshes(devices):
    rows.append(_step(config, vocabulary, mesh, jax.devices()).row(mesh, reference))
    logging.info("%s", rows[-1])
  result = {
    "benchmark": "sharding",
    "devices": devices,
    "device": jax.devices()[0].device_kind,
    "tolerance": TOLERANCE,
    "within": all(row["within"] for row in rows),
    "rows": rows,
    "timing": {"seconds": time.perf_counter() - start},
  }
  if not result["within"]:
    largest = max(max(row["loss_deviation"], row["gradient_deviation"]) for row in rows)
    raise Failed(f"sharding: a deviation of {largest:.1e} from one device exceeds {TOLERANCE:g}", result)
  return result


def _make_devices(count: int) -> None:
  """Creates simulated CPU devices; must be called before jax's backend starts."""
  # jax before 0.11 deadlocks with fewer threads than twice the number of devices.
  os.environ["NPROC"] = str(max(32, 4 * count))
  import jax

  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", count)


def _config() -> Config:
  from cyb_jax import configs
  from cyb_jax.studies.resolution import resolve

  if flags.FLAGS.config is None:
    config = configs.default()
    for part, fields in _TINY.items():
      config[part].update(fields)
  else:
    config = command_line.config_flag()
  config.precision.update(activations="float32", params="float32", matmul="highest")
  # The clipped norm would deviate too; without clipping the first moments are proportional to the gradient.
  config.optimizer.clip_norm = 0.0
  return resolve(config)


def _meshes(devices: int) -> Iterator[dict[str, Any]]:
  """The fields of `parallelism`: every shape of a mesh, then pmap."""
  divisors = [n for n in range(1, devices + 1) if devices % n == 0]
  for tensor in divisors:
    for fsdp in divisors:
      if devices % (tensor * fsdp) == 0:
        yield {"strategy": "jit", "data": devices // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
  yield {"strategy": "pmap", "data": devices, "fsdp": 1, "tensor": 1}


class _Step:
  """The results of a step on the host."""

  def __init__(self, state: TrainState, abstract: TrainState):
    import jax
    import optax

    from cyb_jax.costs.memory import bytes_per_device

    self.loss = float(state.totals.loss / state.totals.tokens)
    self.gradient = jax.device_get(optax.tree.get(state.opt_state, "mu"))
    moments = [optax.tree.get(abstract.opt_state, name) for name in ("mu", "nu")]
    self.parameter_bytes, self.moment_bytes = bytes_per_device(abstract.params), bytes_per_device(moments)

  def row(self, mesh: dict[str, Any], reference: _Step) -> dict[str, Any]:
    loss = abs(self.loss / reference.loss - 1)
    gradient = _deviation(self.gradient, reference.gradient)
    return {
      **({"strategy": "jit", "data": 1, "fsdp": 1, "tensor": 1} | mesh),
      "loss_deviation": loss,
      "gradient_deviation": gradient,
      "parameter_bytes": self.parameter_bytes,
      "moment_bytes": self.moment_bytes,
      # nan is not within the tolerance.
      "within": max(loss, gradient) <= TOLERANCE and loss == loss and gradient == gradient,
    }


def _deviation(tree: PyTree, reference: PyTree) -> float:
  """The maximum over all arrays of the largest deviation, relative to the largest number of the array."""
  import jax
  import numpy as np

  def of(a: np.ndarray, b: np.ndarray) -> float:
    largest = np.abs(b).max()
    return float(np.abs(a - b).max() / largest) if largest else float(np.abs(a).max())

  return max(jax.tree.leaves(jax.tree.map(of, tree, reference)))


def _step(config: Config, vocabulary: int, mesh: dict[str, Any], devices: list[jax.Device]) -> _Step:
  import dataclasses

  import jax

  from cyb_jax.benchmarks.train import RandomTokens
  from cyb_jax.configs import ParallelismConfig
  from cyb_jax.partitioning.mesh import data_shards, make_mesh
  from cyb_jax.training.optimizer import optimizer_of
  from cyb_jax.training.strategies import build_strategy

  config = dataclasses.replace(config, parallelism=ParallelismConfig(**mesh, chunk_size=config.parallelism.chunk_size))
  laid = make_mesh(config.parallelism, devices)
  local = config.parallelism.strategy == "pmap"
  method = config.build_method(vocabulary, data_shards=1 if local else data_shards(laid))
  strategy = build_strategy(config, method, optimizer_of(config, method, 10), laid)
  batch = RandomTokens(vocabulary, config.data.sequence_length, config.data.batch_size)(0)
  with jax.default_matmul_precision("highest"):
    state = strategy.step(strategy.init(), strategy.shard_batch(batch))
  return _Step(strategy.global_state(state), strategy.abstract())
