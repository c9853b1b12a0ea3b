"""What a file of weights offers, whatever its format, and how it is checked before anything is read in bulk."""

from __future__ import annotations

import dataclasses
import importlib
import pathlib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cyb_jax.errors import InputError
from cyb_jax.interop.families import Tensor

# Formats name them differently: F16, float16.
_FLOATS = ("F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
  """What a file's header says of a tensor.

  Attributes:
    shape: outermost axis first.
    dtype: in the format's own words.
    file: that contains it.
    readable: whether this version can make floats of that dtype.
  """

  shape: tuple[int, ...]
  dtype: str
  file: pathlib.Path
  readable: bool = True


class TensorFiles(Protocol):
  """The tensors of a format.

  Attributes:
    infos: what there is, by name.
  """

  infos: Mapping[str, TensorInfo]

  def read(self, name: str) -> np.ndarray:
    """One tensor, of a float dtype; 16-bit ones as they lie in the file."""


def package(name: str, purpose: str) -> types.ModuleType:
  """A package of the extra `pretrained`.

  Raises:
    InputError: it isn't installed.
  """
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(f"{purpose}: needs the package {name}; pip install 'cyb_jax[pretrained]'") from error


def is_float(dtype: str) -> bool:
  return dtype in _FLOATS


def each(table: Sequence[Tensor], num_layers: int) -> Iterator[tuple[Tensor, int | None, str]]:
  """(tensor, layer, name) of a table, the tensors of all layers spelled out."""
  for tensor in table:
    for layer in range(num_layers) if tensor.layered else (None,):
      yield tensor, layer, tensor.name.format(layer=layer)


def check(
  files: TensorFiles, table: Sequence[Tensor], num_layers: int, where: pathlib.Path, harmless: Iterable[str] = ()
) -> None:
  """Whether the files hold a table's tensors, and no others; reads headers alone.

  Args:
    files: as found.
    table: as the config says they should be.
    num_layers: L.
    where: for the error, where a tensor isn't there.
    harmless: patterns of names that are passed over: buffers that are computed anew.

  Raises:
    InputError: a tensor that is missing, of another shape, of a dtype that can't be read, or unknown.
  """
  expected = {name: tensor.shape for tensor, _, name in each(table, num_layers)}
  for name, shape in expected.items():
    info = files.infos.get(name)
    if info is None:
      raise InputError(f"{where}: the tensor {name} {_shown(shape)} is missing; its config asks for it")
    if tuple(info.shape) != shape:
      raise InputError(
        f"{info.file}: the tensor {name} is {_shown(info.shape)}, but its config asks for {_shown(shape)}"
      )
    if not info.readable:
      raise InputError(f"{info.file}: the tensor {name} is of dtype {info.dtype}, which this version doesn't read")
  passed = re.compile("|".join(f"(?:{pattern})" for pattern in harmless) or r"(?!)")
  unknown = [name for name in files.infos if name not in expected and not passed.fullmatch(name)]
  if unknown:
    first, more = unknown[0], f" and {len(unknown) - 1} more" if unknown[1:] else ""
    raise InputError(
      f"{files.infos[first].file}: unknown tensor {first} {_shown(files.infos[first].shape)}{more}; the model has parts"
      " that this version doesn't"
    )


def _shown(shape: Sequence[int]) -> str:
  return f"[{', '.join(map(str, shape))}]"


class Fields:
  """The fields that describe a model, of which none may go unread.

  Args:
    where: the file, for errors.
    values: all fields.
    prefix: of names, where only such are meant (a GGUF's 'llama.').
  """

  def __init__(self, where: pathlib.Path, values: Mapping[str, Any], prefix: str = ""):
    self.where = where
    self._values = {name: value for name, value in values.items() if name.startswith(prefix)}
    self._prefix = prefix
    self._read: set[str] = set()

  def __contains__(self, name: str) -> bool:
    return self._prefix + name in self._values

  def take(self, name: str, kind: type, default: Any = ...) -> Any:
    """A field's value; where it is missing or null, the default.

    Raises:
      InputError: another type, or no value and no default.
    """
    name = self._prefix + name
    self._read.add(name)
    value = self._values.get(name)
    if value is None:
      if default is ...:
        raise InputError(f"{self.where}: {name} is missing; it must be given ({kind.__name__})")
      return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
      value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
      raise InputError(f"{self.where}: {name} = {value!r} must be of type {kind.__name__}")
    return value

  def count(self, name: str) -> int | None:
    """A field that counts something; None where it is missing or null.

    Raises:
      InputError: no int, or none above zero.
    """
    value = self.take(name, int, None)
    if value is not None and value < 1:
      raise InputError(f"{self.where}: {self._prefix}{name} = {value} must be at least 1")
    return value

  def demand(self, name: str, accepted: Sequence[Any], default: Any = None) -> None:
    """Raises InputError unless a field, or its default where it is missing, is one of those that change nothing."""
    self._read.add(self._prefix + name)
    value = self._values.get(self._prefix + name, default)
    if value not in accepted:
      wanted = " or ".join(map(repr, accepted))
      raise InputError(f"{self.where}: {self._prefix}{name} = {value!r}; this version has {wanted} alone")

  def finish(self, harmless: Iterable[str] = ()) -> None:
    """Raises InputError if there is a field that nothing has read: it might change the model."""
    for name, value in self._values.items():
      known = name in self._read or name.removeprefix(self._prefix) in harmless
      if not known and value is not None:
        raise InputError(
          f"{self.where}: {name} = {_short(value)} is unknown, and may change what the model computes; take it out"
          " if it doesn't"
        )


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 60 else text[:57] + "..."
