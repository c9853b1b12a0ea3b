"""What a study writes: comparison.json, comparison.md, index.html and its figures."""

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

if TYPE_CHECKING:  # imported where it is used, since it imports matplotlib
  from cyb_jax.report.trade_off import Outcome

_MATCHED_NOTE = (
  "Matched to: what a deeper or wider plain model costs as much as, and by how much it costs more or less. Matching is"
  " to all slots that a setting has; measured: against what its inference was seen to take."
)


def write(
  study: Study, plan: Plan, measured: Sequence[Measured], result: Mapping[str, Any], show: Callable[[str], None]
) -> list[dict[str, Any]]:
  """Writes the files of a study.

  Args:
    study: whose folder they are written to.
    plan: of the study.
    measured: the rows.
    result: what comparison.json says of the study as a whole.
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
  text = "\n".join([f"Read on the {result['split']} split.", "", table, *(f"{note}\n" for note in notes), slots])
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
  """The columns that a study's table has in addition, without those that are empty in every row."""
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
  """index.html and its figures."""
  from cyb_jax.report import page, side_by_side

  section = side_by_side.trade_offs(outcomes, columns)
  if any(row["matched"] for row in rows):
    section = dataclasses.replace(section, body=section.body + page.paragraph(_MATCHED_NOTE, "note"))
  header = page.paragraph(result["note"] or "") * bool(result["note"])
  header += page.paragraph(
    f"{result['study']}, {result['seeds']} seeds, read on the {result['split']} split. Equal:"
    f" {', '.join(result['equal'])} (the budget: {result['steps']:,} steps of {result['reference']})."
  )
  atomic_write(study.folder / "index.html", page.document("Methods side by side", header, [section]))
  for picture in section.pictures:
    atomic_write(study.folder / f"{picture.name}.png", picture.png)


def match_of(entry: Entry, plan: Plan, costs: Mapping[tuple[str, int], float]) -> dict[str, Any] | None:
  """The settings whose cost a deeper or wider plain model has, and how far off it is.

  Args:
    entry: a row.
    plan: of the study.
    costs: inference FLOPs a token of the rows as they were measured, by setting and steps; of a method without a cache,
      of a window that is read at once.

  Returns:
    None where the row is no such model. `mismatch` is relative to the count with all slots, which is what is matched;
    `mismatch_measured` to the measured inference of that setting's row. None: not known.
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
  """A match in words, such as 'ap, va_uniform (+0.4%, measured +12.0%)'."""
  if found is None:
    return ""
  off, measured = found["mismatch"], found["mismatch_measured"]
  parts = [f"{off:+.1%}"] if off is not None else []
  # Where all slots are run the measured mismatch is the same number.
  if measured is not None and (off is None or abs(measured - off) > 1e-6):
    parts.append(f"measured {measured:+.1%}")
  return ", ".join(found["settings"]) + (f" ({', '.join(parts)})" if parts else "")


def _means(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Further numbers of a row, the mean over seeds."""

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
  """The perplexity of each slot alone and the mean of s, of methods whose slots can be read."""
  from cyb_jax.report import trade_off

  lines = []
  for found, row in zip(measured, rows):
    if len(row["latency"] or []) > 1:
      slots = " ".join(f"{p:.1f}" for p in row["slot_perplexity"] or [])
      latency = " ".join(f"{s:.3f}".lstrip("0") for s in row["latency"])
      lines.append((study.label(found.entry), slots, latency))
  header = ("runs", "perplexity by slot", "mean of s")
  return trade_off.markdown(header, lines) if lines else ""
