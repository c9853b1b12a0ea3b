"""Benchmark of scoring: requests per second of downstream tasks, batched and one by one.

Two sets of requests are drawn, with lengths as in two tasks: LAMBADA, with a context of about 85 tokens and a word of
one to three tokens; and HellaSwag, with a context of about 60 tokens and four endings of about 28 tokens. Three ways
alternate (A B C A B C and so on), so that drift of the machine affects all equally:

- batched: `Scorer.score` of the complete set;
- one_by_one: `Scorer.score` of one request after the other, each compiled for its length;
- padded: the method's evaluation of one request after the other, padded to the longest request of the set, with a
  readout of all tokens.

Both wall-clock and processor time are measured; other programs on the machine affect the latter less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags, logging

from cyb_jax.benchmarks import models, timing
from cyb_jax.errors import InputError

_LIKE = {
  "lambada": {"context": (85, 25), "continuation": (2, 1), "choices": 1},
  "hellaswag": {"context": (60, 25), "continuation": (28, 12), "choices": 4},
}


def define_flags() -> None:
  models.define_flags()
  flags.DEFINE_integer("requests", 64, "The number of requests in each set.")
  flags.DEFINE_integer(
    "row_slots",
    0,
    "With batches, the number of slots of a row, see `Scorer`; 1: the length of the request; 0: the cheapest length.",
  )
  flags.DEFINE_list("like", list(_LIKE), "The sets of requests, some of " + ", ".join(_LIKE) + ".")
  timing.define_flags()


def scoring() -> dict[str, Any]:
  """A row for each set and way, and the speed-up of batches.

  Raises:
    InputError: the input is invalid; nothing was compiled.
  """
  args = flags.FLAGS
  repeats = timing.repeats()
  if args.requests < 1:
    raise InputError(f"--requests: {args.requests} must be at least 1")
  if args.row_slots < 0:
    raise InputError(f"--row_slots: {args.row_slots} must not be negative")
  for name in args.like:
    if name not in _LIKE:
      raise InputError(f"--like: {name!r} is not one of {', '.join(_LIKE)}")
  models.check_flags()

  import jax

  method, params, matmul = models.chosen()
  rows, ratios = [], []
  with jax.default_matmul_precision(matmul):
    for name in args.like:
      ways = _ways(method, params, _requests(name, args.requests, method.vocab_size), args.row_slots)
      for way in ways.values():
        way()
      logging.info("%s: compiled", name)
      times = dict(zip(ways, timing.in_turn([lambda f=f: _timed(f) for f in ways.values()], repeats)))
      for way, taken in times.items():
        wall, busy = (statistics.median(column) for column in zip(*taken))
        rows.append({
          "like": name, "way": way, "requests_per_second": args.requests / wall,
          "requests_per_processor_second": args.requests / busy,
        })  # fmt: skip
      for way in list(times)[1:]:
        ratio: dict[str, Any] = {"like": name, "batched_over": way}
        for kind, column in (("wall", 0), ("processor", 1)):
          ours, others = ([taken[column] for taken in times[x]] for x in ("batched", way))
          ratio[kind] = dict(zip(("median", "lowest", "highest"), timing.ratio(others, ours)))
        ratios.append(ratio)
  return {
    "benchmark": "scoring",
    "source": models.source(),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
    "num_slots": method.num_slots,
    "requests": args.requests,
    "repeats": repeats,
    "timing": {"rows": rows, "ratios": ratios},
  }


def _timed(function: Callable[[], Any]) -> tuple[float, float]:
  """(wall-clock, processor) seconds."""
  wall, busy = time.perf_counter(), time.process_time()
  function()
  return time.perf_counter() - wall, time.process_time() - busy


def _requests(name: str, count: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
  import numpy as np

  rng = np.random.default_rng(0)
  like = _LIKE[name]

  def ids(mean: float, deviation: float) -> list[int]:
    return rng.integers(0, vocabulary, max(1, round(rng.normal(mean, deviation)))).tolist()

  requests = []
  while len(requests) < count:
    context = ids(*like["context"])
    requests += [(context, ids(*like["continuation"])) for _ in range(like["choices"])]
  return requests[:count]


def _ways(
  method: Any, params: Any, requests: list[tuple[list[int], list[int]]], row_slots: int = 0
) -> dict[str, Callable[[], Any]]:
  import jax
  import numpy as np

  from cyb_jax.generation.scoring import Scorer

  longest = max(len(context) + len(continuation) - 1 for context, continuation in requests)
  scorer = Scorer(method, params, context=longest, start_id=0, row_slots=row_slots or None)
  read = jax.jit(method.evaluate)

  def padded(context: list[int], continuation: list[int]) -> float:
    tokens, targets = np.zeros((2, 1, longest), np.int32)
    ids = context + continuation
    tokens[0, : len(ids) - 1], targets[0, : len(ids) - 1] = ids[:-1], ids[1:]
    output = read(params, {"tokens": tokens, "targets": targets})
    scored = slice(len(context) - 1, len(ids) - 1)
    # log sum_i s_i t_i
    log_joint = np.asarray(output.log_stopping + output.scores.log_target)[0, scored]
    return float(np.logaddexp.reduce(log_joint, axis=-1).sum())

  return {
    "batched": lambda: [score.log_likelihood for score in scorer.score(requests)],
    "one_by_one": lambda: [scorer.score([request])[0].log_likelihood for request in requests],
    "padded": lambda: [padded(*request) for request in requests],
  }
