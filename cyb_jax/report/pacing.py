"""Sections of a run's report about the stopping time: latency, calibration of d, speed against accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cyb_jax.report import figures, page, paper
from cyb_jax.report.facts import ONE_SLOT, Statistics, why_no_decisions
from cyb_jax.report.page import Picture, Section, number

# Bins with fewer tokens are in the table of reliability, but not in its plot.
_FILLED = 30


def latency(statistics: Statistics) -> Section:
  """The distribution of the number of pauses."""
  title, all_slots, trained = "Latency", statistics["latency"], statistics["training_latency"]
  if statistics["num_slots"] == 1 or not all_slots:
    return Section(title, page.absent(ONE_SLOT))
  series = [("all slots allowed", all_slots["mean"])] + ([("as in training", trained["mean"])] if trained else [])
  pauses = [str(i) for i in range(statistics["num_slots"])]
  shares = Picture(
    "latency",
    figures.grouped_bars(pauses, series, x="pauses before the answer", y="mean share of s"),
    "Mean share of the answers read after 0, 1, ... pauses: " + figures.shares(all_slots["mean"]),
    "The share of answers that are read after each number of pauses: the mean of s over tokens. A model that always"
    " pauses has all its mass at the last number, and a model that never pauses at 0.",
  )
  rows = [(name, *values, found["mean_pauses"]) for (name, values), found in zip(series, (all_slots, trained or {}))]
  table = page.table("Mean of s", ("step budget", *(f"{i} pauses" for i in pauses), "mean pauses"), rows)
  histogram = all_slots["histogram"]
  edges, counts = histogram["edges"], histogram["counts"]
  picture = Picture(
    "pauses",
    figures.histogram(edges, counts, x="expected pauses of a token", y="tokens", mean=all_slots["mean_pauses"]),
    f"Histogram over tokens of their expected pauses; the mean is {number(all_slots['mean_pauses'])}",
    "Tokens by their expected number of pauses. In a wide distribution the model distinguishes easy from hard tokens;"
    " with a single peak it treats all tokens alike.",
  )
  total = max(sum(counts), 1)
  bins = page.table(
    "Tokens by expected pauses",
    ("from", "to", "tokens", "share"),
    [(number(float(a)), float(b), int(n), n / total) for a, b, n in zip(edges, edges[1:], counts) if n],
  )
  body = page.with_tables(shares, table, paper.variants()) + page.with_tables(picture, bins)
  if trained is None:
    body += page.absent("Training also allowed all slots, so there is no second distribution to show.")
  return Section(title, body, (shares, picture))


def calibration(statistics: Statistics) -> Section:
  """Whether d predicts that one more slot is better."""
  title, steps = "Calibration of d", statistics["calibration"]
  if not steps:
    return Section(title, page.absent(why_no_decisions(statistics)))
  rows = [(f"{s['step']} to {s['step'] + 1}", s["spearman"], page.interval(s["interval"])) for s in steps]
  theirs = [(name, *(values[i] if i < len(values) else None for i in range(3))) for name, values in paper.SPEARMAN]
  body = page.table("Rank correlation of d with the gain of one more slot", ("slots", "Spearman", "95% interval"), rows)
  body += page.table(
    "The paper: rank correlation of d with the gain (Gemma 2B, C4)", ("model", "1 to 2", "2 to 3", "3 to 4"), theirs
  )
  pictures = []
  for step in steps:
    pictures.append(_density(step))
    body += page.with_tables(pictures[-1], _deciles(step))
  reliability, gains = _reliability(steps), _gains(steps)
  body += page.with_tables(reliability, *_reliability_tables(steps)) + page.with_tables(
    gains, page.paragraph("The tables by decile above have the numbers of this figure.", "note")
  )
  return Section(title, body, (*pictures, reliability, gains))


def _density(step: Mapping[str, Any]) -> Picture:
  i, cells = step["step"], step["density"]
  return Picture(
    f"density_{i}",
    figures.density(
      cells["decision_edges"],
      cells["gain_edges"],
      cells["counts"],
      x=f"d of slot {i}",
      y=f"t of slot {i + 1} minus t of slot {i}",
    ),
    f"Density of d and of the gain of one more slot, slot {i}; Spearman {number(step['spearman'])}",
    f"Tokens by d at slot {i} and by the increase of the target's probability at slot {i + 1} (logarithmic counts). If"
    " the cloud rises to the right, the model requests another slot where it helps.",
  )


def _deciles(step: Mapping[str, Any]) -> str:
  return page.table(
    f"Gain of one more slot by decile of d{step['step']}",
    ("d from", "to", "tokens", "mean d", "mean gain", "mean gain, nats", "share better"),
    [
      (number(r["low"]), r["high"], r["count"], r["decision"], r["gain"], r["gain_nats"], r["better"])
      for r in step["deciles"]
    ],
  )


def _reliability(steps: Sequence[Mapping[str, Any]]) -> Picture:
  # The share of a few tokens is too noisy.
  filled = [[row for row in s["reliability"] if row["count"] >= _FILLED] for s in steps]
  series = [(f"slot {s['step']}", *figures.finite(rows, "decision", "better")) for s, rows in zip(steps, filled)]
  return Picture(
    "reliability",
    figures.lines(series, x="d (mean of its bin)", y="share with a better next slot", diagonal=True),
    "Share of the tokens whose next slot is better, by d",
    "d as a forecast that the next slot is better: on the dotted line the forecast is calibrated. The loss only needs a"
    f" line that rises. Bins with fewer than {_FILLED} tokens are only in the table.",
  )


def _reliability_tables(steps: Sequence[Mapping[str, Any]]) -> list[str]:
  return [
    page.table(
      f"Reliability of d{s['step']}",
      ("d from", "to", "tokens", "mean d", "share better"),
      [(number(r["low"]), r["high"], r["count"], r["decision"], r["better"]) for r in s["reliability"]],
      folded=len(steps) > 1 or None,
    )
    for s in steps
  ]


def _gains(steps: Sequence[Mapping[str, Any]]) -> Picture:
  series = [(f"slot {s['step']}", *figures.finite(s["deciles"], "decision", "gain_nats")) for s in steps]
  return Picture(
    "gain",
    figures.lines(series, x="d (mean of its decile)", y="mean gain of a slot, nats", level=0),
    "Mean gain of one more slot in nats, by decile of d",
    "The mean gain of one more slot by decile of d: above the dotted line the slot helps. If the line rises, the model"
    " pauses where pauses help most.",
  )


def speed_accuracy(statistics: Statistics) -> Section:
  """Perplexity against mean pauses, by a threshold on d and by a step budget."""
  title, curves = "Speed and accuracy", statistics["curves"]
  if not curves or not (curves["threshold"] or curves["budget"]):
    return Section(title, page.absent(why_no_decisions(statistics)))
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
        "A step budget through omega",
        ("omega", "mean steps allowed", "mean pauses", "perplexity"),
        [
          (":".join(f"{w:g}" for w in r["omega"]), r["mean_steps"], r["mean_pauses"], r["perplexity"])
          for r in curves["budget"]
        ],
      )
    )
  sorted_lines = [(name, *_sorted(xs, ys)) for name, xs, ys in found]
  latency = statistics["latency"]
  sorted_lines.append(("as evaluated", [latency["mean_pauses"]], [statistics["perplexity"]["mixture"]]))
  picture = Picture(
    "speed_accuracy",
    figures.lines(sorted_lines, x="mean pauses", y="perplexity"),
    "Perplexity against mean pauses, for thresholds on d and for budgets",
    "Perplexity when the answer is read earlier, because of a threshold on d or because the step budget allows fewer"
    " steps. Lower and further left is better.",
  )
  return Section(title, page.with_tables(picture, *tables), (picture,))


def _sorted(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
  pairs = sorted(zip(xs, ys))
  return [x for x, _ in pairs], [y for _, y in pairs]
