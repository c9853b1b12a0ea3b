"""The report of one run: its page, and the pictures in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cyb_jax import configs
from cyb_jax.methods import METHODS
from cyb_jax.report import coloured, figures, page, paper
from cyb_jax.report.coloured import Window
from cyb_jax.report.comparison import method_name
from cyb_jax.report.page import Picture, Section, number

Statistics = Mapping[str, Any]

_ONE_SLOT = "This method has one slot a token and no pauses: there is nothing to show."
_FIXED = "This method doesn't decide when it stops: there is nothing to show."
_CORNERS = {
  "low_low": "low median, low variance",
  "high_low": "high median, low variance",
  "low_high": "low median, high variance",
  "high_high": "high median, high variance",
}
_FILLED = 30
_PAUSES = "expected pauses"


def build(
  source: Mapping[str, Any],
  meta: Mapping[str, Any],
  statistics: Statistics,
  metrics: Sequence[Mapping[str, Any]],
  windows: Sequence[Window],
) -> tuple[str, dict[str, bytes]]:
  """The page and the pictures of a run.

  Args:
    source: the nested dict of its config.
    meta: of its checkpoint.
    statistics: see statistics.json.
    metrics: the rows of metrics.jsonl, in order.
    windows: of text, read.

  Returns:
    HTML, and PNGs by file name.
  """
  sections = [
    _training(metrics),
    _perplexity(statistics),
    _latency(statistics),
    _calibration(statistics),
    _speed_accuracy(statistics),
    _types(statistics),
    _words(statistics),
    _difficulty(statistics),
    _text(windows),
  ]
  title = f"{method_name(source['method'])} after {statistics['step']:,} steps"
  html = page.document(title, _header(source, meta, statistics), sections, script=coloured.SCRIPT)
  return html, {f"{p.name}.png": p.png for section in sections for p in section.pictures}


def read_on(statistics: Statistics) -> str:
  """On what text the numbers are."""
  limit = "whole" if statistics["limit"] is None else f"its first {statistics['limit']:,} windows"
  return f"the {statistics['split']} split, {limit}: {statistics['tokens']:,} tokens"


def _header(source: Mapping[str, Any], meta: Mapping[str, Any], statistics: Statistics) -> str:
  perplexity, latency = statistics["perplexity"], statistics["latency"] or {}
  method = source["method"]
  pairs = [
    ("Method", method["name"]),
    ("Loss", method["loss"] if method["name"] == "cyb" else "cross-entropy"),
    ("Slots a token", statistics["num_slots"]),
    ("Step", statistics["step"]),
    ("Training tokens", meta["train_tokens"]),
    ("Training slots", meta["train_slots"]),
    ("Training FLOPs", meta["train_flops"]),
    ("Perplexity", perplexity["mixture"]),
    ("95% interval over documents", page.interval(perplexity["interval"])),
    ("Mean pauses", latency.get("mean_pauses")),
  ]
  alone = statistics["autoregressive"]
  if alone:
    compared = (
      f"{number(alone['perplexity'])}, against {number(alone['blockwise_perplexity'])} of the same text at once"
    )
    pairs.insert(-1, ("Perplexity, each token from those before it", f"{compared} ({number(alone['tokens'])} tokens)"))
  changed = configs.differences(configs.default().to_dict(), source)
  rows = []
  for line in changed:
    field, _, values = line.partition(": ")
    old, _, new = values.partition(" -> ")
    rows.append((field, old, new))
  differences = (
    page.table("Config, where it differs from the default", ("field", "default", "here"), rows, words=3)
    if rows
    else page.absent("The config is the default.")
  )
  intro = (
    f"Read on {read_on(statistics)}. A pause is another forward step before the answer; s is the distribution of the"
    " slot at which the answer is read, d the probability of asking for another step, t the probability of the target."
  )
  return page.facts(pairs) + page.paragraph(intro, "note") + differences


def _training(metrics: Sequence[Mapping[str, Any]]) -> Section:
  title = "Training"
  rows = {name: [r for r in metrics if r.get("split") == name] for name in ("train", "validation")}
  if not any(rows.values()):
    return Section(title, page.absent("There is no metrics.jsonl: nothing is known of the training."))
  curves, paces = [], []
  # A row of training counts the tokens since the one before.
  spent = itertools.accumulate(row.get("tokens") or 0 for row in rows["train"])
  rows["train"] = [dict(row) | {"train_tokens": tokens} for row, tokens in zip(rows["train"], spent)]
  for name, found in rows.items():
    curves.append((name, *figures.finite(found, "train_tokens", "perplexity")))
    paces.append((name, *figures.finite(found, "train_tokens", "mean_pauses")))
  curves, paces = ([line for line in some if line[1]] for some in (curves, paces))
  paused = any(y > 0 for _, _, ys in paces for y in ys)
  panels = [("perplexity", True, curves), *([("mean pauses", False, paces)] if paused else [])]
  last = {name: ys[-1] for name, _, ys in curves}
  picture = Picture(
    "training",
    figures.stacked_lines(panels, x="training tokens"),
    "Perplexity over training; at the end " + ", ".join(f"{k} {number(v)}" for k, v in last.items()),
    "Perplexity (logarithmic)"
    + (" and the mean number of pauses" if paused else "")
    + " against training tokens: lower is better. Training rows are means since the row before.",
  )
  header = ("split", "step", "training tokens", "perplexity", "mean pauses", "windows")
  table = page.table(
    "Validation in training",
    header,
    [
      (r["split"], r["step"], r.get("train_tokens"), r.get("perplexity"), r.get("mean_pauses"), r.get("limit") or "all")
      for r in rows["validation"]
    ],
  )
  log = page.table(
    "Training log",
    (*header[:5], "gradient norm"),
    [
      (r["split"], r["step"], r["train_tokens"], r.get("perplexity"), r.get("mean_pauses"), r.get("gradient_norm"))
      for r in rows["train"]
    ],
  )
  return Section(title, page.beside(picture, table, log), (picture,))


def _perplexity(statistics: Statistics) -> Section:
  title, found = "Perplexity", statistics["perplexity"]
  one = statistics["num_slots"] == 1
  made = "all slots fused into one state" if METHODS[statistics["method"]].fuses else "mixture over s"
  rows = [(f"as it is read ({made})", found["mixture"])]
  if not one:
    rows += [("mean of logs, exp(-sum s log t)", found.get("mean_of_logs"))]
    rows += [
      ("hard: first slot with d <= 1/2", found.get("hard")),
      ("oracle: best slot (no likelihood)", found["oracle"]),
    ]
    rows += [(f"slot {i} alone", value) for i, value in enumerate(found["slots"] or [], 1)]
  paced = statistics["self_paced"]
  drawn = [(name, value) for name, value in rows if value is not None]
  bounds = found["interval"]
  low = [value if i or not bounds else bounds[0] for i, (_, value) in enumerate(drawn)]
  high = [value if i or not bounds else bounds[1] for i, (_, value) in enumerate(drawn)]
  names = [name.split(":")[0].split(",")[0].split(" (")[0] for name, _ in drawn]
  picture = Picture(
    "perplexity",
    figures.bars(names, [value for _, value in drawn], x="perplexity", low=low, high=high),
    "Perplexity: " + ", ".join(f"{name} {number(value)}" for name, value in drawn),
    "Perplexity by the way in which the slots are read, with a 95% interval over documents for the first: further left"
    " is better. The axis doesn't start at 0.",
  )
  table = page.table("Perplexity by how slots are read", ("read", "perplexity"), rows)
  body = page.beside(picture, table, _of_paper())
  if one:
    body = page.absent("One slot a token: there is one way to read it.") + body
  if paced:
    body += page.paragraph(
      f"Read at its own pace, with only the pauses in the context that it asks for ({number(paced['context_pauses'])} a"
      f" token): {number(paced['perplexity'])}, against {number(paced['constant_perplexity'])} with all of them, as in"
      f" training ({page.percent(paced['perplexity'] / paced['constant_perplexity'] - 1)}); both on the first"
      f" {paced['windows']:,} windows, so not to be compared with the numbers above."
    )
  return Section(title, body, (picture,))


def _of_paper() -> str:
  rows = [(name, *values) for name, values in paper.PERPLEXITY]
  return (
    "<details><summary>The paper's perplexities</summary>"
    + page.paragraph(paper.NOTE, "note")
    + page.table("The paper: perplexity (Gemma 2B, C4)", ("model", *paper.REGIMES), rows)
    + "</details>"
  )


def paper_variants() -> str:
  """The paper's table of variants, folded."""
  rows = [(name, value, *shares) for name, value, shares in paper.VARIANTS]
  header = ("variant, 1x1", "perplexity", *(f"s, {i} pauses" for i in range(4)))
  return (
    "<details><summary>The paper's variants and latencies</summary>"
    + page.paragraph(paper.NOTE + " Mean of s over self-stops alone.", "note")
    + page.table("The paper: variants at 1x1 (Gemma 2B, C4)", header, rows)
    + "</details>"
  )


def _latency(statistics: Statistics) -> Section:
  title, latency, trained = "Latency", statistics["latency"], statistics["training_latency"]
  if statistics["num_slots"] == 1 or not latency:
    return Section(title, page.absent(_ONE_SLOT))
  series = [("all slots granted", latency["mean"])] + ([("as in training", trained["mean"])] if trained else [])
  pauses = [str(i) for i in range(statistics["num_slots"])]
  shares = Picture(
    "latency",
    figures.grouped_bars(pauses, series, x="pauses before the answer", y="mean share of s"),
    "Mean share of the answers read after 0, 1, ... pauses: " + figures.shares(latency["mean"]),
    "How often the answer is read after so many pauses, the mean of s over tokens. All at the last is a model that"
    " always waits; all at 0 one that never does.",
  )
  rows = [(name, *values, found["mean_pauses"]) for (name, values), found in zip(series, (latency, trained or {}))]
  table = page.table("Mean of s", ("world", *(f"{i} pauses" for i in pauses), "mean pauses"), rows)
  histogram = latency["histogram"]
  edges, counts = histogram["edges"], histogram["counts"]
  picture = Picture(
    "pauses",
    figures.histogram(edges, counts, x=f"{_PAUSES} of a token", y="tokens", mean=latency["mean_pauses"]),
    f"Histogram over tokens of their expected pauses; the mean is {number(latency['mean_pauses'])}",
    "Tokens by their expected number of pauses. Wide: the model tells easy tokens from hard ones; one peak: it treats"
    " all alike.",
  )
  total = max(sum(counts), 1)
  bins = page.table(
    "Tokens by expected pauses",
    ("from", "to", "tokens", "share"),
    [(number(float(a)), float(b), int(n), n / total) for a, b, n in zip(edges, edges[1:], counts) if n],
  )
  body = page.beside(shares, table, paper_variants()) + page.beside(picture, bins)
  if trained is None:
    body += page.absent("Training granted all slots too: there is no second world to show.")
  return Section(title, body, (shares, picture))


def _calibration(statistics: Statistics) -> Section:
  title, steps = "Calibration of d", statistics["calibration"]
  if not steps:
    return Section(title, page.absent(_ONE_SLOT if statistics["num_slots"] == 1 else _FIXED))
  rows = [(f"{s['step']} to {s['step'] + 1}", s["spearman"], page.interval(s["interval"])) for s in steps]
  theirs = [(name, *(values[i] if i < len(values) else None for i in range(3))) for name, values in paper.SPEARMAN]
  body = page.table("Rank correlation of d with the gain of one more slot", ("slots", "Spearman", "95% interval"), rows)
  body += page.table("The paper: the same (Gemma 2B, C4)", ("model", "1 to 2", "2 to 3", "3 to 4"), theirs)
  pictures = []
  for step in steps:
    i, cells = step["step"], step["density"]
    picture = Picture(
      f"density_{i}",
      figures.density(
        cells["decision_edges"],
        cells["gain_edges"],
        cells["counts"],
        x=f"d of slot {i}",
        y=f"t of slot {i + 1} less t of slot {i}",
      ),
      f"Density of d and of the gain of one more slot, slot {i}; Spearman {number(step['spearman'])}",
      f"Every token by the d of slot {i} and by how much slot {i + 1} gives its target more (logarithmic counts). A"
      " cloud that rises to the right: the model asks for another slot where it helps.",
    )
    deciles = page.table(
      f"Gain of one more slot by tenths of d{i}",
      ("d from", "to", "tokens", "mean d", "mean gain", "mean gain, nats", "share better"),
      [
        (number(r["low"]), r["high"], r["count"], r["decision"], r["gain"], r["gain_nats"], r["better"])
        for r in step["deciles"]
      ],
    )
    pictures.append(picture)
    body += page.beside(picture, deciles)
  # A share of a handful of tokens says nothing.
  filled = [[row for row in s["reliability"] if row["count"] >= _FILLED] for s in steps]
  series = [(f"slot {s['step']}", *figures.finite(rows, "decision", "better")) for s, rows in zip(steps, filled)]
  reliability = Picture(
    "reliability",
    figures.lines(series, x="d (mean of its bin)", y="share with a better next slot", diagonal=True),
    "Share of the tokens whose next slot is better, by d",
    "d as a forecast that the next slot is better: on the dotted line it would be exact. The loss doesn't ask for that,"
    f" only for a line that rises. Bins of fewer than {_FILLED} tokens are in the table alone.",
  )
  tables = [
    page.table(
      f"Reliability of d{s['step']}",
      ("d from", "to", "tokens", "mean d", "share better"),
      [(number(r["low"]), r["high"], r["count"], r["decision"], r["better"]) for r in s["reliability"]],
      folded=len(steps) > 1 or None,
    )
    for s in steps
  ]
  series = [(f"slot {s['step']}", *figures.finite(s["deciles"], "decision", "gain_nats")) for s in steps]
  gains = Picture(
    "gain",
    figures.lines(series, x="d (mean of its tenth)", y="mean gain of a slot, nats", level=0),
    "Mean gain of one more slot in nats, by tenths of d",
    "What one more slot brings on average, by tenths of the tokens by d: above the dotted line it helps. Where the"
    " line rises, waiting is spent where it pays.",
  )
  body += page.beside(reliability, *tables) + page.beside(
    gains, page.paragraph("Its numbers are in the tables of tenths above.", "note")
  )
  return Section(title, body, (*pictures, reliability, gains))


def _speed_accuracy(statistics: Statistics) -> Section:
  title, curves = "Speed and accuracy", statistics["curves"]
  if not curves or not (curves["threshold"] or curves["budget"]):
    return Section(title, page.absent(_ONE_SLOT if statistics["num_slots"] == 1 else _FIXED))
  found, tables = [], []
  if curves["threshold"]:
    found.append(("threshold on d", *figures.finite(curves["threshold"], "mean_pauses", "perplexity")))
    tables.append(
      page.table(
        "Read at the first slot with d at most the threshold",
        ("threshold", "mean pauses", "perplexity"),
        [(number(r["threshold"]), r["mean_pauses"], r["perplexity"]) for r in curves["threshold"]],
      )
    )
  if curves["budget"]:
    found.append(("budget through omega", *figures.finite(curves["budget"], "mean_pauses", "perplexity")))
    tables.append(
      page.table(
        "A budget of steps through omega",
        ("omega", "mean steps granted", "mean pauses", "perplexity"),
        [
          (":".join(f"{w:g}" for w in r["omega"]), r["mean_steps"], r["mean_pauses"], r["perplexity"])
          for r in curves["budget"]
        ],
      )
    )
  sorted_lines = [(name, *_sorted(xs, ys)) for name, xs, ys in found]
  latency = statistics["latency"]
  sorted_lines.append(("as it is read", [latency["mean_pauses"]], [statistics["perplexity"]["mixture"]]))
  picture = Picture(
    "speed_accuracy",
    figures.lines(sorted_lines, x="mean pauses", y="perplexity"),
    "Perplexity against mean pauses, for thresholds on d and for budgets",
    "What pauses buy: perplexity when the answer is read earlier, by a threshold on d, or because the world grants"
    " fewer steps. Further down and further left is better.",
  )
  return Section(title, page.beside(picture, *tables), (picture,))


def _sorted(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
  pairs = sorted(zip(xs, ys))
  return [x for x, _ in pairs], [y for _, y in pairs]


_ROW = ("token", "count", "median", "mean", "variance")


def _row(row: Mapping[str, Any]) -> tuple[Any, ...]:
  piece = row.get("piece", row.get("word"))
  return (coloured.visible(str(piece)), *(row.get(name) for name in _ROW[1:]))


def _types(statistics: Statistics) -> Section:
  title, types = "Pauses by token (the paper's Table 3)", statistics["types"]
  if not types or statistics["num_slots"] == 1:
    return Section(title, page.absent(_ONE_SLOT))
  corners = {name: types["corners"][name] for name in _CORNERS}
  limits = types["thresholds"]
  bounds = {
    name: f"low: at most {number(limits[name][0])}, high: at least {number(limits[name][1])}" for name in limits
  }
  body = page.paragraph(
    f"Pauses after an input token, over the {types['eligible']:,} types that occur {types['min_count']:,} times or"
    f" more. Median, {bounds['median']}; variance, {bounds['variance']}. Medians are exact to"
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
  folded = "".join(page.table(f"Corner: {_CORNERS[name]}", _ROW, map(_row, found)) for name, found in corners.items())
  if clouds:
    picture = Picture(
      "types",
      figures.points(clouds, x="median pauses", y="variance"),
      "Token types of the four corners by the median and the variance of their pauses",
      "Types whose pauses are fewest or most, and steadiest or most various. To the right: the model waits after"
      " them; further up: it depends on the context.",
    )
    pictures.append(picture)
    body += page.beside(picture, *tables) + f"<details><summary>The corners in numbers</summary>{folded}</details>"
  else:
    body += page.absent("No type falls into a corner: too few types occur often enough.")
  looked_up = [
    (row.get("word"), _CORNERS.get(str(row.get("group")), row.get("group")), *_row(row)[1:]) for row in types["paper"]
  ]
  body += page.table("The paper's words here", ("word", "corner in the paper", *_ROW[1:]), looked_up, words=2)
  body += page.table(
    "The paper's Table 3 (Gemma 2B, C4)", ("corner", "words"),
    [(_CORNERS[name], words) for name, words in paper.WORDS.items()], words=2,
  )  # fmt: skip
  for caption, name in (("Most pauses", "most_paused"), ("Fewest pauses", "least_paused")):
    body += page.table(caption, _ROW, map(_row, types[name]))
  return Section(title, body, tuple(pictures))


def _columns(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> tuple[list[float], list[float]]:
  return [row[x] for row in rows], [row[y] for row in rows]


def _words(statistics: Statistics) -> Section:
  title = "Pauses by kind of word"
  if statistics["num_slots"] == 1:
    return Section(title, page.absent(_ONE_SLOT))
  body, pictures = "", []
  kinds: list[tuple[str, str, str, Callable[[Mapping[str, Any]], str], str]] = [
    ("word_position", "position", "Place in the word", lambda r: r["position"], "the piece's place in its word"),
    ("word_class", "class", "Word class", lambda r: r["class"], "the word's class"),
    ("frequency", "frequency", "Frequency", _range, "how often the type occurs"),
  ]
  for key, name, heading, label, what in kinds:
    rows = [row for row in statistics[key] or [] if row["count"]]
    body += f"<h3>{heading}</h3>"
    if not rows:
      reason = "its lexicon (the package textblob) is not installed" if key == "word_class" else "no token has one"
      body += page.absent(f"There is nothing by {what}: {reason}.")
      continue
    more = [field for field in ("types", "examples") if field in rows[0]]
    names, means = [label(row) for row in rows], [row["mean"] for row in rows]
    picture = Picture(
      name,
      figures.bars(names, means, x="mean pauses after the token"),
      f"Mean pauses by {what}: " + ", ".join(f"{n} {number(m)}" for n, m in zip(names, means)),
      f"The mean number of pauses after a token, by {what}: further right is slower. The axis doesn't start at 0.",
    )
    table = page.table(
      f"Pauses by {what}",
      (name, "tokens", "mean pauses", "variance", *more),
      [
        (n, row["count"], row["mean"], row["variance"], *(_listed(row[field]) for field in more))
        for n, row in zip(names, rows)
      ],
    )
    body += page.beside(picture, table)
    pictures.append(picture)
  return Section(title, body, tuple(pictures))


def _listed(value: Any) -> Any:
  return " ".join(map(coloured.visible, value)) if isinstance(value, list) else value


def _range(row: Mapping[str, Any]) -> str:
  return number(row["low"]) if row["low"] == row["high"] else f"{number(row['low'])} to {number(row['high'])}"


def _difficulty(statistics: Statistics) -> Section:
  title, rows = "Known difficulty", statistics["difficulty"]
  if not rows:
    return Section(title, page.absent("The difficulty of this task's tokens isn't known: there is nothing to show."))
  if statistics["num_slots"] == 1:
    found = [(row["difficulty"], row["count"], row["perplexity"]) for row in rows]
    caption = "Perplexity by difficulty (0: tokens that are no answers)"
    return Section(title, page.table(caption, ("difficulty", "tokens", "perplexity"), found))
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
    "Mean pauses where the difficulty of the answer is known: a self-paced model waits longer for harder ones."
    " The axis doesn't start at 0.",
  )  # fmt: skip
  series = [("as it is read", levels, [row["accuracy"] for row in answers])]
  series += [(f"slot {i + 1}", levels, [row["slot_accuracy"][i] for row in answers]) for i in slots]
  right = Picture(
    "difficulty_accuracy",
    figures.lines(series, x="difficulty of the answer", y="share of right answers", x_ticks=levels),
    "Accuracy by difficulty: " + ", ".join(f"{m}: {number(r['accuracy'])}" for m, r in zip(levels, answers)),
    "The share of answers whose most probable token is right, as it is read and by each slot alone: higher is better.",
  )
  waits = page.table(
    "Pauses by difficulty (0: tokens that are no answers)",
    ("difficulty", "tokens", "mean pauses", *(f"s, {i} pauses" for i in slots)),
    [(row["difficulty"], row["count"], row["mean_pauses"], *row["stopping"]) for row in rows],
  )
  hits = page.table(
    "Accuracy by difficulty",
    ("difficulty", "as it is read", *(f"slot {i + 1}" for i in slots), "perplexity"),
    [(row["difficulty"], row["accuracy"], *row["slot_accuracy"], row["perplexity"]) for row in rows],
  )
  return Section(title, page.beside(paused, waits) + page.beside(right, hits), (paused, right))


def _text(windows: Sequence[Window]) -> Section:
  title = "Text, coloured by pauses"
  if not windows:
    return Section(title, page.absent("No window of text was asked for (--text_windows=0)."))
  if windows[0].stopping.shape[-1] == 1:
    return Section(title, page.absent(_ONE_SLOT))
  return Section(title, coloured.to_html(windows))
