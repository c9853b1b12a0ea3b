"""Prepares a task's tokens: piece by piece, in any order, by any number of processes and hosts, and then as one store.

    .NAME.pieces.partial/       next to the store's path; it is removed when the store is complete
      plan.json                 what is prepared: a process that prepares something else there is refused
      tokenizer/                a tokenizer that is trained for the task, written by the first process that has it
      piece-000012.*            see pieces.py
      shard-train-00003.json    the digests of a shard that is whole
      store/                    the shards, on a local disk; in a bucket they are written to the store's path

A task's pieces depend on its source alone, and so does the order of the documents. The store is therefore the same
whichever process prepares which piece, and after a failure only the missing parts are prepared. Shards do not know of
each other: of n shards, shard i prepares the pieces p with p mod n = i, and the one that finds all pieces whole makes
the store.
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

# A piece that is damaged is prepared again; if that does not help, the disk is at fault.
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Prepared:
  """The result of a preparation.

  Attributes:
    path: the store's folder.
    description: the content of store.json; None: some pieces of other shards are missing.
    pieces: number of pieces of the task; 0 if the store existed already.
    pieces_done: number of pieces that are whole.
    tokens, cpu_seconds: of the pieces of this shard, including those of earlier calls.
    piece_seconds: seconds that this call spent on pieces, some of which may have been whole before.
    finish_seconds: seconds that this call spent on the store; 0: another process made it.
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
  """Prepares a task's tokens, or opens them if they are prepared already.

  The store appears when it is whole. A second call for the same path waits for the first, and a call after one that was
  killed prepares the missing parts. Exact duplicates of a document are dropped over the whole task; of two in different
  splits, the one in train is dropped.

  Args:
    task: a name of `tasks.TASKS`, or 'seqio:NAME'.
    tokenizer: 'sentencepiece:N' (N pieces trained on the task's train split), or a spec for `open_tokenizer`.
    output: the store's folder, on a local disk or in a bucket; None: a folder in the user's cache that is named by what
      the store holds.
    options: the task's options.
    limit: at most so many documents are read of each split.
    progress: whether progress is shown (`cyb_jax.progress`).
    shard_tokens: tokens in a file at most.
    workers: processes that tokenize. The store does not depend on their number.
    write: False: a store that is prepared already is opened, and nothing is written.

  Returns:
    the open store; None if it is missing and `write` is False.

  Raises:
    InputError: an unknown task or option, an unusable tokenizer, a source that is missing or empty, an output that
      holds something else or cannot be written.
    StorageError: the disk is full, or the bucket fails; parts that are whole are kept.
    ChildProcessError: a worker died; parts that are whole are kept.
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
  """One host's share of `prepare`: the pieces of a shard, and the store if all other pieces are whole.

  Args:
    shard: (i, n): the i-th of n, from 1 on. All write to the same `output`, which all must be able to read.
    task, tokenizer, output, options, limit, progress, shard_tokens, workers: see `prepare`; the same for all.

  Raises:
    InputError: as `prepare`; another shard has other arguments, or another process prepares this shard.
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
  # A store appears when it is whole: opening it needs no lock, which a read-only folder would refuse.
  if (existing := plan.existing_store()) is not None:
    if shards == 1:
      _remove_leftovers(plan)
    return Prepared(path, existing)
  with contextlib.ExitStack() as stack:
    if not in_bucket(path):
      _make_folder(path)
      waiting = f"{path} is being prepared by another process; waiting for it"
      stack.enter_context(locks.held(_lock_file(path), wait=waiting, shared=shards > 1))
      if (existing := plan.existing_store()) is not None:  # the other process has made it
        return Prepared(path, existing)
    streams.make_folder(folder)
    try:
      stack.enter_context(locks.held(folder / f"shard-{number}-of-{shards}.lock"))
    except locks.Busy as error:
      raise InputError(
        f"--shard={number}/{shards}: {error} is preparing this shard of {os.fspath(path)}; wait for it, or take another"
      ) from None
    local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cyb-prepare.")))
    try:
      return _Preparation(plan, local, processes, Progress(plan.recipe["task"], progress)).run(shard)
    except BaseException as error:
      # A folder without a single whole piece is of no use to the next call, and neither are the pieces of a source that
      # has to be changed.
      with contextlib.suppress(StorageError):
        names = streams.names(folder) if shards == 1 else ()
        whole = any(re.fullmatch(r"piece-\d+\.json", name) for name in names)
        if shards == 1 and (not whole or isinstance(error, InputError)):
          streams.remove(folder)
      raise


def _lock_file(path: epath.Path) -> epath.Path:
  """The lock of a store on a local disk."""
  return path.parent / f".{path.name}.lock"


def _remove_leftovers(plan: Plan) -> None:
  """Removes the pieces that a process has left which was killed right after its last step, where that is possible."""
  if not streams.names(plan.folder):
    return
  with contextlib.suppress(OSError, locks.Busy), contextlib.ExitStack() as stack:
    if not in_bucket(plan.path):
      stack.enter_context(locks.held(_lock_file(plan.path)))
    streams.remove(plan.folder)


def _make_folder(path: epath.Path) -> None:
  """Makes the folder around a store's path and the file of its lock.

  Raises:
    InputError: they cannot be written.
  """
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock may be another user's, which can be locked all the same; the folder must accept new files.
    tempfile.TemporaryFile(dir=path.parent).close()
    locks.opened(_lock_file(path)).close()
  except OSError as error:
    raise InputError(
      f"output={os.fspath(path)!r}: cannot be written ({error.strerror}); give a folder that can"
    ) from error


class _Preparation:
  """One process's part of a preparation, with its workers.

  Args:
    plan: what is prepared.
    local: an empty folder on a local disk.
    processes: number of workers.
    progress: shows what is done.
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
    return task_tokenizer.shared_tokenizer(plan.task, pieces, plan.limit, folder, local, self._progress.say)

  def run(self, shard: tuple[int, int]) -> Prepared:
    """Prepares the pieces of a shard, and the store if all pieces are whole then."""
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
      self._progress.say(f"{len(found)} of {len(self._pieces)} pieces are whole; the others are other shards'")
      return done
    start = time.perf_counter()
    # The process of another shard may have found all pieces whole at the same time.
    try:
      with locks.held(self._folder / "finish.lock", wait="another process finishes the store; waiting for it"):
        documents = [found[p]["documents"] for p in range(len(self._pieces))]
        description = self._plan.existing_store() or self._build(documents)
        streams.remove(self._folder)
    except locks.Busy as error:
      self._progress.say(f"{error} finishes the store")
      return done
    return dataclasses.replace(done, description=description, finish_seconds=time.perf_counter() - start)

  def _record(self, number: int) -> dict[str, Any] | None:
    """The record of a piece that is whole, without its files; None if it is not."""
    found = piece_files.read_record(self._folder, number, self._made_of[number])
    # The digests of its files may be many; they are read again when they are needed.
    return found and {name: value for name, value in found.items() if name != "files"}

  def _do_pieces(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Prepares the pieces that are not whole; the records of all of them by number."""
    records = {number: record for number in numbers if (record := self._record(number))}
    left = [number for number in numbers if number not in records]
    if records and left:
      self._progress.say(f"{len(records)} of {len(numbers)} pieces are whole already")
    jobs = [
      {"number": p, "piece": dataclasses.asdict(self._pieces[p]), "made_of": self._made_of[p]}
      for p in sorted(left, key=lambda p: -self._pieces[p].size)  # longest first, so that the workers end together
    ]
    with self._progress.phase(len(left), sum(self._pieces[p].size for p in left)):
      for job, record in self._run_jobs(jobs, self._processes, self._progress.report):
        records[job["number"]] = record
        self._progress.finish_part(record["documents"], record["tokens"], self._pieces[job["number"]].size)
    return records

  def _build(self, documents: Sequence[int]) -> dict[str, Any]:
    """Makes the store; pieces that turn out to be damaged are prepared again."""
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
    raise StorageError(f"{os.fspath(self._folder)}: pieces are damaged again and again; is the disk well?")
