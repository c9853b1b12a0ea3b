"""Builds a store from complete pieces: orders the documents, writes shards and description, and publishes the store."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from cyb_jax.data import block_sample, merging, tasks, tokenizers
from cyb_jax.data import pieces as piece_files
from cyb_jax.data import store as stores
from cyb_jax.data.plan import Plan
from cyb_jax.data.progress import Progress
from cyb_jax.data.tokenizers import Tokenizer
from cyb_jax.errors import InputError
from cyb_jax.storage import streams

# Copying fewer tokens than this takes less time than starting a process.
_TOKENS_WORTH_A_PROCESS = 1 << 26

Digests = dict[tuple[str, int], dict[str, str]]


@dataclasses.dataclass(frozen=True)
class StoreBuilder:
  """Builds the store of a plan.

  Attributes:
    plan: the plan.
    pieces: all pieces of the task.
    tokenizer: the store's tokenizer.
    saved_tokenizer: a local folder that `tokenizer.save` has written.
    output: the folder of the shards, on the disk or in the bucket of the store.
    made_of: a digest of everything that determines the content of a shard.
    run: (jobs, number of processes, report) -> (job, result) of each job when it is done; see `workers.run`.
    processes: the largest number of processes that copy shards.
    progress: shows the progress.
  """

  plan: Plan
  pieces: Sequence[tasks.Piece]
  tokenizer: Tokenizer
  saved_tokenizer: Path
  output: epath.Path
  made_of: str
  run: Callable[..., Iterable[tuple[dict[str, Any], dict[str, Any]]]]
  processes: int
  progress: Progress

  def build(self, documents: Sequence[int]) -> dict[str, Any]:
    """Builds the store and returns its description.

    Args:
      documents: number of nonempty documents of each piece.

    Raises:
      InputError: train has no text.
      Damaged: a file of a piece was altered.
      StorageError, ChildProcessError: the disk failed, or a worker died.
    """
    self.progress.log(f"merging {len(self.pieces)} pieces")
    streams.make_folder(self.output)
    with streams.scratch_folder(self.plan.folder) as scratch:
      splits = self._lay_out(documents, scratch)
      digests = self._copy(splits, scratch)
    description = self._describe(splits, digests)
    self._publish(description)
    return description

  def _lay_out(self, documents: Sequence[int], scratch: Path) -> dict[str, merging.Split]:
    """Drops duplicates and writes, for each shard, the list of the token runs that it consists of."""
    plan, task = self.plan, self.plan.task
    groups = dict.fromkeys(piece.group for piece in self.pieces)
    splits_of = {group: task.splits_of(group) for group in groups}
    pieces = merging.Pieces(plan.folder, self.pieces, documents, task.splits, splits_of)
    encoder = piece_files.Encoder(self.tokenizer, task.annotations)
    copies = merging.find_duplicates(pieces, scratch)
    splits, emptied = merging.lay_out(
      pieces,
      copies,
      self.output,
      scratch,
      start=len(encoder.start),
      weighted="weights" in encoder.annotations,
      shard_tokens=plan.recipe["shard_tokens"],
    )
    for split in emptied:
      if split != "train":
        self.progress.log(f"all {emptied[split]:,} documents of {split} are duplicates; the split is omitted")
    if "train" not in splits:
      streams.remove(plan.folder)
      if "train" in emptied:
        raise InputError(
          f"data.task={task.name!r}: all {emptied['train']:,} documents of train also occur in a held-out split"
          f" ({', '.join(splits)}), and such documents are dropped from train, so train is empty; give more varied text"
          f" or other held-out splits; options {task.options}"
        )
      raise InputError(f"data.task={task.name!r}: no text in train; options {task.options}")
    return splits

  def _copy(self, splits: dict[str, merging.Split], scratch: Path) -> Digests:
    """Writes the shards; returns their digests by split and number."""
    jobs = [
      {
        "split": split,
        "number": number,
        "runs": os.fspath(scratch / f"{split}-{number:05d}.runs"),
        "made_of": self.made_of,
      }
      for split, laid in splits.items()
      for number in range(len(laid.shards))
    ]
    tokens = sum(laid.counts["tokens"] for laid in splits.values())
    processes = min(self.processes, 1 + tokens // _TOKENS_WORTH_A_PROCESS)
    written: Digests = {}
    with self.progress.phase(len(jobs), tokens, "shards"):
      for job, digests in self.run(jobs, processes, self.progress.report):
        written[job["split"], job["number"]] = digests
        size = splits[job["split"]].shards[job["number"]]["tokens"]
        self.progress.finish_part(0, size, size)
    return written

  def _describe(self, splits: dict[str, merging.Split], digests: Digests) -> dict[str, Any]:
    """The content of store.json."""
    described = {}
    for split, laid in splits.items():
      shards = [_shard_entry(split, n, shard, digests[split, n]) for n, shard in enumerate(laid.shards)]
      described[split] = laid.counts | {"shards": shards}
    description = self.plan.recipe | {"tokenizer": self.tokenizer.describe(), "splits": described}
    return description | {"fingerprint": stores.fingerprint(description)}

  def _publish(self, description: dict[str, Any]) -> None:
    """Writes the tokenizer and then the description, which makes the folder a store, and moves it to its path."""
    for name in tokenizers.files(self.tokenizer.describe()):
      streams.write(self.output / name, (self.saved_tokenizer / name).read_bytes())
    sizes = {name: size for name, size, _ in stores.files_of(description)}
    if sum(sizes.values()) > stores.VERIFIED_BYTES:
      block_sample.record(self.output, sizes, description["fingerprint"])
    streams.write_json(self.output / stores.DESCRIPTION, description)
    if self.output != self.plan.path:
      for name in streams.names(self.output):
        if name.startswith("."):  # a scratch file of a process that was killed
          streams.remove(self.output / name)
      os.rename(self.output, self.plan.path)
    self.progress.log(f"prepared {os.fspath(self.plan.path)}")


def _shard_entry(split: str, number: int, laid: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
  """A shard's entry in the description."""
  stem = f"{split}-{number:05d}"
  entry = {"file": f"{stem}.tokens", "tokens": laid["tokens"], "sha256": digests["tokens"]}
  entry["documents"] = laid["documents"]
  annotations = {
    kind: {"file": f"{stem}.{kind}", "sha256": value} for kind, value in digests.items() if kind != "tokens"
  }
  return entry | annotations
