"""How many floating-point operations a decoder needs, counted by hand.

Counted by hand because XLA counts the body of a scan once. Two counts, of matrix products only (a
multiplication and an addition are two operations; norms, activations and softmax are a few percent at most):

- the model's: causal attention over the keys that a query may see. What the method needs, on any machine; the
  one for model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
- executed: what the compiled program does. XLA's attention computes the full square and masks half of it
  away (of hidden slots, only what lies in `decoder.attention.HiddenSlots`); rematerialised layers run twice; the
  readout computes its logits again in the backward pass.

Letters: T tokens, W slots, S = T*W flattened, D model, V vocabulary, N heads, G kv heads, H head size,
L layers, F mlp, r rank of adapters.
"""

from __future__ import annotations

import dataclasses

import jax

from cyb_jax.decoder import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a device can do at best, as JAX counts devices; None: not known here.

  Attributes:
    peak_flops: dense bfloat16 operations per second.
    hbm_bytes: of its memory, what programs may use: less than the data sheet's, by what the runtime keeps.
    hbm_bandwidth: bytes per second from and to it.
    link_bandwidth: bytes per second that it can send over all of its links to other chips together, which is half of
      what data sheets call bidirectional.
  """

  peak_flops: float
  hbm_bytes: int | None = None
  hbm_bandwidth: float | None = None
  link_bandwidth: float | None = None


# hbm_bytes: what libtpu 0.0.42 says when a program needs more. The other columns:
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
# The same names on slower boards, and on a part of a board.
_SLOWER = ("PCIe", "NVL", "MIG")


@dataclasses.dataclass(frozen=True)
class Cost:
  """Operations, by what needs them.

  Attributes:
    matrices: of the layers.
    attention: its weights, and the weighted values.
    readout: the logits.
    adapters: the matrices of LoRA.
    routing: what decides where slots go, of methods that have such.
  """

  matrices: float = 0.0
  attention: float = 0.0
  readout: float = 0.0
  adapters: float = 0.0
  routing: float = 0.0

  @property
  def total(self) -> float:
    return sum(dataclasses.astuple(self))

  def __add__(self, other: Cost) -> Cost:
    mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
    return Cost(*(a + b for a, b in zip(mine, theirs)))

  def times(self, factor: float) -> Cost:
    """The same, so many times."""
    return Cost(*(factor * value for value in dataclasses.astuple(self)))


def forward_cost(
  config: DecoderConfig, *, tokens: int, slots: float, slots_read: float, hidden: bool = False, executed: bool = False
) -> Cost:
  """Operations of one forward pass, per real token.

  Each of the S = T*W slots passes all matrices, 2 operations per parameter, and attends: 4 N H operations per
  key (half for the weights, half for the values), over (S + 1)/2 keys on average, or S as executed; where slots are
  hidden, over (T + 1)/2 tokens and (W - 1)/2 slots of its own token, or T + W - 1 as executed. Each slot that is read
  out costs 2 D V.

  Args:
    config: the decoder. Embedding rows are looked up, which costs nothing.
    tokens: T, real tokens in a window.
    slots: W, slots per token; a fraction where rows of a fixed number of slots are shared out.
    slots_read: how many of a token's slots are read out.
    hidden: whether the slots after a token's first are seen by that token's alone.
    executed: count what the program does. Attention is taken to be XLA's: cuDNN's skips the masked half.
  """
  return pass_cost(config, slots=slots, keys=_keys(tokens, slots, hidden, executed), slots_read=slots_read)


def pass_cost(
  config: DecoderConfig,
  *,
  slots: float,
  keys: float,
  slots_read: float = 0.0,
  layers: int | None = None,
  routing: float = 0.0,
) -> Cost:
  """Operations of slots that pass some layers once, per real token; methods that pass them several times add up.

  Args:
    config: the decoder.
    slots: per real token.
    keys: of each of them, on average; see `causal_keys`.
    slots_read: how many are read out, per real token.
    layers: that are passed; None: all.
    routing: of a slot, in parameters that aren't the decoder's.
  """
  layers = config.num_layers if layers is None else layers
  return Cost(
    matrices=slots * layers * 2 * sum(_matrices(config).values()),
    attention=slots * layers * _attention(config, keys),
    readout=slots_read * _readout(config),
    adapters=slots * layers * 2 * sum(_adapters(config).values()),
    routing=slots * 2 * routing,
  )


def causal_keys(length: float, executed: bool = False) -> float:
  """Keys of a slot in a row of so many slots, averaged: it sees itself and those before it; XLA computes the square."""
  return length if executed else (length + 1) / 2


def train_cost(
  config: DecoderConfig,
  *,
  tokens: int,
  slots: float,
  slots_read: float,
  hidden: bool = False,
  executed: bool = False,
  frozen: bool = False,
) -> Cost:
  """Operations of one training step, per real token: forward, and for each product two more backward, for the gradients
  of both of its factors.

  A matrix that isn't trained has one, that of its input: pauses' rows are learned through all layers. As executed, with
  what is computed again: the logits; with `remat` 'full' the layers, except for the products that end them, whose
  results no gradient needs; with 'dots' attention.

  Args:
    frozen: whether the decoder's own parameters aren't trained; its adapters are.
    config, tokens, slots, slots_read, hidden, executed: as in `forward_cost`.
  """
  return train_pass_cost(
    config,
    slots=slots,
    keys=_keys(tokens, slots, hidden, executed),
    slots_read=slots_read,
    executed=executed,
    frozen=frozen,
  )


def train_pass_cost(
  config: DecoderConfig,
  *,
  slots: float,
  keys: float,
  slots_read: float = 0.0,
  layers: int | None = None,
  routing: float = 0.0,
  executed: bool = False,
  frozen: bool = False,
  scaled: bool = False,
) -> Cost:
  """The same as `train_cost` of slots that pass some layers once; arguments as in `pass_cost`.

  `scaled`: whether updates of the residual stream are multiplied by what has a gradient (`Decoder.run_layers`); then
  the results of the products that end layers are needed too.
  """
  layers = config.num_layers if layers is None else layers
  once = pass_cost(config, slots=slots, keys=keys, slots_read=slots_read, layers=layers, routing=routing)
  trained = 2 if frozen else 3
  matrices, attention, readout, adapters = (
    trained * once.matrices, 3 * once.attention, trained * once.readout, 3 * once.adapters,
  )  # fmt: skip
  if executed:
    readout += once.readout
    if config.remat == "full":
      last = () if scaled else ("down", "out") if config.parallel_residual else ("down",)
      matrices += once.matrices - slots * layers * 2 * sum(_matrices(config)[name] for name in last)
      attention += once.attention
      # Of an adapter that ends a layer x A is needed, for the gradient of B.
      spared = sum(config.lora.rank * config.d_model for name in last if name in _adapters(config))
      adapters += once.adapters - slots * layers * 2 * spared
    elif config.remat == "dots":
      attention += once.attention
  return Cost(matrices, attention, readout, adapters, 3 * once.routing)


def slot_flops(config: DecoderConfig, *, slots: float, keys: float, slots_read: float) -> float:
  """Operations of the model for slots that lie anywhere.

  Args:
    config: the decoder.
    slots: how many pass the layers.
    keys: how many keys they see, all of them together.
    slots_read: how many are read out.
  """
  matrices = 2 * (sum(_matrices(config).values()) + sum(_adapters(config).values()))
  return config.num_layers * (slots * matrices + _attention(config, keys)) + slots_read * _readout(config)


def chip(device: jax.Device) -> Chip | None:
  """What the device can do at best, or None where that is not known."""
  kind = device.device_kind
  if any(word in kind for word in _SLOWER):
    return None
  for name, found in _GPUS.items():
    if name in kind:
      return found
  return _TPUS.get(kind)


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 operations per second that the device can do at best, or None where that is not known."""
  found = chip(device)
  return None if found is None else found.peak_flops


def _keys(tokens: int, slots: float, hidden: bool, executed: bool) -> float:
  """Keys of a slot, averaged over the window."""
  seen_of_tokens, seen_of_own = (tokens, slots - 1) if hidden else (tokens * slots, 0)
  return causal_keys(seen_of_tokens + seen_of_own, executed)


def _sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
  """(inputs, outputs) of the matrices of a layer."""
  model, inner = config.d_model, config.mlp_size
  heads, kv_heads = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
  sizes = {"query": (model, heads), "key": (model, kv_heads), "value": (model, kv_heads), "out": (heads, model)}
  sizes |= {"gate": (model, inner)} if config.gated_mlp else {}
  return sizes | {"up": (model, inner), "down": (inner, model)}


def _matrices(config: DecoderConfig) -> dict[str, int]:
  """Parameters of the matrices of a layer."""
  return {name: inputs * outputs for name, (inputs, outputs) in _sizes(config).items()}


def _adapters(config: DecoderConfig) -> dict[str, int]:
  """Parameters of the adapters of a layer."""
  if config.lora is None:
    return {}
  sizes = _sizes(config)
  return {name: config.lora.rank * sum(sizes[name]) for name in config.lora.targets}


def _attention(config: DecoderConfig, keys: float) -> float:
  """One slot's weights and weighted values, in one layer."""
  return 4 * config.num_heads * config.head_size * keys


def _readout(config: DecoderConfig) -> float:
  """The logits of one slot."""
  return 2 * config.d_model * config.vocab_size
