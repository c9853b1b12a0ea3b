"""Preparation in pieces: the store does not depend on processes and failures, and memory does not grow."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import cli
import fsspec
import numpy as np
import pytest
from etils.epath import gpath
from fsspec.implementations.memory import MemoryFileSystem

from cyb_jax.cli import prepare as program
from cyb_jax.data import (
  Prepared,
  TokenStore,
  chunks,
  finishing,
  is_store,
  locks,
  merging,
  open_task,
  prepare,
  prepare_shard,
  tasks,
  tokenizers,
  workers,
)
from cyb_jax.data import store as stores
from cyb_jax.data.store import canonical
from cyb_jax.data.tasks import c4, files, synthetic
from cyb_jax.errors import InputError, StorageError
from cyb_jax.storage import failures, streams
from cyb_jax.storage.paths import unchecked_place

END = 256
SHARD = 700
C4 = pathlib.Path(__file__).resolve().parents[3] / "shared" / "tfds"


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Many pieces of little text; chunks and buckets of a few documents."""
  monkeypatch.setattr(files, "_SPAN_BYTES", (1500, 1500))
  monkeypatch.setattr(synthetic, "_PIECE_DOCUMENTS", 40)
  monkeypatch.setattr(finishing, "_TOKENS_WORTH_A_PROCESS", 1000)
  monkeypatch.setattr(merging, "_SORTED_ROWS", 60)
  monkeypatch.setattr(merging, "_READ_ROWS", 16)
  monkeypatch.setattr(chunks, "CHUNK_BYTES", 256)


@pytest.fixture(scope="module")
def lines():
  # Duplicates within a piece, across pieces and of held-out documents, with empty documents between them.
  return [f"line {i * 7 % 331} " + "x" * (i * 7 % 331 % 17) for i in range(500)] + ["", "line 3 xxx", ""] * 3


@pytest.fixture(scope="module")
def options(tmp_path_factory, lines):
  folder = tmp_path_factory.mktemp("text")
  for number in range(3):
    part = lines[number * 200 : (number + 1) * 200]
    (folder / f"{number}.txt").write_text("".join(line + "\n" for line in part))
  return {"pattern": str(folder / "*.txt"), "unit": "line"}


def stream_of(lines, split):
  """The stream of a split, computed directly: held-out splits keep their copies, and no line is in two splits."""
  stream, documents = [END], 0
  for line in dict.fromkeys(line for line in lines if line):
    if tasks.split_of(tasks.text_digest(line)) == split:
      stream += [*line.encode(), END]
      documents += 1
  return stream, documents


def contents(folder):
  return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.fixture
def whole(tmp_path, options):
  prepare("text_files", "bytes", tmp_path / "whole", options=options, shard_tokens=SHARD)
  return contents(tmp_path / "whole")


def test_stores_of_other_versions_are_unchanged(whole):
  """These digests are from a version that read a task in one pass; they must never change."""
  splits = json.loads(whole["store.json"])["splits"]
  assert (
    hashlib.sha256(canonical(splits)).hexdigest() == "f4651b620c2b237fe2cacff3a0a66f5bc90e7151ea656e237c9a9118a6de6be9"
  )


def test_many_pieces_make_the_stream(tmp_path, lines, options):
  assert len(open_task("text_files", options).pieces()) >= 5
  store = prepare("text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD)
  for split in store.splits:
    stream, documents = stream_of(lines, split)
    described = store.description["splits"][split]
    assert (described["tokens"], described["documents"]) == (len(stream), documents)
    tokens, _ = store.windows(split, np.array([0]), len(stream) - 1)
    assert tokens[0].tolist() == stream
    starts = store.document_starts(split)
    assert [stream[i - 1] for i in starts] == [END] * documents
    assert len(set(starts.tolist())) == documents
  assert {len(shard["sha256"]) for shard in store.description["splits"]["train"]["shards"]} == {64}
  assert len(store.description["splits"]["train"]["shards"]) > 4  # so documents cross their borders
  dropped = sum(split["duplicates_dropped"] for split in store.description["splits"].values())
  assert dropped == len([line for line in lines if line]) - len({line for line in lines if line})
  assert [path.name for path in tmp_path.glob(".*.partial")] == []


@pytest.mark.parametrize("shards", [1, 2, 3, 50])
def test_the_same_store_from_any_number_of_shards(tmp_path, options, whole, shards):
  for number in range(shards, 0, -1):
    done = prepare_shard(
      "text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD, shard=(number, shards)
    )
    assert (done.description is None) == (number > 1)
    assert (tmp_path / "s").exists() == (number == 1)
  assert done.pieces_done == done.pieces
  assert contents(tmp_path / "s") == whole


def test_the_same_store_from_processes(tmp_path, options, whole):
  for number in (1, 2):
    done = prepare_shard(
      "text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD, shard=(number, 2), workers=2
    )
  assert done.workers == 2
  assert done.cpu_seconds > 0
  assert contents(tmp_path / "s") == whole


@pytest.mark.parametrize(("task", "tokenizer"), [("synthetic_lookups", "sentencepiece:298"), ("hellaswag", "bytes")])
def test_annotations_follow_the_tokens(tmp_path, monkeypatch, task, tokenizer):
  """Difficulties and weights, with a tokenizer that the first process trains."""
  options = {"documents": 130, "max_difficulty": 3}
  if task == "hellaswag":
    docs = [{"query": f"question {i % 90}", "choices": ["no", f"yes {i % 90}"], "gold": 1} for i in range(120)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    options = {"path": str(tmp_path / "x.jsonl")}
  whole = prepare(task, tokenizer, tmp_path / "whole", options=options, shard_tokens=SHARD)
  trained = []
  train = tokenizers.train_sentencepiece
  monkeypatch.setattr(tokenizers, "train_sentencepiece", lambda *given: trained.append(given) or train(*given))
  for number in (2, 1):
    prepare_shard(task, tokenizer, tmp_path / "s", options=options, shard_tokens=SHARD, shard=(number, 2))
  assert len(trained) == tokenizer.startswith("sentencepiece")
  assert contents(tmp_path / "s") == contents(whole.path)
  kind = "weights" if task == "hellaswag" else "difficulty"
  values = np.concatenate([np.fromfile(path, np.uint8) for path in sorted((tmp_path / "s").glob(f"train-*.{kind}"))])
  if task == "hellaswag":
    assert int(values.sum()) == whole.num_targets("train") > 0
  else:
    expected = [d.difficulty[d.difficulty > 0] for d in open_task(task, options).documents("train")]
    assert values[values > 0].tolist() == np.concatenate(expected).tolist()


def test_files_are_interleaved_like_in_tensorflow():
  tf = pytest.importorskip("tensorflow")
  rng = np.random.default_rng(0)
  for total, cycle, highest in ((5, 2, 40), (23, 4, 70)):
    # Includes files that are empty, or that end at the end of a turn.
    lengths = [int(n) for n in np.where(rng.random(total) < 0.3, rng.integers(0, 4, total) * 16, rng.integers(highest))]
    found = c4.interleaved_pieces("train", lengths, cycle)
    rows = [
      (position, (number, k))
      for number, piece in enumerate(found)
      for k, position in enumerate(piece.positions(np.arange(lengths[number])).tolist())
    ]

    def read(number, lengths=lengths):
      count = tf.gather(tf.constant(lengths, tf.int64), number)
      return tf.data.Dataset.zip(tf.data.Dataset.from_tensors(number).repeat(), tf.data.Dataset.range(count))

    dataset = tf.data.Dataset.range(total).interleave(
      read, cycle_length=cycle, block_length=16, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    expected = [(int(number), int(k)) for number, k in dataset.as_numpy_iterator()]
    assert [row for _, row in sorted(rows)] == expected


@pytest.mark.skipif(not C4.is_dir(), reason="no prepared C4 sample next to the checkout")
def test_pieces_of_c4_equal_the_documents_of_tfds():
  task = open_task("c4_en", {"data_dir": str(C4)})
  pieces = [piece for piece in task.pieces() if piece.group == "train"]
  assert len(pieces) == 8
  texts = {}
  for piece in pieces:
    documents = [document.text for split, document in task.read(piece) if split == "train"]
    texts |= zip(piece.positions(np.arange(len(documents))).tolist(), documents, strict=True)
  assert [text for _, text in sorted(texts.items())] == [document.text for document in task.documents("train")]


def test_interleaved_pieces_are_merged(tmp_path, monkeypatch):
  """Like a TFDS source: 20 files, of which 16 are read at once in turns of 16 documents."""
  lengths = [int(n) for n in np.random.default_rng(1).integers(0, 70, 20)]
  found = c4.interleaved_pieces("train", lengths)
  texts = {}
  for number, piece in enumerate(found):
    for k, position in enumerate(piece.positions(np.arange(lengths[number])).tolist()):
      texts[position] = f"{number}.{k}" if k % 9 else f"copy {k}"

  def read(group, part):
    piece = found[part[0]]
    return [texts[position] for position in piece.positions(np.arange(lengths[part[0]])).tolist()]

  source = tasks.Source(("train",), read, lambda group: found)
  monkeypatch.setattr(tasks, "open_task", lambda *_: tasks.Task("own", {}, {}, (), lambda: source))
  store = prepare("own", "bytes", tmp_path / "s", shard_tokens=SHARD)
  kept = list(dict.fromkeys(text for _, text in sorted(texts.items())))
  tokens, _ = store.windows("train", np.array([0]), store.num_tokens("train") - 1)
  assert bytes(np.where(tokens[0] == END, 10, tokens[0]).tolist()).decode().split("\n")[1:-1] == kept
  assert store.description["splits"]["train"]["duplicates_dropped"] == len(texts) - len(kept)


@pytest.mark.parametrize("sizes", [[], [0], [5], [100, 0, 3, 0], [10, 10, 10], [0, 35, 7], [9, 1, 10, 11]])
@pytest.mark.parametrize("unit", ["line", "file"])
def test_spans_cover_each_byte_once(sizes, unit):
  spans = list(files.spans(sizes, [unit == "line"] * len(sizes), 10))
  covered = collections.Counter()
  for (first, begin, last, end), size in spans:
    inside = [
      (n, byte)
      for n in range(first, min(last + 1, len(sizes)))
      for byte in range(begin if n == first else 0, end if n == last else sizes[n])
    ]
    assert len(inside) == size
    covered.update(inside)
    if unit == "file":
      assert begin == end == 0
  assert covered == {(n, byte): 1 for n, size in enumerate(sizes) for byte in range(size)}
  if unit == "line":
    assert all(size == 10 for _, size in spans[:-1])


def test_a_line_belongs_to_the_span_in_which_it_begins(tmp_path):
  path = tmp_path / "x"
  path.write_bytes(b"ab\n\ncdefgh\ni\n\n\nlast")
  content = path.read_bytes()
  begins = [0] + [i + 1 for i, byte in enumerate(content) if byte == 10 and i + 1 < len(content)]
  for start in range(len(content)):
    for stop in [*range(start + 1, len(content) + 1), None]:
      with path.open("rb") as file:
        got = list(files.lines(file, start, stop))
      expected = [
        (b, content[b:].split(b"\n")[0] + b"\n" * (b"\n" in content[b:]))
        for b in begins
        if b >= start and (stop is None or b < stop)
      ]
      assert got == expected, (start, stop)


def killed_in_mid_shard(tmp_path, options, signal_to):
  """(the folder of a process that was killed while it wrote its third piece, number of complete pieces)."""
  code = """
import json, sys, time
from cyb_jax.data import pieces, prepare_shard
from cyb_jax.data.tasks import files
files._SPAN_BYTES = 1500, 1500
pieces._BATCH_BYTES = 300
write = pieces.write
calls = []
def counted(*args, **kwargs):
  calls.append(0)
  if len(calls) == 3:
    def stop(documents, tokens):
      open(sys.argv[1] + '.reached', 'w').close()
      time.sleep(60)
    kwargs['report'] = stop
  return write(*args, **kwargs)
pieces.write = counted
prepare_shard('text_files', 'bytes', sys.argv[1], options=json.loads(sys.argv[2]), shard_tokens=700, shard=(1, 2))
"""
  command = [sys.executable, "-c", code, str(tmp_path / "s"), json.dumps(options)]
  child = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=cli.environment())
  deadline = time.monotonic() + 60
  while not (tmp_path / "s.reached").exists():
    assert child.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.02)
  os.kill(child.pid, signal_to)
  child.wait()
  folder = tmp_path / ".s.pieces.partial"
  return folder, sorted(path.name for path in folder.glob("piece-*.json"))


def test_after_a_kill_only_missing_pieces_are_prepared(tmp_path, options, whole):
  folder, done = killed_in_mid_shard(tmp_path, options, signal.SIGKILL)
  assert len(done) == 2
  assert list(folder.glob(".piece-*.tmp"))  # of the third piece
  before = {name: (folder / name).stat().st_mtime_ns for name in done}
  # One of the two complete pieces has lost a byte; it is detected by its size and prepared again.
  tokens = folder / done[0].replace(".json", ".train.tokens")
  tokens.write_bytes(tokens.read_bytes()[:-1])
  arguments = {"options": options, "shard_tokens": SHARD}
  assert prepare_shard("text_files", "bytes", tmp_path / "s", shard=(1, 2), **arguments).description is None
  after = {name: (folder / name).stat().st_mtime_ns for name in done}
  assert [after[name] != before[name] for name in done] == [True, False]
  # With another number of shards, and without shards.
  prepare_shard("text_files", "bytes", tmp_path / "s", shard=(2, 3), **arguments)
  prepare("text_files", "bytes", tmp_path / "s", **arguments)
  assert contents(tmp_path / "s") == whole
  assert not folder.exists()


@pytest.mark.parametrize("name", ["train.tokens", "index", "json"])
def test_a_damaged_piece_is_prepared_again(tmp_path, options, whole, name):
  prepare_shard("text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD, shard=(1, 2))
  path = tmp_path / ".s.pieces.partial" / f"piece-000002.{name}"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1  # the same size
  path.write_bytes(content)
  prepare_shard("text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD, shard=(2, 2))
  done = prepare_shard("text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD, shard=(1, 2))
  assert done.description is not None
  assert contents(tmp_path / "s") == whole


def test_a_complete_shard_is_not_copied_again(tmp_path, monkeypatch, options, whole):
  calls = []
  copy = merging._copy

  def failing(*args):
    calls.append(args[1].name)
    if len(calls) == 4:
      raise StorageError("the disk is full")
    return copy(*args)

  monkeypatch.setattr(merging, "_copy", failing)
  for _ in range(2):
    with pytest.raises(StorageError) if len(calls) < 4 else monkeypatch.context():
      prepare("text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD)
  assert collections.Counter(calls).most_common(2)[0][1] == 2
  assert len(calls) == len(set(calls)) + 1
  assert contents(tmp_path / "s") == whole


def test_shards_with_different_arguments(tmp_path, options):
  def shard(number, tokenizer="bytes", **changed):
    changed = {"options": options, "shard_tokens": SHARD} | changed
    return prepare_shard("text_files", tokenizer, tmp_path / "s", shard=(number, 2), **changed)

  shard(1)
  for arguments, field in (
    ({"limit": 5}, "limit=None, not 5"),
    ({"shard_tokens": 900}, "shard_tokens=700, not 900"),
    ({"tokenizer": "sentencepiece:300"}, "tokenizer_from="),
    ({"options": options | {"unit": "file"}}, "options="),
  ):
    with pytest.raises(InputError, match=field) as caught:
      shard(2, **arguments)
    assert ".s.pieces.partial" in str(caught.value)
  assert shard(2).description is not None
  with pytest.raises(InputError, match=r"a store with limit=None, not 5"):
    shard(2, limit=5)


def test_one_process_per_shard(tmp_path, options):
  folder = tmp_path / ".s.pieces.partial"
  folder.mkdir()
  with locks.held(unchecked_place(folder / "shard-1-of-2.lock")):
    with pytest.raises(InputError, match=r"--shard=1/2: another process"):
      prepare_shard("text_files", "bytes", tmp_path / "s", options=options, shard=(1, 2))
    assert prepare_shard("text_files", "bytes", tmp_path / "s", options=options, shard=(2, 2)).description is None


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--shard=3/2",), "--shard=3/2: give i/n with 1 <= i <= n"),
    (("--shard=0/2",), "--shard=0/2"),
    (("--shard=half",), "--shard=half"),
    (("--workers=0",), "--workers=0: give at least 1"),
    (("--workers=-3",), "--workers=-3"),
  ],
)
def test_bad_flags(tmp_path, flags, message):
  said = cli.complaint("prepare", "--task=synthetic_sums", f"--output={tmp_path / 's'}", *flags)
  assert message in said
  assert list(tmp_path.iterdir()) == [] or [p.name for p in tmp_path.iterdir()] == [".s.lock"]


def test_the_program_in_two_shards(tmp_path):
  flags = ("--task=synthetic_sums", "--option=documents=6000", f"--output={tmp_path / 's'}")
  first, _ = cli.run("prepare", *flags, "--shard=1/2")
  assert first["finished"] is False
  assert 0 < first["pieces"]["whole"] < first["pieces"]["all"]
  second, said = cli.run("prepare", *flags, "--shard=2/2", "--workers=2")
  assert "tokens/s" in said
  timing = second["timing"]
  assert timing["workers"] == 2
  assert timing["tokens_per_second_per_core"] > 0
  assert set(timing["c4_hours"]) == {"pieces_1_hosts", "pieces_32_hosts"}  # too little text for the last step


def test_projected_hours(monkeypatch):
  monkeypatch.setattr(program, "num_threads", lambda: 4)
  prepared = Prepared(
    unchecked_place("x"), {"splits": {"train": {"tokens": 30_000_000}, "test": {"tokens": 9_000_000}}},
    tokens=20_000_000, cpu_seconds=10.0, piece_seconds=5.0, finish_seconds=3.9, workers=2,
  )  # fmt: skip
  speed = program._speed(prepared)
  assert speed["tokens_per_second_per_core"] == 2_000_000
  # 156e9 tokens at 8e6 per second and host; building the store at 1e7 per second.
  assert speed["c4_hours"] == {"pieces_1_hosts": 5.42, "pieces_32_hosts": 0.17, "finish": 4.33}
  assert "finish" not in program._speed(dataclasses.replace(prepared, description=None))["c4_hours"]
  assert program._speed(dataclasses.replace(prepared, tokens=0)) == {}


def test_a_worker_that_dies(tmp_path, monkeypatch, options):
  start = workers._start

  def dying(workers):
    process = start(workers)
    process.kill()
    return process

  monkeypatch.setattr(workers, "_start", dying)
  with pytest.raises(ChildProcessError, match=r"SIGKILL \(possibly out of memory.* the same command continues"):
    prepare("text_files", "bytes", tmp_path / "s", options=options, workers=2)
  assert not (tmp_path / "s").exists()


_MEASURED = """
import re, sys
from cyb_jax.data import merging, pieces, prepare, chunks, tasks
merging._SORTED_ROWS = merging._READ_ROWS = 1000
pieces._BATCH_BYTES = 100_000
chunks.CHUNK_BYTES = 1 << 16
def read(group, part):
  return (f'{number % (count - 7)} {"text " * 20}' for number in range(count))
def peak():  # of this process alone; what getrusage says, a child inherits
  return int(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1]) / 1024
found = []
for count in (5000, 100000):
  source = tasks.Source(('train',), read)
  tasks.open_task = lambda *_: tasks.Task('own', {}, {'count': count}, (), lambda: source)
  store = prepare('own', 'bytes', f'{sys.argv[1]}/{count}', shard_tokens=1 << 20, progress=False)
  assert store.description['splits']['train']['duplicates_dropped'] == 7
  found.append(peak())
print(found[1] - found[0])
"""


def test_memory_does_not_grow_with_the_corpus(tmp_path):
  """A corpus with 20 times the documents. A set of their digests would take 9 MB more, and their tokens 20 MB."""
  done = subprocess.run(
    [sys.executable, "-c", _MEASURED, str(tmp_path)], capture_output=True, text=True, env=cli.environment(), timeout=120
  )
  assert done.returncode == 0, done.stderr
  assert float(done.stdout) < 5


# With several buckets.


class _Bucket(MemoryFileSystem):
  """An in-memory gs://; `trouble` is called with (operation, path) before each access, and may raise."""

  protocol = ("gcs", "gs")
  store: dict = {}  # noqa: RUF012
  pseudo_dirs = [""]  # noqa: RUF012
  trouble = None
  cachable = False

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix("gcs://").removeprefix("gs://"))

  def _open(self, path, mode="rb", **kwargs):
    if type(self).trouble:
      type(self).trouble(mode, path)
    return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
  fsspec.register_implementation("gcs", _Bucket, clobber=True)
  monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
  monkeypatch.setattr(locks, "_SECONDS_TO_SETTLE", 0.01)
  monkeypatch.setattr(_Bucket, "store", {})
  monkeypatch.setattr(_Bucket, "pseudo_dirs", [""])
  gpath.backend_lib.fsspec_backend._get_filesystem.cache_clear()
  monkeypatch.setattr(
    gpath.backend_lib._FileSystemSpecBackend, "_get_filesystem", lambda self, name: _Bucket(), raising=True
  )
  yield _Bucket
  # The tests of other modules use the real file system, with a simulated server.
  with contextlib.suppress(ImportError):
    import gcsfs

    fsspec.register_implementation("gcs", gcsfs.GCSFileSystem, clobber=True)


def objects(bucket, prefix):
  return {
    path.removeprefix(f"/{prefix}/"): file.getvalue()
    for path, file in bucket.store.items()
    if path.startswith(f"/{prefix}/")
  }


def test_the_tokenizer_of_a_store_in_a_bucket(tmp_path, bucket):
  tokenizers.train_sentencepiece(["one two three"] * 9, 266).save(tmp_path)
  model = tokenizers.open_tokenizer(tmp_path / "tokenizer.model")
  for name, spec in (("s", str(tmp_path / "tokenizer.model")), ("b", "bytes"), ("t", "sentencepiece:310")):
    prepare("synthetic_lookups", spec, f"gs://b/{name}", options={"documents": 64})
  assert [stores.tokenizer_spec(f"gs://b/{name}") for name in "sbt"] == ["gs://b/s", "bytes", "sentencepiece:310"]
  assert tokenizers.open_tokenizer("gs://b/s").describe() == model.describe()
  with pytest.raises(InputError, match=r"data\.tokenizer='gs://b/nothing': there is no token store at this path"):
    tokenizers.open_tokenizer("gs://b/nothing")


def test_a_store_in_a_bucket(tmp_path, monkeypatch, bucket, options, whole):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  arguments = {"options": options, "shard_tokens": SHARD}
  for number in (1, 2):
    assert not is_store("gs://b/deep/s")
    done = prepare_shard("text_files", "bytes", "gs://b/deep/s", shard=(number, 2), **arguments)
  assert objects(bucket, "b/deep/s") == whole
  assert objects(bucket, "b/deep/.s.pieces.partial") == {}
  assert done.description["fingerprint"] == json.loads(whole["store.json"])["fingerprint"]
  assert not (tmp_path / "cache" / "cyb_jax" / "copies").exists()  # preparing does not need a local copy

  # Opening copies the store; the second time, only its description is read.
  reads = []
  bucket.trouble = lambda mode, path: reads.append(path)
  store = TokenStore.open("gs://b/deep/s")
  assert store.path == tmp_path / "cache" / "cyb_jax" / "copies" / store.fingerprint
  assert {name: content for name, content in contents(store.path).items() if name != ".lock"} == whole
  reads.clear()
  assert TokenStore.open("gs://b/deep/s").path == store.path
  assert reads == ["/b/deep/s/store.json"]
  assert prepare("text_files", "bytes", "gs://b/deep/s", **arguments).path == store.path


def test_an_interrupted_copy(tmp_path, monkeypatch, bucket, options, whole):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  bucket.store.update({f"/b/s/{name}": _file(content) for name, content in whole.items()})
  reads = []

  def breaking(mode, path):
    reads.append(path)
    if path.endswith("train-00002.tokens") and len(reads) < 30:
      raise OSError("503 Backend Error")

  bucket.trouble = breaking
  with pytest.raises(StorageError, match=r"gs://b/s/train-00002\.tokens can't be read: 503 Backend Error; finished"):
    TokenStore.open("gs://b/s")
  before = list(reads)
  reads.extend([""] * 30)
  TokenStore.open("gs://b/s")
  again = set(before) & set(reads[len(before) + 30 :])
  assert not any(name.endswith(("train-00000.tokens", "train-00001.tokens")) for name in again)

  # A copy that differs from the prepared store is not opened.
  shutil.rmtree(tmp_path / "cache")
  bucket.trouble = None
  bucket.store["/b/s/train-00001.tokens"] = _file(b"!" * len(whole["train-00001.tokens"]))
  with pytest.raises(InputError, match=r"gs://b/s/train-00001\.tokens differs from the"):
    TokenStore.open("gs://b/s")
  with pytest.raises(InputError, match=r"gs://b/nothing/store\.json cannot be read"):
    TokenStore.open("gs://b/nothing")


def _file(content):
  from fsspec.implementations.memory import MemoryFile

  return MemoryFile(None, "/", content)


def test_a_failing_bucket_loses_nothing(bucket, options, whole):
  """The bucket fails at each kind of write in turn; the same call continues."""
  seen = set()
  arguments = {"options": options, "shard_tokens": SHARD}

  def trouble(mode, path):
    kind = "".join(c for c in os.path.basename(path) if not c.isdigit())
    if mode == "wb" and kind not in seen and not kind.endswith(".lock"):
      seen.add(kind)
      raise OSError("503 Backend Error")

  bucket.trouble = trouble
  failures = 0
  while not is_store("gs://b/s"):
    try:
      prepare_shard("text_files", "bytes", "gs://b/s", **arguments)
    except StorageError as error:
      assert "503 Backend Error; finished files are kept, and the same command continues" in str(error)  # noqa: PT017
      assert "gs://b/" in str(error)  # noqa: PT017
      failures += 1
  bucket.trouble = None
  assert failures == len(seen) >= 8
  assert objects(bucket, "b/s") == whole


def test_a_bucket_with_other_content(bucket, options):
  bucket.store["/b/s/thesis.tex"] = _file(b"years of work")
  with pytest.raises(InputError, match=r"gs://b/s.*not a token store"):
    prepare_shard("text_files", "bytes", "gs://b/s", options=options)
  assert objects(bucket, "b") == {"s/thesis.tex": b"years of work"}


def test_leases_in_a_bucket(monkeypatch, bucket, options):
  monkeypatch.setattr(locks, "_SECONDS_UNTIL_DEAD", 0.6)
  monkeypatch.setattr(locks, "_SECONDS_BETWEEN_RENEWALS", 0.1)
  lock = unchecked_place("gs://b/.s.pieces.partial/shard-1-of-2.lock")
  with locks.held(lock), pytest.raises(InputError, match=rf"--shard=1/2: process {os.getpid()} on "):
    prepare_shard("text_files", "bytes", "gs://b/s", options=options, shard=(1, 2))
  assert streams.size_of(lock) is None
  # The lease of a dead process is taken over.
  streams.write_json(lock, {"host": "h", "pid": 1, "token": "t", "signs": 3})
  assert prepare_shard("text_files", "bytes", "gs://b/s", options=options, shard=(1, 2)).description is None


def test_two_processes_that_start_a_lease_at_once(monkeypatch, bucket):
  monkeypatch.setattr(locks, "_SECONDS_TO_SETTLE", 0.3)
  lock = unchecked_place("gs://b/.s.pieces.partial/shard-1-of-2.lock")
  read, both, refused = streams.read_json, threading.Barrier(2), threading.Event()
  local, outcomes = threading.local(), []

  def read_together(path):
    found = read(path)
    if not hasattr(local, "started"):
      local.started = True
      both.wait(10)  # neither has written its lease yet
    return found

  def start():
    try:
      with locks.held(lock):
        outcomes.append("held")
        assert refused.wait(10)
        assert streams.size_of(lock) is not None  # the refused process has not removed it
    except locks.Busy as busy:
      outcomes.append(str(busy))
      refused.set()

  monkeypatch.setattr(streams, "read_json", read_together)
  threads = [threading.Thread(target=start) for _ in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(20)
  assert sorted(outcomes) == ["held", f"process {os.getpid()} on {socket.gethostname()}"]
  assert streams.size_of(lock) is None


def test_errors_of_a_local_disk(tmp_path, monkeypatch, options, whole):
  """The disk is full while a piece is written: the error is one line, and complete pieces are kept."""
  write, calls = streams.Output.write, []

  def full(self, content):
    calls.append(self.path)
    if len(calls) == 12:
      with failures.access(self.path, "written"):
        raise OSError(28, "No space left on device")
    write(self, content)

  monkeypatch.setattr(streams.Output, "write", full)
  with pytest.raises(StorageError, match=r"can't be written: the disk is full; finished files are kept") as caught:
    prepare("text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD)
  assert "\n" not in str(caught.value)
  assert not list((tmp_path / ".s.pieces.partial").glob(".*.tmp"))
  prepare("text_files", "bytes", tmp_path / "s", options=options, shard_tokens=SHARD)
  assert contents(tmp_path / "s") == whole
