"""How many floating-point operations a decoder needs, counted by hand.

Counted by hand because XLA counts the body of a scan once. Two counts, of matrix products only (a
multiplication and an addition are two operations; norms, activations and softmax are a few percent at most):

- the model's: causal attention over the keys that a query may see. What the method needs, on any machine; the
  one for model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B).
- executed: what the compiled program does. XLA's attention computes the full square and masks half of it
  away (of hidden slots, only what lies in `decoder.attention.HiddenSlots`); rematerialised layers run twice; the
  readout computes its logits again in the backward pass.

Letters: T tokens, W slots, S = T*W flattened, D model, V vocabulary, N heads, G kv heads, H head size,
L layers, F mlp.
"""

from __future__ import annotations

import jax

from cyb_jax.decoder import DecoderConfig

# Dense bfloat16, per device as JAX counts devices, from the manufacturers' data sheets:
# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, https://www.nvidia.com/en-us/data-center/
_TPU_PEAKS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
}
_GPU_PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# The same names on slower boards, and on a part of a board.
_SLOWER = ("PCIe", "NVL", "MIG")


def forward_flops(
  config: DecoderConfig, *, tokens: int, slots: float, slots_read: float, hidden: bool = False, executed: bool = False
) -> float:
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
  keys = _keys(tokens, slots, hidden, executed)
  return slots * _layers(config, keys) + slots_read * _readout(config)


def train_flops(
  config: DecoderConfig, *, tokens: int, slots: float, slots_read: float, hidden: bool = False, executed: bool = False
) -> float:
  """Operations of one training step, per real token: forward, and twice that for backward.

  As executed, with what is computed again: the logits; with `remat` 'full' the layers, except for the
  products that end them, whose results no gradient needs; with 'dots' attention. Arguments as in
  `forward_flops`.
  """
  keys = _keys(tokens, slots, hidden, executed)
  total = 3 * (slots * _layers(config, keys) + slots_read * _readout(config))
  if executed:
    total += slots_read * _readout(config)
    if config.remat == "full":
      last = config.mlp_size  # mlp down; in parallel with it, attention out
      if config.parallel_residual:
        last += config.num_heads * config.head_size
      spared = config.num_layers * 2 * config.d_model * last
      total += slots * (_layers(config, keys) - spared)
    elif config.remat == "dots":
      total += slots * config.num_layers * _attention(config, keys)
  return total


def peak_flops(device: jax.Device) -> float | None:
  """Dense bfloat16 operations per second that the device can do at best, or None where that is not known."""
  kind = device.device_kind
  if any(word in kind for word in _SLOWER):
    return None
  for name, peak in _GPU_PEAKS.items():
    if name in kind:
      return peak
  return _TPU_PEAKS.get(kind)


def _keys(tokens: int, slots: float, hidden: bool, executed: bool) -> float:
  """Keys of a slot, averaged over the window."""
  seen_of_tokens, seen_of_own = (tokens, slots - 1) if hidden else (tokens * slots, 0)
  return seen_of_tokens + seen_of_own if executed else (seen_of_tokens + 1 + seen_of_own) / 2


def _layers(config: DecoderConfig, keys: float) -> float:
  """One slot through all layers."""
  heads = 2 * config.num_heads + 2 * config.num_kv_heads  # query and out; key and value
  matrices = heads * config.head_size + (3 if config.gated_mlp else 2) * config.mlp_size
  return config.num_layers * (2 * config.d_model * matrices + _attention(config, keys))


def _attention(config: DecoderConfig, keys: float) -> float:
  """One slot's weights and weighted values, in one layer."""
  return 4 * config.num_heads * config.head_size * keys


def _readout(config: DecoderConfig) -> float:
  """The logits of one slot."""
  return 2 * config.d_model * config.vocab_size
