"""Parser of the text of a compiled program, its optimised HLO, into computations of instructions.

Format of HLO: https://openxla.org/xla/operation_semantics; `S(1)` in a layout is a memory other than HBM.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{")
NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
  """The shape of an array.

  Attributes:
    bytes: the size without the padding of tiles.
    in_hbm: whether the array is in HBM.
  """

  bytes: int
  in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """An instruction, one line of the text.

  Attributes:
    name: its name within the computation.
    opcode: such as 'all-reduce' or 'fusion'.
    arrays: the arrays of its result; a tuple has several.
    operands: names of instructions of the same computation.
    rest: the text of the attributes.
    root: whether its result is the result of the computation.
    literal: the text in the parentheses of a constant or a parameter.
  """

  name: str
  opcode: str
  arrays: tuple[Array, ...]
  operands: tuple[str, ...]
  rest: str
  root: bool
  literal: str

  @property
  def bytes(self) -> int:
    return sum(array.bytes for array in self.arrays)

  @property
  def hbm_bytes(self) -> int:
    return sum(array.bytes for array in self.arrays if array.in_hbm)

  def attribute(self, name: str) -> str | None:
    """The computation or number that an attribute names."""
    found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
    return found[1] if found else None


class Computation:
  """The instructions of a computation by name, in order."""

  def __init__(self, instructions: list[Instruction]):
    self.instructions = {instruction.name: instruction for instruction in instructions}

  def __getitem__(self, name: str) -> Instruction:
    return self.instructions[name]

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @functools.cached_property
  def root(self) -> Instruction:
    roots = [instruction for instruction in self if instruction.root]
    return roots[0] if roots else list(self)[-1]

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(x.literal): x for x in self if x.opcode == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
    for instruction in self:
      for operand in dict.fromkeys(instruction.operands):
        found[operand].append(instruction)
    return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations by name, and the name of the entry computation."""
  computations: dict[str, Computation] = {}
  name, entry, lines = None, "", []
  for line in text.splitlines():
    if name is None:
      found = _COMPUTATION.match(line)
      if found:
        name, lines = found[2], []
        entry = name if found[1] else entry
    elif line.rstrip() == "}":
      matches = [_INSTRUCTION.match(line) for line in lines]
      computations[name] = Computation([_instruction(x[2], x[3], root=x[1] is not None) for x in matches])
      name = None
    elif _INSTRUCTION.match(line):
      lines.append(line)
    elif lines:
      # Attributes, for example those of kernels, may continue on further lines.
      lines[-1] += " " + line
  return computations, entry


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
  end = _closing(text) if text.startswith("(") else text.index(" ")
  shape, _, text = text[: end + 1], None, text[end + 1 :].lstrip()
  opcode, _, text = text.partition("(")
  end = _closing("(" + text) - 1
  inside, rest = text[:end], text[end + 1 :]
  operands = () if opcode in ("constant", "parameter") else tuple(NAME.findall(inside))
  return Instruction(name, opcode, _arrays(shape), operands, rest, root, inside)


def _closing(text: str) -> int:
  """The index of the parenthesis that closes the one at the start of a text."""
  depth = 0
  for index, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return index
  raise ValueError(f"no closing parenthesis in {text[:80]!r}")


def _arrays(shape: str) -> tuple[Array, ...]:
  arrays = []
  for kind, sizes, layout in _ARRAY.findall(shape):
    bits = _BITS.get(kind)
    if bits is None:
      bits = int(re.search(r"\d+", kind)[0])
      bits *= 2 if kind.startswith("c") else 1
    count = math.prod(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    memory = re.search(r"S\((\d+)\)", layout)
    arrays.append(Array(-(-count * bits // 8), memory is None or memory[1] == "0"))
  return tuple(arrays)
