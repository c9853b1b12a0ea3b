"""The token store: no token is lost, no incomplete store is read, all damage is reported."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from cyb_jax.data import TokenStore, block_sample, open_task, prepare, tasks
from cyb_jax.data import store as store_module
from cyb_jax.data.tasks import split_of, text_digest
from cyb_jax.errors import InputError
from cyb_jax.storage.paths import unchecked_place

END = 256


def write_lines(path, lines):
  path.write_text("".join(line + "\n" for line in lines))
  return {"pattern": str(path), "unit": "line"}


@pytest.fixture(scope="module")
def lines():
  return [f"line {i} " + "x" * (i % 17) for i in range(400)] + ["line 3 xxx", "", "line 4 xxxx"]


@pytest.fixture(scope="module")
def options(tmp_path_factory, lines):
  return write_lines(tmp_path_factory.mktemp("text") / "x.txt", lines)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, options):
  return prepare("text_files", "bytes", tmp_path_factory.mktemp("store") / "a", options=options, shard_tokens=100)


def stream_of(lines, split):
  stream = [END]
  for line in dict.fromkeys(line for line in lines if line):
    if split_of(text_digest(line)) == split:
      stream += [*line.encode(), END]
  return np.array(stream)


def test_a_store_by_hand(tmp_path):
  options = write_lines(tmp_path / "x.txt", ["ab", "c", "ab"])
  store = prepare("text_files", "bytes", tmp_path / "s", options=options)
  assert store.splits == ("train",)
  described = store.description["splits"]["train"]
  assert described["duplicates_dropped"] == 1
  assert (store.num_tokens("train"), described["documents"], store.num_bytes("train")) == (6, 2, 3)
  assert np.fromfile(tmp_path / "s" / "train-00000.tokens", "<u2").tolist() == [END, 97, 98, END, 99, END]
  assert store.document_starts("train").tolist() == [1, 4]
  tokens, weights = store.windows("train", np.array([0, 1, 2]), 3)
  assert tokens.dtype == np.int32 and weights.dtype == np.float32  # noqa: PT018
  assert tokens.tolist() == [[END, 97, 98, END], [END, 99, END, END], [END] * 4]
  assert weights.tolist() == [[1, 1, 1], [1, 1, 0], [0, 0, 0]]
  assert store.num_windows("train", 3) == 2
  assert store.difficulty("train", np.array([0]), 3) is None
  assert store.tokenizer.decode([97, END]) == "a"
  assert store.fingerprint == json.loads((tmp_path / "s" / "store.json").read_text())["fingerprint"]


@pytest.mark.parametrize("length", [1, 7, 100, 333, 5000])
def test_windows_lose_no_token(prepared, lines, length):
  assert len(prepared.description["splits"]["train"]["shards"]) > 50  # of 100 tokens, so windows cross many borders
  for split in prepared.splits:
    stream = stream_of(lines, split)
    assert prepared.num_tokens(split) == len(stream)
    tokens, weights = prepared.windows(split, np.arange(prepared.num_windows(split, length)), length)
    assert tokens[:, 1:][weights == 1].tolist() == stream[1:].tolist()
    assert tokens[:, :-1][weights == 1].tolist() == stream[:-1].tolist()
    assert (tokens[:, 1:][weights == 0] == END).all()
    starts = prepared.document_starts(split).astype(int)
    assert (stream[starts - 1] == END).all()
    assert len(starts) == prepared.description["splits"][split]["documents"] == (stream == END).sum() - 1


def test_duplicates_are_counted(prepared):
  assert sum(split["duplicates_dropped"] for split in prepared.description["splits"].values()) == 2


def test_held_out_copies_are_kept_and_train_copies_dropped(tmp_path, monkeypatch):
  texts = {"train": ["a", "b"], "validation": ["b"]}
  source = tasks.Source(tuple(texts), lambda group, part: texts[group])
  monkeypatch.setattr(tasks, "open_task", lambda *_: tasks.Task("own", {}, {}, (), lambda: source))
  splits = prepare("own", "bytes", tmp_path / "s").description["splits"]
  assert {name: (s['documents'], s['duplicates_dropped']) for name, s in splits.items()} == {
    'train': (1, 1), 'validation': (1, 0)
  }  # fmt: skip


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece:300"])
def test_difficulties_match_their_tokens(tmp_path, tokenizer):
  options = {"documents": 200, "max_difficulty": 4}
  store = prepare("synthetic_lookups", tokenizer, tmp_path / "s", options=options, shard_tokens=999)
  indices = np.arange(store.num_windows("test", 32))
  tokens, weights = store.windows("test", indices, 32)
  difficulty = store.difficulty("test", indices, 32)
  assert difficulty.shape == (len(indices), 32)
  assert (difficulty[weights == 0] == 0).all()
  found = difficulty[weights == 1]
  expected = [d.difficulty[d.difficulty > 0] for d in open_task("synthetic_lookups", options).documents("test")]
  assert found[found > 0].tolist() == np.concatenate(expected).tolist()
  answers = [store.tokenizer.decode([i]) for i in tokens[:, 1:][difficulty > 0]]
  assert all(answer in "0123456789" for answer in answers)


def test_sentencepiece_stores_are_reproducible(tmp_path, options):
  first, second = (prepare("text_files", "sentencepiece:280", tmp_path / name, options=options) for name in "ab")
  assert first.fingerprint == second.fingerprint
  model = tmp_path / "a" / "tokenizer.model"
  given = prepare("text_files", str(model), tmp_path / "c", options=options)
  assert given.description["splits"] == first.description["splits"]
  tokens, _ = first.windows("train", np.array([0]), first.num_tokens("train") - 1)
  text = first.tokenizer.decode(tokens[0])
  assert text.startswith("line 0 line 1 xline 2 xx")


def test_large_vocabularies_take_four_bytes():
  assert store_module.token_dtype(1 << 16) == np.dtype("<u2")
  assert store_module.token_dtype((1 << 16) + 1) == np.dtype("<u4")


def test_limit(tmp_path, options):
  store = prepare("text_files", "bytes", tmp_path / "s", options=options, limit=10)
  assert store.description["splits"]["train"]["documents"] == 10


def test_the_default_place(tmp_path, monkeypatch, options):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  store = prepare("text_files", "bytes", options=options)
  assert store.path.parent == tmp_path / "cyb_jax" / "stores"
  assert store.path.name.startswith("text_files-bytes-")
  changed = (store.path / "store.json").stat().st_mtime_ns
  assert prepare("text_files", "bytes", options=options).path == store.path
  assert (store.path / "store.json").stat().st_mtime_ns == changed  # the store was opened and not written again
  assert prepare("text_files", "bytes", options=options, limit=5).path != store.path
  assert [p.name for p in store.path.parent.glob(".*.partial")] == []


def test_an_output_with_other_content(tmp_path, prepared, options):
  with pytest.raises(InputError, match="limit=None, not 3"):
    prepare("text_files", "bytes", prepared.path, options=options, limit=3, shard_tokens=100)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("years of work")
  with pytest.raises(InputError, match="not a token store"):
    prepare("text_files", "bytes", tmp_path / "mine", options=options)
  assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"


def test_an_output_that_cannot_be_written(tmp_path, options):
  (tmp_path / "file").write_text("")
  with pytest.raises(InputError, match="cannot be written"):
    prepare("text_files", "bytes", tmp_path / "file" / "store", options=options)


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece:300"])
def test_an_empty_task(tmp_path, tokenizer):
  options = write_lines(tmp_path / "x.txt", ["", ""])
  with pytest.raises(InputError, match="no text in train"):
    prepare("text_files", tokenizer, tmp_path / "s", options=options)
  assert not (tmp_path / "s").exists()
  assert list(tmp_path.glob(".*.partial")) == []


def test_bad_arguments(tmp_path, prepared, options):
  for tokenizer, message in (("sentencepiece:no", "sentencepiece:no"), ("/no/such.model", "no such file")):
    with pytest.raises(InputError, match=message):
      prepare("text_files", tokenizer, tmp_path / "s", options=options)
  with pytest.raises(InputError, match="limit=0"):
    prepare("text_files", "bytes", tmp_path / "s", options=options, limit=0)
  with pytest.raises(InputError, match=r"'dev'.* has train"):
    prepared.num_tokens("dev")
  with pytest.raises(InputError, match="sequence_length=0"):
    prepared.num_windows("train", 0)
  tokens = prepared.num_tokens("train")
  prepared.require("train", tokens - 1)
  with pytest.raises(InputError, match=f"only {tokens} tokens; give at most {tokens - 1}"):
    prepared.require("train", tokens)


def test_a_missing_store(tmp_path):
  with pytest.raises(InputError, match=r"store\.json cannot be read"):
    TokenStore.open(tmp_path)


@pytest.mark.parametrize("name", ["train-00001.tokens", "train-00001.documents", "store.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["altered", "truncated", "removed"])
def test_a_damaged_file_is_reported(tmp_path, prepared, name, damage):
  shutil.copytree(prepared.path, tmp_path / "s")
  path = tmp_path / "s" / name
  content = bytearray(path.read_bytes())
  if damage == "removed":
    path.unlink()
  elif damage == "truncated":
    path.write_bytes(content[:-1] if name.startswith("train") else content[:20])
  else:
    middle = content.index(b"bytes") if name.endswith("json") else len(content) // 2
    content[middle] ^= 1
    path.write_bytes(content)
  for verify in ("auto", True):
    with pytest.raises(InputError, match=name):
      TokenStore.open(tmp_path / "s", verify=verify)
  if damage == "altered" and name.startswith("train"):
    TokenStore.open(tmp_path / "s", verify=False)  # the size is unchanged, so only the digest detects it
  else:
    with pytest.raises(InputError, match=name):
      TokenStore.open(tmp_path / "s", verify=False)


def test_another_format_is_rejected(tmp_path, prepared):
  shutil.copytree(prepared.path, tmp_path / "s")
  (tmp_path / "s" / "store.json").write_text('{"format": 99}')
  with pytest.raises(InputError, match="format 99, but this version reads 1"):
    TokenStore.open(tmp_path / "s")


def test_a_killed_preparation_leaves_no_readable_store(tmp_path):
  # The child process stops when its train split is half written, and is killed there.
  code = """
import sys, time
from cyb_jax.data import pieces, prepare, progress
def stop(self, worker, documents, tokens):
  open(sys.argv[1] + '.reached', 'w').close()
  time.sleep(60)
pieces._BATCH_BYTES = 1000
progress.Progress.report = stop
prepare('synthetic_sums', 'bytes', sys.argv[1], options={'documents': 60})
"""
  path = tmp_path / "s"
  child = subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 60
  while not (tmp_path / "s.reached").exists():
    assert child.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.05)
  os.kill(child.pid, signal.SIGKILL)
  child.wait()
  assert not path.exists()
  assert len(list(tmp_path.glob(".s.*.partial"))) == 1
  with pytest.raises(InputError):
    TokenStore.open(path)
  store = prepare("synthetic_sums", "bytes", path, options={"documents": 60})
  assert store.description["splits"]["train"]["documents"] == 60
  assert list(tmp_path.glob(".s.*.partial")) == []
  assert store.fingerprint == prepare("synthetic_sums", "bytes", tmp_path / "t", options={"documents": 60}).fingerprint


def test_the_program(tmp_path):
  def run(*flags):
    command = [sys.executable, "-m", "cyb_jax.cli.prepare", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)

  done = run("--task=synthetic_sums", "--option", "documents=30", f"--output={tmp_path / 's'}")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert set(result) == {"output", "task", "tokenizer", "vocab_size", "fingerprint", "splits", "timing"}
  assert (result["vocab_size"], result["splits"]["train"]["documents"]) == (257, 30)
  again = json.loads(run(f"--verify={tmp_path / 's'}").stdout.splitlines()[-1])
  assert {**again, "timing": 0} == {**result, "timing": 0}
  with open(tmp_path / "s" / "train-00000.tokens", "r+b") as file:
    file.write(b"!")
  for flags, message in (
    ((f"--verify={tmp_path / 's'}",), "train-00000.tokens was altered"),
    (("--task=poems",), "data.task='poems'"),
    (("--task=synthetic_sums", "--option=documents"), "give key=value"),
    ((), "--task"),
  ):
    done = run(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# If the tests run as root, whom permissions do not restrict, the child changes its user after the imports.
_OF_ANOTHER_USER = """
import os, sys
from cyb_jax.data import TokenStore, locks, preparation, prepare, store, workers
if os.getuid() == 0:
  os.setgid(65534)
  os.setuid(65534)
path = sys.argv[1]
if sys.argv[2] == "read_only":
  try:
    open(os.path.join(os.path.dirname(path), "new"), "w")
    sys.exit("the folder can be written to")
  except PermissionError:
    pass
print(prepare("synthetic_sums", "bytes", path, options={"documents": 60}).fingerprint)
"""


def _by_another_user(path, *how):
  done = subprocess.run([sys.executable, "-c", _OF_ANOTHER_USER, path, *how], capture_output=True, text=True)
  return done.stdout.strip() if done.returncode == 0 else done.stderr


@pytest.fixture
def public():
  """A folder that other users may enter, unlike the folders of pytest."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    path.chmod(0o755)
    yield path
    path.chmod(0o755)


@pytest.mark.parametrize("left", ["lock", "pieces", "nothing"])
def test_a_store_in_a_read_only_folder_is_opened(public, left):
  path = public / "s"
  fingerprint = prepare("synthetic_sums", "bytes", path, options={"documents": 60}).fingerprint
  if left == "pieces":
    (public / ".s.pieces.partial").mkdir()
    (public / ".s.pieces.partial" / "plan.json").write_text("{}")
  if left != "lock":
    (public / ".s.lock").unlink()
  public.chmod(0o555)
  assert _by_another_user(path, "read_only") == fingerprint


def test_the_lock_of_another_user_can_be_locked(public):
  public.chmod(0o777)
  (public / ".s.lock").touch()
  (public / ".s.lock").chmod(0o444)
  found = _by_another_user(public / "s", "writable")
  assert found == prepare("synthetic_sums", "bytes", public / "s", options={"documents": 60}).fingerprint


def test_a_complete_copy_of_a_bucket_is_opened_without_a_lock(tmp_path, monkeypatch, prepared):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  copy = tmp_path / "cyb_jax" / "copies" / prepared.fingerprint
  shutil.copytree(prepared.path, copy)
  (copy / ".lock").mkdir()  # a lock that cannot be opened
  assert store_module._local_copy(unchecked_place("gs://b/s"), prepared.description) == copy


def test_a_sample_of_the_blocks_of_a_large_store_is_checked(tmp_path, options, monkeypatch):
  monkeypatch.setattr(store_module, "VERIFIED_BYTES", 100)
  monkeypatch.setattr(block_sample, "_BLOCK_BYTES", 16)
  monkeypatch.setattr(block_sample, "_BLOCKS", 12)
  store = prepare("text_files", "bytes", tmp_path / "s", options=options)
  assert store.fingerprint == store_module.fingerprint(store.description)  # the sample is not a part of it
  sample, tokens = store.path / "sample.json", store.path / "train-00000.tokens"
  recorded, content = sample.read_bytes(), tokens.read_bytes()
  blocks = json.loads(recorded)["files"][tokens.name]["blocks"]
  begins = block_sample.offsets(len(content), blocks, 16)
  assert 2 <= blocks < len(content) // 16
  for begin in begins:
    tokens.write_bytes(content[: begin + 3] + bytes([content[begin + 3] ^ 1]) + content[begin + 4 :])
    with pytest.raises(InputError, match=r"train-00000.tokens was altered; prepare the store again"):
      TokenStore.open(store.path)
  # Between the blocks, only the whole file shows it.
  unsampled = begins[0] + 16
  tokens.write_bytes(content[:unsampled] + b"?" + content[unsampled + 1 :])
  TokenStore.open(store.path)
  with pytest.raises(InputError, match=r"train-00000.tokens was altered"):
    TokenStore.open(store.path, verify=True)
  tokens.write_bytes(content)
  # A store of an earlier version has no sample; cyb-prepare --verify records it.
  sample.unlink()
  TokenStore.open(store.path)
  assert not sample.exists()
  TokenStore.open(store.path, verify=True)
  assert sample.read_bytes() == recorded
  for damaged in (b"{", b"[]", recorded.replace(store.fingerprint.encode(), b"0")):
    sample.write_bytes(damaged)
    with pytest.raises(InputError, match=r"sample.json was altered; delete it, and run cyb-prepare --verify="):
      TokenStore.open(store.path)


def test_offsets_of_sampled_blocks():
  assert block_sample.offsets(100, 3, 10) == [0, 45, 90]
  assert block_sample.offsets(25, 3, 10) == [0, 10, 20]
  assert block_sample.offsets(0, 2, 10) == []
