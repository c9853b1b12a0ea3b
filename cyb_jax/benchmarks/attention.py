"""Benchmark of attention alone: visible and hidden pauses, and rows without pauses, with and without the gradient."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from absl import flags

from cyb_jax.benchmarks import timing
from cyb_jax.errors import InputError

_SIZES = ("batch_size", "tokens", "num_slots", "heads", "kv_heads", "head_size")


def define_flags() -> None:
  flags.DEFINE_integer("batch_size", 1, "The number of rows of the batch.")
  flags.DEFINE_integer("tokens", 1024, "The number of tokens of a row.")
  flags.DEFINE_integer("num_slots", 4, "The number of slots of a token: its pauses and one.")
  flags.DEFINE_integer("heads", 12, "The number of heads.")
  flags.DEFINE_integer("kv_heads", 12, "The number of kv heads.")
  flags.DEFINE_integer("head_size", 64, "The size of a head.")
  flags.DEFINE_string("dtype", "auto", "The dtype, bfloat16 or float32; auto: float32 on CPUs, else bfloat16.")
  flags.DEFINE_list("implementations", ["auto"], "Implementations, as in decoder.attention.")
  timing.define_flags()


def attention() -> dict[str, Any]:
  """The time and XLA's temporary memory of each implementation.

  Raises:
    InputError: a flag's value is invalid; nothing was compiled.
  """
  args, repeats = flags.FLAGS, timing.repeats()
  for name in _SIZES:
    if args[name].value < 1:
      raise InputError(f"--{name}: {args[name].value} must be at least 1")
  if args.heads % args.kv_heads:
    raise InputError(f"--kv_heads: {args.kv_heads} must divide --heads={args.heads}")
  if args.dtype not in ("auto", "bfloat16", "float32"):
    raise InputError(f"--dtype: {args.dtype!r} is not one of 'auto', 'bfloat16', 'float32'")
  if not args.implementations:
    raise InputError("--implementations: empty; give some of auto, xla, blocks, cudnn, splash")
  import jax

  dtype = args.dtype
  if dtype == "auto":
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  contenders = [
    _Contender(implementation, pauses, dtype)
    for implementation in args.implementations
    for pauses in ("none", "visible", "hidden")
  ]
  for contender in contenders:
    contender.compile()
  rounds = timing.in_turn([one.seconds for one in contenders], repeats)
  times = [[statistics.median(values) for values in zip(*mine)] for mine in rounds]
  visible = {one.requested: both for one, (_, both) in zip(contenders, times) if one.pauses == "visible"}
  return {
    "benchmark": "attention",
    **{name: args[name].value for name in _SIZES},
    "dtype": dtype,
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "repeats": repeats,
    "rows": [one.about for one in contenders],
    "timing": {
      "rows": [
        {"forward_seconds": forward, "seconds": both, "visible_over_this": visible[one.requested] / both}
        for one, (forward, both) in zip(contenders, times)
      ]
    },
  }


class _Contender:
  """One implementation with one kind of pauses.

  Raises:
    InputError: the implementation is unknown, or cannot run here.
  """

  def __init__(self, implementation: str, pauses: str, dtype: str):
    import jax
    import jax.numpy as jnp

    args = flags.FLAGS
    self.requested, self.pauses = implementation, pauses
    length = args.tokens * (1 if pauses == "none" else args.num_slots)
    keys = jax.random.split(jax.random.key(0), 3)
    self._arrays = [
      jax.random.normal(key, (args.batch_size, length, heads, args.head_size), jnp.dtype(dtype))
      for key, heads in zip(keys, (args.heads, args.kv_heads, args.kv_heads))
    ]
    chosen, *self._functions = _functions(implementation, pauses, self._arrays)
    self.about = {"requested": implementation, "implementation": chosen, "pauses": pauses, "slots": length}

  def compile(self) -> None:
    """Compiles both functions, and runs them once."""
    import jax

    self._programs = [jax.jit(function).lower(*self._arrays).compile() for function in self._functions]
    self.about["temporary_bytes"] = self._programs[1].memory_analysis().temp_size_in_bytes
    self.seconds()

  def seconds(self) -> tuple[float, float]:
    """The seconds of attention, and of attention with its gradient."""
    import jax

    forward, both = (timing.timed(lambda p=p: jax.block_until_ready(p(*self._arrays))) for p in self._programs)
    return forward, both


def _functions(
  implementation: str, pauses: str, arrays: list[Any]
) -> tuple[str, Callable[..., Any], Callable[..., Any]]:
  """(The implementation that is used, attention, attention with the gradients of a sum of its outputs)."""
  import jax
  import jax.numpy as jnp

  from cyb_jax.decoder import attention as implementations

  mask = implementations.HiddenSlots(flags.FLAGS.num_slots) if pauses == "hidden" else None
  chosen = implementations.choose_implementation(
    arrays[0], arrays[1], mask=mask, implementation=implementation, interpret=False
  )

  def forward(query, key, value):
    return implementations.attend(query, key, value, mask=mask, implementation=implementation)

  def summed(*arrays):
    # A gradient that differs between outputs, so that no part of the backward pass can be left out.
    out = forward(*arrays).astype(jnp.float32)
    return (out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)).sum()

  return chosen, forward, jax.value_and_grad(summed, (0, 1, 2))
