"""The one kind of error that means: the input is bad, nothing was written, here is what would do."""

from __future__ import annotations


class InputError(ValueError):
  """Bad input: a flag, a config field, a file.

  The message is one line that names the field or file, the value that was met, and what would be accepted.
  Programs print it without a traceback and exit with code 2.
  """
