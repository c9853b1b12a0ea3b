"""Binaries of llama2.c: a header of a few integers, then f32 weights in a fixed order.

The legacy format has seven integers; with a negative vocab_size there is an output table at the end. Cosines and sines
precede that table and are recomputed. Version 1 begins with 'ak42' and has a header of 256 bytes.
https://github.com/karpathy/llama2.c/blob/master/export.py
"""

from __future__ import annotations

import math
import pathlib
import struct

import numpy as np
from absl import logging

from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.interop import families
from cyb_jax.interop.families import LLAMA2C, Tensor
from cyb_jax.interop.tensors import TensorInfo

MAGIC = 0x616B3432
# Constants that the header does not contain.
_NORM_EPSILON, _ROPE_BASE = 1e-5, 10_000.0
_LEGACY_ORDER = (
  "embedding", "attention_norm", "query", "key", "value", "out", "mlp_norm", "gate", "down", "up", "final_norm",
)  # fmt: skip
_ORDER = (
  "attention_norm", "mlp_norm", "final_norm", "embedding", "query", "key", "value", "out", "gate", "down", "up",
)  # fmt: skip


class Llama2cFile:
  """The tensors and header of a llama2.c binary.

  Attributes:
    config: the decoder that the header describes.
    context: the number of tokens of its training texts.
    end: the number of bytes of the model; the file may be longer.

  Raises:
    InputError: the file is not a llama2.c binary, has an unsupported version, or is truncated.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    size = path.stat().st_size
    with path.open("rb") as file:
      header = file.read(256)
    if len(header) < 28:
      raise InputError(f"{path}: not a llama2.c binary, {size} bytes; the header alone has 28")
    legacy = struct.unpack_from("<I", header)[0] != MAGIC
    if legacy:
      sizes, start = struct.unpack_from("<7i", header), 28
      tied = sizes[5] > 0
    else:
      version = struct.unpack_from("<i", header, 4)[0]
      if version != 1 or len(header) < 256:
        raise InputError(
          f"{path}: version {version} of llama2.c's format; this version reads the legacy format and version 1 (f32)"
        )
      sizes, start = struct.unpack_from("<7i", header, 8), 256
      tied = bool(header[36])
    width, inner, layers, heads, kv_heads, vocabulary, length = sizes
    if (
      min(width, inner, layers, heads, kv_heads, abs(vocabulary), length) < 1 or width % (2 * heads) or heads % kv_heads
    ):
      raise InputError(
        f"{path}: the header {sizes} is not that of a llama2.c binary; give such a binary, a .gguf file or a folder"
      )
    self.context = length
    self.config = DecoderConfig(
      vocab_size=abs(vocabulary),
      num_layers=layers,
      d_model=width,
      num_heads=heads,
      num_kv_heads=kv_heads,
      head_size=width // heads,
      mlp_size=inner,
      norm_epsilon=_NORM_EPSILON,
      rope_base=_ROPE_BASE,
      tied_embeddings=tied,
    )
    self.infos: dict[str, TensorInfo] = {}
    self._offsets: dict[str, int] = {}
    at = start
    by_name = {tensor.name.removesuffix(".weight"): tensor for tensor in self.table()}
    for module in (*(_LEGACY_ORDER if legacy else _ORDER), *(() if tied else ("unembedding",))):
      if legacy and module == "unembedding":
        at += 4 * length * self.config.head_size  # cosines and sines, H/2 of each
      tensor = by_name[LLAMA2C[module]]
      for layer in range(layers) if tensor.layered else (None,):
        name = tensor.name.format(layer=layer)
        self.infos[name], self._offsets[name] = TensorInfo(tensor.shape, "F32", path), at
        at += 4 * math.prod(tensor.shape)
        if at > size:
          raise InputError(f"{path}: truncated, {size} bytes; the tensor {name} ends at {at}")
    if legacy and tied:
      at += 4 * length * self.config.head_size
    self.end = at
    if size > at:
      logging.warning("%s: the model ends at byte %d; the %d bytes after it are ignored", path, at, size - at)

  def table(self) -> list[Tensor]:
    return families.llama_style(self.config, LLAMA2C, pairs="neighbours")

  def read(self, name: str) -> np.ndarray:
    shape = self.infos[name].shape
    data = np.fromfile(self.path, "<f4", math.prod(shape), offset=self._offsets[name])
    return data.reshape(shape)
