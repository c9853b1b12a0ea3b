"""The traffic of a compiled program between devices and to memory, from its optimised HLO.

XLA's own cost analysis counts the body of a loop once and does not report collectives. Here each instruction counts as
often as it runs: a loop's body counts its number of trips if it is known (`loops`), otherwise once.
"""

from __future__ import annotations

import dataclasses
import math
import re

from cyb_jax.compilation.hlo import NAME, Computation, Instruction, parse
from cyb_jax.compilation.loops import Loops

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# Instructions without traffic: aliases of existing arrays, and instructions that are counted elsewhere.
_FREE = frozenset({
  "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id",
  "replica-id", "iota", "while", "conditional", "call", "async-start", "async-update", "async-done", "copy-done",
  "slice-done", "dynamic-slice-done", "dynamic-update-slice-done",
})  # fmt: skip
# Asynchronous copies have a tuple of the written and the read array as result: the index of the written array.
_WRITTEN = {"copy-start": 0, "slice-start": 1, "dynamic-slice-start": 1}
_COLLECTIVE = re.compile(rf"({'|'.join(KINDS)})(-start)?")


@dataclasses.dataclass(frozen=True)
class Collective:
  """A collective operation.

  Attributes:
    kind: one of KINDS.
    bytes: the size of the full array that a group of devices gathers, reduces, scatters or exchanges, per device.
    group: the number of participating devices.
    times: the number of executions.
  """

  kind: str
  bytes: int
  group: int
  times: int

  @property
  def sent(self) -> float:
    """The minimum bytes that a device sends per execution: n - 1 of n parts in a ring, twice in an all-reduce."""
    if self.kind == "collective-permute":
      return self.bytes
    passes = 2 if self.kind == "all-reduce" else 1
    return passes * self.bytes * (self.group - 1) / self.group


@dataclasses.dataclass(frozen=True)
class Move:
  """An instruction that reads from or writes to HBM.

  Attributes:
    instruction: its name in the optimised HLO.
    operation: the operation of the program that it comes from, as JAX names it; of a fusion that of its result.
    times: the number of executions.
    bytes: the bytes of all executions together.
    in_open_loop: whether it is in a loop with an unknown number of trips.
  """

  instruction: str
  operation: str
  times: int
  bytes: int
  in_open_loop: bool = False


@dataclasses.dataclass(frozen=True)
class Traffic:
  """The traffic of a program on each device.

  Attributes:
    collectives: all collectives.
    hbm_bytes: bytes that instructions outside of fusions read from and write to HBM: their operands and results in HBM.
      For an operand that is sliced or gathered from, only the read part counts; for an operand that is updated in
      place, only the written part. A kernel's operands count once, even if it reads them several times.
      Of a conditional, the branch with the most bytes counts.
    open_loops: the number of loops with an unknown number of trips, which count once.
    moves: the instructions that `hbm_bytes` counts, those with the most bytes first.
  """

  collectives: tuple[Collective, ...]
  hbm_bytes: int
  open_loops: int
  moves: tuple[Move, ...] = ()

  def iteration(self) -> Traffic:
    """The traffic to memory of one iteration of the loops with an unknown number of trips, and all collectives.

    Without such loops it is this traffic.
    """
    if not self.open_loops:
      return self
    moves = tuple(move for move in self.moves if move.in_open_loop)
    return dataclasses.replace(self, hbm_bytes=sum(move.bytes for move in moves), moves=moves)

  @property
  def sent(self) -> float:
    """The total number of bytes that a device sends."""
    return sum(collective.sent * collective.times for collective in self.collectives)

  def by_kind(self) -> dict[str, dict[str, float]]:
    """`count`, `bytes` and `sent_bytes` of all executions, for each of KINDS."""
    result = {kind: {"count": 0, "bytes": 0, "sent_bytes": 0.0} for kind in KINDS}
    for collective in self.collectives:
      sums = result[collective.kind]
      sums["count"] += collective.times
      sums["bytes"] += collective.times * collective.bytes
      sums["sent_bytes"] += collective.times * collective.sent
    return result


def traffic(text: str) -> Traffic:
  """The traffic of a program, from the text of its optimised HLO."""
  return _Walk(text).result()


class _Walk:
  def __init__(self, text: str):
    self.computations, self.entry = parse(text)
    self.loops = Loops(self.computations)
    header = text[: text.find("\n")]
    sizes = [re.search(rf"\b{name}=(\d+)", header) for name in ("num_partitions", "replica_count")]
    self.devices = math.prod(int(size[1]) for size in sizes if size)
    self.collectives: list[Collective] = []
    self.chained: dict[str, Collective] = {}
    self.moves: list[Move] = []
    self.open_loops = 0

  def result(self) -> Traffic:
    self._run(self.entry, 1)
    moves = tuple(sorted(self.moves, key=lambda move: -move.bytes))
    total = sum(move.bytes for move in moves)
    return Traffic((*self.collectives, *self.chained.values()), total, self.open_loops, moves)

  def _run(self, name: str, times: int, in_open_loop: bool = False) -> None:
    computation = self.computations[name]
    for instruction in computation:
      if instruction.opcode == "while":
        trips = self.loops.trips(computation, instruction)
        self.open_loops += trips is None
        self._run(instruction.attribute("body"), times * (1 if trips is None else trips), in_open_loop or trips is None)
      elif instruction.opcode == "conditional":
        self._run_largest(_branches(instruction), times, in_open_loop)
      elif instruction.opcode in ("call", "async-start"):
        self._run(instruction.attribute("to_apply") or instruction.attribute("calls"), times, in_open_loop)
      elif _COLLECTIVE.fullmatch(instruction.opcode):
        self.collectives.append(self._collective(computation, instruction, times))
      elif instruction.opcode == "fusion":
        self._fused(instruction.attribute("calls"), times)
      if moved := self._moved(computation, instruction):
        operation = re.search(r'op_name="([^"]*)"', instruction.rest)
        name_of_operation = operation[1] if operation else ""
        self.moves.append(Move(instruction.name, name_of_operation, times, times * moved, in_open_loop))

  def _run_largest(self, branches: list[str], times: int, in_open_loop: bool) -> None:
    """Counts the branch of a conditional that moves the most bytes. The collectives of all branches count."""
    before, largest = self.moves, []
    for branch in branches:
      self.moves = []
      self._run(branch, times, in_open_loop)
      largest = max(largest, self.moves, key=lambda moves: sum(move.bytes for move in moves))
    self.moves = before + largest

  def _fused(self, name: str, times: int) -> None:
    """Counts the collectives in a fusion on TPUs.

    An all-reduce whose result is scattered counts as a reduce-scatter, and a collective that several fusions execute in
    parts counts once.
    """
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
          # A collective that begins before a loop may continue inside it.
          self.chained[channel] = found

  def _collective(self, computation: Computation, instruction: Instruction, times: int) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    group = _group(instruction.rest) or self.devices
    size = sum(computation[operand].bytes for operand in instruction.operands)
    return Collective(kind, size * group if kind == "all-gather" else size, group, times)

  def _moved(self, computation: Computation, instruction: Instruction) -> int:
    """The bytes of HBM that the instruction reads and writes."""
    opcode = instruction.opcode
    if opcode in _FREE or (opcode.endswith("-done") and _COLLECTIVE.match(opcode)):
      return 0
    operands = [computation[operand] for operand in instruction.operands]
    if opcode in _WRITTEN:
      return _moved_by_copy(instruction, operands[0])
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
    """The bytes of a fusion's operand that are read: all, unless it is only sliced, gathered or updated in place."""
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
  """The number of devices in a group; None: all devices, or unknown."""
  if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
    return found[1].count(",") + 1
  if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
    return int(found[2])
  if found := re.search(r"replica_groups=\w*\[([^\]]*)\]\s*\{([^}]*)\}", rest):
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
    # A part of an axis is written 'a':(before)size.
    axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part) if part else sizes[name] for name, part in axes)
  return None


def _moved_by_copy(start: Instruction, source: Instruction) -> int:
  """The bytes of HBM that an asynchronous copy or slice reads and writes: the size of the written array, for each of
  source and result that is in HBM.
  """
  index = _WRITTEN[start.opcode]
  written = start.arrays[index : index + 1]
  size = sum(array.bytes for array in written)
  return size * (sum(x.in_hbm for x in written) + sum(x.in_hbm for x in source.arrays))


def _branches(instruction: Instruction) -> list[str]:
  found = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
  if found:
    return NAME.findall(found[1])
  return [instruction.attribute("true_computation"), instruction.attribute("false_computation")]
