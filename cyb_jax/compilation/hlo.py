"""What a compiled program moves, read from the text of its optimised HLO: between devices, and from and to memory.

XLA's own cost analysis counts the body of a loop once, and says nothing of collectives. Here each instruction counts as
often as it runs: a loop's body times its trips, where they are known from `known_trip_count` or from a counter that is
compared with a constant; once where they aren't.

Text of HLO: https://openxla.org/xla/operation_semantics; `S(1)` in a layout is another memory than HBM.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "token": 0, "opaque": 0}
# What moves nothing: names for what is there, and what is counted elsewhere.
_FREE = frozenset({
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
  "replica-id", "iota", "while", "conditional", "call", "async-start", "async-update", "async-done", "copy-done",
  "slice-done", "dynamic-slice-done", "dynamic-update-slice-done",
})  # fmt: skip
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{")
_NAME = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
  """The shape of an array.

  Attributes:
    bytes: without the padding of its tiles.
    in_hbm: whether it lies there.
  """

  bytes: int
  in_hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line.

  Attributes:
    name: in its computation.
    opcode: 'all-reduce', 'fusion', ...
    arrays: of its result, a tuple's one after the other.
    operands: names of instructions of the same computation.
    rest: the attributes.
    root: whether its result is the computation's.
    literal: of a constant or a parameter, what stands in its parentheses.
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
  """Instructions by name, in their order."""

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


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of KINDS.
    bytes: of the whole that a group of devices gathers, reduces, scatters or exchanges, as one device holds it.
    group: devices that take part in one.
    times: how often it runs.
  """

  kind: str
  bytes: int
  group: int
  times: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends each time, at least: in a ring n - 1 of n parts, of an all-reduce twice."""
    if self.kind == "collective-permute":
      return self.bytes
    passes = 2 if self.kind == "all-reduce" else 1
    return passes * self.bytes * (self.group - 1) / self.group


@dataclasses.dataclass(frozen=True)
class Traffic:
  """What a program moves, on each device.

  Attributes:
    collectives: all of them.
    hbm_bytes: read and written by the instructions outside fusions: their operands and results, where they lie in HBM;
      of an operand that is sliced or gathered from what is read, of one that is updated in place what is written. A
      kernel's operands count once, however often it reads them.
    open_loops: loops whose number of trips isn't known; they were taken to run once.
  """

  collectives: tuple[Collective, ...]
  hbm_bytes: int
  open_loops: int

  @property
  def sent(self) -> float:
    """Bytes that a device sends."""
    return sum(collective.sent * collective.times for collective in self.collectives)

  def by_kind(self) -> dict[str, dict[str, float]]:
    """For each of KINDS `count`, `bytes` and `sent_bytes`, of all of its runs."""
    result = {kind: {"count": 0, "bytes": 0, "sent_bytes": 0.0} for kind in KINDS}
    for collective in self.collectives:
      sums = result[collective.kind]
      sums["count"] += collective.times
      sums["bytes"] += collective.times * collective.bytes
      sums["sent_bytes"] += collective.times * collective.sent
    return result


def traffic(text: str) -> Traffic:
  """What the program of an optimised HLO text moves."""
  return _Walk(text).result()


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Computations by name, and the name of the one that the program begins with."""
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
      # Attributes may go on for some lines, those of kernels do.
      lines[-1] += " " + line
  return computations, entry


def _instruction(name: str, text: str, *, root: bool) -> Instruction:
  end = _closing(text) if text.startswith("(") else text.index(" ")
  shape, _, text = text[: end + 1], None, text[end + 1 :].lstrip()
  opcode, _, text = text.partition("(")
  end = _closing("(" + text) - 1
  inside, rest = text[:end], text[end + 1 :]
  operands = () if opcode in ("constant", "parameter") else tuple(_NAME.findall(inside))
  return Instruction(name, opcode, _arrays(shape), operands, rest, root, inside)


def _closing(text: str) -> int:
  """Where the parenthesis that a text begins with is closed."""
  depth = 0
  for place, letter in enumerate(text):
    depth += (letter == "(") - (letter == ")")
    if not depth:
      return place
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


class _Walk:
  def __init__(self, text: str):
    self.computations, self.entry = parse(text)
    header = text[: text.find("\n")]
    sizes = [re.search(rf"\b{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    self.devices = math.prod(int(size[1]) for size in sizes if size)
    self.collectives: list[Collective] = []
    self.chained: dict[str, Collective] = {}
    self.hbm_bytes = self.open_loops = 0

  def result(self) -> Traffic:
    self._run(self.entry, 1)
    return Traffic((*self.collectives, *self.chained.values()), self.hbm_bytes, self.open_loops)

  def _run(self, name: str, times: int) -> None:
    computation = self.computations[name]
    for instruction in computation:
      if instruction.opcode == "while":
        trips = self._trips(computation, instruction)
        self.open_loops += trips is None
        self._run(instruction.attribute("body"), times * (1 if trips is None else trips))
      elif instruction.opcode == "conditional":
        # Whichever is taken: they are few and small, and all count.
        for branch in _branches(instruction):
          self._run(branch, times)
      elif instruction.opcode in ("call", "async-start"):
        self._run(instruction.attribute("to_apply") or instruction.attribute("calls"), times)
      elif _COLLECTIVE.fullmatch(instruction.opcode):
        self.collectives.append(self._collective(computation, instruction, times))
      elif instruction.opcode == "fusion":
        self._fused(instruction.attribute("calls"), times)
      self.hbm_bytes += times * self._moved(computation, instruction)

  def _fused(self, name: str, times: int) -> None:
    """The collectives in a fusion, which TPUs have: an all-reduce of which each device keeps its part; and ones that
    are worked on a little in each of several fusions, which are one."""
    computation = self.computations[name]
    for instruction in computation:
      if instruction.opcode == "fusion":
        self._fused(instruction.attribute("calls"), times)
      elif _COLLECTIVE.fullmatch(instruction.opcode):
        found = self._collective(computation, instruction, times)
        if name.startswith("all-reduce-scatter"):
          found = dataclasses.replace(found, kind="reduce-scatter")
        channel = instruction.attribute("channel_id")
        if channel is None or "chain_id" not in instruction.rest:
          self.collectives.append(found)
        elif channel not in self.chained or times < self.chained[channel].times:
          # Begun before a loop, it may be worked on inside.
          self.chained[channel] = found

  def _collective(self, computation: Computation, instruction: Instruction, times: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    group = _group(instruction.rest) or self.devices
    size = sum(computation[operand].bytes for operand in instruction.operands)
    return Collective(kind, size * group if kind == "all-gather" else size, group, times)

  def _trips(self, computation: Computation, loop: Instruction) -> int | None:
    found = re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*:\s*"?(\d+)', loop.rest)
    if found:
      return int(found[1])
    condition = self.computations[loop.attribute("condition")]
    body = self.computations[loop.attribute("body")]
    compared = self._comparison(condition)
    if compared is None:
      return None
    index, limit, direction = compared
    start = _constant(computation, self._element(computation, loop.operands[0], index))
    step = self._step(body, index)
    if start is None or not step or (limit - start) * step < 0:
      return None
    if direction == "NE":
      return (limit - start) // step if (limit - start) % step == 0 else None
    if (direction in ("LT", "LE")) != (step > 0):
      return None
    span = abs(limit - start) + (direction in ("LE", "GE"))
    return -(-span // abs(step))

  def _comparison(self, condition: Computation) -> tuple[int, int, str] | None:
    """(index in the carry, constant, direction) of `carry[index] < constant`."""
    scope, root, given = condition, condition.root, None
    if root.opcode == "fusion":
      scope, given = self.computations[root.attribute("calls")], root
      root = scope.root
    if root.opcode != "compare":
      return None
    sides = []
    for operand in root.operands:
      where, found = scope, _plain(scope, operand)
      if given is not None and found.opcode == "parameter":
        where = condition
        found = _plain(condition, given.operands[int(found.literal)])
      sides.append((where, found))
    (_, counter), (_, limit) = sides
    direction = re.search(r"direction=(\w+)", root.rest)[1]
    if counter.opcode == "constant":
      counter, limit = limit, counter
      direction = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction, direction)
    if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
      return None
    index, value = counter.attribute("index"), _number(limit)
    return None if value is None or direction == "EQ" else (int(index), value, direction)

  def _element(self, computation: Computation, name: str, index: int) -> str | None:
    """The instruction that is an element of a tuple."""
    found = _plain(computation, name)
    return found.operands[index] if found.opcode == "tuple" else None

  def _step(self, body: Computation, index: int) -> int | None:
    """By how much a trip raises an element of the carry."""
    name = self._element(body, body.root.name, index)
    if name is None:
      return None
    found = _plain(body, name)
    scope, given = body, None
    if found.opcode == "fusion":
      scope, given = self.computations[found.attribute("calls")], found
      found = scope.root
    if found.opcode not in ("add", "subtract"):
      return None
    values = []
    for operand in found.operands:
      term = _plain(scope, operand)
      if given is not None and term.opcode == "parameter":
        term = _plain(body, given.operands[int(term.literal)])
      values.append(term)
    counters = [x for x in values if x.opcode == "get-tuple-element" and x.attribute("index") == str(index)]
    constants = [_number(x) for x in values if x.opcode == "constant"]
    if len(counters) != 1 or len(constants) != 1 or constants[0] is None:
      return None
    return constants[0] if found.opcode == "add" else -constants[0]

  def _moved(self, computation: Computation, instruction: Instruction) -> int:
    """Bytes of HBM that it reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or (opcode.endswith("-done") and _COLLECTIVE.match(opcode)):
      return 0
    operands = [computation[operand] for operand in instruction.operands]
    if opcode in ("copy-start", "slice-start", "dynamic-slice-start") or _COLLECTIVE.fullmatch(opcode):
      # The result of what is started holds what it reads too; a part of that is read where it's sliced.
      written = instruction.arrays
      if opcode.endswith("-start"):
        written = written[1:2] if opcode in ("slice-start", "dynamic-slice-start") else written[:1]
      size = sum(array.bytes for array in written)
      if opcode.endswith("-start") and not _COLLECTIVE.fullmatch(opcode):
        return size * (sum(x.in_hbm for x in written) + sum(x.in_hbm for x in operands[0].arrays))
      return instruction.hbm_bytes + sum(x.hbm_bytes for x in operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
      return instruction.hbm_bytes + (instruction.bytes if operands[0].hbm_bytes else 0)
    if opcode in ("dynamic-update-slice", "scatter"):
      update = operands[1 if opcode == "dynamic-update-slice" else -1]
      return update.hbm_bytes + (update.bytes if operands[0].hbm_bytes else 0)
    if opcode == "fusion":
      return self._moved_by_fusion(operands, instruction, self.computations[instruction.attribute("calls")])
    return instruction.hbm_bytes + sum(operand.hbm_bytes for operand in operands)

  def _moved_by_fusion(self, operands: list[Instruction], fusion: Instruction, inside: Computation) -> int:
    moved = 0
    for number, operand in enumerate(operands):
      parameter = inside.parameters.get(number)
      if operand.hbm_bytes and parameter is not None:
        moved += min(operand.hbm_bytes, self._read(inside, parameter))
    root = inside.root
    results = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
    if len(results) != len(fusion.arrays):
      return moved + fusion.hbm_bytes
    for array, result in zip(fusion.arrays, results):
      if not array.in_hbm:
        continue
      while result.opcode == "bitcast":
        result = inside[result.operands[0]]
      if result.opcode == "dynamic-update-slice":
        moved += inside[result.operands[1]].bytes
      elif result.opcode == "scatter":
        moved += inside[result.operands[-1]].bytes
      elif result.opcode != "parameter" and not _COLLECTIVE.fullmatch(result.opcode):
        moved += array.bytes
    return moved

  def _read(self, inside: Computation, value: Instruction) -> int:
    """Bytes of a fusion's operand that are read: all, unless it is only sliced, gathered from or updated in place."""
    read = 0
    for user in inside.users[value.name]:
      first = user.operands[0] == value.name and user.operands.count(value.name) == 1
      if user.opcode == "bitcast":
        read += self._read(inside, user)
      elif user.opcode in ("dynamic-slice", "slice", "gather") and first:
        read += user.bytes
      elif user.opcode == "fusion" and user.operands.count(value.name) == 1:
        called = self.computations[user.attribute("calls")]
        read += self._read(called, called.parameters[user.operands.index(value.name)])
      elif (user.opcode in ("dynamic-update-slice", "scatter") and first) or user.opcode == "tuple":
        continue
      elif not _COLLECTIVE.fullmatch(user.opcode):
        return value.bytes
    return read


def _group(rest: str) -> int | None:
  """Devices in a group; None: all, or it isn't told."""
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return found[1].count(",") + 1
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(found[2])
  if found := re.search(r"replica_groups=\w*\[([^\]]*)\]\s*\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    # Of a part of an axis, 'a':(before)size, the size.
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  return None


def _branches(instruction: Instruction) -> list[str]:
  found = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
  if found:
    return _NAME.findall(found[1])
  return [instruction.attribute("true_computation"), instruction.attribute("false_computation")]


def _plain(computation: Computation, name: str) -> Instruction:
  """The instruction that made a value which was only copied or named anew since."""
  found = computation[name]
  while found.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done", "reshape"):
    found = computation[found.operands[0]]
  return found


def _constant(computation: Computation, name: str | None) -> int | None:
  return None if name is None else _number(_plain(computation, name))


def _number(instruction: Instruction) -> int | None:
  try:
    return int(instruction.literal) if instruction.opcode == "constant" else None
  except ValueError:
    return None
