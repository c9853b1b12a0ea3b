"""Alternating time measurements, so that drift of the machine and other programs affect all candidates equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import flags

from cyb_jax.errors import InputError

T = TypeVar("T")


def define_flags() -> None:
  flags.DEFINE_integer("repeats", 5, "The number of measurements of each time; medians are printed.")


def repeats() -> int:
  """The flag `--repeats`.

  Raises:
    InputError: the value is less than 1.
  """
  if flags.FLAGS.repeats < 1:
    raise InputError(f"--repeats: {flags.FLAGS.repeats} must be at least 1")
  return flags.FLAGS.repeats


def in_turn(functions: Sequence[Callable[[], T]], rounds: int) -> list[list[T]]:
  """The results of each function in each round; the functions are called in turn: A B C A B C and so on.

  Returns:
    One list of `rounds` results for each function.
  """
  results: list[list[T]] = [[] for _ in functions]
  for _ in range(rounds):
    for function, mine in zip(functions, results):
      mine.append(function())
  return results


def timed(function: Callable[[], Any]) -> float:
  """Calls a function once, and returns the seconds."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def side_by_side(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
  """The median seconds of each function, called in turn after one warm-up call of each."""
  for function in functions.values():
    function()
  times = in_turn([lambda f=function: timed(f) for function in functions.values()], rounds)
  return {name: statistics.median(values) for name, values in zip(functions, times)}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  """(lower quartile, median, upper quartile) of at least two values."""
  lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
  return lower, median, upper


def ratio(base: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
  """(median, lowest, highest) of base / other over the rounds: the speed-up of `other`.

  Args:
    base, other: the seconds of each round, in order.
  """
  rounds = [a / b for a, b in zip(base, other, strict=True)]
  return statistics.median(rounds), min(rounds), max(rounds)
