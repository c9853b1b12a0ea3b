"""The number of trips of a loop in an optimised HLO.

It is `known_trip_count` if XLA has written this attribute. Otherwise it is derived from a counter in the loop's carry
that is compared with a constant and incremented by a constant.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from cyb_jax.compilation.hlo import Computation, Instruction


class Loops:
  """The loops of a program.

  Args:
    computations: all computations of the program, by name.
  """

  def __init__(self, computations: Mapping[str, Computation]):
    self._computations = computations

  def trips(self, computation: Computation, loop: Instruction) -> int | None:
    """The number of times that the body of a `while` of this computation runs; None: unknown."""
    found = re.search(r'known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*:\s*"?(\d+)', loop.rest)
    if found:
      return int(found[1])
    condition = self._computations[loop.attribute("condition")]
    body = self._computations[loop.attribute("body")]
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
      scope, given = self._computations[root.attribute("calls")], root
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
    """The increment of an element of the carry per trip."""
    name = self._element(body, body.root.name, index)
    if name is None:
      return None
    found = _plain(body, name)
    scope, given = body, None
    if found.opcode == "fusion":
      scope, given = self._computations[found.attribute("calls")], found
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


def _plain(computation: Computation, name: str) -> Instruction:
  """The instruction that computes a value, before copies, conversions and changes of shape."""
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
