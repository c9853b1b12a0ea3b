"""Text on standard output, in addition to the JSON object on the last line."""

from __future__ import annotations

import os
import sys


def shows_colour() -> bool:
  """Whether standard output is a terminal whose user hasn't requested plain text (https://no-color.org)."""
  return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def show(text: str) -> None:
  """Writes text to standard output and flushes it; characters that its encoding lacks are replaced."""
  encoding = sys.stdout.encoding or "utf-8"
  sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
  sys.stdout.flush()
