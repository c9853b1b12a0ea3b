"""HTML pages in one self-contained file that opens from disk.

Text from outside (pieces of a vocabulary, names of runs, values of a config) goes through `escape`; the other functions
take and return HTML unless their docstring says plain text.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from cyb_jax.report.output import generator

# Tables with more rows are folded.
LONG = 12


@dataclasses.dataclass(frozen=True)
class Picture:
  """A figure and its text.

  Attributes:
    name: the name of its file, without .png.
    png: the bytes of the file.
    alt: the alternative text of the image.
    sentence: the caption: what the figure shows, and how to read it; plain text.
  """

  name: str
  png: bytes
  alt: str
  sentence: str


@dataclasses.dataclass(frozen=True)
class Section:
  """A part of the page under a heading.

  Attributes:
    title: plain text.
    body: HTML.
    pictures: the pictures in the body, in order.
  """

  title: str
  body: str
  pictures: tuple[Picture, ...] = ()

  @property
  def anchor(self) -> str:
    return "".join(c if c.isalnum() else "-" for c in self.title.lower())


def escape(text: Any) -> str:
  """The text escaped for HTML, including attributes."""
  return html.escape(str(text), quote=True)


def number(value: Any, digits: int = 4) -> str:
  """A number as text: `digits` significant digits, grouped thousands; '-' if it is None or not finite."""
  if value is None or (isinstance(value, float) and not math.isfinite(value)):
    return "-"
  if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 10**12:
    return f"{value:,}"
  if not isinstance(value, int | float) or isinstance(value, bool):
    return str(value)
  if value == 0:
    return "0"
  size = math.floor(math.log10(abs(value)))
  if size >= 12:
    return f"{value:.2e}"
  if size < -4:
    return f"{value:.1e}"
  return f"{value:,.{max(digits - 1 - size, 0)}f}"


def percent(share: float) -> str:
  """A relative change as text, such as '+1.8%'."""
  return f"{share:+.1%}"


def interval(bounds: Sequence[float] | None) -> str:
  return "-" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def paragraph(text: str, kind: str = "") -> str:
  """Plain text as a paragraph."""
  return f"<p{_class(kind)}>{escape(text)}</p>"


def absent(text: str) -> str:
  """The paragraph that replaces a part without data."""
  return paragraph(text, "absent")


def table(
  caption: str, header: Sequence[str], rows: Iterable[Sequence[Any]], *, words: int = 1, folded: bool | None = None
) -> str:
  """A table in a box that scrolls independently of the page.

  Args:
    caption: plain text.
    header: plain text.
    rows: rows of values for `number`, or of plain text.
    words: the number of first columns that hold words and are left-aligned; the first column is the row's header.
    folded: whether the table is folded; None: if it has more than 12 rows.
  """
  rows = list(rows)
  head = "".join(f'<th scope="col"{_class("word" if i < words else "")}>{escape(h)}</th>' for i, h in enumerate(header))
  lines = []
  for row in rows:
    first, *rest = (escape(number(value)) for value in row)
    cells = "".join(f"<td{_class('word' if i < words else '')}>{cell}</td>" for i, cell in enumerate(rest, 1))
    lines.append(f'<tr><th scope="row" class="word">{first}</th>{cells}</tr>')
  inner = (
    f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
    f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
  )
  if not (len(rows) > LONG if folded is None else folded):
    return inner
  return f"<details><summary>{escape(caption)}: {len(rows)} rows</summary>{inner}</details>"


def with_tables(picture: Picture, *tables: str) -> str:
  """A picture with its caption and its tables, which are next to it if the page is wide enough."""
  source = base64.b64encode(picture.png).decode()
  return (
    f'<div class="pair"><figure><img src="data:image/png;base64,{source}" alt="{escape(picture.alt)}">'
    f"<figcaption>{escape(picture.sentence)}</figcaption></figure><div>{''.join(tables)}</div></div>"
  )


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
  """A list of names and values."""
  items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(number(value))}</dd></div>" for name, value in pairs)
  return f"<dl>{items}</dl>"


def document(title: str, header: str, sections: Sequence[Section], *, script: str = "") -> str:
  """The complete page.

  Args:
    title: plain text.
    header: HTML under the title.
    sections: the sections, in order; the page lists them at its top.
    script: plain JavaScript, run at the end.
  """
  pictures = [f"{picture.name}.png" for section in sections for picture in section.pictures]
  links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in sections)
  parts = "".join(
    f'<section id="{s.anchor}" aria-labelledby="{s.anchor}-title">'
    f'<h2 id="{s.anchor}-title">{escape(s.title)}</h2>{s.body}</section>\n'
    for s in sections
  )
  return (
    f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n{generator(pictures)}\n'
    f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
    # An inline icon, because otherwise a browser requests one from the page's server.
    f'<link rel="icon" href="data:,">\n<style>{_STYLE}</style>\n</head>\n<body>\n'
    f"<header><h1>{escape(title)}</h1>{header}</header>\n"
    f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n<main>\n{parts}</main>\n'
    + (f"<script>{script}</script>\n" if script else "")
    + "</body>\n</html>\n"
  )


def _class(name: str) -> str:
  return f' class="{name}"' if name else ""


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --faint: #595959; --line: #c9c9c9; --box: #f4f4f2;
  --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --paper: #161616; --faint: #b0b0b0; --line: #4a4a4a; --box: #232323; --link: #8fc1ff; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 84rem; padding: 0 1rem 6rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1.5rem 0 0.75rem; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 0.25rem; }
p, ul, dl { margin: 0.5rem 0; max-width: 48rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 1px; }
nav ul { display: flex; flex-wrap: wrap; gap: 0.25rem 1rem; list-style: none; padding: 0; max-width: none; }
nav a { display: inline-block; padding: 0.25rem 0; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 0.5rem 1rem; max-width: none; }
dt { color: var(--faint); font-size: 0.85rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.absent { color: var(--faint); font-style: italic; }
.note { color: var(--faint); font-size: 0.9rem; }
.pair { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0.5rem 2rem; margin: 1rem 0 2rem;
  align-items: start; }
.pair > div { min-width: 0; }
@media (min-width: 60rem) { .pair { grid-template-columns: minmax(0, 28rem) minmax(0, 1fr); } }
@media (min-width: 80rem) { .pair { grid-template-columns: minmax(0, 36rem) minmax(0, 1fr); } }
figure { margin: 0; max-width: 36rem; }
figure img { display: block; width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); }
figcaption { font-size: 0.9rem; margin-top: 0.35rem; }
.wide { overflow-x: auto; max-width: 100%; margin: 0.75rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: 0.25rem 0; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal;
  white-space: nowrap; }
th.word, td.word { text-align: left; white-space: pre-wrap; min-width: 4rem; max-width: 20rem;
  overflow-wrap: break-word; }
thead th { border-bottom: 2px solid var(--faint); vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 400; }
details { margin: 0.75rem 0; }
summary { cursor: pointer; padding: 0.25rem 0; }
.text { white-space: pre-wrap; font: 0.95rem/2 ui-monospace, "Liberation Mono", "DejaVu Sans Mono", monospace;
  padding: 0.75rem; border: 1px solid var(--line); background: #ffffff; color: #1b1b1b; max-width: none;
  print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.text .first { color: #595959; }
.t { cursor: help; border-radius: 2px; padding: 0.1em 0; border-bottom: 0 solid currentColor; }
.legend .t { padding: 0.1em 0.4em; }
.legend { white-space: normal; line-height: 2.2; }
.q1 { border-bottom: 1px dotted #1b1b1b; } .q2 { border-bottom: 2px solid #1b1b1b; }
.q3 { border-bottom: 4px double #1b1b1b; }
.t.on, .t:focus-visible { outline: 3px solid #d55e00; outline-offset: 0; }
#numbers { position: fixed; left: 0; right: 0; bottom: 0; margin: 0 auto; max-width: 40rem; max-height: 45vh;
  overflow: auto; padding: 0.5rem 1rem; background: var(--box); border: 1px solid var(--line); }
#numbers[hidden] { display: none; }
#numbers table { width: 100%; }
@media print {
  :root { --ink: #000000; --paper: #ffffff; --faint: #333333; --box: #ffffff; --link: #000000; }
  nav, #numbers { display: none; }
  figure, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  body { padding: 0; max-width: none; }
}
"""
