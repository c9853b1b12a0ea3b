"""The programs of a run that are compiled for a TPU topology: the training step, the evaluation of a batch, and one
iteration of the sampler's loop.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import PyTree

from cyb_jax import configs, training
from cyb_jax.costs import flops
from cyb_jax.costs.memory import bytes_per_device
from cyb_jax.decoder import splash
from cyb_jax.errors import InputError
from cyb_jax.evaluation import Evaluator
from cyb_jax.generation.sampler import Sampler
from cyb_jax.methods import CachedDecoding, Decoding, Method
from cyb_jax.partitioning.mesh import data_shards, make_mesh, replicated
from cyb_jax.training.estimate import Outline

# The default number of rows that are decoded together, unless the batch is split into more parts.
_DECODED_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Program:
  """A program to be compiled.

  Attributes:
    compile: compiles the program.
    devices: the number of devices that run the program.
    flops: the executed FLOPs of all devices together, given whether attention is a kernel.
    tokens: the number of tokens that one execution processes.
    about: further keys of its record.
    model_flops: the model FLOPs of all devices together; None: not counted.
    parameter_bytes: the bytes of the parameters on a device, which an execution reads at least once; None: not counted.
    iterates: whether an execution is one iteration of a loop, until the device finds that nothing is left to do.
  """

  compile: Callable[[], jax.stages.Compiled]
  devices: int
  flops: Callable[[bool], float]
  tokens: int
  about: Mapping[str, Any]
  model_flops: float | None = None
  parameter_bytes: int | None = None
  iterates: bool = False


def train(run: Outline) -> Program:
  """The training step."""
  data = run.config.data
  tokens = data.batch_size * data.sequence_length

  def compiled() -> jax.stages.Compiled:
    with _under(run):
      return run.strategy.compile_abstract(run.batch)

  def cost(kernel: bool) -> float:
    executed = run.method.costs(data.sequence_length).train_executed
    if kernel:
      # Of two products in each forward pass, and of four in the backward pass of XLA's attention. Only `remat` 'full'
      # runs the kernel's forward pass twice, only 'none' that of XLA's attention once.
      remat = run.method.decoder.config.remat
      keys, backward_products = _kernels(run, run.method, data.sequence_length)
      products = (2 * (1 + (remat == "full")) + backward_products) / (2 * (1 + (remat != "none")) + 4)
      attention = executed.attention * products * keys
      executed = dataclasses.replace(executed, attention=attention)
    return tokens * executed.total

  model_flops = tokens * run.method.costs(data.sequence_length).train.total
  return Program(compiled, run.mesh.size, cost, tokens, {"rows": data.batch_size}, model_flops)


def evaluate(run: Outline) -> Program:
  """The evaluation of a batch."""
  config, method = run.config, run.evaluated
  rows, length = config.evaluation_rows, config.data.sequence_length
  batch = training.abstract_batch(config, rows)
  evaluator = Evaluator(method, run.mesh)

  def compiled() -> jax.stages.Compiled:
    with jax.set_mesh(run.mesh):
      return evaluator.compile_abstract(_params(run), batch)

  def cost(kernel: bool) -> float:
    costs = method.costs(length)
    executed = costs.forward_executed
    if kernel:
      executed = dataclasses.replace(executed, attention=executed.attention * _kernels(run, method, length)[0])
    return rows * length * costs.evaluation_passes * executed.total

  costs = method.costs(length)
  model_flops = rows * length * costs.evaluation_passes * costs.forward.total
  return Program(compiled, run.mesh.size, cost, rows * length, {"rows": rows}, model_flops)


def decode(run: Outline, rows: int) -> Program:
  """One iteration of the sampler's loop; the cache holds a window of tokens with all their pauses.

  If parameters are sharded over the mesh, they stay sharded, and rows are split over the batch's axes; otherwise one
  device decodes.
  """
  config, method, mesh = run.config, run.evaluated, run.mesh
  if not isinstance(method, Decoding):
    raise InputError(f"--steps: 'decode', but method {method.name!r} doesn't run slot by slot; leave it out")
  sampler = Sampler(method)
  sharded = config.parallelism.strategy == "jit" and mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
  shards = data_shards(mesh) if sharded else 1
  rows = rows or max(_DECODED_ROWS, shards)
  if rows % shards:
    raise InputError(f"--decode_batch: {rows} rows don't divide over {shards} devices; give a multiple of {shards}")
  length = config.data.sequence_length
  capacity = sampler.pacing.layout.capacity(0, length)
  at_once = sampler.pacing.slots_per_iteration

  def compiled() -> jax.stages.Compiled:
    if sharded:
      with jax.set_mesh(mesh):
        return sampler.compile_abstract(_params(run), rows, length, functools.partial(_rows_over, mesh))
    here = SingleDeviceSharding(mesh.devices.flat[0])
    # A mesh of one device sets the platform of the compilation.
    one = make_mesh(configs.ParallelismConfig(), [mesh.devices.flat[0]])
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), _params(run))
    with jax.set_mesh(one):
      return sampler.compile_abstract(params, rows, length, lambda axis: here)

  def cost(kernel: bool) -> float:
    del kernel  # attention of a few queries against a cache always uses XLA
    slots = rows * at_once
    read = rows * sampler.pacing.states_read_per_iteration
    return flops.slot_flops(method.cache_config, slots=slots, keys=slots * capacity, slots_read=read)

  about = {
    "rows": rows,
    "capacity": capacity,
    "slots_at_once": at_once,
    "parameters": "sharded as in training" if sharded else "complete on one device",
  }
  params = _params(run)
  held = bytes_per_device(params) if sharded else sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
  return Program(compiled, mesh.size if sharded else 1, cost, rows, about, parameter_bytes=held, iterates=True)


def _kernels(run: Outline, method: Method, tokens: int) -> tuple[float, int]:
  """The kernels' number of keys for each query, relative to XLA's attention, and their backward products.

  Layers with and without a window count alike.
  """
  kind = run.mesh.devices.flat[0].device_kind
  planned = functools.partial(splash.plan, window=method.decoder.config.window, device_kind=kind)
  if isinstance(method, CachedDecoding) and method.hides_pauses:
    found = planned(tokens * method.num_slots, method.num_slots)
    return found.keys / (tokens + method.num_slots - 1), found.backward_products
  slots = round(method.costs(tokens).train_slots)
  found = planned(slots)
  if not isinstance(method, CachedDecoding) or method.layer_passes != 1:
    # Several passes over rows of different lengths have no single ratio, so XLA's attention is assumed.
    return 1.0, found.backward_products
  return found.keys / slots, found.backward_products


def _under(run: Outline):
  """The mesh context for tracing under jit; pmap creates its own mesh."""
  return jax.set_mesh(run.mesh) if run.config.parallelism.strategy == "jit" else contextlib.nullcontext()


def _params(run: Outline) -> PyTree:
  """The abstract parameters, sharded as in training; replicated with pmap."""
  everywhere = replicated(run.mesh)
  local = run.config.parallelism.strategy == "pmap"
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere if local else x.sharding),
    run.strategy.abstract().params,
  )


def _rows_over(mesh: Mesh, axis: int) -> Sharding:
  return NamedSharding(mesh, PartitionSpec(*(None,) * axis, ("data", "fsdp")) if axis >= 0 else PartitionSpec())
