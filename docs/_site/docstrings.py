"""Reads the docstrings of the package for the API pages, and finds missing ones."""

from __future__ import annotations

import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import griffe

ROOT = pathlib.Path(__file__).parents[2]
_IDENTIFIER = re.compile(r"^::: ([\w.]+)", re.MULTILINE)
# An item of a section that documents several names at once, and its continuation lines.
_JOINED = re.compile(r"^(?P<indent> *)(?P<names>\w+(?:, \w+)+):(?P<meaning> .*(?:\n(?P=indent) +.*)*)", re.MULTILINE)
# Methods that a library calls, such as `flax.linen`.
_OF_LIBRARIES = ("setup",)


class SplitNames(griffe.Extension):
  """Splits an item of a docstring for several names, for example 'store, split: see `open`', into one item per name."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    if obj.docstring:
      obj.docstring.value = _JOINED.sub(_split, obj.docstring.value)


def _split(found: re.Match[str]) -> str:
  return "\n".join(f"{found['indent']}{name}:{found['meaning']}" for name in found["names"].split(", "))


def identifiers(markdown: str) -> list[str]:
  """The names of the objects that a page documents, for example 'cyb_jax.losses'."""
  return _IDENTIFIER.findall(markdown)


@functools.cache
def package(folder: pathlib.Path = ROOT, name: str = "cyb_jax") -> griffe.Module:
  """The package, parsed without an import."""
  extensions = griffe.load_extensions(SplitNames)
  return griffe.load(
    name, search_paths=[folder], docstring_parser="google", resolve_aliases=True, extensions=extensions
  )


@functools.cache
def _protocols(root: griffe.Module) -> list[griffe.Class]:
  """The protocols of the package."""
  found = []
  remaining: list[griffe.Object] = [root]
  while remaining:
    members = [member for member in remaining.pop().members.values() if not member.is_alias]
    remaining += [member for member in members if member.is_module or member.is_class]
    found += [member for member in members if member.is_class and _is_protocol(member)]
  return found


def _is_protocol(found: griffe.Class) -> bool:
  return any(str(base).partition("[")[0].endswith("Protocol") for base in found.bases)


def _methods(found: griffe.Class) -> set[str]:
  return {name for name, member in found.all_members.items() if not member.is_alias and member.is_function}


def _promised(found: griffe.Class, root: griffe.Module) -> set[str]:
  """The names that protocols document for a class: the names of all protocols whose methods the class has."""
  methods = _methods(found) | {name for base in found.mro() for name in base.members}
  names: set[str] = set()
  for protocol in _protocols(root):
    required = {name for name, member in protocol.members.items() if member.is_function and not name.startswith("_")}
    if required and required <= methods and protocol.path != found.path:
      names |= {name for name in required if protocol.members[name].has_docstring} | _attributes(protocol)
  return names


def without_docstring(identifier: str, root: griffe.Module | None = None) -> list[str]:
  """The paths of an object and its public members that have no docstring.

  A field of a dataclass is documented under `Attributes` of its class, and a method that implements a protocol is
  documented by the protocol.

  Args:
    identifier: the name of a module, a class or a function, for example 'cyb_jax.losses'.
    root: the package; None: `package()`.
  """
  root = root or package()
  _, _, path = identifier.partition(".")
  return [*dict.fromkeys(_missing(root[path] if path else root, root))]


def _missing(found: griffe.Object | griffe.Alias, root: griffe.Module) -> Iterator[str]:
  if found.is_attribute:
    return
  if not found.has_docstring:
    yield found.path
  promised = _promised(found, root) if found.is_class else set()
  if found.is_class:
    documented = _attributes(found) if "dataclass" in found.labels else _attributes(found) | promised
    for name, member in found.members.items():
      if _is_field(name, member) and name not in documented and not member.has_docstring:
        yield f"{found.path}.{name} (under Attributes)"
  if found.is_module or found.is_class:
    for name, member in found.members.items():
      if name.startswith("_") or (member.is_alias and name not in (found.exports or ())) or member.is_module:
        continue
      if found.is_class and (name in promised or name in _OF_LIBRARIES or _inherits(found, name)):
        continue
      yield from _missing(member.final_target if member.is_alias else member, root)


def _attributes(found: griffe.Class) -> set[str]:
  if not found.docstring:
    return set()
  sections = found.docstring.parse("google", warnings=False)
  kind = griffe.DocstringSectionKind.attributes
  return {item.name for section in sections if section.kind == kind for item in section.value}


def _is_field(name: str, member: griffe.Object | griffe.Alias) -> bool:
  if name.startswith("_") or not member.is_attribute or "property" in member.labels:
    return False
  return member.annotation is not None and "ClassVar" not in str(member.annotation)


def _inherits(found: griffe.Class, name: str) -> bool:
  """Whether a base class documents the method."""
  return any(name in base.members and base.members[name].has_docstring for base in found.mro())
