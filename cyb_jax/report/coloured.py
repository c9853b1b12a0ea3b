"""Text coloured by the expected number of pauses before each token, in HTML and for a terminal.

The colour of a token shows the pauses after the previous token, which predict it.

Dimensions: N tokens of a window, W slots.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from cyb_jax.data import Tokenizer, TokenStore, with_segment_ids
from cyb_jax.errors import InputError
from cyb_jax.evaluation.abilities import is_adaptive
from cyb_jax.partitioning.mesh import batch_sharding, data_shards, shard_batch
from cyb_jax.report import page
from cyb_jax.runs import Run

# Eight steps of cividis, from light for few pauses to dark for many, and the nearest of a terminal's 256 colours.
_SCALE = ("#FEE838", "#E1CC55", "#C3B369", "#A59C74", "#8A8678", "#707173", "#4A5570", "#12356E")
_TERMINAL = (227, 185, 143, 144, 102, 243, 60, 18)
_DIGITS = "⁰¹²³⁴⁵⁶⁷"
_LONGEST_TABLE = 512
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
PICTURE = "text.svg"
# Of the SVG: width and height of a character, and the margin, in pixels.
_SVG_CELL, _SVG_MARGIN = (8.4, 20), 10

Word: TypeAlias = tuple[str, int | None]
"""The text of a token, and its step of the colour scale; None: without a colour."""


@dataclasses.dataclass(frozen=True)
class Window:
  """An evaluated window of the split.

  Attributes:
    index: the index of the window in the split.
    first: the piece of the first token, which is not predicted.
    pieces: the pieces of the N predicted tokens.
    dont_know: f32[N, W], d; None if the method is not adaptive.
    target: f32[N, W], t.
    stopping: f32[N, W], s.
  """

  index: int
  first: str
  pieces: tuple[str, ...]
  dont_know: np.ndarray | None
  target: np.ndarray
  stopping: np.ndarray

  @property
  def pauses(self) -> np.ndarray:
    """f64[N], the expected number of pauses before each token."""
    return self.stopping.astype(np.float64) @ np.arange(self.stopping.shape[-1])


def read_windows(run: Run, mesh: Mesh, store: TokenStore, *, split: str, limit: int | None, count: int) -> list[Window]:
  """Evaluates `count` windows, evenly spaced over the split.

  Args:
    run: the run, with its parameters on the mesh.
    mesh: the mesh over which the batch is sharded.
    store: the run's token store.
    split: a split of the store.
    limit: the windows are chosen from the first `limit` windows of the split; None: from all windows.
    count: the maximum number of windows.

  Raises:
    InputError: the store has no such split, or the split is empty.
  """
  if split not in store.splits:
    raise InputError(f"split: {split!r} is not in the token store of {store.path}; it has {', '.join(store.splits)}")
  data = run.config.data
  windows = store.num_windows(split, data.sequence_length)
  if not windows:
    raise InputError(f"split: {split!r} of {store.path} is empty")
  used = min(windows, limit or windows)
  indices = np.unique(np.arange(count) * used // max(count, 1)) if count else np.array([], int)
  if not len(indices):
    return []
  shards = data_shards(mesh)
  # The index after the last window gives a window of padding.
  rows = np.concatenate([indices, np.full(-len(indices) % shards, windows)])
  tokens, weights = store.windows(split, rows, data.sequence_length)
  batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}
  if data.document_mask:
    batch = with_segment_ids(batch, store.end_id)
  read = jax.jit(run.method.evaluate)
  with jax.default_matmul_precision(run.config.precision.matmul):
    output = read(run.params, shard_batch(batch, batch_sharding(mesh)))
  scores = [output.scores.log_dont_know, output.scores.log_target, output.log_stopping]
  d, t, s = (np.exp(np.asarray(jax.device_get(x), np.float32)) for x in scores)
  result = []
  for i, index in enumerate(indices.tolist()):
    real = weights[i] > 0
    pieces = tuple(shown(run.tokenizer, token) for token in tokens[i, 1:][real].tolist())
    result.append(
      Window(
        index=index,
        first=shown(run.tokenizer, int(tokens[i, 0])),
        pieces=pieces,
        dont_know=d[i][real] if is_adaptive(run.method) else None,
        target=t[i][real],
        stopping=s[i][real],
      )
    )
  return result


def shown(tokenizer: Tokenizer, token: int) -> str:
  """The text of a token, with visible signs for invisible characters; a line ends after ↵."""
  piece = tokenizer.piece(token)
  if token == tokenizer.separator_id:
    return f"{visible(piece)}\n"
  piece = _BYTE.sub(_character, piece)
  return visible(piece.replace("▁", " "))


def _character(byte: re.Match) -> str:
  code = int(byte[1], 16)
  return chr(code) if code < 128 else byte[0]  # a part of a character


def visible(text: str) -> str:
  """The text with a sign for each character that is invisible or changes the display of others; a newline is ↵ and a
  newline.
  """
  out = []
  for c in text:
    if c == "\n":
      out.append("↵\n")
    elif c == "\t":
      out.append("⇥")
    elif ord(c) < 32:
      out.append(chr(0x2400 + ord(c)))
    elif c != " " and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"):
      out.append(f"<U+{ord(c):04X}>")
    else:
      out.append(c)
  return "".join(out)


@dataclasses.dataclass(frozen=True)
class Scale:
  """The colour scale of pauses over the shown windows.

  Attributes:
    low, high: the minimum and the maximum number of pauses.
    quartiles: the three quartiles of the pauses.
  """

  low: float
  high: float
  quartiles: tuple[float, float, float]

  @classmethod
  def of(cls, windows: Sequence[Window]) -> Scale | None:
    """The scale; None if all tokens have the same number of pauses."""
    pauses = np.concatenate([window.pauses for window in windows]) if windows else np.array([])
    # Smaller differences are rounding errors.
    if not len(pauses) or np.ptp(pauses) < 1e-4:
      return None
    return cls(float(pauses.min()), float(pauses.max()), tuple(np.quantile(pauses, [0.25, 0.5, 0.75]).tolist()))

  def step(self, pauses: float) -> int:
    """The step of the colour scale, 0 to 7."""
    return min(int((pauses - self.low) / (self.high - self.low) * 8), 7)

  def quartile(self, pauses: float) -> int:
    """The quarter, 0 to 3."""
    return sum(pauses > bound for bound in self.quartiles)

  def border(self, step: int) -> str:
    """The minimum number of pauses of a step, with enough digits to distinguish it from the next step."""
    width = (self.high - self.low) / 8
    return f"{self.low + width * step:.{max(1 - math.floor(math.log10(width)), 0)}f}"


def to_html(windows: Sequence[Window]) -> str:
  """The windows with a legend; `SCRIPT` shows the numbers of a token when the user hovers, focuses or taps it."""
  scale = Scale.of(windows)
  pauses = np.concatenate([window.pauses for window in windows])
  parts = []
  if scale is None:
    parts.append(page.paragraph(f"All tokens have {page.number(float(pauses[0]))} pauses, so no colours are shown."))
  else:
    parts.append(_legend(scale))
  parts.append(
    page.paragraph(
      "Hover over a token, tap it, or use the arrow keys: the box below shows d (don't know), t (the probability of the"
      " target) and s (the probability that the answer is read) at each of its slots."
      " The first token, in grey, is not predicted.",
      "note",
    )
  )
  for number, window in enumerate(windows):
    spans = []
    for i, (piece, value) in enumerate(zip(window.pieces, window.pauses)):
      kind = "t" if scale is None else f"t c{scale.step(value)} q{scale.quartile(value)}"
      spans.append(f'<span class="{kind}" tabindex="{-1 if i else 0}">{page.escape(piece)}</span>')
    d, t, s = (
      [] if x is None else [[round(float(v), 4) for v in row] for row in x]
      for x in (window.dont_know, window.target, window.stopping)
    )
    numbers = json.dumps({"d": d, "t": t, "s": s}, separators=(",", ":"))
    parts.append(
      f"<h3>Window {window.index:,}</h3>"
      f'<div class="text" role="group" aria-label="Coloured text, window {window.index}" data-window="{number}">'
      f'<span class="first">{page.escape(window.first)}</span>{"".join(spans)}</div>'
      f'<script type="application/json" id="window-{number}">{numbers}</script>' + _table(window)
    )
  parts.append('<div id="numbers" role="status" aria-live="polite" hidden></div>')
  return f"<style>{_colours()}</style>" + "".join(parts)


def _legend(scale: Scale) -> str:
  steps = "".join(f'<span class="t c{i}">{scale.border(i)}</span> ' for i in range(8))
  words = ("no line: the lowest quarter", "dotted", "solid", "double: the highest quarter")
  lines = " ".join(f'<span class="t q{i}">{word}</span>' for i, word in enumerate(words))
  return (
    f'<div class="text legend">Expected pauses before the token, from {scale.border(0)} to {scale.border(8)}:'
    f" {steps}<br>The underline shows the quarter among these tokens: {lines}</div>"
  )


def _colours() -> str:
  rules = []
  for i, colour in enumerate(_SCALE):
    ink = "#ffffff" if i >= 5 else "#000000"
    rules.append(f".c{i}{{background:{colour};color:{ink}}}")
  return "".join(rules) + ".c5,.c6,.c7{border-color:#1b1b1b}"


def _table(window: Window) -> str:
  slots = range(1, window.stopping.shape[-1] + 1)
  header = ["token", "pauses", *([f"d{i}" for i in slots] if window.dont_know is not None else [])]
  header += [*(f"t{i}" for i in slots), *(f"s{i}" for i in slots)]
  columns = [x for x in (window.dont_know, window.target, window.stopping) if x is not None]
  rows = [
    [piece.rstrip("\n"), float(value), *(float(v) for x in columns for v in x[i])]
    for i, (piece, value) in enumerate(zip(window.pieces, window.pauses))
  ]
  more = f", the first {_LONGEST_TABLE} tokens" if len(rows) > _LONGEST_TABLE else ""
  return page.table(f"Window {window.index:,} in numbers{more}", header, rows[:_LONGEST_TABLE])


def width(text: str) -> int:
  """The number of columns of a text in a terminal."""
  return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def to_terminal(windows: Sequence[Window], columns: int, *, colour: bool) -> str:
  """The windows with a legend, lines no wider than `columns`.

  Args:
    windows: the windows to print.
    columns: the width of the terminal.
    colour: whether to use 256 ANSI colours; otherwise a superscript digit after each token shows its step of the scale.
  """
  scale = Scale.of(windows)
  out = []
  if scale is None:
    pauses = np.concatenate([window.pauses for window in windows]) if windows else np.array([0.0])
    out += _wrapped([(f"All tokens have {pauses[0]:.4g} pauses, so no colours are shown.", None)], columns, False)
  else:
    legend: list[tuple[str, int | None]] = [
      ("Expected pauses before a token: " if colour else "The digit after a token shows the pauses before it: ", None)
    ]
    for i in range(8):
      legend += [(scale.border(i), i) if colour else (f"{_DIGITS[i]}={scale.border(i)}", None), (" ", None)]
    out += _wrapped(legend, columns, colour)
  for window in windows:
    out += ["", f"window {window.index}"]
    out += _wrapped(_words(window, scale), columns, colour)
  return "\n".join(out) + "\n"


def to_svg(windows: Sequence[Window], columns: int = 96) -> str:
  """The windows with a legend as an SVG picture, lines of `columns` characters of a monospaced font."""
  scale = Scale.of(windows)
  lines: list[list[Word]] = []
  if scale is not None:
    legend: list[Word] = [("Expected pauses before a token: ", None)]
    for i in range(8):
      legend += [(scale.border(i), i), (" ", None)]
    lines += [*_lines(legend, columns), []]
  for number, window in enumerate(windows):
    lines += [[]] * bool(number) + _lines(_words(window, scale), columns)
  size = f"{columns * _SVG_CELL[0] + 2 * _SVG_MARGIN:g} {len(lines) * _SVG_CELL[1] + 2 * _SVG_MARGIN:g}"
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" font-size="14"'
    ' font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace">',
    "<title>Text, coloured by the expected number of pauses before each token: darker means more pauses.</title>",
    '<rect width="100%" height="100%" fill="#ffffff"/>',
  ]
  for row, line in enumerate(lines):
    x, y = _SVG_MARGIN, _SVG_MARGIN + row * _SVG_CELL[1]
    for text, step in line:
      across = width(text) * _SVG_CELL[0]
      if step is not None:
        parts.append(f'<rect x="{x:g}" y="{y:g}" width="{across:g}" height="{_SVG_CELL[1]}" fill="{_SCALE[step]}"/>')
      if text.strip():
        ink = "#ffffff" if step is not None and step >= 5 else "#000000"
        # The length keeps the columns if the reader has another font.
        parts.append(
          f'<text x="{x:g}" y="{y + 15:g}" fill="{ink}" textLength="{across:g}" xml:space="preserve">'
          f"{page.escape(text)}</text>"
        )
      x += across
  return "\n".join([*parts, "</svg>"]) + "\n"


def files(windows: Sequence[Window]) -> dict[str, str]:
  """The picture of the windows by its name in a report's folder; nothing for models with one slot."""
  return {PICTURE: to_svg(windows)} if windows and windows[0].stopping.shape[-1] > 1 else {}


def _words(window: Window, scale: Scale | None) -> list[Word]:
  """The tokens of a window, with their steps of the scale."""
  steps = [None if scale is None else scale.step(value) for value in window.pauses]
  return [(window.first, None), *zip(window.pieces, steps)]


def _wrapped(words: Sequence[Word], columns: int, colour: bool) -> list[str]:
  """Lines for a terminal, with colours or with a digit after each token."""
  return [
    "".join(_painted(*word) if colour else word[0] for word in line) for line in _lines(words, columns, not colour)
  ]


def _painted(text: str, step: int | None) -> str:
  if step is None or not text:
    return text
  return f"\x1b[38;5;{231 if step >= 5 else 16};48;5;{_TERMINAL[step]}m{text}\x1b[0m"


def _lines(words: Sequence[Word], columns: int, marked: bool = False) -> list[list[Word]]:
  """Lines of tokens; a token that doesn't fit starts the next line, and a token wider than a line is split.

  Args:
    words: the tokens, each with its step of the scale or None.
    columns: the width of a line.
    marked: whether a superscript digit after each token shows its step.
  """
  lines: list[list[Word]] = []
  line: list[Word] = []
  used = 0
  for word, step in words:
    mark = _DIGITS[step] if step is not None and marked else ""
    text = word.rstrip("\n").replace("\n", "") + mark
    if used and used + width(text) > columns:
      lines.append(line)
      line, used = [], 0
      if text.startswith(" ") and len(text) > len(mark) + 1:
        text = text[1:]
    # Character by character, so that a wide character isn't split.
    for part in text if width(text) > columns else [text]:
      if used and used + width(part) > columns:
        lines.append(line)
        line, used = [], 0
      line.append((part, step))
      used += width(part)
    if word.endswith("\n"):
      lines.append(line)
      line, used = [], 0
  return [*lines, line] if used else lines


# Hover, focus and tap; the tab key stops once per window, and the arrow keys move inside a window.
SCRIPT = """
(function () {
  var box = document.getElementById("numbers");
  if (!box) return;
  var at = null;
  function cell(row, kind, text) {
    var c = document.createElement(kind);
    c.textContent = text;
    row.appendChild(c);
  }
  function show(token) {
    if (at) at.classList.remove("on");
    at = token;
    token.classList.add("on");
    var text = token.parentNode;
    var data = JSON.parse(document.getElementById("window-" + text.dataset.window).textContent);
    var i = Array.prototype.indexOf.call(text.children, token) - 1;
    var table = document.createElement("table");
    var caption = table.createCaption();
    caption.textContent = "\\u201c" + token.textContent.replace(/\\n/g, "") + "\\u201d";
    var head = table.insertRow();
    cell(head, "th", "slot");
    for (var k = 0; k < data.s[i].length; k++) cell(head, "th", k + 1);
    ["d", "t", "s"].forEach(function (name) {
      if (!data[name].length) return;
      var row = table.insertRow();
      cell(row, "th", name);
      data[name][i].forEach(function (value) { cell(row, "td", value.toFixed(4)); });
    });
    box.replaceChildren(table);
    box.hidden = false;
  }
  function hide() {
    if (at) at.classList.remove("on");
    at = null;
    box.hidden = true;
  }
  document.querySelectorAll(".text[data-window]").forEach(function (text) {
    function token(event) { return event.target.closest(".t"); }
    text.addEventListener("mouseover", function (event) { if (token(event)) show(token(event)); });
    text.addEventListener("click", function (event) { if (token(event)) show(token(event)); });
    text.addEventListener("focusin", function (event) { if (token(event)) show(token(event)); });
    text.addEventListener("mouseleave", function () { if (!text.contains(document.activeElement)) hide(); });
    text.addEventListener("focusout", hide);
    text.addEventListener("keydown", function (event) {
      if (event.key === "Escape") return hide();
      var step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      var here = token(event);
      if (!step || !here) return;
      var next = step > 0 ? here.nextElementSibling : here.previousElementSibling;
      if (!next || !next.classList.contains("t")) return;
      here.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
      event.preventDefault();
    });
  });
})();
"""
