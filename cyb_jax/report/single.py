"""The report of one run: its page and its pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from cyb_jax import configs
from cyb_jax.report import coloured, figures, pacing, page, paper, tokens, trade_off
from cyb_jax.report.coloured import Window
from cyb_jax.report.facts import Statistics, fuses_slots, method_name, read_on, stopping_loss
from cyb_jax.report.page import Picture, Section, number


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
    meta: the metadata of its checkpoint.
    statistics: the statistics of statistics.json.
    metrics: the rows of metrics.jsonl, in order.
    windows: evaluated windows of text.

  Returns:
    HTML, and PNGs by file name.
  """
  sections = [
    _training(metrics),
    _perplexity(statistics),
    pacing.latency(statistics),
    pacing.calibration(statistics),
    pacing.speed_accuracy(statistics),
    tokens.types(statistics),
    tokens.words(statistics),
    tokens.difficulty(statistics),
    tokens.text(windows),
  ]
  title = f"{method_name(source['method'])} after {statistics['step']:,} steps"
  html = page.document(title, _header(source, meta, statistics), sections, script=coloured.SCRIPT)
  return html, {f"{p.name}.png": p.png for section in sections for p in section.pictures}


def _header(source: Mapping[str, Any], meta: Mapping[str, Any], statistics: Statistics) -> str:
  perplexity, latency = statistics["perplexity"], statistics["latency"] or {}
  method = source["method"]
  pairs = [
    ("Method", method["name"]),
    ("Loss", stopping_loss(method) or "cross-entropy"),
    ("Slots per token", statistics["num_slots"]),
    ("Step", statistics["step"]),
    ("Training tokens", meta["train_tokens"]),
    ("Training slots", meta["train_slots"]),
    ("Training FLOPs", meta["train_flops"]),
    ("Perplexity", perplexity["mixture"]),
    ("95% interval over documents", page.interval(perplexity["interval"])),
    *((name[0].upper() + name[1:], value) for name, value in _as_trained(perplexity)),
    ("Mean pauses", latency.get("mean_pauses")),
  ]
  alone = statistics["autoregressive"]
  if alone:
    compared = (
      f"{number(alone['perplexity'])}, compared with {number(alone['blockwise_perplexity'])} blockwise on this text"
    )
    pairs.insert(-1, ("Autoregressive perplexity", f"{compared} ({number(alone['tokens'])} tokens)"))
  changed = configs.differences(configs.default().to_dict(), source)
  rows = []
  for line in changed:
    field, _, values = line.partition(": ")
    old, _, new = values.partition(" -> ")
    rows.append((field, old, new))
  differences = (
    page.table("Config fields that differ from the default", ("field", "default", "value"), rows, words=3)
    if rows
    else page.absent("The config is the default.")
  )
  intro = (
    f"Evaluated on {read_on(statistics)}. A pause is an additional forward step before the answer; s is the"
    " distribution of the slot at which the answer is read, d the probability of requesting another step, t the"
    " probability of the target."
  )
  return page.facts(pairs) + page.paragraph(intro, "note") + differences


def _as_trained(perplexity: Mapping[str, Any]) -> list[tuple[str, float]]:
  """Rows for the training objective, from the `perplexity` of statistics.json, if it differs from the perplexity."""
  rows, loss = [], perplexity.get("loss")
  if trade_off.own_loss([{"perplexity": perplexity["mixture"], "loss_perplexity": loss}]):
    rows.append(("exp(loss), with the discount, penalty or bound of training (not a perplexity)", loss))
  if perplexity.get("training") is not None:
    rows.append(("under the omega and the recipe of training", perplexity["training"]))
  return rows


def _training(metrics: Sequence[Mapping[str, Any]]) -> Section:
  title = "Training"
  rows = {name: [r for r in metrics if r.get("split") == name] for name in ("train", "validation")}
  if not any(rows.values()):
    return Section(title, page.absent("There is no metrics.jsonl, so the training curve is unknown."))
  curves, paces = [], []
  # A training row counts the tokens since the previous row.
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
    + " against training tokens: lower is better. Training rows are means since the previous row.",
  )
  header = ("split", "step", "training tokens", "perplexity", "mean pauses", "windows")
  table = page.table(
    "Validation in training",
    (*header[:4], "exp(loss)", "under the training omega", *header[4:]),
    [
      (
        r["split"], r["step"], r.get("train_tokens"), r.get("perplexity"), r.get("loss_perplexity"),
        (r.get("training_omega") or {}).get("perplexity"), r.get("mean_pauses"), r.get("limit") or "all",
      )
      for r in rows["validation"]
    ],
  )  # fmt: skip
  log = page.table(
    "Training log",
    (*header[:5], "gradient norm"),
    [
      (r["split"], r["step"], r["train_tokens"], r.get("perplexity"), r.get("mean_pauses"), r.get("gradient_norm"))
      for r in rows["train"]
    ],
  )
  return Section(title, page.with_tables(picture, table, log), (picture,))


def _perplexity(statistics: Statistics) -> Section:
  title, found = "Perplexity", statistics["perplexity"]
  one = statistics["num_slots"] == 1
  made = "all slots fused into one state" if fuses_slots(statistics) else "mixture over s"
  rows = [(f"as evaluated ({made})", found["mixture"])]
  if not one:
    rows += [("mean of logs, exp(-sum s log t)", found.get("mean_of_logs"))]
    rows += [
      ("hard: first slot with d <= 1/2", found.get("hard")),
      ("oracle: best slot (not a likelihood)", found["oracle"]),
    ]
    rows += [(f"only slot {i}", value) for i, value in enumerate(found["slots"] or [], 1)]
  trained = _as_trained(found)
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
    "Perplexity for each way of reading the slots, with a 95% interval over documents for the first: further left is"
    " better. The axis does not start at 0.",
  )
  table = page.table("Perplexity for each way of reading the slots", ("reading", "perplexity"), [*rows, *trained])
  body = page.with_tables(picture, table, paper.perplexities())
  if one:
    body = page.absent("There is one slot per token, so there is one way of reading it.") + body
  if paced:
    body += page.paragraph(
      f"Self-paced, with only the requested pauses in the context ({number(paced['context_pauses'])} per token), the"
      f" perplexity is {number(paced['perplexity'])}, compared with {number(paced['constant_perplexity'])} with all"
      f" pauses, as in training ({page.percent(paced['perplexity'] / paced['constant_perplexity'] - 1)}). Both are on"
      f" the first {paced['windows']:,} windows, so they are not comparable with the numbers above."
    )
  return Section(title, body, (picture,))
