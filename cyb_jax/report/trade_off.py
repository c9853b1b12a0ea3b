"""The cost and the perplexity of runs: rows with both, which of them are on the Pareto front, and their table.

One accounting for all methods, of `cyb_jax.costs.flops`: FLOPs per real token, of training as the model needs them and
as they are executed, and of decoding with a cache.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cyb_jax.configs import Config
from cyb_jax.costs.memory import count_parameters
from cyb_jax.report.page import number

# What perplexity is set against: the field of a row, and its name.
AXES = {"train_flops": "training FLOPs", "inference_flops": "inference FLOPs a token"}


@dataclasses.dataclass(frozen=True)
class Costs:
  """What a method takes, counted by hand, FLOPs per real token.

  Attributes:
    train: of a training step, as the model needs them; `train_executed`: as the program does.
    inference: of decoding with a cache; of a method that isn't causal, of a window that is read at once.
    autoregressive: of generating a text token by token; `inference`, but for a method that has no cache.
    learnt: of a token, how often training has a loss at it.
    slots: that training runs a token.
    parameters: in all.
  """

  train: float
  train_executed: float
  inference: float
  autoregressive: float
  learnt: float
  slots: float
  parameters: int

  @classmethod
  def of(cls, config: Config, vocab_size: int | None) -> Costs:
    """Of a run with this config, over a vocabulary; None: as many entries as the decoder has rows."""
    method, length = config.build_method(vocab_size), config.data.sequence_length
    costs = method.costs(length)
    return cls(
      train=float(costs.train.total),
      train_executed=float(costs.train_executed.total),
      inference=float(costs.inference.total),
      autoregressive=float(costs.autoregressive.total),
      learnt=costs.trained_tokens / length,
      slots=costs.train_slots / length,
      parameters=count_parameters(method)["total"],
    )


def compared_perplexity(record: Mapping[str, Any]) -> float:
  """What is compared of an evaluation: its perplexity; of one that looks ahead that of each token from those before.

  Args:
    record: see `evaluation.evaluate_split`. Where the method isn't causal its `autoregressive` has `perplexity`, and
      `blockwise_perplexity` of the same windows; these may be fewer than those of the evaluation, whose perplexity is
      then taken times what the two differ by.

  Returns:
    Infinite where it is null in the record.
  """
  perplexity, found = record["perplexity"], record.get("autoregressive")
  if perplexity is None or (found and None in found.values()):
    return math.inf
  return perplexity * found["perplexity"] / found.get("blockwise_perplexity", perplexity) if found else perplexity


@dataclasses.dataclass(frozen=True)
class SelfPaced:
  """The same model where only the pauses that it requests stay in the context.

  Attributes:
    perplexities: of each seed: what is compared, times what the self-paced context costs in the windows that were read
      so.
    pauses: that a token keeps, the mean over seeds.
    inference_flops: a token.
  """

  perplexities: tuple[float, ...]
  pauses: float
  inference_flops: float


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Runs that are equal but for their seeds, as what they spent and what they reached.

  Attributes:
    label: of the row.
    method: the name of the method.
    perplexities: of each seed, what is compared: of a method whose evaluation isn't causal the autoregressive one.
    blockwise: of each seed, what evaluation says of such a method, which looks ahead; None: of a causal one.
    pauses: mean of a token; None: undefined.
    train_tokens: real tokens; `train_tokens_learnt`: those of them at which training had a loss.
    slots: that training ran a real token; `inference_slots`: that decoding was seen to run, None: `slots` of the
      method.
    train_flops, train_executed_flops: of the whole training, the model's and as executed.
    inference_flops: a token, the model's: of what `perplexities` are of.
    blockwise_inference_flops: of what `blockwise` is of; None: of a causal method.
    parameters: in all.
    self_paced: None where it wasn't read so.
    loss_perplexities: of each seed, exp of the training objective; None where that is the perplexity itself.
    training_perplexities: of each seed, the perplexity under the omega and the recipe of training; None where these are
      those of the evaluation.
  """

  label: str
  method: str
  perplexities: tuple[float, ...]
  blockwise: tuple[float, ...] | None
  pauses: float | None
  train_tokens: float
  train_tokens_learnt: float
  slots: float
  inference_slots: float | None
  train_flops: float
  train_executed_flops: float
  inference_flops: float
  blockwise_inference_flops: float | None
  parameters: int
  self_paced: SelfPaced | None = None
  loss_perplexities: tuple[float, ...] | None = None
  training_perplexities: tuple[float, ...] | None = None

  @classmethod
  def of(
    cls,
    label: str,
    records: Sequence[Mapping[str, Any]],
    costs: Costs,
    paced: Sequence[Mapping[str, Any]] = (),
  ) -> Outcome:
    """From evaluations.

    Args:
      label: of the row.
      records: one a seed, see `compared_perplexity`.
      costs: of the method.
      paced: the same in a self-paced context, with their `constant_perplexity`.
    """
    one_by_one = all(record.get("autoregressive") for record in records)
    compared = blockwise = tuple(record["perplexity"] for record in records)
    if one_by_one:
      compared = tuple(compared_perplexity(record) for record in records)
    self_paced = None
    if paced and len(paced) == len(records):
      self_paced = SelfPaced(
        tuple(p * r["perplexity"] / r["constant_perplexity"] for p, r in zip(compared, paced)),
        _mean(paced, "context_pauses"),
        _mean(paced, "inference_flops"),
      )
    train, tokens = _mean(records, "train_flops"), _mean(records, "train_tokens")
    measured = [record.get("inference_flops") for record in records]
    # An older evaluation doesn't tell.
    inference = costs.inference if None in measured else float(np.mean(measured))
    seen = [record.get("inference_slots") for record in records]
    pauses = [record.get("mean_pauses") for record in records]
    return cls(
      label=label,
      method=records[0]["method"],
      perplexities=compared,
      blockwise=blockwise if one_by_one else None,
      pauses=None if None in pauses else float(np.mean(pauses)),
      train_tokens=tokens,
      train_tokens_learnt=tokens * costs.learnt,
      slots=costs.slots,
      inference_slots=None if None in seen else float(np.mean(seen)),
      train_flops=train,
      # The same steps, counted the other way.
      train_executed_flops=train * costs.train_executed / costs.train,
      inference_flops=costs.autoregressive if one_by_one else inference,
      blockwise_inference_flops=inference if one_by_one else None,
      parameters=costs.parameters,
      self_paced=self_paced,
      loss_perplexities=own_loss(records),
      training_perplexities=_known([(record.get("training_omega") or {}).get("perplexity") for record in records]),
    )

  @property
  def perplexity(self) -> float:
    return statistics.fmean(self.perplexities)

  @property
  def deviation(self) -> float | None:
    return statistics.stdev(self.perplexities) if len(self.perplexities) > 1 else None


def own_loss(records: Sequence[Mapping[str, Any]]) -> tuple[float, ...] | None:
  """The `loss_perplexity` of evaluations; None where it is their perplexity, or isn't known."""
  found = _known([record.get("loss_perplexity") for record in records])
  others = [record["perplexity"] for record in records]
  if found is None or None in others or np.allclose(found, others, rtol=1e-5, atol=0):
    return None
  return found


def _known(values: Sequence[float | None]) -> tuple[float, ...] | None:
  return None if None in values else tuple(values)


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
  return statistics.fmean(record[name] for record in records)


@dataclasses.dataclass(frozen=True)
class Point:
  """A place in a plot.

  Attributes:
    row: which outcome it is of, from 0.
    x: one of AXES; y: perplexity, the mean over seeds.
    low, high: of the seeds.
    self_paced: whether it is that of a self-paced context.
    on_front: whether nothing else reaches as little for as little.
  """

  row: int
  x: float
  y: float
  low: float
  high: float
  self_paced: bool
  on_front: bool


def points(outcomes: Sequence[Outcome], axis: str) -> list[Point]:
  """All of them against one of AXES, in the order of the rows; a self-paced one behind that of its row."""
  found: list[tuple[int, float, tuple[float, ...], bool]] = []
  for row, outcome in enumerate(outcomes):
    found.append((row, getattr(outcome, axis), outcome.perplexities, False))
    # The training is the same: only what it takes to decode is another.
    if outcome.self_paced is not None and axis == "inference_flops":
      found.append((row, outcome.self_paced.inference_flops, outcome.self_paced.perplexities, True))
  front = pareto_front([(x, statistics.fmean(values)) for _, x, values, _ in found])
  return [
    Point(row, x, statistics.fmean(values), min(values), max(values), paced, on)
    for (row, x, values, paced), on in zip(found, front)
  ]


def pareto_front(places: Sequence[tuple[float, float]]) -> list[bool]:
  """Of each (cost, perplexity), whether no other is as low in both and lower in one."""
  return [
    not any(a <= x and b <= y and (a < x or b < y) for a, b in places) and bool(np.isfinite(y)) for x, y in places
  ]


def describe(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
  """Rows of comparison.json: the fields of each outcome as `trade_off` tells them, with `pareto`, by axis."""
  fronts = {axis: points(outcomes, axis) for axis in AXES}
  rows = []
  for number_of_row, outcome in enumerate(outcomes):
    on = {axis: [p for p in found if p.row == number_of_row] for axis, found in fronts.items()}
    paced = None
    if outcome.self_paced is not None:
      paced = dataclasses.asdict(outcome.self_paced) | {
        "perplexity": statistics.fmean(outcome.self_paced.perplexities),
        "pareto": next(p.on_front for p in on["inference_flops"] if p.self_paced),
      }
    rows.append(
      {
        "method": outcome.method,
        "autoregressive": outcome.blockwise is not None,
        "perplexity": outcome.perplexity,
        "perplexity_seeds": list(outcome.perplexities),
        "perplexity_deviation": outcome.deviation,
        "blockwise_perplexity": None if outcome.blockwise is None else statistics.fmean(outcome.blockwise),
        **{name: None if of is None else statistics.fmean(of) for name, of in _of_training(outcome).items()},
        "mean_pauses": outcome.pauses,
        "train_tokens": outcome.train_tokens,
        "train_tokens_learnt": outcome.train_tokens_learnt,
        "slots_per_token": outcome.slots,
        "inference_slots": outcome.inference_slots,
        "train_flops": outcome.train_flops,
        "train_executed_flops": outcome.train_executed_flops,
        "inference_flops": outcome.inference_flops,
        "blockwise_inference_flops": outcome.blockwise_inference_flops,
        "parameters": outcome.parameters,
        "self_paced": paced,
        "pareto": {axis: next(p.on_front for p in found if not p.self_paced) for axis, found in on.items()},
      }
    )
  return rows


def _of_training(outcome: Outcome) -> dict[str, tuple[float, ...] | None]:
  return {"loss_perplexity": outcome.loss_perplexities, "training_perplexity": outcome.training_perplexities}


_TRAINED = {"loss_perplexity": "exp(loss)", "training_perplexity": "under the training omega"}
_HEADER = (
  "#", "runs", "perplexity", "lowest to highest", "mean pauses", "slots a token", "parameters", "real tokens",
  "training FLOPs", "as executed", "inference FLOPs a token", "on the front",
)  # fmt: skip
# Columns that hold words.
WORDS = 2
NOTE = (
  "Perplexity: mean and standard deviation over seeds, and their range. FLOPs are counted by hand per real token"
  " (causal attention, a slot counted each time it passes the layers); as executed: with what the program computes"
  " again or masks away. On the front: nothing here is as low in both perplexity and training (T) or inference (I)"
  " FLOPs; inference is set against perplexity whatever training took. Real tokens: those at which training had a loss."
  " Self-paced: the same runs, decoded with the"
  " pauses alone that the model asks for. exp(loss): of the objective that training minimised, where it has a discount,"
  " a penalty or a bound; it is no perplexity. Under the training omega: the perplexity with the budget of steps that"
  " training had, where it is another; only those under one omega are compared."
)
BLOCKWISE = (
  "In brackets: perplexity and inference FLOPs of methods that look ahead where they read a whole window at once. What"
  " is compared is every token said from those before it alone; there is no cache, so that each takes a pass over its"
  " prefix. Plain models that are as deep or as wide as costs the same at inference are matched to the whole window."
)


def table(
  outcomes: Sequence[Outcome], columns: Mapping[str, Sequence[str]] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """A header, and rows of text.

  Args:
    outcomes: in the order of the rows; that of a self-paced context follows.
    columns: further columns, a value for each outcome by header.
  """
  columns, rows = columns or {}, []
  trained = {
    header: [None if (of := _of_training(outcome)[name]) is None else plus_minus(of) for outcome in outcomes]
    for name, header in _TRAINED.items()
  }
  # Columns that are empty in every row are left out.
  trained = {header: column for header, column in trained.items() if any(column)}
  fronts = {axis: points(outcomes, axis) for axis in AXES}
  for row, outcome in enumerate(outcomes):
    letters = [
      letter
      for letter, (axis, found) in zip("TI", fronts.items())
      if any(p.row == row and p.on_front and not p.self_paced for p in found)
    ]
    blockwise = f" ({number(statistics.fmean(outcome.blockwise))})" if outcome.blockwise else ""
    slots = number(outcome.slots, 3)
    if outcome.inference_slots is not None:
      slots += f", decoding {number(outcome.inference_slots, 3)}"
    at_once = outcome.blockwise_inference_flops
    inference = flops(outcome.inference_flops) + (f" ({flops(at_once)})" if at_once is not None else "")
    spent = number(round(outcome.train_tokens_learnt)), flops(outcome.train_flops), flops(outcome.train_executed_flops)
    rows.append(
      (
        str(row + 1), outcome.label, *(column[row] for column in columns.values()),
        plus_minus(outcome.perplexities) + blockwise, *(column[row] or "-" for column in trained.values()),
        span(outcome.perplexities),
        number(outcome.pauses, 3), slots, number(outcome.parameters), *spent, inference,
        " ".join(letters),
      )
    )  # fmt: skip
    if outcome.self_paced is not None:
      paced = outcome.self_paced
      (point,) = [p for p in fronts["inference_flops"] if p.row == row and p.self_paced]
      rows.append(
        (
          f"{row + 1}s", f"{outcome.label}, self-paced", *("" for _ in columns),
          plus_minus(paced.perplexities), *("" for _ in trained), span(paced.perplexities),
          number(paced.pauses, 3), number(paced.pauses + 1, 3), number(outcome.parameters), *spent,
          flops(paced.inference_flops), "I" if point.on_front else "",
        )
      )  # fmt: skip
  return (*_HEADER[:WORDS], *columns, _HEADER[WORDS], *trained, *_HEADER[WORDS + 1 :]), rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table that can be read as text too."""
  cells = [[cell.replace("|", r"\|") for cell in row] for row in (header, *rows)]
  widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
  lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
  return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"


def plus_minus(values: Sequence[float]) -> str:
  spread = f" ± {number(statistics.stdev(values), 2)}" if len(values) > 1 else ""
  return number(statistics.fmean(values)) + spread


def span(values: Sequence[float]) -> str:
  return f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else "-"


def flops(value: float) -> str:
  """Such as '1.902M'."""
  for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
    if value >= size:
      return f"{value / size:.4g}{letter}"
  return f"{value:,.0f}"
