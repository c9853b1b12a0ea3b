"""Prepares a task's tokens: piece by piece, in any order, by any number of processes and hosts, and then as one store.

    .NAME.pieces.partial/       beside the store's place; it goes when the store is there
      plan.json                 what is prepared: whoever prepares something else there is refused
      tokenizer/                where one is trained for the task: whoever comes first writes it
      piece-000012.*            see pieces.py
      shard-train-00003.json    a shard that is whole, and what it hashes to
      store/                    the shards, on a local disk; in a bucket they are written to their place

A task's pieces (tasks.py) hang on its source alone, and so does the order of the documents. The store is therefore the
same whoever prepares which piece, and what is whole needn't be done again after whatever dies. Which shards and hosts
there are is nobody's concern but theirs: piece p is shard p mod n's, and whoever finds all pieces whole finishes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import heapq
import itertools
import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from etils import epath

from cyb_jax.data import chunks, locks, merging, tasks, tokenizers, workers
from cyb_jax.data import pieces as piece_files
from cyb_jax.data import store as stores
from cyb_jax.data.store import DESCRIPTION, FORMAT, SHARD_TOKENS, TokenStore
from cyb_jax.data.tokenizers import Tokenizer
from cyb_jax.errors import InputError, StorageError
from cyb_jax.storage import in_bucket, streams
from cyb_jax.storage.paths import unchecked_place

_SECONDS_BETWEEN_LINES = 5.0
# SentencePiece is trained on at most this much text, the documents of smallest hash among the first so many.
_SAMPLE_BYTES = 4 << 20
_SAMPLED_BYTES = 256 << 20
# Copying fewer takes less time than to start a process.
_TOKENS_WORTH_A_PROCESS = 1 << 26
# A piece that is damaged is done again; where that goes on, the disk is at fault.
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Prepared:
  """What a preparation came to.

  Attributes:
    path: the store's place.
    description: what store.json says; None: some pieces aren't done, which are other shards'.
    pieces: of the task; 0 where the store was there already.
    pieces_done: that are whole.
    tokens, cpu_seconds: of the pieces that this shard has, whenever they were done.
    piece_seconds: of this call, for pieces; a part of them may have been done before.
    finish_seconds: of this call, for the store; 0: it was not this one that finished.
    workers: processes.
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
  """Prepares a task's tokens, or opens them where they are prepared already.

  The store appears when it is whole; a second call for the same place waits for the first, and a call after one that
  was killed does what is left. Exact duplicates of a document are dropped over the whole task (of two in different
  splits, train's).

  Args:
    task: a name of `tasks.TASKS`, or 'seqio:NAME'.
    tokenizer: 'sentencepiece:N' (N pieces trained on the task's train split), or what `open_tokenizer` takes.
    output: the store's folder, on a local disk or in a bucket; None for one in the user's cache, named by what it
      holds.
    options: the task's options.
    limit: at most so many documents are read of each split.
    progress: whether progress is logged every few seconds.
    shard_tokens: tokens in a file at most.
    workers: processes that tokenize. The store is the same.
    write: False: what is prepared already is opened, and nothing is written; None where it isn't.

  Raises:
    InputError: for an unknown task or option, an unusable tokenizer, a source that is missing or empty, an output that
      holds something else or cannot be written.
    StorageError: the disk is full, or the bucket fails; what is whole is kept.
    ChildProcessError: a worker died; what is whole is kept.
  """
  plan = _Plan.make(task, tokenizer, output, options, limit, shard_tokens)
  if not write:
    return _reused(plan) if stores.is_store(plan.path) else None
  _prepare(plan, (1, 1), workers, progress)
  # What was written just now is hashed already.
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
  """One host's share of `prepare`: the pieces of a shard, and the store where all others are done.

  Args:
    shard: (i, n): the i-th of n, from 1 on. All write to the same `output`, which must be seen by all.
    task, tokenizer, output, options, limit, progress, shard_tokens, workers: see `prepare`; the same for all.

  Raises:
    InputError: as `prepare`; another shard was given something else, or another process has this shard.
    StorageError, ChildProcessError: as `prepare`.
  """
  plan = _Plan.make(task, tokenizer, output, options, limit, shard_tokens)
  return _prepare(plan, shard, workers, progress)


@dataclasses.dataclass(frozen=True)
class _Plan:
  """What is to be prepared.

  Attributes:
    task: opened.
    tokenizer: the spec.
    given: the tokenizer; None: it is to be trained.
    recipe: what a store's description says of it.
    limit: documents of each split.
    path: the store's place.
  """

  task: tasks.Task
  tokenizer: str
  given: Tokenizer | None
  recipe: dict[str, Any]
  limit: int | None
  path: epath.Path

  @classmethod
  def make(cls, name, tokenizer, output, options, limit, shard_tokens) -> _Plan:
    if limit is not None and limit < 1:
      raise InputError(f"limit={limit}: give at least 1 document, or none for all")
    task = tasks.open_task(name, options)
    given = None if tokenizers.trained_pieces(tokenizer) else tokenizers.open_tokenizer(tokenizer)
    recipe = {
      "format": FORMAT,
      "task": name,
      "options": {name: value for name, value in task.options.items() if name not in tasks.PLACES},
      "source": task.identity,
      # A model file is what is in it, wherever it lies.
      "tokenizer_from": given.describe()["sha256"] if given else tokenizer,
      "limit": limit,
      "shard_tokens": shard_tokens,
    }
    path = unchecked_place(output) if output else unchecked_place(_default_path(recipe, tokenizer))
    return cls(task, tokenizer, given, recipe, limit, path)

  @property
  def folder(self) -> epath.Path:
    """Of the pieces."""
    return self.path.parent / f".{self.path.name}.pieces.partial"

  def refused(self, found: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raises InputError where what is found at the store's place is of another recipe."""
    for name, value in self.recipe.items():
      if found.get(name) != value:
        raise InputError(
          f"output={os.fspath(self.path)!r}: it holds {what} with {name}={found.get(name)!r}, not {value!r}; {remedy}"
        )


def _default_path(recipe: dict[str, Any], tokenizer: str) -> Path:
  name = re.sub(r"[^\w.-]+", "_", f"{recipe['task']}-{os.path.basename(tokenizer)}")
  key = hashlib.sha256(stores.canonical(recipe)).hexdigest()[:16]
  return stores.default_cache() / "stores" / f"{name}-{key}"


def _prepare(plan: _Plan, shard: tuple[int, int], processes: int, progress: bool) -> Prepared:
  number, shards = shard
  if not 1 <= number <= shards:
    raise InputError(f"--shard={number}/{shards}: give i/n with 1 <= i <= n, such as 1/4")
  if processes < 1:
    raise InputError(f"--workers={processes}: give at least 1")
  path, folder = plan.path, plan.folder
  with contextlib.ExitStack() as stack:
    if not in_bucket(path):
      _make_folder(path)
      lock = path.parent / f".{path.name}.lock"
      waiting = f"{path} is being prepared by another process; waiting for it"
      stack.enter_context(locks.held(lock, wait=waiting, shared=shards > 1))
    if (reused := _found(plan)) is not None:
      if shards == 1:  # a run that was killed right behind its last step has left its pieces
        streams.remove(folder)
      return Prepared(path, reused)
    streams.make_folder(folder)
    try:
      stack.enter_context(locks.held(folder / f"shard-{number}-of-{shards}.lock"))
    except locks.Busy as error:
      raise InputError(
        f"--shard={number}/{shards}: {error} is preparing this shard of {os.fspath(path)}; wait for it, or take another"
      ) from None
    local = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cyb-prepare.")))
    try:
      return _Preparation(plan, local, processes, _Progress(plan.recipe["task"], progress)).run(shard)
    except BaseException:
      # What isn't a single piece yet isn't worth a folder that somebody has to find.
      with contextlib.suppress(StorageError):
        if shards == 1 and not any(re.fullmatch(r"piece-\d+\.json", name) for name in streams.names(folder)):
          streams.remove(folder)
      raise


def _make_folder(path: epath.Path) -> None:
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.parent / f".{path.name}.lock", "a"):
      pass
  except OSError as error:
    raise InputError(
      f"output={os.fspath(path)!r}: cannot be written ({error.strerror}); give a folder that can"
    ) from error


def _found(plan: _Plan) -> dict[str, Any] | None:
  """The description of the store that is at its place already."""
  path = plan.path
  if stores.is_store(path):
    found = stores.read_description(path)
    plan.refused(found, "a store", "give another folder, or remove it")
    if not in_bucket(path):
      TokenStore.open(path)
    logging.info("%s is prepared already", path)
    return found
  # In a bucket, those who finish write to its place.
  started = in_bucket(path) and streams.size_of(plan.folder / "plan.json") is not None
  if not started and (streams.names(path) if in_bucket(path) or path.is_dir() else path.exists()):
    raise InputError(f"output={os.fspath(path)!r}: it exists and is no token store; give another folder")
  return None


def _reused(plan: _Plan) -> TokenStore:
  _found(plan)
  return TokenStore.open(plan.path, verify=False)


class _Preparation:
  """One process's work on a store, with its workers."""

  def __init__(self, plan: _Plan, local: Path, processes: int, log: _Progress):
    self._plan, self._local, self._processes, self._log = plan, local, processes, log
    self._folder = plan.folder
    self._pieces = plan.task.pieces(plan.limit)
    self._agree()
    self._tokenizer = plan.given or self._trained()
    self._tokenizer.save(self._made("tokenizer"))
    of_all = [plan.recipe, self._tokenizer.describe()]
    self._made_of = [_digest([*of_all, dataclasses.asdict(piece)]) for piece in self._pieces]
    self._store_of = _digest(of_all)
    self._output = plan.path if in_bucket(plan.path) else self._folder / "store"
    self._shared = {
      "task": plan.recipe["task"],
      "options": plan.task.options,
      "limit": plan.limit,
      "tokenizer": os.fspath(self._local / "tokenizer"),
      "folder": os.fspath(self._folder),
      "output": os.fspath(self._output),
    }
    self._work = workers.Work(self._shared, plan.task)

  def run(self, shard: tuple[int, int]) -> Prepared:
    number, shards = shard
    start = time.perf_counter()
    mine = [p for p in range(len(self._pieces)) if p % shards == number - 1]
    records = self._do_pieces(mine)
    done = Prepared(
      path=self._plan.path,
      description=None,
      pieces=len(self._pieces),
      tokens=sum(record["tokens"] for record in records.values()),
      cpu_seconds=sum(record["cpu_seconds"] for record in records.values()),
      piece_seconds=time.perf_counter() - start,
      workers=self._processes,
    )
    found = records | {p: r for p in range(len(self._pieces)) if p not in records and (r := self._record(p))}
    if len(found) < len(self._pieces):
      self._log.say(f"{len(found)} of {len(self._pieces)} pieces are whole; the others are other shards'")
      return dataclasses.replace(done, pieces_done=len(found))
    start = time.perf_counter()
    # Another shard's process may have found the same.
    try:
      with locks.held(self._folder / "finish.lock", wait="another process finishes the store; waiting for it"):
        description = _found(self._plan) or self._finish([found[p]["documents"] for p in range(len(self._pieces))])
        streams.remove(self._folder)
    except locks.Busy as error:
      self._log.say(f"{error} finishes the store")
      return dataclasses.replace(done, pieces_done=len(found))
    seconds = time.perf_counter() - start
    return dataclasses.replace(done, pieces_done=len(found), description=description, finish_seconds=seconds)

  def _agree(self) -> None:
    """Writes what is prepared here, or compares it with what was."""
    file = self._folder / "plan.json"
    plan = self._plan.recipe | {"pieces": len(self._pieces)}
    if streams.read_json(file) is None:
      streams.write_json(file, plan)
    found = streams.read_json(file) or {}
    remedy = f"give the same, another output, or remove {os.fspath(self._folder)}"
    self._plan.refused(found, "pieces of a store", remedy)
    if found.get("pieces") != len(self._pieces):
      raise InputError(
        f"output={os.fspath(self._plan.path)!r}: it is prepared in {found.get('pieces')} pieces, and this version makes"
        f" {len(self._pieces)}; {remedy}"
      )

  def _trained(self) -> Tokenizer:
    """The tokenizer of the task: read where there is one, else trained.

    Each who finds none trains it by itself: equal text gives an equal model, and waiting would take as long. Should two
    differ all the same, the one that is written first is everybody's from the next start on, and pieces of the other
    are done again.
    """
    folder = self._folder / "tokenizer"
    copy = self._made("found")
    with contextlib.suppress(InputError):
      for name in streams.names(folder):
        (copy / name).write_bytes(streams.read(folder / name))
      return tokenizers.load(copy)
    task, limit = self._plan.task, self._plan.limit
    pieces = tokenizers.trained_pieces(self._plan.tokenizer)
    self._log.say(f"training a SentencePiece model of {pieces} pieces")
    sample = _sample(itertools.islice(task.documents("train"), limit))
    if not sample:
      raise InputError(f"data.task={task.name!r}: no text in train; options {task.options}")
    trained = tokenizers.train_sentencepiece(sample, pieces)
    own = self._made("trained")
    trained.save(own)
    streams.make_folder(folder)
    for name in tokenizers.files(trained.describe()):
      streams.write(folder / name, (own / name).read_bytes())
    return trained

  def _made(self, name: str) -> Path:
    folder = self._local / name
    folder.mkdir()
    return folder

  def _record(self, number: int) -> dict[str, Any] | None:
    found = piece_files.read_record(self._folder, number, self._made_of[number])
    # The digests of its files, which may be many, are read again where they are needed.
    return found and {name: value for name, value in found.items() if name != "files"}

  def _do_pieces(self, numbers: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Sees to it that pieces are whole; what they say of themselves."""
    records = {number: record for number in numbers if (record := self._record(number))}
    left = [number for number in numbers if number not in records]
    if records and left:
      self._log.say(f"{len(records)} of {len(numbers)} pieces are whole already")
    jobs = [
      {"number": p, "piece": dataclasses.asdict(self._pieces[p]), "made_of": self._made_of[p]}
      for p in sorted(left, key=lambda p: -self._pieces[p].size)  # the longest first: the last ones end together
    ]
    sizes = sum(self._pieces[p].size for p in left)
    self._log.start(len(left), sizes)
    for job, record in workers.run(self._work, self._shared, jobs, self._processes, self._log.report):
      records[job["number"]] = record
      self._log.piece(record, self._pieces[job["number"]].size)
    return records

  def _finish(self, documents: Sequence[int]) -> dict[str, Any]:
    """The store of pieces that are whole."""
    for _ in range(_ATTEMPTS):
      try:
        return self._merge(documents)
      except chunks.Damaged as error:
        found = re.search(r"piece-(\d+)\.", str(error))
        if not found:
          raise
        logging.warning("%s; its piece is prepared again", error)
        streams.remove(piece_files.record_path(self._folder, int(found[1])))
        self._do_pieces([int(found[1])])
    raise StorageError(f"{os.fspath(self._folder)}: pieces are damaged again and again; is the disk well?")

  def _merge(self, documents: Sequence[int]) -> dict[str, Any]:
    plan, task = self._plan, self._plan.task
    self._log.say(f"merging {len(self._pieces)} pieces")
    groups = dict.fromkeys(piece.group for piece in self._pieces)
    pieces = merging.Pieces(
      self._folder, self._pieces, documents, task.splits, {group: task.splits_of(group) for group in groups}
    )
    encoder = piece_files.Encoder(self._tokenizer, task.beside)
    streams.make_folder(self._output)
    with streams.scratch_folder(self._folder) as scratch:
      copies = merging.find_duplicates(pieces, scratch)
      splits = merging.lay_out(
        pieces, copies, self._output, scratch,
        start=len(encoder.start), weighted="weights" in encoder.beside, shard_tokens=plan.recipe["shard_tokens"],
      )  # fmt: skip
      if "train" not in splits:
        streams.remove(self._folder)
        raise InputError(f"data.task={task.name!r}: no text in train; options {task.options}")
      jobs = [
        {
          "split": split,
          "number": number,
          "runs": os.fspath(scratch / f"{split}-{number:05d}.runs"),
          "made_of": self._store_of,
        }
        for split, laid in splits.items()
        for number in range(len(laid.shards))
      ]
      written = {}
      tokens = sum(laid.counts["tokens"] for laid in splits.values())
      self._log.start(len(jobs), tokens, "shards")
      processes = min(self._processes, 1 + tokens // _TOKENS_WORTH_A_PROCESS)
      for job, digests in workers.run(self._work, self._shared, jobs, processes, self._log.report):
        written[job["split"], job["number"]] = digests
        size = splits[job["split"]].shards[job["number"]]["tokens"]
        self._log.piece({"documents": 0, "tokens": size}, size)
    described = {}
    for split, laid in splits.items():
      shards = [_shard(split, n, shard, written[split, n]) for n, shard in enumerate(laid.shards)]
      described[split] = laid.counts | {"shards": shards}
    description = plan.recipe | {"tokenizer": self._tokenizer.describe(), "splits": described}
    description["fingerprint"] = stores.fingerprint(description)
    for name in tokenizers.files(self._tokenizer.describe()):
      streams.write(self._output / name, (self._local / "tokenizer" / name).read_bytes())
    streams.write_json(self._output / DESCRIPTION, description)
    if self._output != plan.path:
      for name in streams.names(self._output):
        if name.startswith("."):  # of a process that was killed
          streams.remove(self._output / name)
      os.rename(self._output, plan.path)
    self._log.say(f"prepared {os.fspath(plan.path)}")
    return description


def _shard(split: str, number: int, laid: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
  """A shard's entry in the description."""
  stem = f"{split}-{number:05d}"
  entry = {"file": f"{stem}.tokens", "tokens": laid["tokens"], "sha256": digests["tokens"]}
  entry["documents"] = laid["documents"]
  beside = {kind: {"file": f"{stem}.{kind}", "sha256": value} for kind, value in digests.items() if kind != "tokens"}
  return entry | beside


def _digest(value: Any) -> str:
  return hashlib.sha256(stores.canonical(value)).hexdigest()


def _sample(documents: Iterable[tasks.Document]) -> list[str]:
  """The texts to train a tokenizer on, the same for the same documents in whatever order they come.

  The first documents alone would be of one kind where a corpus is sorted; a draw over all would have to read it all.
  """
  heap: list[tuple[int, str]] = []
  kept = seen = 0
  for document in documents:
    # Not the part of the digest that the split hangs on.
    digest = int.from_bytes(tasks.text_digest(document.text)[8:], "little")
    heapq.heappush(heap, (-digest, document.text))
    size = len(document.text.encode())
    kept, seen = kept + size, seen + size
    while kept > _SAMPLE_BYTES and len(heap) > 1:
      kept -= len(heapq.heappop(heap)[1].encode())
    if seen >= _SAMPLED_BYTES:
      break
  return [text for _, text in sorted(heap, reverse=True) if text]


class _Progress:
  """Says what is being done, every few seconds."""

  def __init__(self, task: str, enabled: bool):
    self._task, self._enabled = task, enabled
    self._last = time.monotonic()
    self.start(0, 0)

  def say(self, line: str) -> None:
    if self._enabled:
      logging.info("%s: %s", self._task, line)

  def start(self, count: int, size: int, unit: str = "pieces") -> None:
    """`count` pieces or shards, of a size in all, are to be done."""
    self._count, self._size, self._unit = count, size, unit
    self._start = time.monotonic()
    self._done = self._done_size = self._documents = self._tokens = 0
    self._running: dict[int, tuple[int, int]] = {}

  def report(self, worker: int, documents: int, tokens: int) -> None:
    """What a worker has done of its piece so far."""
    self._running[worker] = documents, tokens
    self._line()

  def piece(self, record: Mapping[str, Any], size: int) -> None:
    """A piece is whole. Which worker's it was is not asked: the others say what they have done within seconds."""
    self._done, self._done_size = self._done + 1, self._done_size + size
    self._documents, self._tokens = self._documents + record["documents"], self._tokens + record["tokens"]
    self._running.clear()
    self._line(last=self._done == self._count)

  def _line(self, *, last: bool = False) -> None:
    now = time.monotonic()
    if not last and now - self._last < _SECONDS_BETWEEN_LINES:
      return
    self._last = now
    documents = self._documents + sum(documents for documents, _ in self._running.values())
    tokens = self._tokens + sum(tokens for _, tokens in self._running.values())
    seconds = max(now - self._start, 1e-9)
    what = f"{documents:,} documents, " if documents else ""
    line = f"{self._done} of {self._count} {self._unit}, {what}{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
    share = self._done_size / self._size if self._size else self._done / max(self._count, 1)
    if share and not last:
      left = seconds * (1 - share) / share
      units = (("h", 3600), ("min", 60), ("s", 1))
      unit, length = next(unit for unit in units if left >= unit[1] or unit[1] == 1)
      line += f", about {left / length:.{int(unit == 'h')}f} {unit} left"
    self.say(line)
