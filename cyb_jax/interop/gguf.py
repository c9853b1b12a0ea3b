"""GGUF files, through the package `gguf`: all quantisations that it supports, one tensor at a time."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.interop import families
from cyb_jax.interop.families import Tensor
from cyb_jax.interop.tensors import Fields, TensorInfo, package

ARCHITECTURES = ("llama", "qwen2", "gemma")
# Older versions of llama.cpp wrote this buffer for RoPE over a part of the head; it is recomputed.
HARMLESS_TENSORS = (r"blk\.\d+\.attn_rot_embd\.weight",)
_HARMLESS = frozenset({
  "vocab_size", "tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned",
})  # fmt: skip


class GgufFile:
  """The tensors and metadata of a GGUF file, memory-mapped.

  Raises:
    InputError: the file is not a complete GGUF file.
  """

  def __init__(self, path: pathlib.Path):
    self._gguf = package("gguf", str(path))
    try:
      self._reader = _reader_class(self._gguf)(path)
    except (ValueError, KeyError, IndexError, OSError) as error:
      raise InputError(
        f"{path}: not a complete GGUF file, {path.stat().st_size} bytes ({error}); download it again"
      ) from None
    self.path = path
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    parts = self.metadata("split.count").get("split.count", 1)
    if parts > 1:
      raise InputError(
        f"{path}: one of {parts} parts of a model; merge them (gguf-split --merge), and give the merged file"
      )
    kinds = {tensor.tensor_type for tensor in self._reader.tensors}
    readable = {kind for kind in kinds if self._dequantises(kind)}
    self.infos = {
      name: TensorInfo(
        tuple(int(size) for size in reversed(tensor.shape)),
        tensor.tensor_type.name,
        path,
        tensor.tensor_type in readable,
      )
      for name, tensor in self._tensors.items()
    }

  @property
  def architecture(self) -> str | None:
    return self.metadata("general.architecture").get("general.architecture")

  def metadata(self, prefix: str) -> dict[str, Any]:
    """The fields whose names start with the prefix."""
    return {name: field.contents() for name, field in self._reader.fields.items() if name.startswith(prefix)}

  def _dequantises(self, kind: Any) -> bool:
    _, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
    try:
      self._gguf.quants.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
      return False
    return True

  def read(self, name: str) -> np.ndarray:
    tensor = self._tensors[name]
    array = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    # Floats are a view of the memory map, which may be closed before the weights are released.
    return array.copy() if np.may_share_memory(array, tensor.data) else array


def _reader_class(gguf: Any) -> type:
  class Reader(gguf.GGUFReader):
    """Holds its memory map as a plain array, because a million slices of numpy's memmap take twice the time."""

    @property
    def data(self) -> np.ndarray:
      return self._plain

    @data.setter
    def data(self, mapped: np.memmap) -> None:
      self._plain = mapped.view(np.ndarray)

  return Reader


def read_config(file: GgufFile) -> DecoderConfig:
  """The decoder that a GGUF's metadata describes.

  Raises:
    InputError: an architecture or a field is unsupported.
  """
  architecture = file.architecture
  if architecture not in ARCHITECTURES:
    raise InputError(
      f"{file.path}: general.architecture = {architecture!r} is unsupported; this version loads"
      f" {', '.join(ARCHITECTURES)}"
    )
  fields = Fields(file.path, file.metadata(f"{architecture}."), f"{architecture}.")
  fields.demand("rope.scaling.type", (None, "none"))
  for name in ("expert_count", "expert_used_count"):
    fields.demand(name, (None, 0))
  fields.demand("rope.scaling.factor", (None, 0.0, 1.0))
  fields.demand("attention.causal", (None, True))
  if "rope_freqs.weight" in file.infos:
    raise InputError(
      f"{file.path}: the tensor rope_freqs.weight scales RoPE's wavelengths, which this version does not support"
    )
  width, heads = fields.take("embedding_length", int), fields.take("attention.head_count", int)
  size = fields.take("attention.key_length", int, width // max(1, heads))
  fields.demand("attention.value_length", (size,), size)
  fields.demand("rope.dimension_count", (size,), size)
  tables = file.infos.get("token_embd.weight")
  if tables is None:
    raise InputError(f"{file.path}: the tensor token_embd.weight is missing")
  has_bias = "blk.0.attn_q.bias" in file.infos
  style = {"attention_bias": "none"}
  if has_bias:
    style["attention_bias"] = "all" if "blk.0.attn_output.bias" in file.infos else "qkv"
  if architecture == "gemma":
    style |= dict(norm="rmsnorm_plus_one", activation="gelu_tanh", scale_embeddings=True)
  try:
    config = DecoderConfig(
      vocab_size=tables.shape[0],
      num_layers=fields.take("block_count", int),
      d_model=width,
      num_heads=heads,
      num_kv_heads=fields.take("attention.head_count_kv", int, heads),
      head_size=size,
      mlp_size=fields.take("feed_forward_length", int),
      norm_epsilon=_plain(fields.take("attention.layer_norm_rms_epsilon", float)),
      rope_base=fields.take("rope.freq_base", float, 10_000.0),
      tied_embeddings="output.weight" not in file.infos,
      mlp_bias="blk.0.ffn_up.bias" in file.infos,
      **style,
    )
  except InputError as error:
    raise InputError(f"{file.path}: {error}") from None
  fields.count("context_length")
  fields.finish(_HARMLESS)
  return config


def table(file: GgufFile, config: DecoderConfig) -> list[Tensor]:
  """The table of a file's tensors."""
  return families.llama_style(
    config,
    families.GGUF,
    # llama.cpp rotates neighbouring pairs only in 'llama' models.
    pairs="neighbours" if file.architecture == "llama" else "halves",
    norm_offset=1.0 if file.architecture == "gemma" else 0.0,
  )


def _plain(value: float) -> float:
  """The short decimal that rounds to the stored f32: 1e-5 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))
