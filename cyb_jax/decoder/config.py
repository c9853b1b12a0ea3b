"""The configuration of a decoder and of its adapters, validated when it is made.

Letters: D model, V vocabulary, N heads, G kv heads, H head size, L layers, F mlp.
"""

from __future__ import annotations

import dataclasses
import math

from cyb_jax.errors import InputError

SIZES = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_size", "mlp_size")
TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
_CHOICES = {
  "norm": ("rmsnorm", "rmsnorm_plus_one", "layernorm"),
  "activation": ("silu", "gelu", "gelu_tanh"),
  "attention_bias": ("none", "qkv", "all"),
  "remat": ("none", "full", "dots"),
  "dtype": ("float32", "bfloat16"),
  "param_dtype": ("float32", "bfloat16"),
  "attention": ATTENTION_IMPLEMENTATIONS,
  "initializer": ("normal", "scaled", "small"),
}
_SWITCHES = (
  "gated_mlp", "mlp_bias", "parallel_residual", "tied_embeddings", "scale_embeddings", "scan_layers",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Which matrices have a low-rank adapter, and its size; see `lora.adapt`.

  Attributes:
    rank: the inner size of A and B.
    alpha: the adapter's output is multiplied by alpha / rank.
    targets: some of `TARGETS`; these matrices have an adapter in every layer.

  Raises:
    InputError: a value is invalid; the message names the field of the config group `tuning` that holds the value.
  """

  rank: int = 8
  alpha: float = 16.0
  targets: tuple[str, ...] = ("query", "value")

  def __post_init__(self):
    if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
      raise InputError(f"tuning.lora_rank: {self.rank!r} must be a whole number of at least 1")
    if not 0 < self.alpha < math.inf:
      raise InputError(f"tuning.lora_alpha: {self.alpha!r} must be positive and finite")
    known = all(name in TARGETS for name in self.targets)
    if not self.targets or not known or len(set(self.targets)) < len(self.targets):
      raise InputError(
        f"tuning.lora_targets: {','.join(self.targets)!r} must be some of {', '.join(TARGETS)}, each once, with commas"
        " between them"
      )

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Shape and style of a decoder. The style defaults to Llama's; sizes have no default.

  Raises:
    InputError: a field is out of its range, or two do not go together; the message names `decoder.field`.
  """

  vocab_size: int  # V; rows of the embedding table, which holds neither pauses nor <don't know>
  num_layers: int  # L
  d_model: int  # D
  num_heads: int  # N
  num_kv_heads: int  # G, divides N
  head_size: int  # H; N * H need not be D
  mlp_size: int  # F

  norm: str = "rmsnorm"  # or 'rmsnorm_plus_one' (Gemma: times 1 + scale), 'layernorm' (scale and bias)
  norm_epsilon: float = 1e-5
  activation: str = "silu"  # or 'gelu' (exact), 'gelu_tanh'
  gated_mlp: bool = True  # down(activation(gate x) * up x), else down(activation(up x))
  attention_bias: str = "none"  # or 'qkv', 'all' (the output projection too)
  mlp_bias: bool = False
  parallel_residual: bool = False  # x + attention(norm x) + mlp(norm' x), as in Pythia
  rope_base: float = 10_000.0
  rope_fraction: float = 1.0  # RoPE rotates this fraction of each head, from its start
  tied_embeddings: bool = True
  scale_embeddings: bool = False  # inputs times sqrt(D), as in Gemma; with initializer 'small' sqrt(2.5 D)
  soft_cap: float | None = None  # logits become cap * tanh(logits / cap); the readout applies it

  initializer: str = "normal"  # or 'scaled', 'small'; see init_params
  dtype: str = "float32"  # of activations and matrix products; norms, softmax and RoPE are computed in float32
  param_dtype: str = "float32"  # 'bfloat16' suits frozen parameters only: small updates would be rounded away
  attention: str = "auto"  # or 'xla', 'cudnn', 'splash'; see attention.attend
  remat: str = "none"  # or 'full' (keeps the layers' inputs), 'dots' (also keeps all products but attention's)
  scan_layers: bool = False  # one compiled layer, parameters stacked on a leading axis 'layers'
  lora: LoraConfig | None = None  # low-rank adapters of some matrices; see lora.py

  def __post_init__(self):
    for name in SIZES:
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _bad(name, value, "an integer of at least 1")
    for name, choices in _CHOICES.items():
      if getattr(self, name) not in choices:
        raise _bad(name, getattr(self, name), f"one of {', '.join(choices)}")
    for name in _SWITCHES:
      if not isinstance(getattr(self, name), bool):
        raise _bad(name, getattr(self, name), "True or False")
    for name in ("norm_epsilon", "rope_base", "rope_fraction"):
      if not _is_positive(getattr(self, name)):
        raise _bad(name, getattr(self, name), "a positive number")
    if self.soft_cap is not None and not _is_positive(self.soft_cap):
      raise _bad("soft_cap", self.soft_cap, "a positive number, or None for no cap")
    if self.num_heads % self.num_kv_heads:
      raise _bad("num_kv_heads", self.num_kv_heads, f"a divisor of decoder.num_heads = {self.num_heads}")
    off = abs(self.rotated_size - self.rope_fraction * self.head_size)
    if self.rope_fraction > 1 or self.rotated_size % 2 or off > 1e-6:
      wanted = f"a fraction of at most 1 that gives an even part of decoder.head_size = {self.head_size}"
      raise _bad("rope_fraction", self.rope_fraction, wanted)
    if self.attention == "cudnn" and self.dtype == "float32":
      raise _bad("attention", self.attention, "auto or xla, or decoder.dtype = bfloat16 (cuDNN wants that)")
    if self.lora is not None and "gate" in self.lora.targets and not self.gated_mlp:
      raise InputError(
        f"tuning.lora_targets: {','.join(self.lora.targets)!r} names 'gate', but this decoder has none"
        " (decoder.gated_mlp is False); leave it out"
      )

  @property
  def rotated_size(self) -> int:
    """How many numbers of each head RoPE rotates."""
    return round(self.rope_fraction * self.head_size)


def _is_positive(value: object) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _bad(field: str, value: object, wanted: str) -> InputError:
  return InputError(f"decoder.{field}: {value!r} will not do; expected {wanted}")
