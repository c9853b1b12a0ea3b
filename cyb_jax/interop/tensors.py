"""The common interface of files of weights, and the checks of their headers before weights are read."""

from __future__ import annotations

import dataclasses
import importlib
import math
import pathlib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cyb_jax.errors import InputError, shown
from cyb_jax.interop.families import Tensor

# The names of safetensors; other formats have other names, such as float16.
_FLOATS = ("F32", "F16", "BF16")
# The largest number of layers; published models have fewer than 200.
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """The header of a tensor.

  Attributes:
    shape: the shape, outermost axis first.
    dtype: the format's name of the dtype.
    file: the file that contains the tensor.
    readable: whether this version can convert the dtype to floats.
  """

  shape: tuple[int, ...]
  dtype: str
  file: pathlib.Path
  readable: bool = True


class TensorFiles(Protocol):
  """The tensors of a format.

  Attributes:
    infos: the headers of all tensors, by name.
  """

  infos: Mapping[str, TensorInfo]

  def read(self, name: str) -> np.ndarray:
    """One tensor, of a float dtype; 16-bit floats are not converted."""


def package(name: str, purpose: str) -> types.ModuleType:
  """A package of the extra `pretrained`.

  Raises:
    InputError: the package is not installed.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(f"{purpose}: needs the package {name}; pip install 'cyb_jax[pretrained]'") from error


def is_float(dtype: str) -> bool:
  return dtype in _FLOATS


def each(table: Sequence[Tensor], num_layers: int) -> Iterator[tuple[Tensor, int | None, str]]:
  """(tensor, layer, name) of a table, with one item for each layer."""
  for tensor in table:
    for layer in range(num_layers) if tensor.layered else (None,):
      yield tensor, layer, tensor.name.format(layer=layer)


def check(
  files: TensorFiles, table: Sequence[Tensor], num_layers: int, where: pathlib.Path, harmless: Iterable[str] = ()
) -> None:
  """Checks that the files hold exactly the tensors of a table; reads only headers.

  Args:
    files: the files.
    table: the tensors that the config requires.
    num_layers: L.
    where: the path in the error of a missing tensor.
    harmless: patterns of names that are ignored, for buffers that are recomputed.

  Raises:
    InputError: a tensor is missing or unknown, or has another shape or an unsupported dtype.
  """
  expected = set()
  # The first missing tensor ends the loop, because a config can name more layers than fit into memory.
  for tensor, _, name in each(table, num_layers):
    shape, info = tensor.shape, files.infos.get(name)
    expected.add(name)
    if info is None:
      raise InputError(f"{where}: the tensor {name} {_shown(shape)} is missing, but the config requires it")
    if tuple(info.shape) != shape:
      raise InputError(
        f"{info.file}: the tensor {name} has the shape {_shown(info.shape)}; the config requires {_shown(shape)}"
      )
    if not info.readable:
      raise InputError(
        f"{info.file}: the tensor {name} has the dtype {info.dtype}, which this version does not support"
      )
  passed = re.compile("|".join(f"(?:{pattern})" for pattern in harmless) or r"(?!)")
  unknown = [name for name in files.infos if name not in expected and not passed.fullmatch(name)]
  if unknown:
    first, more = unknown[0], f" and {len(unknown) - 1} more" if unknown[1:] else ""
    raise InputError(
      f"{files.infos[first].file}: unknown tensor {first} {_shown(files.infos[first].shape)}{more}; this version does"
      " not support all parts of the model"
    )


def _shown(shape: Sequence[int]) -> str:
  return f"[{', '.join(map(str, shape))}]"


class Fields:
  """The fields that describe a model; every field must be read.

  Args:
    where: the file, for errors.
    values: all fields.
    prefix: the prefix of the names of the fields (such as 'llama.' in a GGUF); other fields are ignored.
  """

  def __init__(self, where: pathlib.Path, values: Mapping[str, Any], prefix: str = ""):
    self.where = where
    self._values = {name: value for name, value in values.items() if name.startswith(prefix)}
    self._prefix = prefix
    self._read: set[str] = set()

  def __contains__(self, name: str) -> bool:
    return self._prefix + name in self._values

  def take(self, name: str, kind: type, default: Any = ...) -> Any:
    """A field's value; the default if the field is missing or null.

    Raises:
      InputError: the value has another type, is a float that is not finite or an int of more than 64 bits, or there is
        neither a value nor a default.
    """
    name = self._prefix + name
    self._read.add(name)
    value = self._values.get(name)
    if value is None:
      if default is ...:
        raise InputError(f"{self.where}: {name} is missing; it must be given ({kind.__name__})")
      return default
    # Larger integers are not floats.
    if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 1000:
      value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise InputError(f"{self.where}: {name} = {shown(value)} must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
      raise InputError(f"{self.where}: {name} = {shown(value)} must be finite; fetch the file again")
    if kind is int and abs(value) >= 1 << 63:
      raise InputError(f"{self.where}: {name} = {shown(value)} must be an integer of 64 bits; fetch the file again")
    return value

  def count(self, name: str, default: int | None = None) -> int | None:
    """A field that is a positive count; the default if it is missing or null.

    Raises:
      InputError: the value is not an int, or is not positive.
    """
    value = self.take(name, int, default)
    if value is not None and value < 1:
      raise InputError(f"{self.where}: {self._prefix}{name} = {shown(value)} must be at least 1")
    return value

  def layers(self, name: str) -> int:
    """A field that is the number of layers.

    Raises:
      InputError: the value is not an int, is not positive, or no model has so many layers. The limit bounds the lists
        with one entry for each layer, which are made before the tensors are compared with the config.
    """
    value = self.take(name, int)
    if not 1 <= value <= _MOST_LAYERS:
      raise InputError(
        f"{self.where}: {self._prefix}{name} = {shown(value)} must be from 1 to {_MOST_LAYERS}; fetch the file again"
      )
    return value

  def demand(self, name: str, accepted: Sequence[Any], default: Any = None) -> None:
    """Raises InputError unless a field (its default if it is missing) has one of the accepted values."""
    self._read.add(self._prefix + name)
    value = self._values.get(self._prefix + name, default)
    if value not in accepted:
      wanted = " or ".join(map(repr, accepted))
      raise InputError(f"{self.where}: {self._prefix}{name} = {shown(value)}; this version only supports {wanted}")

  def finish(self, harmless: Iterable[str] = ()) -> None:
    """Raises InputError if a field was not read, because it might change the model."""
    for name, value in self._values.items():
      known = name in self._read or name.removeprefix(self._prefix) in harmless
      if not known and value is not None:
        raise InputError(
          f"{self.where}: {name} = {shown(value)} is unknown and may change the model; remove it if it does not"
        )
