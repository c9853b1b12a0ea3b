"""Benchmark of the readout: XLA's temporary memory and time, compared with a dense readout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from absl import flags

from cyb_jax.benchmarks import timing
from cyb_jax.errors import InputError


def define_flags() -> None:
  flags.DEFINE_integer("slots", 131072, "The number of slots that are read.")
  flags.DEFINE_integer("width", 768, "The width of the hidden states, d_model.")
  flags.DEFINE_integer("vocabulary", 50304, "The number of rows of the unembedding.")
  flags.DEFINE_integer("timed_slots", 1024, "The number of slots of the timed runs; a dense readout of them must fit.")
  timing.define_flags()


def readout() -> dict[str, Any]:
  """Measures XLA's temporary memory for value and gradient of CYB-AP at full size, and the time at a smaller size, for
  which dense logits fit into memory: of `weighted_loss` (fused), of `slot_scores` (chunked), and of dense logits; of
  the last two with a frozen unembedding too.
  """
  args, repeats = flags.FLAGS, timing.repeats()
  for name in ("slots", "timed_slots", "width", "vocabulary"):
    value, unit = args[name].value, 4 if name.endswith("slots") else 1
    if value < unit or value % unit:
      raise InputError(f"--{name}: {value} must be a positive multiple of {unit}")
  import jax

  memory = {
    name: _compiled(function, args.slots).memory_analysis().temp_size_in_bytes for name, function in _readouts().items()
  }
  values = _values(args.timed_slots)
  functions = _readouts() | _readouts(frozen=True)
  timed = {name: _compiled(function, args.timed_slots) for name, function in functions.items()}
  seconds = timing.side_by_side(
    {name: lambda p=program: jax.block_until_ready(p(*values)) for name, program in timed.items()}, repeats
  )
  return {
    "benchmark": "readout",
    "slots": args.slots,
    "width": args.width,
    "vocabulary": args.vocabulary,
    "temporary_bytes": memory["fused"],
    "temporary_gib": memory["fused"] / 2**30,
    "chunked_temporary_gib": memory["chunked"] / 2**30,
    "dense_temporary_gib": memory["dense"] / 2**30,
    "device": jax.devices()[0].device_kind,
    "timing": {
      "slots": args.timed_slots,
      "fused_seconds": seconds["fused"],
      "chunked_seconds": seconds["chunked"],
      "dense_seconds": seconds["dense"],
      "fused_over_dense": seconds["fused"] / seconds["dense"],
      "chunked_over_dense": seconds["chunked"] / seconds["dense"],
      "frozen_chunked_seconds": seconds["frozen_chunked"],
      "frozen_dense_seconds": seconds["frozen_dense"],
      "frozen_chunked_over_dense": seconds["frozen_chunked"] / seconds["frozen_dense"],
    },
  }


def _readouts(*, frozen: bool = False) -> dict[str, Callable[..., Any]]:
  """Functions (hidden, unembedding, dk row, targets) -> the sum of CYB-AP's loss, by their names."""
  import jax
  import jax.numpy as jnp

  from cyb_jax import losses
  from cyb_jax.readout import slot_scores, weighted_loss
  from cyb_jax.stopping import SlotScores

  def fused(hidden, unembedding, row, targets):
    def token_loss(scores, _):
      return losses.cyb(scores)

    return weighted_loss(token_loss, hidden, unembedding, targets, row, jnp.ones(targets.shape), prior=0.9)[0]

  def chunked(hidden, unembedding, row, targets):
    return losses.cyb(slot_scores(hidden, unembedding, targets, row, prior=0.9, frozen=frozen)).sum()

  def dense(hidden, unembedding, row, targets):
    unembedding = jax.lax.stop_gradient(unembedding) if frozen else unembedding
    rows = jnp.concatenate([unembedding, row[None]])
    return losses.cyb(SlotScores.from_logits(hidden @ rows.T, targets, -1, prior=0.9)).sum()

  if frozen:
    return {"frozen_chunked": chunked, "frozen_dense": dense}
  return {"fused": fused, "chunked": chunked, "dense": dense}


def _arguments(slots: int) -> tuple[Any, ...]:
  """The shapes of the arguments: hidden f32[slots / 4, 4, D], unembedding f32[V, D], dk row f32[D], targets i32."""
  import jax
  import jax.numpy as jnp

  args = flags.FLAGS
  return (
    jax.ShapeDtypeStruct((slots // 4, 4, args.width), jnp.float32),
    jax.ShapeDtypeStruct((args.vocabulary, args.width), jnp.float32),
    jax.ShapeDtypeStruct((args.width,), jnp.float32),
    jax.ShapeDtypeStruct((slots // 4,), jnp.int32),
  )


def _values(slots: int) -> list[Any]:
  """Arrays of these shapes: normal numbers with a standard deviation of 0.02, and targets of 0."""
  import jax
  import jax.numpy as jnp

  keys = jax.random.split(jax.random.key(0), 4)
  return [
    0.02 * jax.random.normal(key, x.shape, x.dtype) if x.dtype == jnp.float32 else jnp.zeros(x.shape, x.dtype)
    for key, x in zip(keys, _arguments(slots))
  ]


def _compiled(function: Callable[..., Any], slots: int) -> Any:
  """The compiled value and gradient of a readout of `slots` slots."""
  import jax

  return jax.jit(jax.value_and_grad(function, (0, 1, 2))).lower(*_arguments(slots)).compile()
