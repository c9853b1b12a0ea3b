"""The files of a study: comparison.json, comparison.md, index.html and its figures."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cyb_jax import jsonl
from cyb_jax.storage import atomic_write
from cyb_jax.studies import settings
from cyb_jax.studies.plan import Entry, Plan
from cyb_jax.studies.runner import Measured, Study

if TYPE_CHECKING:  # otherwise imported where it is used, because it imports matplotlib
  from cyb_jax.report.trade_off import Outcome

_MATCHED_NOTE = (
  "Matched to: the settings whose cost a deeper or wider plain model has, and the relative difference of the costs."
  " Models are matched to the cost with all slots; measured: the difference to the measured cost of inference."
)


def write(
  study: Study, plan: Plan, measured: Sequence[Measured], result: Mapping[str, Any], show: Callable[[str], None]
) -> list[dict[str, Any]]:
  """Writes the files of a study.

  Args:
    study: the study; the files are written to its folder.
    plan: the plan of the study.
    measured: the rows.
    result: the keys of comparison.json about the study.
    show: receives the table as Markdown.

  Returns:
    The rows of comparison.json.
  """
  from cyb_jax.report import trade_off

  outcomes = [_outcome(study, plan, row) for row in measured]
  rows = _rows(study, plan, measured, outcomes)
  columns = _columns(rows, result["seeds"])
  table = trade_off.markdown(*trade_off.table(outcomes, columns))
  notes = [note for note in (result["note"], trade_off.NOTE) if note]
  if any(outcome.blockwise for outcome in outcomes):
    notes.append(trade_off.BLOCKWISE)
  if any(row["matched"] for row in rows):
    notes.append(_MATCHED_NOTE)
  slots = _slots_table(study, measured, rows)
  text = "\n".join([f"Evaluated on the {result['split']} split.", "", table, *(f"{note}\n" for note in notes), slots])
  _write_page(study, result, rows, outcomes, columns)
  atomic_write(study.folder / "comparison.md", text)
  atomic_write(study.folder / "comparison.json", jsonl.dumps(dict(result) | {"rows": rows}, indent=2) + "\n")
  show(text + "\n")
  return rows


def _outcome(study: Study, plan: Plan, row: Measured) -> Outcome:
  from cyb_jax.report import trade_off

  model, readings = plan.models[row.entry.setting], row.readings.values()
  return trade_off.Outcome.of(
    study.label(row.entry),
    [reading.record | {"method": model.method} for reading in readings],
    model.costs,
    [reading.paced for reading in readings if reading.paced],
  )


def _rows(study: Study, plan: Plan, measured: Sequence[Measured], outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
  """The rows of comparison.json."""
  from cyb_jax.report import trade_off

  costs = {
    (setting, row.entry.steps): outcome.inference_flops
    if outcome.blockwise_inference_flops is None
    else outcome.blockwise_inference_flops
    for row, outcome in zip(measured, outcomes)
    for setting in (row.entry.setting, *row.entry.also)
  }
  rows = []
  for row, described in zip(measured, trade_off.describe(outcomes)):
    entry, by_rate = row.entry, row.validation_by_rate
    rows.append(
      {"setting": entry.setting, "also": list(entry.also), "equal": list(entry.equal), "steps": entry.steps}
      | {"seeds": len(row.readings), "diverged": study.options.seeds - len(row.readings), "learning_rate": row.rate}
      | described
      | _means([reading.record for reading in row.readings.values()])
      | {"matched": match_of(entry, plan, costs)}
      | {"validation_by_rate": {f"{rate:g}": by_rate[rate] for rate in sorted(by_rate)}}
    )
  return rows


def _columns(rows: Sequence[Mapping[str, Any]], seeds: int) -> dict[str, list[str]]:
  """The additional columns of a study's table, without empty columns."""
  columns = {
    "equal": [", ".join(budget.replace("_flops", " FLOPs") for budget in row["equal"]) for row in rows],
    "rate": [f"{row['learning_rate']:g}" for row in rows],
    "also": [", ".join(row["also"]) for row in rows],
    "matched to": [describe_match(row["matched"]) for row in rows],
    "diverged": [f"{row['diverged']} of {seeds} seeds" if row["diverged"] else "" for row in rows],
  }
  return {name: column for name, column in columns.items() if any(column)}


def _write_page(
  study: Study,
  result: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  outcomes: Sequence[Outcome],
  columns: Mapping[str, Sequence[str]],
) -> None:
  """Writes index.html and its figures."""
  from cyb_jax.report import page, side_by_side

  section = side_by_side.trade_offs(outcomes, columns)
  if any(row["matched"] for row in rows):
    section = dataclasses.replace(section, body=section.body + page.paragraph(_MATCHED_NOTE, "note"))
  header = page.paragraph(result["note"] or "") * bool(result["note"])
  header += page.paragraph(
    f"{result['study']}, {result['seeds']} seeds, evaluated on the {result['split']} split. Equal:"
    f" {', '.join(result['equal'])} (the budget: {result['steps']:,} steps of {result['reference']})."
  )
  atomic_write(study.folder / "index.html", page.document("Methods side by side", header, [section]))
  for picture in section.pictures:
    atomic_write(study.folder / f"{picture.name}.png", picture.png)


def match_of(entry: Entry, plan: Plan, costs: Mapping[tuple[str, int], float]) -> dict[str, Any] | None:
  """The settings whose cost a deeper or wider plain model has, and the relative difference of the costs.

  Args:
    entry: a row.
    plan: the plan of the study.
    costs: measured inference FLOPs per token of the rows, by setting and steps; for a method without a cache, of a
      blockwise pass.

  Returns:
    None if the row is not such a model. `mismatch` is relative to the cost with all slots, which is matched;
    `mismatch_measured` is relative to the measured inference of that setting's row. None: not known.
  """
  match = settings.parse_match(entry.setting)
  if match is None:
    return None
  models, inference = plan.models, match.measure == "inference"
  off = measured = None
  if match.setting in models:
    name = "inference_flops" if inference else "step_flops"
    off = getattr(models[entry.setting], name) / getattr(models[match.setting], name) - 1
  seen = costs.get((match.setting, entry.steps))
  if inference and seen is not None:
    measured = costs[entry.setting, entry.steps] / seen - 1
  others = plan.shared.get(match.setting, [match.setting]) if inference else [match.setting]
  return {"settings": list(others), "measure": match.measure, "mismatch": off, "mismatch_measured": measured}


def describe_match(found: Mapping[str, Any] | None) -> str:
  """A match as text, such as 'ap, va_uniform (+0.4%, measured +12.0%)'."""
  if found is None:
    return ""
  off, measured = found["mismatch"], found["mismatch_measured"]
  parts = [f"{off:+.1%}"] if off is not None else []
  # If inference runs all slots, the measured mismatch is the same number.
  if measured is not None and (off is None or abs(measured - off) > 1e-6):
    parts.append(f"measured {measured:+.1%}")
  return ", ".join(found["settings"]) + (f" ({', '.join(parts)})" if parts else "")


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Further numbers of a row, as means over seeds."""

  def by_slot(name: str) -> list[float] | None:
    found = [record.get(name) for record in records]
    return None if None in found else [statistics.mean(values) for values in zip(*found)]

  first = records[0]
  return {
    "latency": by_slot("latency"),
    "slot_perplexity": by_slot("slot_perplexity"),
    "train_tokens": first["train_tokens"],
    "train_slots": first["train_slots"],
    "train_flops": first["train_flops"],
  }


def _slots_table(study: Study, measured: Sequence[Measured], rows: Sequence[Mapping[str, Any]]) -> str:
  """The perplexity of each slot and the mean of s, for methods with several slots."""
  from cyb_jax.report import trade_off

  lines = []
  for found, row in zip(measured, rows):
    if len(row["latency"] or []) > 1:
      slots = " ".join(f"{p:.1f}" for p in row["slot_perplexity"] or [])
      latency = " ".join(f"{s:.3f}".lstrip("0") for s in row["latency"])
      lines.append((study.label(found.entry), slots, latency))
  header = ("runs", "perplexity by slot", "mean of s")
  return trade_off.markdown(header, lines) if lines else ""
