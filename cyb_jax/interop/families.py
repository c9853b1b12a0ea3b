"""The tensors in the files of a family, and the leaves of params['decoder'] that they hold.

There is one table per family. A matrix in a file is [outputs, inputs], as in PyTorch; ours is [inputs, outputs] with
separate axes for heads.

Letters: D model, V vocabulary, N heads, G kv heads, H head size, F mlp.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from cyb_jax.decoder import DecoderConfig

LeafPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One tensor of a family, and the leaves that it holds.

  Attributes:
    name: the name in the file; '{layer}' is a placeholder for the number of the layer.
    shape: the shape in the file.
    leaves: paths in params['decoder']; paths in a layer are relative to the layer: ('attention', 'query', 'kernel').
    split: the tensor -> its leaves, as views if possible.
    join: the leaves -> the tensor; the inverse of `split`.
  """

  name: str
  shape: tuple[int, ...]
  leaves: tuple[LeafPath, ...]
  split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
  join: Callable[..., np.ndarray]

  @property
  def layered(self) -> bool:
    return "{layer}" in self.name


# The names of the modules of the Llama style, by format; '.weight' or '.bias' follows.
HUGGINGFACE = {
  "embedding": "model.embed_tokens",
  "unembedding": "lm_head",
  "final_norm": "model.norm",
  "attention_norm": "model.layers.{layer}.input_layernorm",
  "query": "model.layers.{layer}.self_attn.q_proj",
  "key": "model.layers.{layer}.self_attn.k_proj",
  "value": "model.layers.{layer}.self_attn.v_proj",
  "out": "model.layers.{layer}.self_attn.o_proj",
  "mlp_norm": "model.layers.{layer}.post_attention_layernorm",
  "gate": "model.layers.{layer}.mlp.gate_proj",
  "up": "model.layers.{layer}.mlp.up_proj",
  "down": "model.layers.{layer}.mlp.down_proj",
  "query_norm": "model.layers.{layer}.self_attn.q_norm",
  "key_norm": "model.layers.{layer}.self_attn.k_norm",
}
# With norms after attention and mlp, the name of the second norm before is that of the first norm after.
HUGGINGFACE_POST_NORMS = HUGGINGFACE | {
  "attention_post_norm": "model.layers.{layer}.post_attention_layernorm",
  "mlp_norm": "model.layers.{layer}.pre_feedforward_layernorm",
  "mlp_post_norm": "model.layers.{layer}.post_feedforward_layernorm",
}
GGUF = {
  "embedding": "token_embd",
  "unembedding": "output",
  "final_norm": "output_norm",
  "attention_norm": "blk.{layer}.attn_norm",
  "query": "blk.{layer}.attn_q",
  "key": "blk.{layer}.attn_k",
  "value": "blk.{layer}.attn_v",
  "out": "blk.{layer}.attn_output",
  "mlp_norm": "blk.{layer}.ffn_norm",
  "gate": "blk.{layer}.ffn_gate",
  "up": "blk.{layer}.ffn_up",
  "down": "blk.{layer}.ffn_down",
  "query_norm": "blk.{layer}.attn_q_norm",
  "key_norm": "blk.{layer}.attn_k_norm",
  "attention_post_norm": "blk.{layer}.post_attention_norm",
  "mlp_post_norm": "blk.{layer}.post_ffw_norm",
}
LLAMA2C = {
  "embedding": "tok_embeddings",
  "unembedding": "output",
  "final_norm": "norm",
  "attention_norm": "layers.{layer}.attention_norm",
  "query": "layers.{layer}.attention.wq",
  "key": "layers.{layer}.attention.wk",
  "value": "layers.{layer}.attention.wv",
  "out": "layers.{layer}.attention.wo",
  "mlp_norm": "layers.{layer}.ffn_norm",
  "gate": "layers.{layer}.feed_forward.w1",
  "up": "layers.{layer}.feed_forward.w3",
  "down": "layers.{layer}.feed_forward.w2",
}


def llama_style(
  config: DecoderConfig, names: Mapping[str, str], *, pairs: str = "halves", norm_offset: float = 0.0
) -> list[Tensor]:
  """The table of Llama, Qwen, Gemma and others: RMSNorms, separate projections, a gated MLP.

  Args:
    config: determines the biases, the norms, and whether the output table is tied.
    names: HUGGINGFACE, HUGGINGFACE_POST_NORMS, GGUF or LLAMA2C.
    pairs: RoPE's pairs in the rows of query and key: 'halves', i with i + H/2, as in `rope.apply_rope`; or
      'neighbours', 2i with 2i + 1.
    norm_offset: the difference between the file's norm scales and ours.
  """
  model, inner = (config.d_model,), (config.mlp_size,)
  heads, kv_heads = (config.num_heads, config.head_size), (config.num_kv_heads, config.head_size)
  reads, writes = config.attention_bias != "none", config.attention_bias == "all"

  def norm(module: str, *inside: str, shape: tuple[int, ...] = model) -> Tensor:
    offset, flat = np.float32(norm_offset), (math.prod(shape),)
    name, leaf = f"{names[module]}.weight", (*inside, module, "scale")
    if not norm_offset:
      return Tensor(name, flat, (leaf,), lambda x: (x.reshape(shape),), lambda x: x.reshape(flat))
    return Tensor(name, flat, (leaf,), lambda x: (x.reshape(shape) - offset,), lambda x: (x + offset).reshape(flat))

  def norms(part: str) -> list[Tensor]:
    """The norms before and after attention or mlp."""
    found = [] if config.norm_placement == "after" else [norm(f"{part}_norm")]
    return found + ([] if config.norm_placement == "before" else [norm(f"{part}_post_norm")])

  def query_key_norms() -> list[Tensor]:
    if config.query_key_norm == "none":
      return []
    shapes = (heads, kv_heads) if config.query_key_norm == "all" else (heads[1:], heads[1:])
    return [norm(name, "attention", shape=shape) for name, shape in zip(("query_norm", "key_norm"), shapes)]

  def attention(module: str, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool) -> list[Tensor]:
    permuted = pairs == "neighbours" and module in ("query", "key")
    return _projection(names[module], ("attention", module), inputs, outputs, bias, outputs if permuted else None)

  def mlp(module: str, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> list[Tensor]:
    return _projection(names[module], ("mlp", module), inputs, outputs, config.mlp_bias)

  return [
    *_tables(config, names["embedding"], names["unembedding"]),
    *norms("attention"),
    *attention("query", model, heads, reads),
    *attention("key", model, kv_heads, reads),
    *attention("value", model, kv_heads, reads),
    *attention("out", heads, model, writes),
    *query_key_norms(),
    *norms("mlp"),
    *mlp("gate", model, inner),
    *mlp("up", model, inner),
    *mlp("down", inner, model),
    norm("final_norm"),
  ]


def gpt_neox(config: DecoderConfig) -> list[Tensor]:
  """The table of GPT-NeoX and Pythia: LayerNorms, and query, key and value of each head in one matrix."""
  model, inner, heads = (config.d_model,), (config.mlp_size,), (config.num_heads, config.head_size)
  layer = "gpt_neox.layers.{layer}"
  bias = config.attention_bias == "all"

  def norm(name: str, module: str) -> list[Tensor]:
    return [
      same_layout(f"{name}.weight", (module, "scale"), model),
      same_layout(f"{name}.bias", (module, "bias"), model),
    ]

  return [
    *_tables(config, "gpt_neox.embed_in", "embed_out"),
    *norm(f"{layer}.input_layernorm", "attention_norm"),
    *_fused(f"{layer}.attention.query_key_value", config, bias),
    *_projection(f"{layer}.attention.dense", ("attention", "out"), heads, model, bias),
    *norm(f"{layer}.post_attention_layernorm", "mlp_norm"),
    *_projection(f"{layer}.mlp.dense_h_to_4h", ("mlp", "up"), model, inner, True),
    *_projection(f"{layer}.mlp.dense_4h_to_h", ("mlp", "down"), inner, model, True),
    *norm("gpt_neox.final_layer_norm", "final_norm"),
  ]


def gpt2(config: DecoderConfig) -> list[Tensor]:
  """The table of GPT-2: LayerNorms, learned positions, and matrices [inputs, outputs]; query, key, value are one."""
  model, inner, heads = (config.d_model,), (config.mlp_size,), (config.num_heads, config.head_size)
  layer, bias = "transformer.h.{layer}", config.attention_bias == "all"
  modules = ("query", "key", "value")

  def norm(name: str, module: str) -> list[Tensor]:
    return [
      same_layout(f"{name}.weight", (module, "scale"), model),
      same_layout(f"{name}.bias", (module, "bias"), model),
    ]

  def projection(name: str, leaf: LeafPath, inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool):
    shape, ours = (math.prod(inputs), math.prod(outputs)), inputs + outputs
    found = [
      Tensor(f"{name}.weight", shape, ((*leaf, "kernel"),), lambda x: (x.reshape(ours),), lambda x: x.reshape(shape))
    ]
    if bias:
      flat = shape[1:]
      split, join = (lambda x: (x.reshape(outputs),)), (lambda x: x.reshape(flat))
      found.append(Tensor(f"{name}.bias", flat, ((*leaf, "bias"),), split, join))
    return found

  def fused(name: str) -> list[Tensor]:
    def parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
      return tuple(part.reshape(*part.shape[:-1], *heads) for part in np.split(x, 3, axis=-1))

    def joined(*leaves: np.ndarray) -> np.ndarray:
      return np.concatenate([leaf.reshape(*leaf.shape[:-2], -1) for leaf in leaves], -1)

    width = 3 * math.prod(heads)
    found = [
      Tensor(f"{name}.weight", (*model, width), tuple(("attention", m, "kernel") for m in modules), parts, joined)
    ]
    if bias:
      found.append(Tensor(f"{name}.bias", (width,), tuple(("attention", m, "bias") for m in modules), parts, joined))
    return found

  positions = (config.learned_positions, config.d_model)
  return [
    *_tables(config, "transformer.wte", "lm_head"),
    same_layout("transformer.wpe.weight", ("position_embedding",), positions),
    *norm(f"{layer}.ln_1", "attention_norm"),
    *fused(f"{layer}.attn.c_attn"),
    *projection(f"{layer}.attn.c_proj", ("attention", "out"), heads, model, bias),
    *norm(f"{layer}.ln_2", "mlp_norm"),
    *projection(f"{layer}.mlp.c_fc", ("mlp", "up"), model, inner, True),
    *projection(f"{layer}.mlp.c_proj", ("mlp", "down"), inner, model, True),
    *norm("transformer.ln_f", "final_norm"),
  ]


def same_layout(name: str, leaf: LeafPath, shape: tuple[int, ...]) -> Tensor:
  """A tensor with the same layout as ours."""
  return Tensor(name, shape, (leaf,), lambda x: (x,), lambda x: x)


def _tables(config: DecoderConfig, embedding: str, unembedding: str) -> list[Tensor]:
  shape = (config.vocab_size, config.d_model)
  tables = [same_layout(f"{embedding}.weight", ("embedding",), shape)]
  if not config.tied_embeddings:
    tables.append(same_layout(f"{unembedding}.weight", ("unembedding",), shape))
  return tables


def _projection(
  name: str,
  leaf: LeafPath,
  inputs: tuple[int, ...],
  outputs: tuple[int, ...],
  bias: bool,
  neighbours: tuple[int, int] | None = None,
) -> list[Tensor]:
  """A matrix and its bias; `neighbours`: (heads, H) if neighbouring rows are RoPE's pairs; None: no permutation."""
  shape = (math.prod(outputs), math.prod(inputs))

  def ours(rows: np.ndarray) -> np.ndarray:
    if neighbours is None:
      return rows
    count, size = neighbours
    return rows.reshape(count, size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)

  def theirs(rows: np.ndarray) -> np.ndarray:
    if neighbours is None:
      return rows
    count, size = neighbours
    return rows.reshape(count, 2, size // 2, -1).swapaxes(1, 2).reshape(rows.shape)

  tensors = [
    Tensor(
      f"{name}.weight",
      shape,
      ((*leaf, "kernel"),),
      lambda x: (ours(x).T.reshape(inputs + outputs),),
      lambda x: theirs(x.reshape(shape[::-1]).T),
    )
  ]
  if bias:
    split, join = (lambda x: (ours(x).reshape(outputs),)), (lambda x: theirs(x.reshape(shape[:1])))
    tensors.append(Tensor(f"{name}.bias", shape[:1], ((*leaf, "bias"),), split, join))
  return tensors


def _fused(name: str, config: DecoderConfig, bias: bool) -> list[Tensor]:
  """Query, key and value in one matrix, with rows [N, 3, H]."""
  model, heads, size = config.d_model, config.num_heads, config.head_size
  modules = ("query", "key", "value")

  def split(matrix: np.ndarray) -> tuple[np.ndarray, ...]:
    parts = matrix.reshape(heads, 3, size, model)
    return tuple(np.moveaxis(parts[:, part], -1, 0) for part in range(3))

  def join(*kernels: np.ndarray) -> np.ndarray:
    return np.stack([np.moveaxis(kernel, 0, -1) for kernel in kernels], 1).reshape(-1, model)

  rows = 3 * heads * size
  tensors = [Tensor(f"{name}.weight", (rows, model), tuple(("attention", m, "kernel") for m in modules), split, join)]
  if bias:
    tensors.append(
      Tensor(
        f"{name}.bias",
        (rows,),
        tuple(("attention", m, "bias") for m in modules),
        lambda x: tuple(x.reshape(heads, 3, size)[:, part] for part in range(3)),
        lambda *x: np.stack(x, 1).reshape(rows),
      )
    )
  return tensors
