"""The report: its page, its pictures and its folder; coloured text by hand; ratios, groups and labels by hand; once
through the program, and once in a browser."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import xml.etree.ElementTree

import jax
import numpy as np
import pytest
from models import tiny_config
from report_page import Page, call
from statistics_example import HOSTILE, example

from cyb_jax import configs, evaluation, training
from cyb_jax.checkpointing.workdir import read_config
from cyb_jax.cli import splits
from cyb_jax.data import ByteTokenizer
from cyb_jax.errors import InputError, StorageError
from cyb_jax.interop import pretrained
from cyb_jax.methods import Adaptive
from cyb_jax.report import coloured, comparison, facts, figures, output, page, side_by_side, single
from cyb_jax.report.coloured import Window
from cyb_jax.report.comparison import Candidate, Curve

META = {"train_tokens": 640, "train_slots": 1920, "train_flops": 3e15, "store": "f" * 64}


def source(**method):
  return configs.freeze(tiny_config(pauses=2, **method)).source | {}


def window(num_slots=3, pieces=(" The", " film", HOSTILE, "↵\n", "</s>\n", " x"), index=0):
  rng = np.random.default_rng(index)
  stopping = rng.dirichlet(np.ones(num_slots), len(pieces)).astype(np.float32)
  scores = rng.uniform(size=(2, len(pieces), num_slots)).astype(np.float32)
  return Window(index, "<b>", tuple(pieces), scores[0], scores[1], stopping)


METRICS = [
  {"split": "train", "step": step, "tokens": 320, "perplexity": 90.0 - step, "mean_pauses": 1.0, "gradient_norm": 0.5}
  for step in (20, 40)
] + [
  {
    "split": "validation", "step": 40, "limit": None, "omega": None, "perplexity": 55.0, "mean_pauses": 0.5,
    "train_tokens": 640, "train_slots": 1920, "train_flops": 3e15,
  }
]  # fmt: skip


@pytest.fixture(scope="module")
def complete():
  """(HTML, PNGs) of a run with all statistics."""
  statistics = example(difficulty=True, trained=True)
  statistics["self_paced"] = {
    "perplexity": 21.0, "constant_perplexity": 20.0, "mean_pauses": 0.4, "context_pauses": 0.5, "windows": 3,
    "tokens": 99,
  }  # fmt: skip
  return single.build(source(), META, statistics, METRICS, [window(), window(index=7)])


def test_page_is_complete_and_self_contained(complete):
  text, pictures = complete
  found = Page(text)
  assert found.all("html") == [{"lang": "en"}]
  images = found.all("img")
  assert len(images) == len(pictures) == 15
  for image in images:
    assert image["src"].startswith("data:image/png;base64,")
    assert len(image["alt"]) > 20
  # Nothing is fetched: every address starts with # or data:.
  addresses = [v for _, attributes in found.tags for k, v in attributes.items() if k in ("src", "href")]
  assert all(address.startswith(("#", "data:")) for address in addresses)
  assert "url(" not in text
  assert "@import" not in text
  anchors = {attributes["id"] for attributes in found.all("section")}
  assert {address["href"][1:] for address in found.all("a")} == anchors
  assert len(found.text("caption")) == len(found.all("table"))
  # One number from every part of the page.
  cells = found.text("td") + found.text("th")
  for cell in ("640", "55.00", "20.09", "0.3000", "0.2500 to 0.3500", "film plot<b>", "isn", "1:0:0", "8 to 15"):
    assert cell in cells, cell
  assert {"1,920", "3.00e+15", "20.09"} <= set(found.text("dd"))
  assert "(0.5000 per token), the perplexity is 21.00, compared with 20.00" in text
  assert all(png.startswith(b"\x89PNG") for png in pictures.values())


def test_hostile_text_is_shown_but_not_run(complete):
  found = Page(complete[0])
  shown = [text for _, text in found.texts]
  assert any(HOSTILE in text for text in found.text("span"))
  assert any(HOSTILE in text for text in found.text("th"))
  assert not any("alert" in text for text in found.text("script"))
  assert "<b>" in shown
  # The page's own scripts: the numbers of two windows, and one program.
  assert [script.get("type") for script in found.all("script")] == ["application/json", "application/json", None]


def test_equal_numbers_give_equal_files():
  first, again, other = (figures.bars(["a", "b"], [1.0, value], x="x") for value in (2.0, 2.0, 2.1))
  assert first == again != other


@pytest.mark.parametrize(("slots", "decides", "count"), [(1, False, 9), (3, False, 6)])
def test_methods_without_slots_or_decisions_state_what_is_missing(slots, decides, count):
  config = tiny_config(name="baseline") if slots == 1 else tiny_config(name="tbys", pauses=slots - 1)
  statistics = example(slots, decides=decides)
  text, pictures = single.build(configs.freeze(config).source, META, statistics, [], [])
  found = Page(text)
  assert len(found.all("section")) == 9
  absent = [attributes for tag, attributes in found.tags if tag == "p" and attributes.get("class") == "absent"]
  assert len(absent) == count
  assert "perplexity.png" in pictures
  assert ("latency.png" in pictures) == (slots > 1)
  assert not any(name.startswith("density") for name in pictures)


def test_a_method_is_named_by_its_config():
  names = [
    ({"name": "cyb", "loss": "dp", "pauses": 3}, "CYB-DP", "dp"),
    ({"name": "cyb"}, "CYB-AP", "ap"),  # an older config omits the default
    ({"name": "tbys", "loss": "ap", "pauses": 3}, "TBYS-3", None),
    ({"name": "looped", "pauses": 3}, "looped-3", None),
    ({"name": "baseline", "loss": "ap", "pauses": 0}, "baseline", None),
    ({"name": "deeper@ap", "pauses": 0}, "deeper@ap", None),  # not a method, but a plain model that is matched to one
  ]
  for method, name, loss in names:
    assert (facts.method_name(method), facts.stopping_loss(method)) == (name, loss)
  assert facts.looks_ahead({"autoregressive": {"perplexity": 12.0}})
  assert not facts.looks_ahead({"autoregressive": None})


def test_numbers_as_text():
  values = (None, math.nan, 0, 0.0, 1234567, 188.30165, 0.00382, 1.5e-7, 7.4e12, True, "x", 12345.678, -0.5)
  assert [page.number(value) for value in values] == [
    "-", "-", "0", "0", "1,234,567", "188.3", "0.003820", "1.5e-07", "7.40e+12", "True", "x", "12,346", "-0.5000",
  ]  # fmt: skip


def test_invisible_characters_are_made_visible():
  tokenizer = ByteTokenizer()
  shown = [coloured.shown(tokenizer, token) for token in (97, 32, 10, 9, 27, 0xE2, 256)]
  assert shown == ["a", " ", "↵\n", "⇥", "␛", "<0xE2>", "<end>\n"]
  # A right-to-left override, and a space other than U+0020.
  assert coloured.visible("a\u202eb\u00a0") == "a<U+202E>b<U+00A0>"


def fixed(pauses, pieces):
  """A window whose tokens have the given numbers of pauses, with two slots."""
  pauses = np.array(pauses, np.float32)
  s = np.stack([1 - pauses, pauses], -1)
  return Window(3, "^", tuple(pieces), None, s, s)


def test_terminal_by_hand():
  window = fixed([0.0, 1.0, 0.5, 0.99, 0.0], [" one", " two", "映画", "↵\n", "abcdefghijklm"])
  text = coloured.to_terminal([window], 10, colour=False)
  lines = text.split("\n")
  assert all(coloured.width(line) <= 10 for line in lines)
  start = lines.index("window 3")
  # The first token is not predicted; a token that doesn't fit starts the next line without its space; wide characters
  # have width two.
  assert lines[start + 1 :] == ["^ one⁰", "two⁷映画⁴", "↵⁷", "abcdefghij", "klm⁰", ""]
  painted = coloured.to_terminal([window], 10, colour=True)
  assert "\x1b[38;5;231;48;5;18m two\x1b[0m" in painted
  plain = re.sub(r"\x1b\[[0-9;]*m", "", painted)
  assert all(coloured.width(line) <= 10 for line in plain.split("\n"))
  assert "⁷" not in plain


def test_svg_by_hand():
  """Characters of 8.4 x 20 pixels in lines of 8 columns, after a legend and an empty line."""
  window = fixed([0.0, 1.0, 0.5, 0.99], [" o&e", " two", "映画", "↵\n"])
  root = xml.etree.ElementTree.fromstring(coloured.to_svg([window], 8))
  names = {"s": "http://www.w3.org/2000/svg"}
  texts = [(x.text, float(x.get("x")), x.get("fill")) for x in root.findall("s:text", names)][-5:]
  black, white = "#000000", "#ffffff"
  # " two" starts the second line without its space; the wide characters take four columns.
  assert texts == [
    ("^", 10, black), (" o&e", 18.4, black), ("two", 10, white), ("映画", 35.2, black), ("↵", 68.8, white),
  ]  # fmt: skip
  boxes = [(x.get("fill"), float(x.get("width"))) for x in root.findall("s:rect", names)[-4:]]
  scale = coloured._SCALE
  assert boxes == [(scale[0], 33.6), (scale[7], 25.2), (scale[4], 33.6), (scale[7], 8.4)]
  height = float(root.get("viewBox").split()[3])
  rows = {float(x.get("y")) for x in root.findall("s:text", names)}
  assert max(rows) == height - 15  # a line of 20 pixels with its base line at 15, and a margin of 10
  one = dataclasses.replace(window, stopping=window.stopping[:, :1])
  assert coloured.files([one]) == coloured.files([]) == {}
  assert set(coloured.files([window])) == {"text.svg"}


def test_equal_pauses_are_not_coloured():
  window = fixed([1.0, 1.0], ["a", "b"])
  assert coloured.Scale.of([window]) is None
  assert "1 pauses, so no colours are shown" in coloured.to_terminal([window], 80, colour=True)
  assert "\x1b" not in coloured.to_terminal([window], 80, colour=True)
  assert "1.000 pauses, so no colours are shown" in coloured.to_html([window])


def test_colour_and_underline():
  window = fixed([0.0, 0.2, 0.6, 1.0], "abcd")
  spans = [
    attributes for attributes in Page(f"<p>{coloured.to_html([window])}</p>").all("span") if "tabindex" in attributes
  ]
  assert [span["class"] for span in spans] == ["t c0 q0", "t c1 q1", "t c4 q2", "t c7 q3"]
  # One stop of the tab key.
  assert [span["tabindex"] for span in spans] == ["0", "-1", "-1", "-1"]


def test_one_slot_has_its_perplexity_by_difficulty():
  statistics = example(1)
  bare, _ = single.build(source(), META, statistics, METRICS, [])
  assert "The difficulty of this task&#x27;s tokens is unknown" in bare
  rows = [{"difficulty": m, "count": 10, "perplexity": 2.5 + m, "accuracy": 0.75 - m / 4} for m in range(3)]
  statistics["difficulty"] = rows
  text, _ = single.build(source(), META, statistics, METRICS, [])
  assert "Perplexity and accuracy by difficulty (0: tokens outside of answers)" in Page(text).text("caption")
  assert {"2.500", "3.500", "4.500", "0.7500", "0.2500"} <= set(Page(text).text("td"))
  for row in rows:
    del row["accuracy"]  # a record of version 0.2
  text, _ = single.build(source(), META, statistics, METRICS, [])
  assert {"2.500", "3.500", "4.500"} <= set(Page(text).text("td"))


def test_comparison_by_difficulty():
  """The mean over seeds of accuracy and pauses; a task of unknown difficulty has no such section."""
  runs = [candidate("a"), candidate("b", seed=1), candidate("c", loss="va", rho="1:1:1")]
  groups = comparison.group_runs(runs)
  assert side_by_side._difficulty(groups) == []
  answers = [[(0.5, 0.25), (0.25, 1.0)], [(1.0, 0.75), (0.5, 2.0)], [(0.125, 0.0), (0.0, 0.0)]]
  for run, rows in zip(runs, answers):
    run.statistics["difficulty"] = [{"difficulty": 0, "count": 9, "perplexity": 3.0, "accuracy": 0.9, "mean_pauses": 0}]
    for m, (accuracy, pauses) in enumerate(rows, start=1):
      row = {"difficulty": m, "count": 5, "perplexity": 2.0, "accuracy": accuracy, "mean_pauses": pauses}
      run.statistics["difficulty"].append(row)
  (section,) = side_by_side._difficulty(groups)
  cells = [text for name, text in Page(section.body).texts if name in ("th", "td")]
  label, other = (group.label for group in groups)
  for row in (
    [f"{label}, correct answers", "0.7500", "0.3750"],
    [f"{label}, mean pauses", "0.5000", "1.500"],
    [f"{other}, correct answers", "0.1250", "0"],
  ):
    place = cells.index(row[0])
    assert cells[place : place + 3] == row
  assert [picture.name for picture in section.pictures] == ["difficulty_accuracy", "difficulty_pauses"]
  # Methods with one slot have no pauses.
  for run in runs:
    for row in run.statistics["difficulty"]:
      del row["mean_pauses"]
  assert [p.name for p in side_by_side._difficulty(groups)[0].pictures] == ["difficulty_accuracy"]


def test_spent_at_by_hand():
  curve = Curve((100.0, 400.0, 1600.0), (5.0, 4.0, 3.5))
  # Half of the way from 5 to 4 is half of the way from log 100 to log 400.
  assert comparison.spent_at(curve, 4.5) == (pytest.approx(200.0), False)
  assert comparison.spent_at(curve, 4.0) == (pytest.approx(400.0), False)
  assert comparison.spent_at(curve, 3.75) == (pytest.approx(800.0), False)
  assert comparison.spent_at(curve, 5.0) == (100.0, False)
  assert comparison.spent_at(curve, 6.0) == (100.0, True)
  assert comparison.spent_at(curve, 3.4) is None
  assert comparison.spent_at(Curve((), ()), 3.4) is None


def candidate(name, losses=(5.0, 4.0), seed=0, *, changes=(), nats=3.0, limit=None, **method):
  config = tiny_config(pauses=2, **method)
  config.train.seed = config.data.seed = seed
  for field, value in changes:
    part, _, key = field.partition(".")
    config[part][key] = value
  rows = [
    {
      "limit": limit, "perplexity": math.exp(loss), "train_tokens": 100 * 4**i, "train_slots": 300 * 4**i,
      "train_flops": 1e9 * 4**i,
    }
    for i, loss in enumerate(losses)
  ]  # fmt: skip
  # All runs have the same documents of equal difficulty; each run adds its own noise.
  return Candidate(name, configs.freeze(config).source | {}, META, example(nats=nats), rows)


def test_efficiency_over_pairs_of_seeds():
  runs = [candidate("a", (5.0, 4.0)), candidate("b", (5.0, 4.5), loss="dp", rho="1:1:1", alpha=0.1)]
  runs += [candidate("c", (5.0, 4.6), seed=1)]
  a, b = comparison.group_runs(runs)
  assert [run.workdir for run in a.runs] == ["a", "c"]
  found = comparison.efficiency(a, b, "train_tokens", None)
  # The first seed needs 200 of 400 tokens for 4.5; the second seed never reaches it.
  assert found["ratios"] == [pytest.approx(2.0), None]
  assert (found["median"], found["low"], found["high"]) == (None, None, pytest.approx(2.0))
  assert not found["at_least"]
  back = comparison.efficiency(b, a, "train_flops", None)
  assert back["ratios"] == [None, pytest.approx(4**0.2)]
  early = candidate("d", (4.4, 4.3), pause_input="pause")
  found = comparison.efficiency(*comparison.group_runs([early, runs[1]]), "train_tokens", None)
  assert (found["median"], found["at_least"]) == (pytest.approx(4.0), True)


def test_curves_use_the_same_windows():
  """A validation during a run has fewer windows than the last one, so these losses do not belong to one curve."""
  run = candidate("a", (5.0, 4.0, 3.0), limit=8)
  run.validation[-1]["limit"] = None
  assert comparison.common_windows([run]) == 8
  assert comparison.curve(run, "train_tokens", 8).losses == pytest.approx((5.0, 4.0))
  assert comparison.common_windows([run, candidate("b", (5.0, 4.0))]) is None


def test_groups_and_labels():
  runs = [
    candidate("a"),
    candidate("b", loss="va", rho="4:1:1"),
    candidate("c", seed=3),
    candidate("d", loss="va", rho="1:1:1", changes=[("optimizer.learning_rate", 0.5)]),
    candidate("e", loss="va", rho="1:1:1", changes=[("data.fraction", 0.5)]),
  ]
  groups = comparison.group_runs(runs)
  assert [len(group.runs) for group in groups] == [2, 1, 1, 1]
  assert [group.label for group in groups] == [
    # The rate distinguishes d from e, but not from b; with rho all three differ.
    "CYB-AP", "CYB-VA, rho 4:1:1, fraction 1", "CYB-VA, rho 1:1:1, fraction 1", "CYB-VA, rho 1:1:1, fraction 0.5",
  ]  # fmt: skip
  assert [group.regime for group in groups] == ["12 steps"] * 3 + ["12 steps of 0.5 of the data"]
  two = [source(), source(omega="1:1:1"), source(omega="1:1:1", dont_know="unit")]
  assert comparison.labels(two) == [
    "CYB-AP, dont_know token, omega default",
    "CYB-AP, dont_know token, omega 1:1:1",
    "CYB-AP, dont_know unit, omega 1:1:1",
  ]
  assert comparison.labels([source(), source()]) == ["CYB-AP", "CYB-AP"]
  with pytest.raises(InputError, match="a and b have equal configs and equal seeds"):
    comparison.group_runs([candidate("a"), candidate("b")])


def test_difference_in_nats():
  a, b = comparison.group_runs([candidate("a", nats=3.0), candidate("b", nats=3.0, loss="va", rho="1:1:1")])
  same = comparison.difference_in_nats(a, b)
  assert same == {"mean": 0.0, "interval": [0.0, 0.0], "low": 0.0, "high": 0.0}
  # Equal documents: a constant difference is the same in every draw, whatever the documents are.
  c = comparison.group_runs([candidate("c", nats=2.9, loss="va", rho="1:1:1")])[0]
  apart = comparison.difference_in_nats(a, c)
  assert apart["mean"] == pytest.approx(0.1)
  assert apart["interval"] == pytest.approx([0.1, 0.1])
  # By hand: two groups of 1 token, gaps 0 and 1; a draw of two has mean 0, 1/2 or 1.
  for group, nats in ((a, [1.0, 2.0]), (b, [1.0, 1.0])):
    group.runs[0].statistics["groups"] |= {"nats": nats, "tokens": [1, 1]}
  found = comparison.difference_in_nats(a, b)
  assert (found["mean"], found["interval"]) == (0.5, [0.0, 1.0])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      lambda c: c.statistics.update(split="test"),
      "a and b can't be compared: split is 'validation' in the first and 'test' in the second",
    ),
    (lambda c: c.statistics.update(limit=5), "limit is None in the first and 5 in the second"),
    (
      lambda c: c.source["data"].update(sequence_length=32),
      "data.sequence_length is 16 in the first and 32 in the second",
    ),
    (
      lambda c: c.meta.update(store="e" * 64),
      "the fingerprint of data.store is 'ffffffffffff' in the first and 'eeeeeeeeeeee'",
    ),
    (
      lambda c: (c.meta.update(store="e"), c.source["data"].update(tokenizer="sentencepiece:100")),
      "data.tokenizer is 'bytes' in the first and 'sentencepiece:100' in the second",
    ),
    (lambda c: c.statistics["groups"]["tokens"].pop(), "groups.tokens"),
  ],
)
def test_runs_that_are_not_comparable(change, message):
  a, b = candidate("a"), copy.deepcopy(candidate("b", seed=1))
  comparison.check_comparable([a, b])
  change(b)
  with pytest.raises(InputError, match=re.escape(message)):
    comparison.check_comparable([a, b])


@pytest.fixture(scope="module")
def compared():
  runs = [candidate(f"ap{i}", seed=i, nats=3 + i / 100) for i in range(2)]
  runs += [candidate("<i>va", (5.1, 3.9), loss="va", rho="1:1:1", changes=[("data.fraction", 0.5)])]
  groups = comparison.group_runs(runs)
  numbers = comparison.compare(groups)
  return groups, numbers, *side_by_side.build(groups, numbers)


def test_comparison_page(compared):
  _, numbers, text, pictures = compared
  found = Page(text)
  assert len(found.all("img")) == len(pictures) == 10
  assert "regimes.png" in pictures
  assert len(found.text("caption")) == len(found.all("table"))
  assert "<i>va" in found.text("td")
  assert found.all("i") == []
  assert numbers["groups"][0]["perplexity"]["mean"] == pytest.approx((math.exp(3) + math.exp(3.01)) / 2)
  assert numbers["groups"][0]["perplexity"]["deviation"] == pytest.approx((math.exp(3.01) - math.exp(3)) / math.sqrt(2))
  # The page has the numbers of comparison.json.
  (ratio,) = [e for e in numbers["efficiency"]["train_tokens"] if e["a"] == "CYB-VA"]
  assert f"{page.number(ratio['median'], 3)} ({page.number(ratio['low'], 3)}" in text
  assert "not reached" in text
  # The paper's results are marked as such.
  assert any("Gemma 2B" in caption for caption in found.text("caption"))


def test_a_comparison_shows_where_the_first_model_with_a_choice_pauses():
  runs = [candidate("plain"), candidate("<i>va", loss="va", rho="1:1:1"), candidate("dp", loss="dp", rho="1:1:1")]
  # Equal pauses after all tokens, as of a method that always pauses.
  types = runs[0].statistics["types"]
  runs[0].statistics["types"] = types | {"least_paused": types["most_paused"]}
  groups = comparison.group_runs(runs)
  numbers = comparison.compare(groups)
  assert side_by_side.pausing_group(groups).runs[0].workdir == "<i>va"
  text, _ = side_by_side.build(groups, numbers, [window(), window(index=4)])
  found = Page(text)
  assert [title for title in found.text("h2") if "pauses" in title] == [
    "Where CYB-VA pauses",
    "Text, coloured by pauses",
  ]
  assert "--workdir=&lt;i&gt;va" in text
  most = found.text("caption").index("Most pauses after the token")
  assert types["most_paused"][0]["piece"].strip() in text[text.index(found.text("caption")[most]) :]
  assert len(found.all("script")) == 3  # the numbers of two windows, and the code that shows them
  without, _ = side_by_side.build(groups, numbers)
  assert "Text, coloured by pauses" not in without


def test_one_group_gives_a_page_without_a_comparison():
  groups = comparison.group_runs([candidate("a"), candidate("b", seed=1)])
  text, _ = side_by_side.build(groups, comparison.compare(groups))
  assert "no difference to show" in text


def test_runs_without_metrics_are_compared():
  groups = comparison.group_runs([candidate("a", ()), candidate("b", (), loss="va", rho="1:1:1")])
  text, pictures = side_by_side.build(groups, comparison.compare(groups))
  assert text.count("No run has a validation on the complete validation split") == 2
  assert "perplexity.png" in pictures
  groups = comparison.group_runs([candidate("a"), candidate("b", (), loss="va", rho="1:1:1")])
  text, pictures = side_by_side.build(groups, comparison.compare(groups))
  assert "never reached: CYB-VA" in text
  assert "curve_tokens.png" in pictures


def test_matplotlib_may_be_missing(monkeypatch):
  monkeypatch.setitem(sys.modules, "matplotlib", None)
  monkeypatch.delitem(sys.modules, "cyb_jax.report.figures")
  with pytest.raises(InputError, match=re.escape("pip install 'cyb_jax[report]'")):
    import cyb_jax.report.figures  # noqa: F401


def test_figures_do_not_change_matplotlib():
  import matplotlib

  before = dict(matplotlib.rcParams)
  figures.bars(["$x_1$ <b>", "\n映"], [1.0, 2.0], x="x")
  assert dict(matplotlib.rcParams) == before


def test_a_folder_is_replaced_atomically(tmp_path, monkeypatch):
  folder = output.check_output(tmp_path / "run" / "report")
  output.write_folder(folder, {"index.html": f"{output.generator(['a.png', 'b.png'])} é", "a.png": b"1"})
  output.write_folder(output.check_output(folder), {"index.html": output.generator([])})
  assert [p.name for p in folder.iterdir()] == ["index.html"]

  def full(*_):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
      output.write_folder(folder, {"index.html": "3", "b.png": b"1"})
  assert (folder / "index.html").read_text() == output.generator([])
  # Nor after an interruption between the two renames.
  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, "rename", interrupted_at(2))
    with pytest.raises(KeyboardInterrupt):
      output.write_folder(folder, {"index.html": "3"})
  assert (folder / "index.html").read_text() == output.generator([])
  assert [p.name for p in folder.parent.iterdir()] == ["report"]
  # A process that was killed between them has left the earlier report in its temporary folder.
  ended = subprocess.Popen(["true"])
  ended.wait()
  left = folder.with_name(f"report.{socket.gethostname()}.{ended.pid}.tmp")
  (left / "new").mkdir(parents=True)
  folder.rename(left / "old")
  output.check_output(folder)
  assert (folder / "index.html").read_text() == output.generator([])
  assert [p.name for p in folder.parent.iterdir()] == ["report"]
  # Files that are not part of a report are not replaced: another picture in the folder, another program's page.
  (folder / "holiday.png").write_text("")
  with pytest.raises(InputError, match=r"holds 'holiday.png'"):
    output.check_output(folder)
  (folder / "holiday.png").unlink()
  (folder / "index.html").write_text("<h1>Home</h1>")
  with pytest.raises(InputError, match=r"holds 'index.html'"):
    output.check_output(folder)
  with pytest.raises(InputError, match="is a file"):
    output.check_output(folder / "index.html")


def interrupted_at(call):
  """A `Path.rename` that is interrupted once."""
  rename, calls = pathlib.Path.rename, []

  def renamed(path, target):
    calls.append(path)
    if len(calls) == call:
      raise KeyboardInterrupt
    return rename(path, target)

  return renamed


def test_pages_that_are_too_large_are_refused():
  output.check_size("x" * output.MAX_BYTES)
  with pytest.raises(InputError, match=r"--text_windows: the page would have 10\.0 MB"):
    output.check_size("x" * output.MAX_BYTES + "y")


def test_the_training_objective_is_shown_next_to_the_perplexity():
  """The report and the comparison show losses with a discount, a penalty or a bound, and losses with another omega."""
  statistics = example(nats=3.0)
  statistics["perplexity"] |= {"loss": 23.45, "training": 21.23}
  rows = [{"split": "validation", "step": 1, "perplexity": 20.0, "loss_perplexity": 24.56}]
  rows[0]["training_omega"] = {"perplexity": 22.34}
  text, _ = single.build(source(), META, statistics, rows, [])
  for number in ("23.45", "21.23", "24.56", "22.34"):
    assert number in text
  assert "exp(loss), with the discount, penalty or bound of training (not a perplexity)" in text
  # A loss that equals the perplexity is not shown twice.
  statistics["perplexity"] |= {"loss": statistics["perplexity"]["mixture"], "training": None}
  assert "exp(loss), with" not in single.build(source(), META, statistics, [], [])[0]
  statistics["perplexity"] |= {"loss": 23.45, "training": 21.23}
  config = configs.freeze(tiny_config(pauses=3)).source
  other = configs.freeze(tiny_config(name="baseline")).source
  candidates = [
    Candidate("a", config, META, statistics, []), Candidate("b", other, META, example(1, nats=3.1), []),
  ]  # fmt: skip
  numbers = comparison.compare(comparison.group_runs(candidates))
  assert [row["loss_perplexity"] for row in numbers["groups"]] == [23.45, None]
  assert [row["training_perplexity"] for row in numbers["groups"]] == [21.23, None]


# The program itself, on real runs and made-up statistics.


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs")
  for name, method in (("a", {"pauses": 2}), ("c", {"name": "baseline"})):
    training.train(configs.freeze(tiny_config(**method)), folder / name)
  # Another seed, as far as a report can distinguish.
  shutil.copytree(folder / "a", folder / "b")
  config = read_config(folder / "b")
  config["train"]["seed"] = config["data"]["seed"] = 1
  (folder / "b" / "config.json").write_text(json.dumps(config))
  return folder


@pytest.fixture
def program(monkeypatch):
  """`report.main` with made-up statistics, whose computations are counted."""
  calls = []

  def statistics_of_split(method, params, store, config, *, split, step, limit, batch_size):
    calls.append((split, limit, batch_size))
    made = example(method.num_slots, decides=isinstance(method, Adaptive), step=step)
    return made | {"split": split, "limit": limit, "method": method.name}

  paced = {"perplexity": 21.0, "constant_perplexity": 20.0, "mean_pauses": 0.4, "context_pauses": 0.5, "tokens": 64}
  monkeypatch.setattr(evaluation, "PauseStatistics", lambda method, mesh, tokenizer: method)
  monkeypatch.setattr(evaluation, "statistics_of_split", statistics_of_split)
  monkeypatch.setattr(evaluation, "evaluate_split", lambda *args, **options: paced)

  def main(**given):
    return call(monkeypatch, **given)

  main.calls = calls
  return main


@pytest.mark.slow
def test_through_main(workdirs, program, capsys, monkeypatch):
  folder = workdirs / "a"
  record = program(workdir=folder, text="true", text_windows=2, limit=4)
  assert program.calls == [("validation", 4, 8)]
  written = {path.name for path in (folder / "report").iterdir()}
  assert written == {"index.html", "statistics.json", "text.svg", *record["figures"]}
  text = (folder / "report" / "index.html").read_text()
  Page(text)
  assert record["bytes"] == len(text.encode())
  assert (record["step"], record["split"]) == (12, "validation")
  # The printed text is the evaluated text, without colours outside of a terminal.
  printed = capsys.readouterr().out
  assert "\x1b" not in printed
  assert "window 0" in printed
  assert "window 2" in printed
  # Once more: the statistics exist and are reused, but not for other windows.
  program(workdir=folder, limit=4)
  assert len(program.calls) == 1
  program(workdir=folder, limit=3)
  assert program.calls[1:] == [("validation", 3, 8)]
  # Nor for another checkpoint.
  program(workdir=folder, limit=3, checkpoint=10, output=folder.parent / "elsewhere")
  assert len(program.calls) == 3
  program.calls.pop()
  # Nor if they are damaged, or from a version with fewer keys.
  path = folder / "report" / "statistics.json"
  for damaged in ("{", json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "types"})):
    path.write_text(damaged)
    program(workdir=folder, limit=3, text_windows=0)
    assert json.loads(path.read_text())["types"] is not None
  assert len(program.calls) == 4


@pytest.mark.slow
def test_real_statistics_have_figures(workdirs, monkeypatch, tmp_path):
  record = call(monkeypatch, workdir=workdirs / "a", limit=8, output=tmp_path / "report", checkpoint=10)
  # All statistics of an adaptive method on a task of known difficulty; the lexicon of word classes may be missing.
  assert {"density_2.png", "difficulty_pauses.png", "speed_accuracy.png", "position.png"} <= set(record["figures"])
  Page((tmp_path / "report" / "index.html").read_text())
  statistics = json.loads((tmp_path / "report" / "statistics.json").read_text())
  assert (statistics["step"], statistics["limit"]) == (10, 8)
  assert record["perplexity"] == statistics["perplexity"]["mixture"]
  # The same windows, evaluated self-paced.
  paced = statistics["self_paced"]
  assert paced["windows"] == 8
  assert paced["constant_perplexity"] == pytest.approx(statistics["perplexity"]["mixture"], rel=1e-5)


def test_windows_hold_the_scores_of_the_method(workdirs):
  mesh = splits.reading_mesh()
  run = pretrained.load_run(workdirs / "a", "last", mesh)
  store = training.open_store(run.config)
  read = coloured.read_windows(run, mesh, store, split="validation", limit=None, count=1000)
  only = read[0]
  tokens, weights = store.windows("validation", np.array([0]), 16)
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
  reading = jax.jit(run.method.evaluate)(run.params, batch)
  np.testing.assert_allclose(only.stopping, np.exp(reading.log_stopping)[0], rtol=1e-5)
  np.testing.assert_allclose(only.target, np.exp(reading.scores.log_target)[0], rtol=1e-5)
  np.testing.assert_allclose(only.dont_know, np.exp(reading.scores.log_dont_know)[0], rtol=1e-5)
  np.testing.assert_allclose(only.pauses, np.exp(reading.log_stopping)[0] @ [0.0, 1.0, 2.0], rtol=1e-5)
  assert "".join(only.pieces).replace("↵\n", "\n") == "".join(
    "<end>\n" if token == 256 else chr(token) for token in tokens[0, 1:]
  )
  # The last window may be partial.
  windows = store.num_windows("validation", 16)
  assert [window.index for window in read] == list(range(windows))
  assert sum(len(window.pieces) for window in read) == store.num_tokens("validation") - 1


def test_compare_through_main(workdirs, program, tmp_path):
  names = [str(workdirs / name) for name in ("a", "b", "c")]
  record = program(compare=",".join(names), output=tmp_path / "report")
  assert [(group["label"], group["seeds"]) for group in record["groups"]] == [("CYB-AP", 2), ("baseline", 1)]
  numbers = json.loads((tmp_path / "report" / "comparison.json").read_text())
  assert numbers["groups"][0]["train_tokens"] == [12 * 8 * 16] * 2
  assert numbers["groups"][0]["train_slots"] == [3 * 12 * 8 * 16] * 2
  # Stored in the work directories, and reused.
  calls_before = len(program.calls)
  program(compare=",".join(names), output=tmp_path / "report")
  assert len(program.calls) <= calls_before + 1  # a's report may have other windows, so its statistics are not changed


def test_bad_input(workdirs, program, tmp_path):
  def refused(**given):
    with pytest.raises(InputError) as error:
      program(**given)
    return str(error.value)

  run = workdirs / "a"
  assert "--workdir: not given" in refused()
  assert "give one" in refused(workdir=run, compare=f"{run},{run}")
  assert "is a single folder; give at least two" in refused(compare=run)
  assert "contains no run" in refused(workdir=tmp_path)
  assert "contains no run" in refused(compare=f"{run},{tmp_path}")
  assert "split: 'tset' is not in" in refused(workdir=run, split="tset")
  assert "--limit: -1 must not be negative" in refused(workdir=run, limit=-1)
  assert "--checkpoint: 'newest'" in refused(workdir=run, checkpoint="newest")
  assert "--text: set, but --text_windows is 0" in refused(workdir=run, text="true", text_windows=0)
  assert "equal configs and equal seeds" in refused(compare=f"{run},{run}", output=tmp_path / "out")
  empty = tmp_path / "empty"
  empty.mkdir()
  shutil.copy(run / "config.json", empty)
  assert "no finished checkpoint" in refused(workdir=empty)
  assert "checkpoint" in refused(compare=f"{run},{empty}", output=tmp_path / "out")
  # Errors in configs are reported before any run is evaluated.
  other = tmp_path / "other"
  shutil.copytree(run, other)
  config = read_config(other)
  config["data"]["sequence_length"] = 8
  (other / "config.json").write_text(json.dumps(config))
  message = refused(compare=f"{run},{other}", output=tmp_path / "out")
  assert "data.sequence_length is 16 in the first and 8 in the second" in message
  assert not program.calls
  assert not (tmp_path / "out").exists()
  assert not (empty / "report").exists()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURE = """
<script>
window.failed = [];
window.addEventListener("error", function (e) { window.failed.push(e.message); });
</script>
"""
RESULT = """
<script>
window.addEventListener("load", function () {
  var images = Array.prototype.slice.call(document.images);
  var frame = document.documentElement;
  document.querySelectorAll("details").forEach(function (d) { d.open = true; });
  var token = document.querySelectorAll(".text[data-window] .t")[2];
  if (token) token.focus();
  document.title = JSON.stringify({
    failed: window.failed,
    hidden: images.filter(function (i) { return !(i.naturalWidth > 0 && i.clientWidth > 100); }).length,
    images: images.length, inner: window.innerWidth, scroll: frame.scrollWidth,
    numbers: token ? document.getElementById("numbers").innerText : null
  });
});
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is found")
@pytest.mark.parametrize("kind", ["single", "comparison"])
def test_in_a_browser(kind, complete, compared, tmp_path):
  text, pictures = complete if kind == "single" else compared[2:]
  path = tmp_path / "page.html"
  path.write_text(text.replace("<style>", MEASURE + "<style>", 1).replace("</body>", RESULT + "</body>"))
  # A browser window has a minimum width; a frame may be as narrow as a phone.
  for width in (360, 1600):
    outer = tmp_path / "outer.html"
    outer.write_text(
      f'<iframe id="f" src="page.html" style="width:{width}px;height:800px;border:0"></iframe><script>'
      'window.addEventListener("load", function () { setTimeout(function () {'
      'document.title = document.getElementById("f").contentDocument.title; }, 300); });</script>'
    )
    done = subprocess.run(
      [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}/profile",
        "--enable-logging=stderr",
        "--allow-file-access-from-files", "--window-size=1700,900", "--virtual-time-budget=5000", "--dump-dom",
        outer.as_uri(),
      ],
      capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = json.loads(Page(done.stdout).text("title")[0])
    assert found["failed"] == []
    assert "CONSOLE" not in done.stderr
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert (found["images"], found["hidden"]) == (len(pictures), 0)
    if kind == "single":
      assert all(line[0] in "“s dts" for line in found["numbers"].splitlines() if line)
      assert HOSTILE in found["numbers"]
