"""The compute cost and the perplexity of runs: rows with both, the Pareto front, and a table.

All methods use the accounting of `cyb_jax.costs.flops`: FLOPs per real token, model and executed FLOPs of training, and
model FLOPs of decoding with a cache.
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

# The x axes of perplexity: the field of a row, and its name.
AXES = {"train_flops": "training FLOPs", "inference_flops": "inference FLOPs per token"}


@dataclasses.dataclass(frozen=True)
class Costs:
  """The compute cost of a method, counted by hand, in FLOPs per real token.

  Attributes:
    train: model FLOPs of a training step; `train_executed`: executed FLOPs of a training step.
    inference: FLOPs of decoding with a cache; for a non-causal method FLOPs of a blockwise pass over a window.
    autoregressive: FLOPs of generating a text token by token; equals `inference` unless a method has no cache.
    learnt: the share of tokens that have a training loss.
    slots: the number of slots per token in training.
    parameters: the total number of parameters.
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
    """The costs of a run with this config and vocabulary size; None: the number of rows of the decoder's tables."""
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
  """The perplexity that is compared: for a non-causal method the autoregressive perplexity.

  Args:
    record: see `evaluation.evaluate_split`. For a non-causal method `autoregressive` has `perplexity` and
      `blockwise_perplexity` of the same windows. These may be fewer than the windows of the evaluation, so the
      perplexity of the evaluation is multiplied by the ratio of the two.

  Returns:
    The perplexity; inf if it is null in the record.
  """
  perplexity, found = record["perplexity"], record.get("autoregressive")
  if perplexity is None or (found and None in found.values()):
    return math.inf
  return perplexity * found["perplexity"] / found.get("blockwise_perplexity", perplexity) if found else perplexity


@dataclasses.dataclass(frozen=True)
class SelfPaced:
  """The same model with only the pauses that it requests in the context.

  Attributes:
    perplexities: the compared perplexity of each seed, times the ratio of self-paced to constant perplexity on the
      windows of the self-paced evaluation.
    pauses: the number of pauses per token in the context, the mean over seeds.
    inference_flops: inference FLOPs per token.
  """

  perplexities: tuple[float, ...]
  pauses: float
  inference_flops: float


@dataclasses.dataclass(frozen=True)
class Outcome:
  """The compute cost and the perplexity of runs that differ only in their seeds.

  Attributes:
    label: the label of the row.
    method: the name of the method.
    perplexities: the compared perplexity of each seed; for a non-causal method the autoregressive perplexity.
    blockwise: the blockwise perplexity of each seed of a non-causal method; None: the method is causal.
    pauses: the mean number of pauses per token; None: undefined.
    train_tokens: the number of real tokens in training; `train_tokens_learnt`: the number of those with a training
      loss.
    slots: slots per real token in training; `inference_slots`: the measured slots per token in decoding, None: not
      measured.
    train_flops, train_executed_flops: model and executed FLOPs of the complete training.
    inference_flops: model FLOPs per token of the inference that `perplexities` evaluate.
    blockwise_inference_flops: FLOPs per token of the blockwise evaluation; None: the method is causal.
    parameters: the total number of parameters.
    self_paced: the self-paced results; None: not evaluated.
    loss_perplexities: exp of the training objective of each seed; None: it equals the perplexity.
    training_perplexities: the perplexity of each seed under the omega and recipe of training; None: they equal those of
      the evaluation.
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
    """The outcome from evaluations.

    Args:
      label: the label of the row.
      records: one record per seed, see `compared_perplexity`.
      costs: the costs of the method.
      paced: the records in a self-paced context, with `constant_perplexity`.
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
    # Older evaluations don't have this key.
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
      # The executed FLOPs of the same steps.
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
  """The `loss_perplexity` of evaluations; None if it equals the perplexity, or is unknown."""
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
  """A point in a plot.

  Attributes:
    row: the index of its outcome, from 0.
    x: the value of one of AXES; y: perplexity, the mean over seeds.
    low, high: the range of the perplexity over seeds.
    self_paced: whether the context is self-paced.
    on_front: whether the point is on the Pareto front.
  """

  row: int
  x: float
  y: float
  low: float
  high: float
  self_paced: bool
  on_front: bool


def points(outcomes: Sequence[Outcome], axis: str) -> list[Point]:
  """The points of all outcomes against one of AXES, in order; a self-paced point follows the point of its row."""
  found: list[tuple[int, float, tuple[float, ...], bool]] = []
  for row, outcome in enumerate(outcomes):
    found.append((row, getattr(outcome, axis), outcome.perplexities, False))
    # The training is the same, so a self-paced point only exists for inference.
    if outcome.self_paced is not None and axis == "inference_flops":
      found.append((row, outcome.self_paced.inference_flops, outcome.self_paced.perplexities, True))
  front = pareto_front([(x, statistics.fmean(values)) for _, x, values, _ in found])
  return [
    Point(row, x, statistics.fmean(values), min(values), max(values), paced, on)
    for (row, x, values, paced), on in zip(found, front)
  ]


def pareto_front(pairs: Sequence[tuple[float, float]]) -> list[bool]:
  """For each (cost, perplexity), whether no other pair is at most as high in both and lower in one."""
  return [not any(a <= x and b <= y and (a < x or b < y) for a, b in pairs) and bool(np.isfinite(y)) for x, y in pairs]


def describe(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
  """The rows of comparison.json: the fields of each outcome, and `pareto`, by axis."""
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
  "#", "runs", "perplexity", "lowest to highest", "mean pauses", "slots per token", "parameters", "real tokens",
  "training FLOPs", "as executed", "inference FLOPs per token", "on the front",
)  # fmt: skip
# The number of columns that hold words.
WORDS = 2
NOTE = (
  "Perplexity: mean and standard deviation over seeds, and the range of the seeds. FLOPs are counted by hand per real"
  " token (causal attention; a slot counts each time it passes through the layers). As executed: including operations"
  " that the program recomputes or masks. On the front: no other row is at most as high in both perplexity and training"
  " (T) or inference (I) FLOPs; the front of inference ignores the cost of training. Real tokens: those with a training"
  " loss. Self-paced: the same runs, decoded with only the pauses that the model requests. exp(loss): of the training"
  " objective if it has a discount, a penalty or a bound; it is not a perplexity. Under the training omega: the"
  " perplexity with the step budget of training if it differs; only perplexities under the same omega are comparable."
)
BLOCKWISE = (
  "In brackets: blockwise perplexity and inference FLOPs of non-causal methods. These methods are compared by their"
  " autoregressive perplexity and its cost: every token is predicted only from the tokens before it, without a cache,"
  " which needs one pass over the prefix per token. Deeper or wider plain models with the same inference cost are"
  " matched to the blockwise cost."
)


def table(
  outcomes: Sequence[Outcome], columns: Mapping[str, Sequence[str]] | None = None
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
  """The header of the table, and its rows as text.

  Args:
    outcomes: the outcomes in the order of the rows; a self-paced row follows the row of its outcome.
    columns: further columns by header, with a value for each outcome.
  """
  columns, rows = columns or {}, []
  trained = {
    header: [None if (of := _of_training(outcome)[name]) is None else plus_minus(of) for outcome in outcomes]
    for name, header in _TRAINED.items()
  }
  # Empty columns are left out.
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
  """A Markdown table with aligned columns, readable as plain text."""
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
  """FLOPs as text, such as '1.902M'."""
  for size, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
    if value >= size:
      return f"{value / size:.4g}{letter}"
  return f"{value:,.0f}"
