"""The floating-point operations of a decoder, counted by hand, because XLA counts the body of a scan once.

Only matrix products are counted; a multiplication and an addition are two operations. Norms, activations and softmax
are a few percent at most. There are two counts:

- model: causal attention counts only the keys that a query attends to. The method needs these operations on any
  machine, and model FLOPs utilisation is computed from them (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
  appendix B).
- executed: the operations of the compiled program. XLA's attention computes the full square and masks half of it (with
  hidden slots only the blocks of `decoder.attention.HiddenSlots`), and masks the keys before a window; rematerialised
  layers run twice; methods that train on `readout.slot_scores` compute the logits again for the backward pass, unless
  the unembedding is frozen. (Nor do they if the logits are few, see `tiling.KEPT`, which depends on the batch and is
  not counted.)

Letters: T tokens, W slots, S = T*W flattened, D model, V vocabulary, N heads, G kv heads, H head size, L layers, F mlp,
r rank of adapters.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax

from cyb_jax.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates of a device, as JAX counts devices; None for an unknown number.

  Attributes:
    peak_flops: dense bfloat16 operations per second.
    hbm_bytes: device memory that programs may use, which is the data sheet's figure minus the runtime's reserve.
    hbm_bandwidth: bytes per second between the chip and its memory.
    link_bandwidth: bytes per second that the chip can send over all links to other chips together; this is half of the
      number that data sheets call bidirectional.
  """

  peak_flops: float
  hbm_bytes: int | None = None
  hbm_bandwidth: float | None = None
  link_bandwidth: float | None = None


# hbm_bytes is from the error that libtpu 0.0.42 reports for a program that needs more. Sources of the other columns:
# - https://docs.cloud.google.com/tpu/docs/v4; its six links of 50e9: Jouppi et al. 2023, https://arxiv.org/abs/2304.01433
# - https://docs.cloud.google.com/tpu/docs/v5e, https://docs.cloud.google.com/tpu/docs/v5p (4800 Gbit/s),
#   https://docs.cloud.google.com/tpu/docs/v6e
_V4 = Chip(275e12, round(30.75 * 2**30), 1200e9, 300e9)
_V5E = Chip(197e12, round(15.75 * 2**30), 819e9, 200e9)
_V5P = Chip(459e12, round(95.74 * 2**30), 2765e9, 600e9)
_V6E = Chip(918e12, round(31.25 * 2**30), 1638e9, 400e9)
_TPUS = {
  "TPU v4": _V4,
  "TPU v5 lite": _V5E,
  "TPU v5e": _V5E,
  "TPU v5": _V5P,
  "TPU v5p": _V5P,
  "TPU v6 lite": _V6E,
  "TPU v6e": _V6E,
}
# https://www.nvidia.com/en-us/data-center/
_GPUS = {"H100": Chip(989e12), "H200": Chip(989e12), "A100": Chip(312e12)}
# Slower boards, and partitions of a board, whose names contain the names above.
_SLOWER = ("PCIe", "NVL", "MIG")


@dataclasses.dataclass(frozen=True)
class Cost:
  """Numbers of operations by component.

  Attributes:
    matrices: the matrices of the layers.
    attention: attention weights and weighted values.
    readout: the logits.
    adapters: the matrices of LoRA.
    routing: the routers of methods that have routers.
  """

  matrices: float = 0.0
  attention: float = 0.0
  readout: float = 0.0
  adapters: float = 0.0
  routing: float = 0.0

  @property
  def total(self) -> float:
    """The sum over all components."""
    return sum(self._values())

  def __add__(self, other: Cost) -> Cost:
    return Cost(*(a + b for a, b in zip(self._values(), other._values())))

  def times(self, factor: float) -> Cost:
    """Returns the cost multiplied by a factor."""
    return Cost(*(factor * value for value in self._values()))

  def _values(self) -> tuple[float, ...]:
    return dataclasses.astuple(self)


def forward_cost(
  config: DecoderConfig,
  *,
  tokens: int,
  slots: float,
  slots_read: float,
  hidden: bool = False,
  shifting: bool = False,
  executed: bool = False,
) -> Cost:
  """Returns the operations of one forward pass, per real token.

  Each of the S = T*W slots is multiplied by all matrices (2 operations per parameter) and attends to keys: 4 N H
  operations per key, half for the weights and half for the values. A slot has (S + 1)/2 keys on average, or S as
  executed; with hidden slots it has (T + 1)/2 first slots and (W - 1)/2 slots of its own token, or T + W - 1 keys as
  executed. A slot that is read out costs 2 D V.

  Args:
    config: the decoder. An embedding lookup costs nothing.
    tokens: T, real tokens in a window.
    slots: W, slots per token; fractional if a row has a fixed number of slots.
    slots_read: the number of a token's slots that are read out.
    hidden: whether the slots after the first slot of a token are keys for the slots of that token only.
    shifting: see `local_keys`.
    executed: whether to count the operations of the compiled program. XLA's attention is assumed; cuDNN's attention
      skips the masked half.
  """
  return pass_cost(
    config,
    slots=slots,
    keys=_keys(tokens, slots, hidden, executed),
    local_keys=local_keys(config, tokens, slots, hidden=hidden, shifting=shifting, executed=executed),
    slots_read=slots_read,
  )


def pass_cost(
  config: DecoderConfig,
  *,
  slots: float,
  keys: float,
  local_keys: float | None = None,
  slots_read: float = 0.0,
  layers: Sequence[int] | None = None,
  routing: float = 0.0,
) -> Cost:
  """Returns the operations, per real token, of slots that pass through layers once.

  A method whose slots pass through the layers several times adds several costs.

  Args:
    config: the decoder.
    slots: the number of slots per real token.
    keys: the average number of keys of a slot, see `causal_keys`.
    local_keys: the average number in local layers, see `local_keys`; None: `keys`.
    slots_read: the number of slots that are read out, per real token.
    layers: the numbers of the layers, each as often as the slots pass through it; None: all layers once.
    routing: the number of parameters outside the decoder that a slot is multiplied by.
  """
  layers = range(config.num_layers) if layers is None else layers
  return Cost(
    matrices=slots * len(layers) * 2 * sum(_matrices(config).values()),
    attention=slots * _attention(config, _keys_of_layers(config, keys, local_keys, layers)),
    readout=slots_read * _readout(config),
    adapters=slots * len(layers) * 2 * sum(_adapters(config).values()),
    routing=slots * 2 * routing,
  )


def local_keys(
  config: DecoderConfig,
  tokens: float,
  slots: float = 1.0,
  *,
  hidden: bool = False,
  shifting: bool = False,
  executed: bool = False,
) -> float | None:
  """Returns the average number of keys of a slot in a layer with the config's window.

  Args:
    config: the decoder.
    tokens, slots, hidden: as in `forward_cost`.
    shifting: whether every slot has a position of its own, so that the window counts slots; otherwise the slots of a
      token have its position.
    executed: as in `forward_cost`.

  Returns:
    The number; None if it is the number in a layer without a window.
  """
  if config.window is None or executed:
    return None
  window: float = config.window
  if shifting and not hidden:
    tokens, slots = tokens * slots, 1.0
  elif shifting:
    window = max(1.0, window / slots)
  window = min(window, tokens)
  # Of the first slots of tokens, token t (from 1) sees min(t, window).
  of_tokens = (window * (window + 1) / 2 + (tokens - window) * window) / tokens
  before = (of_tokens - 1) * (1 if hidden else slots)
  return before + (slots + 1) / 2


def last_local_keys(config: DecoderConfig, tokens: float) -> float | None:
  """Returns `local_keys` of the last of `tokens` tokens with one slot each."""
  return None if config.window is None else min(config.window, tokens)


def total_keys(counts: Sequence[int], window: int | None, *, of_own: bool = True, hidden: bool = False) -> float:
  """Returns the number of keys of all slots of a text together, in a layer.

  Args:
    counts: the number of slots of each token.
    window: the number of tokens, its own included, that a token sees; None: all tokens before it.
    of_own: whether a slot also sees the slots before it of its own token; loops do not.
    hidden: whether the slots of other tokens count as one, because only one of them is a key.
  """
  ends, keys = [0, *itertools.accumulate(counts)], 0.0
  for token, count in enumerate(counts):
    first = 0 if window is None else max(0, token + 1 - window)
    others = token - first if hidden else ends[token] - ends[first]
    keys += count * others + (count * (count + 1) / 2 if of_own else count)
  return keys


def _keys_of_layers(config: DecoderConfig, keys: float, local: float | None, layers: Sequence[int]) -> float:
  """Returns the sum of the keys over layers."""
  return sum(keys if local is None or config.is_global(number) else local for number in layers)


def causal_keys(length: float, executed: bool = False) -> float:
  """Returns the average number of keys of a slot in a row of `length` slots.

  A slot attends to itself and to the slots before it. As executed, XLA computes the full square.
  """
  return length if executed else (length + 1) / 2


def train_cost(
  config: DecoderConfig,
  *,
  tokens: int,
  slots: float,
  slots_read: float,
  hidden: bool = False,
  shifting: bool = False,
  executed: bool = False,
  frozen: bool = False,
  reads_twice: bool = False,
) -> Cost:
  """Returns the operations of one training step, per real token.

  Each product of the forward pass has two products in the backward pass, for the gradients of its two factors. A matrix
  that is not trained has one, for the gradient of its input, because the pauses are trained through all layers. As
  executed, recomputation counts too: with `reads_twice` the logits of a trained unembedding; with `remat` 'full' the
  layers except their last products, whose results no gradient needs; with `remat` 'dots' XLA's attention and the
  product with attention's output matrix.

  Args:
    config, tokens, slots, slots_read, hidden, shifting, executed: as in `forward_cost`.
    frozen: whether the decoder's parameters are frozen while its adapters are trained.
    reads_twice: whether the backward pass computes the logits again: `readout.slot_scores` does, and
      `readout.weighted_loss` does not.
  """
  return train_pass_cost(
    config,
    slots=slots,
    keys=_keys(tokens, slots, hidden, executed),
    local_keys=local_keys(config, tokens, slots, hidden=hidden, shifting=shifting, executed=executed),
    slots_read=slots_read,
    executed=executed,
    frozen=frozen,
    reads_twice=reads_twice,
  )


def train_pass_cost(
  config: DecoderConfig,
  *,
  slots: float,
  keys: float,
  local_keys: float | None = None,
  slots_read: float = 0.0,
  layers: Sequence[int] | None = None,
  routing: float = 0.0,
  executed: bool = False,
  frozen: bool = False,
  reads_twice: bool = False,
  scaled: bool = False,
) -> Cost:
  """Returns `train_cost` of slots that pass through layers once; see `pass_cost` for the other arguments.

  Args:
    executed, frozen, reads_twice: as in `train_cost`.
    scaled: whether the updates of the residual stream are multiplied by a factor that has a gradient
      (`Decoder.run_layers`). The gradient then also needs the results of the last products of layers.
  """
  layers = range(config.num_layers) if layers is None else layers
  once = pass_cost(
    config, slots=slots, keys=keys, local_keys=local_keys, slots_read=slots_read, layers=layers, routing=routing
  )
  trained = 2 if frozen else 3
  matrices, attention, readout, adapters = (
    trained * once.matrices, 3 * once.attention, trained * once.readout, 3 * once.adapters,
  )  # fmt: skip
  if executed:
    readout += once.readout if reads_twice and not frozen else 0
    # A norm after a product needs its result for the gradient.
    needed = scaled or config.norm_placement != "before"
    last: tuple[str, ...] = () if needed else ("down", "out") if config.parallel_residual else ("down",)
    rank = 0 if config.lora is None else config.lora.rank
    if config.remat == "full":
      matrices += once.matrices - slots * len(layers) * 2 * sum(_matrices(config)[name] for name in last)
      attention += once.attention
      # If an adapter B A ends a layer, only its product with B is not recomputed: the gradient of B needs A x.
      spared = sum(rank * config.d_model for name in last if name in _adapters(config))
      adapters += once.adapters - slots * len(layers) * 2 * spared
    elif config.remat == "dots":
      attention += once.attention
      matrices += slots * len(layers) * 2 * _matrices(config)["out"] * ("out" not in last)
      adapters += slots * len(layers) * 2 * rank * _sizes(config)["out"][0] * ("out" in _adapters(config))
  return Cost(matrices, attention, readout, adapters, 3 * once.routing)


def slot_flops(
  config: DecoderConfig, *, slots: float, keys: float, slots_read: float, local_keys: float | None = None
) -> float:
  """Returns the operations of the model for a number of slots with a known number of keys.

  Args:
    config: the decoder.
    slots: the number of slots that pass through the layers.
    keys: the total number of keys of all slots.
    slots_read: the number of slots that are read out.
    local_keys: the total number in layers with the config's window; None: `keys`.
  """
  matrices = 2 * (sum(_matrices(config).values()) + sum(_adapters(config).values()))
  attention = _attention(config, _keys_of_layers(config, keys, local_keys, range(config.num_layers)))
  return config.num_layers * slots * matrices + attention + slots_read * _readout(config)


def chip(device: jax.Device) -> Chip | None:
  """Returns the peak rates of a device; None if they are unknown."""
  kind = device.device_kind
  if any(word in kind for word in _SLOWER):
    return None
  for name, found in _GPUS.items():
    if name in kind:
      return found
  return _TPUS.get(kind)


def peak_flops(device: jax.Device) -> float | None:
  """Returns the peak rate of a device in dense bfloat16 operations per second; None if it is unknown."""
  found = chip(device)
  return None if found is None else found.peak_flops


def _keys(tokens: int, slots: float, hidden: bool, executed: bool) -> float:
  """Returns the average number of keys of a slot in a window."""
  of_tokens, of_own_token = (tokens, slots - 1) if hidden else (tokens * slots, 0)
  return causal_keys(of_tokens + of_own_token, executed)


def _sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
  """Returns (inputs, outputs) of each matrix of a layer."""
  model, inner = config.d_model, config.mlp_size
  heads, kv_heads = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
  sizes = {"query": (model, heads), "key": (model, kv_heads), "value": (model, kv_heads), "out": (heads, model)}
  sizes |= {"gate": (model, inner)} if config.gated_mlp else {}
  return sizes | {"up": (model, inner), "down": (inner, model)}


def _matrices(config: DecoderConfig) -> dict[str, int]:
  """Returns the number of parameters of each matrix of a layer."""
  return {name: inputs * outputs for name, (inputs, outputs) in _sizes(config).items()}


def _adapters(config: DecoderConfig) -> dict[str, int]:
  """Returns the number of parameters of each adapter of a layer."""
  if config.lora is None:
    return {}
  sizes = _sizes(config)
  return {name: config.lora.rank * sum(sizes[name]) for name in config.lora.targets}


def _attention(config: DecoderConfig, keys: float) -> float:
  """Returns the operations of the attention of one slot in one layer."""
  return 4 * config.num_heads * config.head_size * keys


def _readout(config: DecoderConfig) -> float:
  """Returns the operations of the logits of one slot."""
  return 2 * config.d_model * config.vocab_size
