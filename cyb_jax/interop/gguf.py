"""GGUF files, through the package `gguf`: all quantisations that it supports, one tensor at a time."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import numpy as np

from cyb_jax.decoder import DecoderConfig, rope_scaling
from cyb_jax.errors import InputError, shown
from cyb_jax.interop import families
from cyb_jax.interop.families import Tensor
from cyb_jax.interop.tensors import Fields, TensorInfo, package

_STYLES: dict[str, dict[str, Any]] = {
  "llama": {},
  "qwen2": {},
  "qwen3": dict(query_key_norm="head"),
  "gemma": dict(norm="rmsnorm_plus_one", activation="gelu_tanh", scale_embeddings=True),
  "olmo2": dict(norm_placement="after", query_key_norm="all"),
}
_STYLES["gemma2"] = _STYLES["gemma"] | dict(norm_placement="both")
_STYLES["gemma3"] = _STYLES["gemma2"] | dict(query_key_norm="head")
ARCHITECTURES = tuple(_STYLES)
# Numbers that llama.cpp has in its code: the period of the global layers, the base of RoPE in the local layers of
# Gemma 3, and the numbers of layers of the models (27B) that scale queries by D / N instead of H.
_EVERY = {"gemma2": 2, "gemma3": 6}
_LOCAL_BASE = 10_000.0
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# The divisors of RoPE's frequencies of Llama 3; and a buffer that older versions of llama.cpp wrote for RoPE over a
# part of the head, which is recomputed.
_DIVISORS = "rope_freqs.weight"
_LLAMA3_CONTEXT = 8192
HARMLESS_TENSORS = (r"blk\.\d+\.attn_rot_embd\.weight", r"rope_freqs\.weight")
_HARMLESS = frozenset({"vocab_size", "tensor_data_layout", "rope.scaling.finetuned"})


class GgufFile:
  """The tensors and metadata of a GGUF file, memory-mapped.

  Raises:
    InputError: the file is not a complete GGUF file.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._gguf = package("gguf", str(path))
    try:
      self._reader = _reader_class(self._gguf)(path)
    except Exception as error:  # the package checks little, so damage causes errors of many types
      reason = " ".join(str(error).split())[:200] or type(error).__name__
      if unknown := re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", reason):
        raise InputError(
          f"{path}: a tensor has the quantisation of number {unknown[1]}, which the installed package gguf does not"
          " know; pip install --upgrade gguf, or download the model in another quantisation"
        ) from None
      raise InputError(
        f"{path}: not a complete GGUF file, {path.stat().st_size} bytes ({reason}); download it again"
      ) from None
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
    parts = self.metadata("split.count").get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
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
    """The fields whose names start with the prefix.

    Raises:
      InputError: a string is not UTF-8.
    """
    found = {}
    for name, field in self._reader.fields.items():
      if name.startswith(prefix):
        try:
          found[name] = field.contents()
        except (ValueError, LookupError) as error:
          raise InputError(f"{self.path}: {shown(name)} is damaged ({error}); download the file again") from None
    return found

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

    def _get(self, offset: int, dtype: Any, count: int = 1, **options: Any) -> Any:
      # A slice after the end is empty, so the package would read a damaged count of strings for hours.
      if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self._plain):
        raise ValueError("the file ends inside of its header or of a tensor")
      return super()._get(offset, dtype, count, **options)

  return Reader


def read_config(file: GgufFile) -> DecoderConfig:
  """The decoder that a GGUF's metadata describes.

  Raises:
    InputError: an architecture or a field is unsupported.
  """
  architecture = file.architecture
  if architecture not in ARCHITECTURES:
    raise InputError(
      f"{file.path}: general.architecture = {shown(architecture)} is unsupported; this version loads"
      f" {', '.join(ARCHITECTURES)}"
    )
  fields = Fields(file.path, file.metadata(f"{architecture}."), f"{architecture}.")
  for name in ("expert_count", "expert_used_count"):
    fields.demand(name, (None, 0))
  fields.demand("attention.causal", (None, True))
  width, heads = fields.take("embedding_length", int), fields.take("attention.head_count", int)
  size = fields.take("attention.key_length", int, width // max(1, heads))
  fields.demand("attention.value_length", (size,), size)
  fields.demand("rope.dimension_count", (size,), size)
  tables = file.infos.get("token_embd.weight")
  if tables is None or len(tables.shape) != 2:
    found = "is missing" if tables is None else f"has the shape {list(tables.shape)}"
    raise InputError(f"{file.path}: the tensor token_embd.weight {found}; it must have two axes")
  has_bias = "blk.0.attn_q.bias" in file.infos
  style = {"attention_bias": "none"} | _STYLES[architecture]
  if has_bias:
    style["attention_bias"] = "all" if "blk.0.attn_output.bias" in file.infos else "qkv"
  base = fields.take("rope.freq_base", float, 10_000.0)
  style |= _windows(fields, architecture, width // max(1, heads), base)
  try:
    config = DecoderConfig(
      vocab_size=tables.shape[0],
      num_layers=fields.layers("block_count"),
      d_model=width,
      num_heads=heads,
      num_kv_heads=fields.take("attention.head_count_kv", int, heads),
      head_size=size,
      mlp_size=fields.take("feed_forward_length", int),
      norm_epsilon=_plain(fields.take("attention.layer_norm_rms_epsilon", float)),
      rope_base=base,
      rope_scaling=_scaling(file, fields, size, base),
      tied_embeddings="output.weight" not in file.infos,
      mlp_bias="blk.0.ffn_up.bias" in file.infos,
      **style,
    )
  except InputError as error:
    raise InputError(f"{file.path}: {error}") from None
  fields.count("context_length")
  fields.finish(_HARMLESS)
  return config


def _windows(fields: Fields, architecture: str, width_of_head: int, base: float) -> dict[str, Any]:
  """The windows of Gemma 2 and 3, and what else these two have."""
  if architecture not in _EVERY:
    fields.demand("attention.sliding_window", (None, 0))
    return {}
  every = fields.count("attention.sliding_window_pattern", _EVERY[architecture])
  style: dict[str, Any] = {"window": fields.take("attention.sliding_window", int), "global_every": every}
  if architecture == "gemma2":
    style["attention_soft_cap"] = fields.take("attn_logit_softcapping", float, 50.0)
    style["soft_cap"] = fields.take("final_logit_softcapping", float, 30.0)
  else:
    local = fields.take("rope.freq_base_swa", float, _LOCAL_BASE)
    style["local_rope_base"] = local
    style["soft_cap"] = fields.take("final_logit_softcapping", float, None)
  if fields.layers("block_count") == _SCALED_BY_WIDTH[architecture]:
    style["query_scalar"] = float(width_of_head)
  return style


def _scaling(file: GgufFile, fields: Fields, size: int, base: float) -> str:
  """The scaling of RoPE: linear and YaRN in the metadata, that of Llama 3 as the tensor of its divisors."""
  kind, factor = fields.take("rope.scaling.type", str, "none"), fields.take("rope.scaling.factor", float, 1.0)
  fields.demand("rope.scaling.type", (None, "none", "linear", "yarn"))
  context = fields.take("rope.scaling.original_context_length", int, fields.take("context_length", int, None))
  if _DIVISORS in file.infos:
    return _llama3(file, size, base)
  if kind == "none" or factor in (0.0, 1.0):
    return ""
  numbers = {"factor": factor} | ({} if kind == "linear" else {"context": context})
  return str(rope_scaling.scaling(f"{file.path}: rope.scaling", kind, numbers))


def _llama3(file: GgufFile, size: int, base: float) -> str:
  """The numbers of Llama 3's scaling from its divisors.

  Raises:
    InputError: the divisors are of another scaling.
  """
  divisors = np.asarray(file.read(_DIVISORS), np.float64)
  if divisors.shape != (size // 2,) or not size:
    raise InputError(f"{file.path}: the tensor {_DIVISORS} has the shape {list(divisors.shape)}, but heads have {size}")
  plain = base ** -(np.arange(0, size, 2) / size)
  # The factor is the divisor of the longest wavelength. All published models have the same other numbers.
  numbers = {"factor": max(1.0, float(divisors[-1])), "context": _LLAMA3_CONTEXT}
  found = rope_scaling.scaling(f"{file.path}: {_DIVISORS}", "llama3", numbers)
  if np.allclose(plain / found.frequencies(size, base), divisors, rtol=1e-5):
    return str(found)
  raise InputError(
    f"{file.path}: the tensor {_DIVISORS} scales RoPE's wavelengths in another way than Llama 3, which this version"
    " does not support"
  )


def table(file: GgufFile, config: DecoderConfig) -> list[Tensor]:
  """The table of a file's tensors."""
  return families.llama_style(
    config,
    families.GGUF,
    # llama.cpp rotates neighbouring pairs only in 'llama' models.
    pairs="neighbours" if file.architecture == "llama" else "halves",
    norm_offset=1.0 if file.architecture.startswith("gemma") else 0.0,
  )


def _plain(value: float) -> float:
  """The short decimal that rounds to the stored f32: 1e-5 for 9.999999747378752e-06."""
  return float(str(np.float32(value)))
