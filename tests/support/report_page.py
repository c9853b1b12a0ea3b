"""Shared by tests of reports: a parser of their pages, and a call of the program with flags."""

import functools
import html.parser

from absl import flags

from cyb_jax.cli import report

VOID = {"meta", "link", "img", "br"}


class Page(html.parser.HTMLParser):
  """Elements and text of a page; fails if a tag is not closed or is closed twice."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.texts = [], [], []
    self.feed(text)
    self.close()
    assert self.open == []

  def handle_starttag(self, tag, attributes):
    self.tags.append((tag, dict(attributes)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, text):
    self.texts.append((self.open[-1] if self.open else "", text))

  def all(self, tag):
    return [attributes for name, attributes in self.tags if name == tag]

  def text(self, tag):
    return [text for name, text in self.texts if name == tag]


def call(monkeypatch, **given):
  """Calls `report.main` with flags."""
  with monkeypatch.context() as patch:
    values = flags.FlagValues()
    patch.setattr(flags, "FLAGS", values)
    for kind in ("string", "integer", "bool", "list"):
      define = getattr(flags, f"DEFINE_{kind}")
      patch.setattr(flags, f"DEFINE_{kind}", lambda *a, define=define: define(*a, flag_values=values))
    patch.setattr(flags, "DEFINE", functools.partial(flags.DEFINE, flag_values=values))  # paths
    report.define_flags()
    values(["report", *(f"--{name}={value}" for name, value in given.items())])
    return report.main([])
