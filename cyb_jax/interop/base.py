"""The base of a run whose decoder is frozen: the model of `init_from`, to which its checkpoints refer.

The checkpoints of such a run contain the parameters that a run of its kind changes: adapters, and everything outside of
the decoder. The frozen parameters of the decoder are read from the base again. The JSON object of a checkpoint has the
reference to the base under 'base'; a checkpoint without this entry contains all parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from jaxtyping import PyTree

from cyb_jax import hub, storage
from cyb_jax.decoder import LoraConfig
from cyb_jax.errors import InputError, shown
from cyb_jax.methods import Method
from cyb_jax.methods.parameters import trained_part

_HASHING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class BaseReference:
  """The identity of a base.

  Attributes:
    path: the absolute path, or the address in the hub with the commit as its revision.
    checkpoint: the step of the checkpoint of a run; None: the base is no run.
    checksum: a hexadecimal sha256 of the weights.
  """

  path: str
  checkpoint: int | None
  checksum: str

  @classmethod
  def of_checkpoint(cls, meta: Mapping[str, Any]) -> BaseReference | None:
    """The reference in the JSON object of a checkpoint; None: the checkpoint contains all parameters.

    Raises:
      InputError: the object has another form.
    """
    if "base" not in meta:
      return None
    base = meta["base"]
    valid = isinstance(base, dict) and base.keys() == {"path", "checkpoint", "checksum"}
    if not valid or not all(isinstance(base[name], str) for name in ("path", "checksum")):
      raise InputError(
        f"checkpoint: base = {shown(base)} is no reference to a model; restore the checkpoint from a copy"
      )
    return cls(**base)

  def pinned(self, path: str) -> str:
    """The path; if it is the repository of the reference without a revision, the revision is added."""
    return self.path if hub.in_hub(path) and self.path.startswith(f"{path}@") else path


def checksum_of_files(files: Iterable[pathlib.Path]) -> str:
  """A hexadecimal sha256 of the contents of files, whatever their names and their order."""
  with ThreadPoolExecutor(_HASHING_THREADS) as pool:
    digests = sorted(pool.map(lambda path: storage.files(path.parent).digest(path.name, "sha256"), files))
  return hashlib.sha256("".join(digests).encode()).hexdigest()


class DecoderSource(Protocol):
  """The part of `pretrained.Pretrained` that gives the frozen parameters."""

  path: str

  @property
  def reference(self) -> BaseReference: ...
  def decoder_params(self, wanted: PyTree, lora: LoraConfig | None) -> PyTree: ...


@dataclasses.dataclass(frozen=True)
class Base:
  """The opened base of a run.

  Attributes:
    source: the base.
    method: the method of the run.
  """

  source: DecoderSource
  method: Method

  def saved_part(self, params: PyTree) -> PyTree:
    """The part of the run's parameters that its checkpoints contain; `params` has leaves of any kind."""
    return trained_part(params, lambda path: path[0] != "decoder" or self.method.is_trained(path))

  def complete(self, saved: PyTree, wanted: PyTree) -> PyTree:
    """All parameters of the run; the frozen ones are read from the base.

    Args:
      saved: see `saved_part`.
      wanted: all parameters, as jax.ShapeDtypeStruct with shardings.
    """
    frozen = trained_part(wanted["decoder"], lambda path: not self.method.is_trained(path), ("decoder",))
    decoder = self.source.decoder_params(frozen, self.method.decoder.config.lora)
    return saved | {"decoder": _joined(decoder, saved.get("decoder", {}))}


def _joined(a: PyTree, b: PyTree) -> PyTree:
  """The leaves of two nested dicts that have no leaf in common."""
  joined = a | b
  for name in a.keys() & b.keys():
    joined[name] = _joined(a[name], b[name])
  return joined
