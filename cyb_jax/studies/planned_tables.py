"""The tables of a planned study, from its results file.

Dimensions: G groups of documents, R resamples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cyb_jax.evaluation import bootstrap
from cyb_jax.report import trade_off
from cyb_jax.report.page import number
from cyb_jax.studies import planned_runs
from cyb_jax.studies.plans import PlannedStudy, Row
from cyb_jax.studies.results_file import Entry

_NOTE = (
  "Perplexity of the validation split: mean and standard deviation over seeds. Under the training omega: the"
  " perplexity under the step budget and recipe of training, if they differ. Difference: nats per token minus those"
  " of `{reference}` with the same seeds, with a 95% interval over documents (paired bootstrap of the losses, averaged"
  " over seeds); negative means that the row is better. By seed: the difference of each seed, which shows what the"
  " interval does not, the luck of a training. Slots per token: in training. FLOPs: of inference with all slots and a"
  " cache, counted by hand per real token. Self-paced: only the pauses that the model requests run and stay in the"
  " context; the perplexity is that of the row times the ratio of the two contexts on {windows} windows. Tokens of"
  " `{reference}`: the number that it needs to reach the row's loss, by interpolation of its loss over the logarithm"
  " of its tokens between {short:,} and {long:,}; ~: extrapolated. Front: no other row with the same number of steps,"
  " self-paced or with all slots, is at most as high in both inference FLOPs and perplexity (I: with all slots, P:"
  " self-paced)."
)


def table(plan: PlannedStudy, results: Mapping[str, Entry], documents: Mapping[str, Sequence[int]]) -> dict[str, Any]:
  """The numbers of a study's tables.

  Args:
    plan: the plan.
    results: the entries of finished runs, by key.
    documents: the number of targets of each validation document, by digest.

  Returns:
    `plan`; `gates`, one line each; `rows`, for the rows with at least one final run; `rates`, the perplexity by rate of
    the searches, by row. Unknown values are None.
  """
  finished = {row.name: _finished(plan, results, row) for row in plan.rows}
  rows = [_row(plan, row, finished, documents) for row in plan.rows if finished[row.name]]
  of_reference = [row for row in rows if row["compared_with"] == plan.reference]
  _mark_front([row for row in of_reference if plan.row(row["row"]).steps == plan.row(plan.reference).steps])
  rates = {}
  for row in plan.rows:
    found = {
      f"{rate:g}": results[key] for rate, key in planned_runs.search_keys(plan, results, row).items() if key in results
    }
    if found:
      rates[row.name] = {rate: entry["perplexity"] for rate, entry in found.items()}
  gates = [str(gate) for gate in planned_runs.gates(plan, results)]
  return {"plan": plan.name, "gates": gates, "rows": rows, "rates": rates}


def text(plan: PlannedStudy, numbers: Mapping[str, Any]) -> str:
  """The tables of `table` as Markdown."""
  has_training = any(row["training_perplexity"] is not None for row in numbers["rows"])
  rows = [_cells(row, plan.reference, has_training) for row in numbers["rows"]]
  header = (
    "row", "seeds", "rate", "perplexity", *["under the training omega"] * has_training,
    f"difference to {plan.reference}, nats", "by seed", "mean pauses", "slots per token",
    "FLOPs", "self-paced", "pauses kept", "self-paced FLOPs", f"tokens of {plan.reference}", "front",
  )  # fmt: skip
  parts = [f"{gate}\n" for gate in numbers["gates"]]
  parts.append(trade_off.markdown(header, rows))
  short, long = plan.row(plan.reference).steps * plan.step_tokens, plan.row(plan.longer).steps * plan.step_tokens
  values = {"reference": plan.reference, "windows": plan.paced_windows, "short": short, "long": long}
  parts += [f"{note}\n" for note in (_NOTE.format(**values), plan.note) if note]
  rates = [f"{rate:g}" for rate in plan.rates]
  searched = [(name, *(_perplexity(found, rate) for rate in rates)) for name, found in numbers["rates"].items()]
  parts.append(
    f"Perplexity by rate, with one seed and a short training:\n\n{trade_off.markdown(('row', *rates), searched)}"
  )
  return "\n".join(parts)


def tokens_to_reach(loss: float, short: tuple[float, float], long: tuple[float, float]) -> float | None:
  """The number of tokens at which a model reaches a loss that is linear in the logarithm of the tokens.

  Args:
    loss: the value, nats per token.
    short, long: (tokens, loss) of two trainings.

  Returns:
    None if the loss does not fall from the shorter to the longer training.
  """
  slope = (short[1] - long[1]) / math.log(long[0] / short[0])
  return short[0] * math.exp((short[1] - loss) / slope) if slope > 0 else None


def difference(
  row: Sequence[Entry], reference: Sequence[Entry], documents: Mapping[str, Sequence[int]]
) -> tuple[float, list[float] | None] | None:
  """(mean, 95% interval over documents) of the loss of a row minus that of the reference, nats per token.

  The losses of each document are averaged over seeds. None if the runs do not have losses of the same documents.
  """
  kept = {entry.get("documents") for entry in (*row, *reference)}
  if len(kept) != 1 or None in kept or not reference:
    return None
  tokens = np.asarray(documents[kept.pop()], np.float64)
  means = [np.mean([entry["document_losses"] for entry in runs], 0) for runs in (row, reference)]
  sums = np.stack([(means[0] - means[1]) * tokens, tokens], 1)
  found = bootstrap.interval(sums, lambda totals: totals[:, 0] / totals[:, 1])
  return float(sums[:, 0].sum() / tokens.sum()), found


def _finished(plan: PlannedStudy, results: Mapping[str, Entry], row: Row) -> list[Entry]:
  """The entries of a row's seeds that do not diverge."""
  keys = planned_runs.final_keys(plan, results, row)
  return [results[key] for key in keys if key in results and results[key]["perplexity"] is not None]


def _row(
  plan: PlannedStudy, row: Row, finished: Mapping[str, Sequence[Entry]], documents: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
  entries = finished[row.name]
  compared_with = row.compared_with or plan.reference
  reference = _same_seeds(entries, finished[compared_with])
  perplexities = [entry["perplexity"] for entry in entries]
  compared = None if row.name == compared_with else difference(entries, reference, documents)
  paced = _self_paced(entries)
  loss = statistics.fmean(map(math.log, perplexities))
  return {
    "row": row.name,
    "seeds": len(entries),
    "of_seeds": row.seeds,
    "rate": entries[0]["rate"],
    "perplexity": statistics.fmean(perplexities),
    "perplexity_seeds": perplexities,
    "difference": None if compared is None else compared[0],
    "interval": None if compared is None else compared[1],
    "difference_seeds": None if compared is None else _by_seed(entries, reference),
    "training_perplexity": _training_perplexity(entries),
    "mean_pauses": _mean(entries, "mean_pauses"),
    "train_slots": _ratio(entries, "train_slots", "train_tokens"),
    "inference_flops": _mean(entries, "inference_flops"),
    "self_paced": paced,
    "compared_with": compared_with,
    "reference_tokens": None if row.compared_with else _reference_tokens(plan, finished, loss),
    "front": [],
  }


def _same_seeds(entries: Sequence[Entry], reference: Sequence[Entry]) -> list[Entry]:
  """The reference's entries with the seeds of a row, whose initialisation and order of the data are the row's; all
  entries if a seed is missing.
  """
  by_seed = {entry["seed"]: entry for entry in reference}
  seeds = [entry["seed"] for entry in entries]
  return [by_seed[seed] for seed in seeds] if set(seeds) <= set(by_seed) else list(reference)


def _by_seed(entries: Sequence[Entry], reference: Sequence[Entry]) -> list[float] | None:
  """The difference in nats per token of each seed; None: the reference lacks a seed."""
  if [entry["seed"] for entry in entries] != [entry["seed"] for entry in reference]:
    return None
  return [math.log(a["perplexity"] / b["perplexity"]) for a, b in zip(entries, reference)]


def _training_perplexity(entries: Sequence[Entry]) -> float | None:
  """The perplexity under the omega and recipe of training; None: it equals the perplexity of the evaluation."""
  found = [(entry.get("training_omega") or {}).get("perplexity") for entry in entries]
  return None if None in found else statistics.fmean(found)


def _self_paced(entries: Sequence[Entry]) -> dict[str, float] | None:
  """Self-paced perplexity, pauses and inference FLOPs; None: not all runs were evaluated self-paced."""
  paced = [entry.get("self_paced") for entry in entries]
  if not all(found and found["perplexity"] is not None for found in paced):
    return None
  scaled = [e["perplexity"] * p["perplexity"] / p["constant_perplexity"] for e, p in zip(entries, paced) if p]
  return {
    "perplexity": statistics.fmean(scaled),
    "pauses": statistics.fmean(p["context_pauses"] for p in paced if p),
    "inference_flops": statistics.fmean(p["inference_flops"] for p in paced if p),
  }


def _reference_tokens(
  plan: PlannedStudy, finished: Mapping[str, Sequence[Entry]], loss: float
) -> dict[str, Any] | None:
  """`tokens` that the reference needs to reach a loss, and whether this is an `extrapolation`; None: not known."""
  points = []
  for name in (plan.reference, plan.longer):
    if not finished[name]:
      return None
    losses = [math.log(entry["perplexity"]) for entry in finished[name]]
    points.append((float(plan.row(name).steps * plan.step_tokens), statistics.fmean(losses)))
  tokens = tokens_to_reach(loss, *points)
  if tokens is None:
    return None
  # The tolerance keeps the reference itself inside despite rounding.
  inside = points[0][0] * (1 - 1e-9) <= tokens <= points[1][0] * (1 + 1e-9)
  return {"tokens": tokens, "extrapolation": not inside}


def _mark_front(rows: Sequence[dict[str, Any]]) -> None:
  """Fills `front`: 'I' if a row is on the Pareto front with all slots, 'P' if it is on the front self-paced."""
  points = [(row, "I", row["inference_flops"], row["perplexity"]) for row in rows]
  points += [
    (row, "P", row["self_paced"]["inference_flops"], row["self_paced"]["perplexity"])
    for row in rows
    if row["self_paced"]
  ]
  known = [point for point in points if point[2] is not None]
  for (row, letter, *_), on_front in zip(known, trade_off.pareto_front([point[2:] for point in known])):
    row["front"] += [letter] * on_front


def _mean(entries: Sequence[Entry], name: str) -> float | None:
  values = [entry.get(name) for entry in entries]
  return None if None in values else statistics.fmean(v for v in values if v is not None)


def _ratio(entries: Sequence[Entry], above: str, below: str) -> float | None:
  found = _mean(entries, above), _mean(entries, below)
  return found[0] / found[1] if found[0] is not None and found[1] else None


def _cells(row: Mapping[str, Any], reference: str, has_training: bool) -> tuple[str, ...]:
  compared, paced, reached = "-", row["self_paced"], row["reference_tokens"]
  if row["interval"] is not None:
    low, high = row["interval"]
    compared = f"{row['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
    if row["compared_with"] != reference:
      compared += f", to {row['compared_with']}"
  seeds = str(row["seeds"]) if row["seeds"] == row["of_seeds"] else f"{row['seeds']} of {row['of_seeds']}"
  cost = row["inference_flops"]
  tokens = ""
  if reached is not None:
    tokens = "~" * reached["extrapolation"] + f"{reached['tokens'] / 1e6:.3g}M"
  return (
    row["row"], seeds, f"{row['rate']:g}", trade_off.plus_minus(row["perplexity_seeds"]),
    *[number(row["training_perplexity"])] * has_training, compared,
    " ".join(f"{value:+.3f}" for value in row["difference_seeds"] or ()),
    number(row["mean_pauses"], 3), number(row["train_slots"], 3), "-" if cost is None else trade_off.flops(cost),
    "" if paced is None else number(paced["perplexity"]), "" if paced is None else number(paced["pauses"], 3),
    "" if paced is None else trade_off.flops(paced["inference_flops"]), tokens, " ".join(row["front"]),
  )  # fmt: skip


def _perplexity(found: Mapping[str, float | None], rate: str) -> str:
  if rate not in found:
    return ""
  value = found[rate]
  return "diverges" if value is None else number(value)
