"""The report of several runs: its page and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cyb_jax.report import coloured, comparison, figures, page, paper, tokens, trade_off
from cyb_jax.report.coloured import Window
from cyb_jax.report.comparison import SPENDS, Group, curve
from cyb_jax.report.facts import read_on
from cyb_jax.report.page import Picture, Section, number
from cyb_jax.report.trade_off import Outcome

# Types of tokens that are listed before the table.
_LISTED_TYPES = 12
# Values by known difficulty: the label of the axis, and a description.
_BY_DIFFICULTY = {
  "accuracy": ("correct answers", "The share of answers whose most probable token is correct"),
  "mean_pauses": ("mean pauses", "Mean pauses (of a model that loops: the loops after the first one)"),
}


def build(
  groups: Sequence[Group], numbers: Mapping[str, Any], windows: Sequence[Window] = ()
) -> tuple[str, dict[str, bytes]]:
  """The page and the pictures of a comparison.

  Args:
    groups: the groups of runs, in the order of the report.
    numbers: see `comparison.compare`.
    windows: evaluated windows of text of the first run of `pausing_group`.

  Returns:
    HTML, and PNGs by file name.
  """
  sections = [
    _perplexity(groups, numbers),
    trade_offs(comparison.outcomes(groups)),
    *(_regimes(groups, numbers) if any(group.regime for group in groups) else []),
    _differences(numbers),
    _curves(groups, numbers),
    _efficiency(groups, numbers),
    _latency(groups, numbers),
    _speed_accuracy(groups, numbers),
    *_difficulty(groups),
    *_where(groups, windows),
    _paper(),
  ]
  first = groups[0].runs[0].statistics
  runs = sum(len(group.runs) for group in groups)
  header = page.paragraph(
    f"{runs} runs in {len(groups)} groups; the configs of a group differ only in their seeds. All runs are evaluated on"
    f" {read_on(first)}."
  )
  for row in numbers["groups"]:
    if len(set(row["steps"])) > 1:
      steps = ", ".join(f"{step:,}" for step in row["steps"])
      header += page.paragraph(f"The seeds of {row['label']} were evaluated at different steps: {steps}.", "note")
  rows = [
    (g.label, len(g.runs), r["num_slots"], *(float(np.mean(r[s])) for s in SPENDS), " ".join(r["workdirs"]))
    for g, r in zip(groups, numbers["groups"])
  ]
  names = [f"training {name}" for name in SPENDS.values()]
  header += page.table("Compared runs", ("group", "seeds", "slots", *names, "folders"), rows)
  html = page.document(f"{len(groups)} groups of runs side by side", header, sections, script=coloured.SCRIPT)
  return html, {f"{p.name}.png": p.png for section in sections for p in section.pictures}


def _plus_minus(found: Mapping[str, Any] | None) -> str:
  return "-" if found is None else trade_off.plus_minus(found["values"])


def _left_out(numbers: Mapping[str, Any]) -> str:
  """A sentence on the groups that are left out of a section; '' if there are none."""
  labels = numbers["looks_ahead"]
  return page.paragraph(
    f"Left out, because these numbers are blockwise and the methods are non-causal: {', '.join(labels)}.",
    "note",
  ) * bool(labels)


def _perplexity(groups: Sequence[Group], numbers: Mapping[str, Any]) -> Section:
  rows = numbers["groups"]
  found = [row["perplexity"] for row in rows]
  low, high = ([edge(f["values"]) for f in found] for edge in (min, max))
  picture = Picture(
    "perplexity",
    figures.bars([g.label for g in groups], [f["mean"] for f in found], x="perplexity", low=low, high=high),
    "Perplexity: " + ", ".join(f"{g.label} {number(f['mean'])}" for g, f in zip(groups, found)),
    "Perplexity: the mean over seeds, and the range from the lowest to the highest seed; further left is better. The"
    " axis does not start at 0.",
  )
  table = page.table(
    "Perplexity (± standard deviation over seeds)",
    (
      "group", "perplexity", "exp(loss)", "under the training omega", "mean pauses", "with a self-paced context",
      "by seed",
    ),
    [
      (
        row["label"], _plus_minus(row["perplexity"]), number(row["loss_perplexity"]),
        number(row["training_perplexity"]), _plus_minus(row["mean_pauses"]),
        page.percent(row["self_paced_cost"]["mean"]) if row["self_paced_cost"] else "-",
        " ".join(number(v) for v in row["perplexity"]["values"]),
      )
      for row in rows
    ],
  )  # fmt: skip
  return Section("Perplexity", page.with_tables(picture, table), (picture,))


def trade_offs(outcomes: Sequence[Outcome], columns: Mapping[str, Sequence[str]] | None = None) -> Section:
  """Perplexity against the FLOPs of training and of inference; `columns`: further columns of the table, by header."""
  names = [f"{row} {outcome.label}" for row, outcome in enumerate(outcomes, start=1)]
  pictures = []
  for axis, name in trade_off.AXES.items():
    points = trade_off.points(outcomes, axis)
    marks = [
      (f"{p.row + 1}{'s' * p.self_paced}", p.row, p.x, p.y, p.low, p.high, p.self_paced, p.on_front) for p in points
    ]
    front = [names[p.row] + ", self-paced" * p.self_paced for p in points if p.on_front]
    hollow = " Hollow points (s): the same runs with only the pauses that the model requests in the context."
    picture = Picture(
      f"pareto_{axis.removesuffix('_flops')}",
      figures.trade_off(marks, names, x=name, y="perplexity"),
      f"Perplexity against {name}; on the Pareto front: {', '.join(front)}",
      f"Perplexity against {name} (both logarithmic): the mean over seeds, and the range from the lowest to the highest"
      " seed; lower and further left is better. The dashed line is the Pareto front of these runs."
      + hollow
      * any(p.self_paced for p in points),
    )
    pictures.append(picture)
  note = trade_off.NOTE + (f" {trade_off.BLOCKWISE}" if any(outcome.blockwise for outcome in outcomes) else "")
  words = trade_off.WORDS + len(columns or ())
  table = page.table("Perplexity and compute", *trade_off.table(outcomes, columns), words=words, folded=False)
  body = page.paragraph(note, "note") + table + "".join(page.with_tables(picture) for picture in pictures)
  return Section("Perplexity and FLOPs", body, tuple(pictures))


def _regimes(groups: Sequence[Group], numbers: Mapping[str, Any]) -> list[Section]:
  regimes = list(dict.fromkeys(group.regime for group in groups))
  models = list(dict.fromkeys(group.model for group in groups))
  cells = {(g.model, g.regime): row["perplexity"] for g, row in zip(groups, numbers["groups"])}

  def values(model: str, field: str) -> list[float | None]:
    return [cells[model, regime][field] if (model, regime) in cells else None for regime in regimes]

  series = [(model, values(model, "mean"), [d or 0.0 for d in values(model, "deviation")]) for model in models]
  picture = Picture(
    "regimes",
    figures.grouped_bars(regimes, series, x="data regime", y="perplexity"),
    "Perplexity by model and data regime",
    "Perplexity by model and by amount of training data, with the standard deviation over seeds: lower is better.",
  )
  table = page.table(
    "Perplexity by data regime",
    ("model", *regimes),
    [(model, *(_plus_minus(cells.get((model, regime))) for regime in regimes)) for model in models],
  )
  return [Section("Data regimes", page.with_tables(picture, table), (picture,))]


def _differences(numbers: Mapping[str, Any]) -> Section:
  title, found = "Differences", numbers["differences"]
  if not found:
    return Section(title, page.absent("There is only one group: no difference to show.") + _left_out(numbers))
  picture = Picture(
    "differences",
    figures.bars(
      [f"{d['a']} minus {d['b']}" for d in found[:16]], [d["mean"] for d in found[:16]], x="nats per token",
      low=[d["interval"][0] for d in found[:16]], high=[d["interval"][1] for d in found[:16]], zero=True,
    ),
    "Difference in nats per token: " + ", ".join(f"{d['a']} minus {d['b']} {number(d['mean'])}" for d in found[:16]),
    "Nats per token of the first group minus those of the second, with a 95% interval over documents (paired"
    " bootstrap): left of 0 the first group is better. If the interval contains 0, the difference is not significant.",
  )  # fmt: skip
  table = page.table(
    "Difference in nats per token",
    ("first", "second", "difference", "95% over documents", "over seeds"),
    [(d["a"], d["b"], d["mean"], page.interval(d["interval"]), page.interval([d["low"], d["high"]])) for d in found],
    words=2,
  )
  return Section(title, page.with_tables(picture, table) + _left_out(numbers), (picture,))


def _on(windows: int | None) -> str:
  return "the complete validation split" if windows is None else f"the first {windows:,} windows of validation"


def _curves(groups: Sequence[Group], numbers: Mapping[str, Any]) -> Section:
  title, windows = "Validation against training compute", numbers["curve_windows"]
  groups = [group for group in groups if group.causal]
  body, pictures = _left_out(numbers), []
  for spend, name in SPENDS.items():
    series, rows = [], []
    for group in groups:
      curves = [c for c in (curve(run, spend, windows) for run in group.runs) if c.spent]
      if not curves:
        continue
      # Runs of a group are validated at the same steps, except for a run that is not complete.
      common = [x for x in curves[0].spent if all(x in c.spent for c in curves)]
      losses = np.exp([[c.losses[c.spent.index(x)] for x in common] for c in curves])
      series.append((group.label, common, losses.mean(0), losses.min(0), losses.max(0)))
      rows += [(group.label, x, *v) for x, *v in zip(common, losses.mean(0), losses.min(0), losses.max(0))]
    if not series:
      body += page.absent(f"No run has a validation on {_on(windows)} in metrics.jsonl.")
      break
    picture = Picture(
      f"curve_{name.lower()}",
      figures.lines(series, x=f"training {name}", y="validation perplexity", log_x=True, log_y=True),
      f"Validation perplexity against training {name}: "
      + ", ".join(f"{label} ends at {number(float(mean[-1]))}" for label, _, mean, *_ in series if len(mean)),
      f"Perplexity on {_on(windows)} against training {name} (both logarithmic): the mean over seeds and the range of"
      " the seeds; lower and further left is better.",
    )
    table = page.table(
      f"Validation against {name}",
      ("group", f"training {name}", "perplexity", "lowest", "highest"),
      [(label, number(float(x)), *map(float, v)) for label, x, *v in rows],
    )
    body += page.with_tables(picture, table)
    pictures.append(picture)
  return Section(title, body, tuple(pictures))


def _ratio(found: Mapping[str, Any] | None) -> str:
  if found is None:
    return ""
  if found["high"] is None:
    return "not reached"
  bound = "≥ " if found["at_least"] else ""
  if len(found["ratios"]) == 1:
    return bound + number(found["median"], 3)
  middle = "not reached" if found["median"] is None else bound + number(found["median"], 3)
  low = "not reached" if found["low"] is None else number(found["low"], 3)
  return f"{middle} ({low} to {number(found['high'], 3)})"


def _efficiency(groups: Sequence[Group], numbers: Mapping[str, Any]) -> Section:
  title, groups = "Data efficiency", [group for group in groups if group.causal]
  if len(groups) < 2:
    return Section(title, page.absent("There is only one group, so there is no loss to reach.") + _left_out(numbers))
  windows = numbers["curve_windows"]
  unknown = [g.label for g in groups if not all(curve(run, "train_tokens", windows).spent for run in g.runs)]
  if len(unknown) == len(groups):
    absent = page.absent(f"No run has a validation on {_on(windows)} in metrics.jsonl.")
    return Section(title, absent + _left_out(numbers))
  body = page.paragraph(
    "The ratio of the column's compute to the compute with which the row reaches the column's last validation loss, on"
    f" {_on(windows)}: 2 means that the row needs half as much. The logarithm of the compute is interpolated linearly"
    " in the loss along the row's own curve, where the learning rate is still on its schedule. Each cell is the median"
    " over pairs of seeds, with the range. ≥: the row's first validation is already below the loss."
  )
  if unknown:
    body += page.absent(f"Without a validation on these windows, so never reached: {', '.join(unknown)}.")
  for spend, name in SPENDS.items():
    cells = {(e["a"], e["b"]): e for e in numbers["efficiency"][spend]}
    body += page.table(
      f"Ratio of {name}",
      ("needs", *(f"to reach {g.label}" for g in groups)),
      [(a.label, *("1" if a is b else _ratio(cells[a.label, b.label]) for b in groups)) for a in groups],
    )
  return Section(title, body + _left_out(numbers) + page.paragraph(paper.DATA_EFFICIENCY, "note"))


def _latency(groups: Sequence[Group], numbers: Mapping[str, Any]) -> Section:
  title = "Latency"
  rows = [row for row in numbers["groups"] if row["latency"] and row["num_slots"] > 1]
  if not rows:
    return Section(title, page.absent("No method in this comparison has pauses, so there is nothing to show."))
  slots = max(row["num_slots"] for row in rows)
  series = [(row["label"], row["latency"] + [None] * (slots - row["num_slots"])) for row in rows]
  picture = Picture(
    "latency",
    figures.grouped_bars([str(i) for i in range(slots)], series, x="pauses before the answer", y="mean share of s"),
    "Mean of s: " + "; ".join(f"{row['label']} {figures.shares(row['latency'])}" for row in rows),
    "The share of answers that are read after each number of pauses: the mean of s over tokens and seeds.",
  )
  table = page.table(
    "Mean of s",
    ("group", *(f"{i} pauses" for i in range(slots)), "mean pauses"),
    [(name, *values, _plus_minus(row["mean_pauses"])) for (name, values), row in zip(series, rows)],
  )
  return Section(title, page.with_tables(picture, table), (picture,))


def _speed_accuracy(groups: Sequence[Group], numbers: Mapping[str, Any]) -> Section:
  title = "Speed and accuracy"
  series, rows = [], []
  for group in groups:
    curves = group.runs[0].statistics["curves"]
    for kind in ("threshold", "budget") if curves else ():
      x, y = figures.finite(curves[kind] or [], "mean_pauses", "perplexity")
      pairs = sorted(zip(x, y))
      if pairs:
        series.append((f"{group.label}, {kind}", *map(list, zip(*pairs))))
        rows += [(group.label, kind, *pair) for pair in pairs]
  if not series:
    return Section(title, page.absent("No method in this comparison decides when it stops: there is nothing to show."))
  for group, row in zip(groups, numbers["groups"]):
    if not group.runs[0].statistics["curves"] or not group.runs[0].statistics["curves"]["budget"]:
      latency = group.runs[0].statistics["latency"] or {"mean_pauses": 0.0}
      point = latency["mean_pauses"], row["perplexity"]["values"][0]
      series.append((group.label, [point[0]], [point[1]]))
      rows.append((group.label, "as evaluated", *point))
  picture = Picture(
    "speed_accuracy",
    figures.lines(series, x="mean pauses", y="perplexity"),
    "Perplexity against mean pauses, for thresholds on d and for budgets",
    "Perplexity when the answer is read earlier, because of a threshold on d or a step budget through omega; the first"
    " seed of each group. Methods that do not decide are points. Lower and further left is better.",
  )
  table = page.table("Perplexity against mean pauses", ("group", "by", "mean pauses", "perplexity"), rows, words=2)
  return Section(title, page.with_tables(picture, table), (picture,))


def _difficulty(groups: Sequence[Group]) -> list[Section]:
  """Accuracy and mean pauses by known difficulty of the answer; nothing for a task without known difficulty."""
  found = {group.label: [_answers(run.statistics) for run in group.runs] for group in groups if group.causal}
  # Records of version 0.2 have no accuracy for methods with one slot.
  found = {label: runs for label, runs in found.items() if all(runs)}
  if not found:
    return []
  # All runs are evaluated on the same text, so they have the same levels.
  levels = [row["difficulty"] for row in next(iter(found.values()))[0]]
  pictures, rows = [], []
  for field, (y, caption) in _BY_DIFFICULTY.items():
    values = {label: _over_seeds(runs, field) for label, runs in found.items() if field in runs[0][0]}
    if not values:
      continue
    series = [(label, levels, *lines) for label, lines in values.items()]
    means = {label: mean for label, (mean, *_) in values.items()}
    words = "; ".join(f"{label} {figures.shares(mean)}" for label, mean in means.items())
    png = figures.lines(series, x="difficulty of the answer", y=y, x_ticks=levels)
    note = f"{caption}, by known difficulty of the answer: the mean over seeds, and the range of the seeds."
    pictures.append(Picture(f"difficulty_{field.removeprefix('mean_')}", png, f"By difficulty: {words}", note))
    rows += [(f"{label}, {y}", *mean) for label, mean in means.items()]
  table = page.table("By difficulty of the answer", ("group", *map(str, levels)), rows)
  body = "".join(page.with_tables(picture) for picture in pictures[:-1]) + page.with_tables(pictures[-1], table)
  return [Section("Known difficulty", body, tuple(pictures))]


def _answers(statistics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
  """The rows of a record that are about answers and have their accuracy."""
  return [row for row in statistics["difficulty"] or [] if row["difficulty"] and "accuracy" in row]


def _over_seeds(
  runs: Sequence[Sequence[Mapping[str, Any]]], field: str
) -> tuple[list[float], list[float], list[float]]:
  """The mean, the lowest and the highest value over runs, by difficulty."""
  values = np.array([[row[field] for row in rows] for rows in runs])
  return values.mean(0).tolist(), values.min(0).tolist(), values.max(0).tolist()


def pausing_group(groups: Sequence[Group]) -> Group | None:
  """The first group whose pauses differ between types of tokens; the report shows where its first run pauses."""
  return next((g for g in groups if g.causal and _pauses_vary(g.runs[0].statistics)), None)


def _pauses_vary(statistics: Mapping[str, Any]) -> bool:
  found = statistics.get("types")
  if statistics["num_slots"] == 1 or not found or not found["most_paused"]:
    return False
  return bool(found["most_paused"][0]["mean"] > found["least_paused"][0]["mean"])


def _where(groups: Sequence[Group], windows: Sequence[Window]) -> list[Section]:
  """Where a model pauses: types of tokens, and text; nothing if no model decides this."""
  group = pausing_group(groups)
  if group is None:
    return []
  run = group.runs[0]
  intro = f"The first run of {group.label}, {run.workdir}. Its own report has more: cyb-report --workdir={run.workdir}"
  body = page.paragraph(intro, "note")
  for caption, name in (("Most pauses after the token", "most_paused"), ("Fewest pauses", "least_paused")):
    rows = run.statistics["types"][name]
    listed = ", ".join(f"{coloured.visible(row['piece'])} {number(row['mean'], 3)}" for row in rows[:_LISTED_TYPES])
    body += page.paragraph(f"{caption}: {listed}.") + tokens.type_table(caption, rows)
  return [Section(f"Where {group.label} pauses", body), *([tokens.text(windows)] if windows else [])]


def _paper() -> Section:
  rows = [(name, *values) for name, values in paper.PERPLEXITY]
  body = page.paragraph(paper.NOTE, "note")
  body += page.table("The paper: perplexity by model and data regime", ("model", *paper.REGIMES), rows)
  return Section("The paper's results", body + paper.variants())
