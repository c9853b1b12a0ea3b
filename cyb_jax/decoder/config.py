"""The configuration of a decoder and of its adapters; the dataclasses validate their fields on construction.

Letters: D model, V vocabulary, N heads, G kv heads, H head size, L layers, F mlp.
"""

from __future__ import annotations

import dataclasses

from cyb_jax.decoder import rope_scaling
from cyb_jax.decoder.quantization import SCHEMES
from cyb_jax.decoder.rope_scaling import RopeScaling
from cyb_jax.errors import InputError
from cyb_jax.field_rules import (
  POSITIVE,
  POSITIVE_SHARE,
  SWITCH,
  Rule,
  check_fields,
  checked_later,
  one_of,
  or_none,
  whole_number,
)

SIZES = ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_size", "mlp_size")
TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
ATTENTION_IMPLEMENTATIONS = ("auto", "xla", "blocks", "cudnn", "splash")


def _are_targets(value: tuple[str, ...]) -> bool:
  return bool(value) and all(name in TARGETS for name in value) and len(set(value)) == len(value)


RULES: dict[str, Rule] = {
  **dict.fromkeys(SIZES, whole_number(1)),
  "norm": one_of("rmsnorm", "rmsnorm_plus_one", "layernorm"),
  "activation": one_of("silu", "gelu", "gelu_tanh"),
  "norm_placement": one_of("before", "after", "both"),
  "attention_bias": one_of("none", "qkv", "all"),
  "query_key_norm": one_of("none", "head", "all"),
  "remat": one_of("none", "full", "dots"),
  "dtype": one_of("float32", "bfloat16"),
  "param_dtype": one_of("float32", "bfloat16", *SCHEMES),
  "attention": one_of(*ATTENTION_IMPLEMENTATIONS),
  "initializer": one_of("normal", "scaled", "small"),
  "gated_mlp": SWITCH,
  "mlp_bias": SWITCH,
  "parallel_residual": SWITCH,
  "tied_embeddings": SWITCH,
  "scale_embeddings": SWITCH,
  "scan_layers": SWITCH,
  "norm_epsilon": POSITIVE,
  "rope_base": POSITIVE,
  "rope_fraction": POSITIVE_SHARE,
  "rope_scaling": checked_later(f"'' or KIND:NAME=NUMBER,... with a kind of {', '.join(rope_scaling.KINDS)}"),
  "learned_positions": or_none(whole_number(1), "for RoPE"),
  "window": or_none(whole_number(1), "for no window"),
  "global_every": or_none(whole_number(1), "if all layers are alike"),
  "global_rope": SWITCH,
  "local_rope_base": or_none(POSITIVE, "for rope_base"),
  "query_scalar": or_none(POSITIVE, "for head_size"),
  "attention_soft_cap": or_none(POSITIVE, "for no cap"),
  "soft_cap": or_none(POSITIVE, "for no cap"),
}
LORA_RULES: dict[str, Rule] = {
  "lora_rank": whole_number(1),
  "lora_alpha": POSITIVE,
  "lora_targets": Rule(_are_targets, f"some of {', '.join(TARGETS)}, each once, with commas between them"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """The matrices that have a low-rank adapter, and the size of the adapters; see `lora.adapt`.

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
    check_fields("tuning", self, LORA_RULES, prefix="lora_")

  @property
  def scale(self) -> float:
    """alpha / rank."""
    return self.alpha / self.rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Shape and style of a decoder. The style defaults to Llama's; sizes have no default.

  Layers are local or global. With `global_every` = n every n-th layer is global, counted from 1, and the others are
  local; without it all layers are local if there is a window, and else global. Only local layers have the window
  (Gemma 2 and 3, Mistral); only global layers have `rope_scaling` if `local_rope_base` is set (Gemma 3), and no RoPE
  if `global_rope` is False (SmolLM3).

  Attributes:
    vocab_size: V, rows of the embedding table, which holds neither pauses nor `<don't know>`.
    num_layers: L, the number of layers.
    d_model: D, the width of the residual stream.
    num_heads: N, query heads of a layer.
    num_kv_heads: G, key and value heads of a layer; it divides num_heads.
    head_size: H, the width of a head; N * H need not be D.
    mlp_size: F, the width of the hidden layer of the mlp.
    norm: the kind of the norms: 'rmsnorm'; 'rmsnorm_plus_one', times 1 + scale, as in Gemma; or 'layernorm', with scale
      and bias.
    norm_epsilon: the constant that is added to the variance inside a norm.
    norm_placement: where a layer has its norms: 'before' attention and mlp; 'after' them, before their outputs are
      added to the residual stream, as in OLMo 2; or 'both', as in Gemma 2.
    activation: the activation of the mlp: 'silu', 'gelu' (exact) or 'gelu_tanh'.
    gated_mlp: whether the mlp is down(activation(gate x) * up x) instead of down(activation(up x)).
    attention_bias: which projections of attention have a bias: 'none', 'qkv', or 'all', which includes the output.
    query_key_norm: the norm of queries and keys before RoPE: 'none'; 'head', over each head, as in Qwen3; or 'all',
      over all heads together, as in OLMo 2.
    query_scalar: attention scores are divided by sqrt(query_scalar); None: head_size.
    attention_soft_cap: the bound of attention scores, as in `soft_cap`, before the mask; None: no bound.
    mlp_bias: whether the matrices of the mlp have biases.
    parallel_residual: whether a layer is x + attention(norm x) + mlp(norm' x), as in Pythia.
    rope_base: the base of the wavelengths of RoPE.
    rope_fraction: RoPE rotates this fraction of each head, from its start; the rotated part of head_size is even.
    rope_scaling: the scaling of RoPE's wavelengths as 'kind:name=number,...', see `rope_scaling`; '': none.
    learned_positions: the number of rows of a table of learned positions, which replaces RoPE, as in GPT-2: a slot's
      row is that of its position, so a pause has the row of its token. None: RoPE.
    window: the number of positions, its own included, that a slot sees in local layers. Positions are those of tokens:
      a pause has its token's position, so pauses do not shorten the window. None: no window.
    global_every: every global_every-th layer is global; None: all layers are alike.
    global_rope: whether global layers have RoPE.
    local_rope_base: the base of RoPE in local layers; None: rope_base, with rope_scaling.
    tied_embeddings: whether the embedding table is also the unembedding.
    scale_embeddings: whether inputs are multiplied by sqrt(D), as in Gemma; with initializer 'small' by sqrt(2.5 D).
    soft_cap: the bound of the logits, which become soft_cap * tanh(logits / soft_cap) in the readout;
      None: no bound.
    initializer: the standard deviations of the initial weights: 'normal', 'scaled' or 'small', see `init_params`.
    dtype: the number format of activations and matrix products; norms, softmax and RoPE are computed in float32.
    param_dtype: the number format of the parameters: 'float32'; or, for frozen parameters, 'bfloat16', which rounds
      small updates away; or 'int8' or 'nf4', see `quantization`: the matrices of the layers have 8 or 4 bits, and the
      other parameters are bfloat16.
    attention: the implementation of attention: 'auto', 'xla', 'blocks', 'cudnn' or 'splash', see `attention.attend`.
    remat: what the backward pass recomputes: 'none', nothing; 'full', everything except the layers' inputs; 'dots',
      everything except the layers' inputs, the results of the matrices but attention's output matrix, and those of the
      kernels 'splash' and 'blocks'. Other attention is recomputed.
    scan_layers: whether one layer is compiled and scanned over parameters that are stacked on a leading axis 'layers'.
    lora: low-rank adapters of some matrices, see lora.py; None: none.

  Raises:
    InputError: a field is out of its range, or two fields are incompatible; the message names `decoder.field`.
  """

  vocab_size: int
  num_layers: int
  d_model: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  mlp_size: int

  norm: str = "rmsnorm"
  norm_epsilon: float = 1e-5
  norm_placement: str = "before"
  activation: str = "silu"
  gated_mlp: bool = True
  attention_bias: str = "none"
  query_key_norm: str = "none"
  query_scalar: float | None = None
  attention_soft_cap: float | None = None
  mlp_bias: bool = False
  parallel_residual: bool = False
  rope_base: float = 10_000.0
  rope_fraction: float = 1.0
  rope_scaling: str = ""
  learned_positions: int | None = None
  window: int | None = None
  global_every: int | None = None
  global_rope: bool = True
  local_rope_base: float | None = None
  tied_embeddings: bool = True
  scale_embeddings: bool = False
  soft_cap: float | None = None

  initializer: str = "normal"
  dtype: str = "float32"
  param_dtype: str = "float32"
  attention: str = "auto"
  remat: str = "none"
  scan_layers: bool = False
  lora: LoraConfig | None = None

  def __post_init__(self):
    check_fields("decoder", self, RULES)
    if self.num_heads % self.num_kv_heads:
      raise _bad("num_kv_heads", self.num_kv_heads, f"a divisor of decoder.num_heads = {self.num_heads}")
    off = abs(self.rotated_size - self.rope_fraction * self.head_size)
    if self.rotated_size % 2 or off > 1e-6:
      wanted = f"a fraction of at most 1 that gives an even part of decoder.head_size = {self.head_size}"
      raise _bad("rope_fraction", self.rope_fraction, wanted)
    self._check_positions()
    if self.norm_placement != "before" and self.parallel_residual:
      raise _bad("norm_placement", self.norm_placement, "before, because decoder.parallel_residual is True")
    if self.attention == "cudnn" and self.dtype == "float32":
      raise _bad("attention", self.attention, "auto or xla, or decoder.dtype = bfloat16 (which cuDNN requires)")
    if self.lora is not None and "gate" in self.lora.targets and not self.gated_mlp:
      raise InputError(
        f"tuning.lora_targets: {','.join(self.lora.targets)!r} names 'gate', but this decoder has no gate"
        " (decoder.gated_mlp is False); leave 'gate' out"
      )

  def _check_positions(self) -> None:
    scaling = rope_scaling.parse("decoder.rope_scaling", self.rope_scaling)
    # The order and the spelling of numbers do not make two decoders different.
    object.__setattr__(self, "rope_scaling", "" if scaling is None else str(scaling))
    if scaling is not None and scaling.kind == "dynamic" and self.rotated_size < 4:
      raise _bad("rope_scaling", self.rope_scaling, f"another kind, because RoPE rotates {self.rotated_size} elements")
    if self.learned_positions is not None:
      unused = {"rope_scaling": "", "local_rope_base": None, "global_rope": True}
      for field, value in unused.items():
        if getattr(self, field) != value:
          wanted = f"{value!r}, because decoder.learned_positions = {self.learned_positions} replaces RoPE"
          raise _bad(field, getattr(self, field), wanted)
      if self.window is not None and self.window > self.learned_positions:
        raise _bad("window", self.window, f"at most decoder.learned_positions = {self.learned_positions}")
    if self.global_every is None:
      for field, value in {"local_rope_base": None, "global_rope": True}.items():
        if getattr(self, field) != value:
          raise _bad(field, getattr(self, field), f"{value!r} without decoder.global_every, which makes layers differ")

  @property
  def table_dtype(self) -> str:
    """The number format of tables, norms and biases, and of matrices that are not quantised."""
    return "bfloat16" if self.is_quantized else self.param_dtype

  @property
  def is_quantized(self) -> bool:
    """Whether the matrices of the layers have 8 or 4 bits."""
    return self.param_dtype in SCHEMES

  @property
  def scaling(self) -> RopeScaling | None:
    """The parsed `rope_scaling`."""
    return rope_scaling.parse("decoder.rope_scaling", self.rope_scaling)

  def is_global(self, layer: int) -> bool:
    """Whether a layer, counted from 0, is global."""
    return self.window is None if self.global_every is None else (layer + 1) % self.global_every == 0

  @property
  def attention_scale(self) -> float:
    """The factor of attention scores, query_scalar^-0.5."""
    return (self.head_size if self.query_scalar is None else self.query_scalar) ** -0.5

  @property
  def rotated_size(self) -> int:
    """The number of elements of each head that RoPE rotates."""
    return round(self.rope_fraction * self.head_size)


def matrix_shape(config: DecoderConfig, target: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes of a matrix that are contracted, and its other axes."""
  model, inner = (config.d_model,), (config.mlp_size,)
  heads, kv_heads = (config.num_heads, config.head_size), (config.num_kv_heads, config.head_size)
  shapes = {"query": (model, heads), "key": (model, kv_heads), "value": (model, kv_heads), "out": (heads, model)}
  return (shapes | {"gate": (model, inner), "up": (model, inner), "down": (inner, model)})[target]


def _bad(field: str, value: object, wanted: str) -> InputError:
  return InputError(f"decoder.{field}: {value!r} must be {wanted}")
