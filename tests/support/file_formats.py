"""Writes GGUF files and llama2.c binaries from tensors with Hugging Face's names."""

import struct

import numpy as np
import pytest


def neighbours(matrix, heads):
  """Permutes rows of a projection: the pairs (i, i + H/2) become (2i, 2i + 1)."""
  size = len(matrix) // heads
  order = [
    head * size + half * (size // 2) + pair for head in range(heads) for pair in range(size // 2) for half in (0, 1)
  ]
  return matrix[np.array(order)]


_GGUF_NAMES = {
  "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm",
  "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
  "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
  "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
  "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
_POST_NORMS = {
  "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
  "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def gguf_name(name, architecture="llama"):
  names = _GGUF_NAMES | (_POST_NORMS if architecture in ("gemma2", "gemma3", "olmo2") else {})
  stem, suffix = name.rsplit(".", 1)
  if stem.startswith("model.layers."):
    _, _, layer, module = stem.split(".", 3)
    return f"blk.{layer}.{names[module]}.{suffix}"
  return f"{names[stem]}.{suffix}"


def write_gguf(path, arrays, config, architecture, quantisation=None, tokenizer=None, **metadata):
  """Tensors with Hugging Face's names, in the layout of llama.cpp's converter; `tokenizer` writes more keys."""
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_block_count(config.num_layers)
  writer.add_context_length(64)
  writer.add_embedding_length(config.d_model)
  writer.add_feed_forward_length(config.mlp_size)
  writer.add_head_count(config.num_heads)
  writer.add_head_count_kv(config.num_kv_heads)
  writer.add_key_length(config.head_size)
  writer.add_value_length(config.head_size)
  writer.add_rope_freq_base(config.rope_base)
  writer.add_layer_norm_rms_eps(config.norm_epsilon)
  for name, value in metadata.items():
    add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
    add(f"{architecture}.{name.replace('__', '.')}", value)
  if tokenizer is not None:
    tokenizer(writer)
  for name, array in arrays.items():
    if architecture == "llama" and "q_proj" in name:
      array = neighbours(array, config.num_heads)
    if architecture == "llama" and "k_proj" in name:
      array = neighbours(array, config.num_kv_heads)
    if architecture.startswith("gemma") and "norm" in name:
      array = array + 1
    if quantisation is None or array.ndim == 1:
      name = name if name == "rope_freqs.weight" else gguf_name(name, architecture)
      writer.add_tensor(name, np.ascontiguousarray(array))
    else:
      kind = gguf.GGMLQuantizationType[quantisation]
      writer.add_tensor(
        gguf_name(name, architecture), gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind
      )
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def llama2c_bytes(form, arrays, config, length=12):
  """A llama2.c binary, by the format's own description."""
  tied, layers = config.tied_embeddings, range(config.num_layers)

  def every(module, turned=0):
    rows = (arrays[f"model.layers.{layer}.{module}.weight"] for layer in layers)
    return [neighbours(x, turned) if turned else x for x in rows]

  attention = [
    *every("self_attn.q_proj", config.num_heads), *every("self_attn.k_proj", config.num_kv_heads),
    *every("self_attn.v_proj"), *every("self_attn.o_proj"),
  ]  # fmt: skip
  mlp = [*every("mlp.gate_proj"), *every("mlp.down_proj"), *every("mlp.up_proj")]
  first, second, last = every("input_layernorm"), every("post_attention_layernorm"), [arrays["model.norm.weight"]]
  table, output = [arrays["model.embed_tokens.weight"]], [] if tied else [arrays["lm_head.weight"]]
  sizes = [config.d_model, config.mlp_size, config.num_layers, config.num_heads, config.num_kv_heads]
  if form == "legacy":
    turns = [np.full((length, config.head_size), np.nan, np.float32)]
    header = struct.pack("<7i", *sizes, config.vocab_size if tied else -config.vocab_size, length)
    parts = table + first + attention + second + mlp + last + turns + output
  else:
    header = struct.pack("<Ii7iB", 0x616B3432, 1, *sizes, config.vocab_size, length, tied).ljust(256, b"\0")
    parts = first + second + last + table + attention + mlp + output
  return header + b"".join(np.ascontiguousarray(part, "<f4").tobytes() for part in parts)
