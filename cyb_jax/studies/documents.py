"""Documents in a planned study: the losses of a run by document, and the division of text by document.

    python -m cyb_jax.studies.documents WORKDIR [BASE]     prints the losses of a run as one JSON object; BASE is the
                                                           model from which it started, if this has been moved

Dimensions: B batch, T tokens, G groups of documents.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cyb_jax import jsonl
from cyb_jax.data import TokenStore, open_task
from cyb_jax.data.tasks import text_digest
from cyb_jax.evaluation.bootstrap import GROUPS
from cyb_jax.evaluation.windows import StatisticsWindows
from cyb_jax.interop import pretrained
from cyb_jax.runs import Run
from cyb_jax.storage import atomic_write
from cyb_jax.training.run_data import open_recorded_or_new_store

SPLIT = "validation"
# The files of a task that is divided, in the order of `write_parts`.
PARTS = ("pretraining", "finetuning", SPLIT)


def document_losses(run: Run, store: TokenStore) -> dict[str, list[Any]]:
  """The losses of a run on the documents of its validation split.

  Args:
    run: a trained run.
    store: the store that it was trained on.

  Returns:
    `tokens`: the number of targets of each document; `losses`: their mean -log p in nats, rounded to 6 digits. If there
    are more than 1,024 documents, documents with the same number modulo 1,024 are combined.
  """
  config = run.config
  read = StatisticsWindows.of(store, config, SPLIT, None, batch_size=None, context=0)
  log_likelihood = jax.jit(lambda params, batch: run.method.evaluate(params, batch).log_likelihood)
  nats, tokens = np.zeros(GROUPS), np.zeros(GROUPS)
  for batch in read.batches():
    group = batch["group"].ravel()
    inputs = {name: jnp.asarray(batch[name]) for name in batch if name not in ("group", "before", "difficulty")}
    with jax.default_matmul_precision(config.precision.matmul):
      found = np.asarray(log_likelihood(run.params, inputs), np.float64).ravel()
    weights = np.asarray(batch["weights"], np.float64).ravel()
    # A target without weight may have no finite likelihood.
    nats -= np.bincount(group, np.where(weights > 0, found, 0.0) * weights, GROUPS)
    tokens += np.bincount(group, weights, GROUPS)
  count = min(GROUPS, read.documents)
  losses = nats[:count] / np.maximum(tokens[:count], 1)
  return {"tokens": tokens[:count].astype(int).tolist(), "losses": np.round(losses, 6).tolist()}


def write_parts(task: str, percent: int, folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Divides the training documents of a task into two parts; writes these and the validation documents as JSON lines.

  The part of a document depends only on its text, so equal documents are in the same part.

  Args:
    task: a task that has a validation split.
    percent: the percentage of documents in the first part.
    folder: the folder of the files, which are written if they do not exist.

  Returns:
    The paths by the names of PARTS.
  """
  paths = {part: folder / f"{part}.jsonl" for part in PARTS}
  if not all(path.exists() for path in paths.values()):
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[str]] = {part: [] for part in PARTS}
    for part, text in _divided(task, percent):
      lines[part].append(json.dumps({"text": text}) + "\n")
    for part, path in paths.items():
      atomic_write(path, "".join(lines[part]))
  return paths


def part_of(text: str, percent: int) -> str:
  """'pretraining' or 'finetuning', for a training document; the former has `percent` of all documents."""
  # The first eight bytes determine the split.
  hundredth = int.from_bytes(text_digest(text)[8:], "little") % 100
  return PARTS[0] if hundredth < percent else PARTS[1]


def _divided(task: str, percent: int) -> Iterator[tuple[str, str]]:
  """(part, text) of the documents of a task's training and validation splits."""
  opened = open_task(task)
  for document in opened.documents("train"):
    yield part_of(document.text, percent), document.text
  for document in opened.documents(SPLIT):
    yield SPLIT, document.text


def main(workdir: str, base: str = "") -> None:
  """Prints the losses of the last checkpoint of a run."""
  run = pretrained.load_run(workdir, base=base, base_option="BASE")
  losses = document_losses(run, open_recorded_or_new_store(run.config, run.meta))
  sys.stdout.write(jsonl.dumps(losses) + "\n")


if __name__ == "__main__":
  main(*sys.argv[1:])
