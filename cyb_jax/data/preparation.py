"""Prepares a task's tokens piece by piece, in any number of processes and hosts, and merges the pieces into a store.

    .NAME.pieces.partial/       next to the store's path; it is removed when the store is complete
      plan.json                 the recipe and the number of pieces; a process with a different plan is rejected
      tokenizer/                the tokenizer that was trained on the task, written by the first process that has one
      piece-000012.*            see pieces.py
      shard-train-00003.json    the digests of a complete shard
      store/                    the shards, on a local disk; in a bucket they are written to the store's path

A task's pieces and the order of its documents depend on the source alone. The store is therefore independent of which
process prepares which piece, and after a failure only the missing parts are prepared. Hosts do not communicate: of n
hosts, host i prepares the pieces p with p mod n = i - 1, and a host that finds all pieces complete builds the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from cyb_jax.data import chunks, locks, task_tokenizer, tokenizers, workers
from cyb_jax.data import pieces as piece_files
from cyb_jax.data import store as stores
from cyb_jax.data.finishing import StoreBuilder
from cyb_jax.data.plan import Plan
from cyb_jax.data.progress import Progress
from cyb_jax.data.store import SHARD_TOKENS, TokenStore
from cyb_jax.errors import InputError, StorageError
from cyb_jax.storage import in_bucket, streams

# A damaged piece is prepared again; if this fails repeatedly, the disk is faulty.
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Prepared:
  """The result of a preparation.

  Attributes:
    path: the store's folder.
    description: the content of store.json; None if some pieces of other shards are missing.
    pieces: number of pieces of the task; 0 if the store already existed.
    pieces_done: number of complete pieces.
    tokens, cpu_seconds: totals over the pieces of this shard, including pieces of earlier calls.
    piece_seconds: seconds that this call spent on pieces; pieces of earlier calls take no time.
    finish_seconds: seconds that this call spent on building the store; 0 if another process has built it.
    workers: number of processes.
  """

  path: epath.Path
  description: dict[str, Any] | None
  pieces: int = 0
  pieces_done: int = 0
  tokens: int = 0
  cpu_seconds: float = 0.0
  piece_seconds: float = 0.0
  finish_seconds: float = 0.0
  workers: int = 1


def prepare(
  task: str,
  tokenizer: str,
  output: str | os.PathLike | None = None,
  *,
  options: Mapping[str, Any] | None = None,
  limit: int | None = None,
  progress: bool = True,
  shard_tokens: int = SHARD_TOKENS,
  workers: int = 1,
  write: bool = True,
) -> TokenStore | None:
  """Prepares a task's tokens, or opens an existing store.

  The store appears at its path when it is complete. A concurrent call for the same path waits for the first call, and a
  call after one that was killed prepares the missing parts. Exact duplicates of a document are dropped across all
  splits of the task; if two copies are in different splits, the copy in train is dropped.

  Args:
    task: a name in `tasks.TASKS`, or 'seqio:NAME'.
    tokenizer: 'sentencepiece:N' (a model of N pieces is trained on the task's train split), or a spec for
      `open_tokenizer`.
    output: the store's folder, on a local disk or in a bucket; None means a folder in the user's cache whose name
      contains a digest of the recipe.
    options: the task's options.
    limit: the largest number of documents that are read of each split; None means all.
    progress: whether progress is shown (`cyb_jax.progress`).
    shard_tokens: the largest number of tokens in a file.
    workers: number of processes that tokenize. The store does not depend on it.
    write: if False, an existing store is opened, and nothing is written.

  Returns:
    the open store; None if it is missing and `write` is False.

  Raises:
    InputError: a task or option is unknown, the tokenizer is unusable, a source is missing or empty, or the output has
      other content or cannot be written.
    StorageError: the disk is full, or the bucket failed; complete parts are kept.
    ChildProcessError: a worker died; complete parts are kept.
  """
  plan = Plan.make(task, tokenizer, output, options, limit, shard_tokens)
  if write:
    _prepare(plan, (1, 1), workers, progress)
  elif stores.is_store(plan.path):
    plan.existing_store()
  else:
    return None
  # The files have just been written or checked.
  return TokenStore.open(plan.path, verify=False)


def prepare_shard(
  task: str,
  tokenizer: str,
  output: str | os.PathLike | None = None,
  *,
  options: Mapping[str, Any] | None = None,
  limit: int | None = None,
  progress: bool = True,
  shard_tokens: int = SHARD_TOKENS,
  workers: int = 1,
  shard: tuple[int, int] = (1, 1),
) -> Prepared:
  """One host's part of `prepare`: the pieces of a shard, and the store if all other pieces are complete.

  Args:
    shard: (i, n), shard i of n, counted from 1. All shards write to the same `output`, which all hosts must be able to
      read.
    task, tokenizer, output, options, limit, progress, shard_tokens, workers: see `prepare`; equal for all shards.

  Raises:
    InputError: as `prepare`; or another shard has different arguments, or another process prepares this shard.
    StorageError, ChildProcessError: as `prepare`.
  """
  plan = Plan.make(task, tokenizer, output, options, limit, shard_tokens)
  return _prepare(plan, shard, workers, progress)


def _prepare(plan: Plan, shard: tuple[int, int], processes: int, progress: bool) -> Prepared:
  number, shards = shard
  if not 1 <= number <= shards:
    raise InputError(f"--shard={number}/{shards}: give i/n with 1 <= i <= n, such as 1/4")
  if processes < 1:
    raise InputError(f"--workers={processes}: give at least 1")
  path, folder = plan.path, plan.folder
  # A store appears when it is complete, so opening it needs no lock. A lock would fail in a read-only folder.
  if (existing := plan.existing_store()) is not None:
    if shards == 1:
      _remove_leftovers(plan)
    return Prepared(path, existing)
  with contextlib.ExitStack() as stack:
    if not in_bucket(path):
      _make_folder(path)
      waiting = f"{path} is being prepared by another process; waiting for it"
      stack.enter_context(locks.held(_lock_file(path), wait=waiting, shared=shards > 1))
      if (existing := plan.existing_store()) is not None:  # the other process has built it
        return Prepared(path, existing)
    streams.make_folder(folder)
    try:
      stack.enter_context(locks.held(folder / f"shard-{number}-of-{shards}.lock"))
    except locks.Busy as error:
      raise InputError(
        f"--shard={number}/{shards}: {error} is preparing this shard of {os.fspath(path)}; wait for it, or give another"
      ) from None
    local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cyb-prepare.")))
    try:
      return _Preparation(plan, local, processes, Progress(plan.recipe["task"], progress)).run(shard)
    except BaseException as error:
      # The next call cannot use a folder without any complete piece, nor the pieces of a source that must be corrected.
      with contextlib.suppress(StorageError):
        names = streams.names(folder) if shards == 1 else ()
        has_pieces = any(re.fullmatch(r"piece-\d+\.json", name) for name in names)
        if shards == 1 and (not has_pieces or isinstance(error, InputError)):
          streams.remove(folder)
      raise


def _lock_file(path: epath.Path) -> epath.Path:
  """The lock of a store on a local disk."""
  return path.parent / f".{path.name}.lock"


def _remove_leftovers(plan: Plan) -> None:
  """Removes, if possible, the pieces of a process that was killed after it built the store and before it cleaned up."""
  if not streams.names(plan.folder):
    return
  with contextlib.suppress(OSError, locks.Busy), contextlib.ExitStack() as stack:
    if not in_bucket(plan.path):
      stack.enter_context(locks.held(_lock_file(plan.path)))
    streams.remove(plan.folder)


def _make_folder(path: epath.Path) -> None:
  """Creates the parent folder of a store's path, and the lock file.

  Raises:
    InputError: the folder cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A lock file of another user can be locked without write permission, but the folder must accept new files.
    tempfile.TemporaryFile(dir=path.parent).close()
    locks.opened(_lock_file(path)).close()
  except OSError as error:
    raise InputError(
      f"output={os.fspath(path)!r}: cannot be written ({error.strerror}); give a writable folder"
    ) from error


class _Preparation:
  """One process's part of a preparation, with its workers.

  Args:
    plan: the plan.
    local: an empty folder on a local disk.
    processes: number of workers.
    progress: shows the progress.
  """

  def __init__(self, plan: Plan, local: Path, processes: int, progress: Progress):
    self._plan, self._processes, self._progress = plan, processes, progress
    self._folder = plan.folder
    self._pieces = plan.task.pieces(plan.limit)
    plan.record(len(self._pieces))
    tokenizer = plan.given or self._trained(local)
    saved = local / "tokenizer"
    saved.mkdir()
    tokenizer.save(saved)
    recipe = [plan.recipe, tokenizer.describe()]
    self._made_of = [stores.digest([*recipe, dataclasses.asdict(piece)]) for piece in self._pieces]
    output = plan.path if in_bucket(plan.path) else self._folder / "store"
    shared = {
      "task": plan.recipe["task"],
      "options": plan.task.options,
      "limit": plan.limit,
      "tokenizer": os.fspath(saved),
      "folder": os.fspath(self._folder),
      "output": os.fspath(output),
    }
    self._run_jobs = functools.partial(workers.run, workers.Work(shared, plan.task), shared)
    self._builder = StoreBuilder(
      plan, self._pieces, tokenizer, saved, output, stores.digest(recipe), self._run_jobs, processes, progress
    )

  def _trained(self, local: Path) -> tokenizers.Tokenizer:
    plan = self._plan
    pieces = tokenizers.trained_pieces(plan.tokenizer)
    folder = self._folder / "tokenizer"
    return task_tokenizer.shared_tokenizer(plan.task, pieces, plan.limit, folder, local, self._progress.log)

  def run(self, shard: tuple[int, int]) -> Prepared:
    """Prepares the pieces of a shard; if all pieces of the task are complete then, also builds the store."""
    number, shards = shard
    start = time.perf_counter()
    records = self._do_pieces([p for p in range(len(self._pieces)) if p % shards == number - 1])
    piece_seconds = time.perf_counter() - start
    found = records | {p: r for p in range(len(self._pieces)) if p not in records and (r := self._record(p))}
    done = Prepared(
      path=self._plan.path,
      description=None,
      pieces=len(self._pieces),
      pieces_done=len(found),
      tokens=sum(record["tokens"] for record in records.values()),
      cpu_seconds=sum(record["cpu_seconds"] for record in records.values()),
      piece_seconds=piece_seconds,
      workers=self._processes,
    )
    if len(found) < len(self._pieces):
      self._progress.log(f"{len(found)} of {len(self._pieces)} pieces are complete; the others belong to other shards")
      return done
    start = time.perf_counter()
    # The process of another shard may have found all pieces complete at the same time.
    try:
      with locks.held(self._folder / "finish.lock", wait="another process is building the store; waiting for it"):
        documents = [found[p]["documents"] for p in range(len(self._pieces))]
        description = self._plan.existing_store() or self._build(documents)
        streams.remove(self._folder)
    except locks.Busy as error:
      self._progress.log(f"{error} is building the store")
      return done
    return dataclasses.replace(done, description=description, finish_seconds=time.perf_counter() - start)

  def _record(self, number: int) -> dict[str, Any] | None:
    """The record of a complete piece, without its files; None if the piece is incomplete."""
    found = piece_files.read_record(self._folder, number, self._made_of[number])
    # The files may have many digests, so they are not kept in memory; they are read again when they are needed.
    return found and {name: value for name, value in found.items() if name != "files"}

  def _do_pieces(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Prepares the incomplete ones among these pieces; returns the records of all of these pieces by number."""
    records = {number: record for number in numbers if (record := self._record(number))}
    left = [number for number in numbers if number not in records]
    if records and left:
      self._progress.log(f"{len(records)} of {len(numbers)} pieces are already complete")
    jobs = [
      {"number": p, "piece": dataclasses.asdict(self._pieces[p]), "made_of": self._made_of[p]}
      for p in sorted(left, key=lambda p: -self._pieces[p].size)  # longest first, so that the workers finish together
    ]
    with self._progress.phase(len(left), sum(self._pieces[p].size for p in left)):
      for job, record in self._run_jobs(jobs, self._processes, self._progress.report):
        records[job["number"]] = record
        self._progress.finish_part(record["documents"], record["tokens"], self._pieces[job["number"]].size)
    return records

  def _build(self, documents: Sequence[int]) -> dict[str, Any]:
    """Builds the store; pieces that turn out to be damaged are prepared again."""
    for _ in range(_ATTEMPTS):
      try:
        return self._builder.build(documents)
      except chunks.Damaged as error:
        found = re.search(r"piece-(\d+)\.", str(error))
        if not found:
          raise
        logging.warning("%s; its piece is prepared again", error)
        streams.remove(piece_files.record_path(self._folder, int(found[1])))
        self._do_pieces([int(found[1])])
    raise StorageError(f"{os.fspath(self._folder)}: pieces were damaged {_ATTEMPTS} times in a row; check the disk")
