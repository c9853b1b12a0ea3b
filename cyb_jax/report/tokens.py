"""Sections of a run's report about tokens: pauses by type of token, difficulty, and coloured text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cyb_jax.report import coloured, figures, page, paper
from cyb_jax.report.coloured import Window
from cyb_jax.report.facts import ONE_SLOT, Statistics
from cyb_jax.report.page import Picture, Section, number

_CORNERS = {
  "low_low": "low median, low variance",
  "high_low": "high median, low variance",
  "low_high": "low median, high variance",
  "high_high": "high median, high variance",
}
_ROW = ("token", "count", "median", "mean", "variance")


def _row(row: Mapping[str, Any]) -> tuple[Any, ...]:
  piece = row.get("piece", row.get("word"))
  return (coloured.visible(str(piece)), *(row.get(name) for name in _ROW[1:]))


def type_table(caption: str, rows: Sequence[Mapping[str, Any]]) -> str:
  """A table of types of tokens, from the `types` of statistics.json."""
  return page.table(caption, _ROW, map(_row, rows))


def types(statistics: Statistics) -> Section:
  """Pauses by type of the input token, with the words that the paper lists."""
  title, types = "Pauses by token (the paper's Table 3)", statistics["types"]
  if not types or statistics["num_slots"] == 1:
    return Section(title, page.absent(ONE_SLOT))
  corners = {name: types["corners"][name] for name in _CORNERS}
  limits = types["thresholds"]
  bounds = {
    name: f"low: at most {number(limits[name][0])}, high: at least {number(limits[name][1])}" for name in limits
  }
  body = page.paragraph(
    f"Pauses after an input token, over the {types['eligible']:,} types that occur at least {types['min_count']:,}"
    f" times. Median: {bounds['median']}. Variance: {bounds['variance']}. The resolution of medians is"
    f" {number(types['median_resolution'])}."
  )
  rows = max(map(len, corners.values()), default=0)
  overview = [
    [coloured.visible(corners[name][i]["piece"]) if i < len(corners[name]) else "" for name in _CORNERS]
    for i in range(min(rows, 10))
  ]
  tables = [page.table("Four corners: tokens", tuple(_CORNERS.values()), overview, words=4)] if overview else []
  clouds = [
    (_CORNERS[name], *_columns(found, "median", "variance"), [coloured.visible(r["piece"]).strip() for r in found])
    for name, found in corners.items()
    if found
  ]
  pictures = []
  folded = "".join(type_table(f"Corner: {_CORNERS[name]}", found) for name, found in corners.items())
  if clouds:
    picture = Picture(
      "types",
      figures.points(clouds, x="median pauses", y="variance"),
      "Token types of the four corners by the median and the variance of their pauses",
      "Types with the fewest or the most pauses, and with the lowest or the highest variance. Further right, the model"
      " pauses more after the token; further up, the number of pauses depends more on the context.",
    )
    pictures.append(picture)
    body += page.with_tables(picture, *tables) + f"<details><summary>The corners in numbers</summary>{folded}</details>"
  else:
    body += page.absent("The corners are empty, because too few types occur often enough.")
  looked_up = [
    (row.get("word"), _CORNERS.get(str(row.get("group")), row.get("group")), *_row(row)[1:]) for row in types["paper"]
  ]
  body += page.table("The paper's words in this run", ("word", "corner in the paper", *_ROW[1:]), looked_up, words=2)
  body += page.table(
    "The paper's Table 3 (Gemma 2B, C4)", ("corner", "words"),
    [(_CORNERS[name], words) for name, words in paper.WORDS.items()], words=2,
  )  # fmt: skip
  for caption, name in (("Most pauses", "most_paused"), ("Fewest pauses", "least_paused")):
    body += type_table(caption, types[name])
  return Section(title, body, tuple(pictures))


def _columns(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
  return [row[x] for row in rows], [row[y] for row in rows]


def words(statistics: Statistics) -> Section:
  """Pauses by position in the word, word class and frequency."""
  title = "Pauses by kind of word"
  if statistics["num_slots"] == 1:
    return Section(title, page.absent(ONE_SLOT))
  body, pictures = "", []
  kinds: list[tuple[str, str, str, Callable[[Mapping[str, Any]], str], str]] = [
    ("word_position", "position", "Position in the word", lambda r: r["position"], "position of the piece in its word"),
    ("word_class", "class", "Word class", lambda r: r["class"], "word class"),
    ("frequency", "frequency", "Frequency", _range, "frequency of the type"),
  ]
  for key, name, heading, label, kind in kinds:
    rows = [row for row in statistics[key] or [] if row["count"]]
    body += f"<h3>{heading}</h3>"
    if not rows:
      reason = "its lexicon (the package textblob) is not installed" if key == "word_class" else "no token has one"
      body += page.absent(f"There are no pauses by {kind}: {reason}.")
      continue
    more = [field for field in ("types", "examples") if field in rows[0]]
    names, means = [label(row) for row in rows], [row["mean"] for row in rows]
    picture = Picture(
      name,
      figures.bars(names, means, x="mean pauses after the token"),
      f"Mean pauses by {kind}: " + ", ".join(f"{n} {number(m)}" for n, m in zip(names, means)),
      f"The mean number of pauses after a token, by {kind}: further right is slower. The axis does not start at 0.",
    )
    table = page.table(
      f"Pauses by {kind}",
      (name, "tokens", "mean pauses", "variance", *more),
      [
        (n, row["count"], row["mean"], row["variance"], *(_listed(row[field]) for field in more))
        for n, row in zip(names, rows)
      ],
    )
    body += page.with_tables(picture, table)
    pictures.append(picture)
  return Section(title, body, tuple(pictures))


def _listed(value: Any) -> Any:
  return " ".join(map(coloured.visible, value)) if isinstance(value, list) else value


def _range(row: Mapping[str, Any]) -> str:
  return number(row["low"]) if row["low"] == row["high"] else f"{number(row['low'])} to {number(row['high'])}"


def difficulty(statistics: Statistics) -> Section:
  """Pauses and accuracy by known difficulty of the answer."""
  title, rows = "Known difficulty", statistics["difficulty"]
  if not rows:
    return Section(title, page.absent("The difficulty of this task's tokens is unknown, so there is nothing to show."))
  if statistics["num_slots"] == 1:
    # Records of version 0.2 have no accuracy for methods with one slot.
    found = [(row["difficulty"], row["count"], row["perplexity"], row.get("accuracy")) for row in rows]
    caption = "Perplexity and accuracy by difficulty (0: tokens outside of answers)"
    return Section(title, page.table(caption, ("difficulty", "tokens", "perplexity", "accuracy"), found))
  answers = [row for row in rows if row["difficulty"]]
  levels = [row["difficulty"] for row in answers]
  slots = range(statistics["num_slots"])
  paused = Picture(
    "difficulty_pauses",
    figures.lines(
      [("pauses", levels, [row["mean_pauses"] for row in answers])],
      x="difficulty of the answer", y="mean pauses", x_ticks=levels, legend=False,
    ),
    "Mean pauses by difficulty: " + ", ".join(f"{m}: {number(r['mean_pauses'])}" for m, r in zip(levels, answers)),
    "Mean pauses by known difficulty of the answer: a self-paced model pauses longer before harder answers."
    " The axis does not start at 0.",
  )  # fmt: skip
  series = [("as evaluated", levels, [row["accuracy"] for row in answers])]
  series += [(f"slot {i + 1}", levels, [row["slot_accuracy"][i] for row in answers]) for i in slots]
  right = Picture(
    "difficulty_accuracy",
    figures.lines(series, x="difficulty of the answer", y="share of correct answers", x_ticks=levels),
    "Accuracy by difficulty: " + ", ".join(f"{m}: {number(r['accuracy'])}" for m, r in zip(levels, answers)),
    "The share of answers whose most probable token is correct, as evaluated and for each slot: higher is better.",
  )
  waits = page.table(
    "Pauses by difficulty (0: tokens outside of answers)",
    ("difficulty", "tokens", "mean pauses", *(f"s, {i} pauses" for i in slots)),
    [(row["difficulty"], row["count"], row["mean_pauses"], *row["stopping"]) for row in rows],
  )
  hits = page.table(
    "Accuracy by difficulty",
    ("difficulty", "as evaluated", *(f"slot {i + 1}" for i in slots), "perplexity"),
    [(row["difficulty"], row["accuracy"], *row["slot_accuracy"], row["perplexity"]) for row in rows],
  )
  return Section(title, page.with_tables(paused, waits) + page.with_tables(right, hits), (paused, right))


def text(windows: Sequence[Window]) -> Section:
  """Windows of the split, coloured by pauses."""
  title = "Text, coloured by pauses"
  if not windows:
    return Section(title, page.absent("The report has no windows of text (--text_windows=0)."))
  if windows[0].stopping.shape[-1] == 1:
    return Section(title, page.absent(ONE_SLOT))
  return Section(title, coloured.to_html(windows))
