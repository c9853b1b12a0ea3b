"""The sources jsonl, parquet, hf and compressed text files: documents, weights, and invalid input."""

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys

import numpy as np
import pytest

from cyb_jax.data import open_task, prepare, prepare_shard
from cyb_jax.data.tasks import files as task_files
from cyb_jax.data.tasks import has_targets, hf, parquet
from cyb_jax.data.tasks.records import RecordForm
from cyb_jax.errors import InputError

pyarrow = pytest.importorskip("pyarrow")

END = 256
TEXTS = [f"document {i}: {'word ' * (i % 7)}number {i * i}, naïve\n" for i in range(300)]
PAIRS = [(f"Q: {i} + {i}?\nA:", f" {2 * i}") for i in range(300)]
PACKERS = {
  "": lambda content: content,
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


def json_lines(rows):
  return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_parquet(path, columns, **options):
  from pyarrow import parquet as library

  library.write_table(pyarrow.table(columns), path, **options)


@pytest.fixture
def small(monkeypatch):
  """Many pieces of little text."""
  monkeypatch.setattr(task_files, "_SPAN_BYTES", (1500, 1500))
  monkeypatch.setattr(parquet, "_PIECE_BYTES", 2000)
  monkeypatch.setattr(hf, "_PIECE_ROWS", 40)


@pytest.fixture
def corpus(tmp_path):
  """The same texts for every source: task -> its options."""
  pytest.importorskip("datasets")
  (tmp_path / "a.jsonl").write_bytes(json_lines({"n": 1, "body": text} for text in TEXTS[:200]))
  (tmp_path / "b.json.gz").write_bytes(gzip.compress(json_lines({"body": text} for text in TEXTS[200:])))
  write_parquet(tmp_path / "a.parquet", {"body": TEXTS[:200], "n": [1] * 200}, row_group_size=30)
  write_parquet(tmp_path / "b.parquet", {"body": TEXTS[200:]}, row_group_size=30)
  (tmp_path / "folder").mkdir()
  (tmp_path / "folder" / "train.jsonl").write_bytes(json_lines({"body": text} for text in TEXTS))
  return {
    "jsonl": {"pattern": f"{tmp_path}/*.json*", "text_key": "body"},
    "parquet": {"pattern": f"{tmp_path}/*.parquet", "text_key": "body"},
    "hf": {"dataset": f"{tmp_path}/folder", "text_key": "body"},
  }


@pytest.fixture(autouse=True)
def cached_datasets(tmp_path_factory, monkeypatch):
  datasets = pytest.importorskip("datasets")
  monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


def digests(store):
  return {split: [shard["sha256"] for shard in of["shards"]] for split, of in store.description["splits"].items()}


@pytest.mark.parametrize("task", ["jsonl", "parquet", "hf"])
def test_the_documents_are_the_rows_for_any_division(task, corpus, small):
  opened = open_task(task, corpus[task])
  assert len(opened.pieces()) > 3
  read = [document.text for piece in opened.pieces() for _, document in opened.read(piece)]
  assert read == TEXTS
  assert opened.splits == ("train", "test", "validation")
  assert opened.annotations == ()


def test_all_sources_of_the_same_texts_give_the_same_tokens(tmp_path, corpus, small):
  stores = [prepare(task, "bytes", tmp_path / task, options=options) for task, options in corpus.items()]
  streamed = prepare("hf", "bytes", tmp_path / "streamed", options=corpus["hf"] | {"streaming": "yes"})
  assert all(digests(store) == digests(stores[0]) for store in [*stores[1:], streamed])
  ids = np.concatenate([np.fromfile(stores[0].path / f"{split}-00000.tokens", "<u2") for split in stores[0].splits])
  found = [part[1:].astype(np.uint8).tobytes().decode() for part in np.split(ids, np.flatnonzero(ids == END))]
  assert sorted(filter(None, found)) == sorted(TEXTS)


@pytest.mark.parametrize("task", ["jsonl", "parquet", "hf"])
def test_any_number_of_shards_and_workers_gives_the_same_store(task, tmp_path, corpus, small):
  whole = prepare(task, "bytes", tmp_path / "whole", options=corpus[task], shard_tokens=5000)
  for number in (2, 1):
    prepare_shard(task, "bytes", tmp_path / "parts", options=corpus[task], shard_tokens=5000, shard=(number, 2))
  parts = prepare(task, "bytes", tmp_path / "parts", options=corpus[task], shard_tokens=5000)
  assert parts.fingerprint == whole.fingerprint
  assert len(digests(whole)["train"]) > 2


_WORKERS = """
import json, sys
from cyb_jax.data import prepare
task, options, output = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
from cyb_jax.data.tasks import files, hf, parquet
files._SPAN_BYTES, parquet._PIECE_BYTES, hf._PIECE_ROWS = (1500, 1500), 2000, 40
print(prepare(task, "bytes", output, options=options, shard_tokens=5000, workers=2).fingerprint)
print(*sorted({"tensorflow", "seqio", "torch"} & set(sys.modules)))
"""


def test_worker_processes_read_rows_without_tensorflow(tmp_path, corpus, small):
  whole = prepare("jsonl", "bytes", tmp_path / "whole", options=corpus["jsonl"], shard_tokens=5000)
  # Worker processes must divide the source like their parent, so the sizes of the package are used.
  arguments = [sys.executable, "-c", _WORKERS, "jsonl", json.dumps(corpus["jsonl"]), str(tmp_path / "two")]
  done = subprocess.run(arguments, capture_output=True, text=True, check=True)
  fingerprint, imported = done.stdout.split("\n")[:2]
  assert fingerprint == whole.fingerprint
  assert imported == ""


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("unit", ["file", "line"])
def test_compressed_text_is_read(tmp_path, suffix, unit):
  content = "first line\r\nsecond, naïve\n\nlast".encode()
  (tmp_path / f"x.txt{suffix}").write_bytes(PACKERS[suffix](content))
  task = open_task("text_files", {"pattern": f"{tmp_path}/x*", "unit": unit})
  lines = ["first line", "second, naïve", "", "last"]
  read = [document.text for piece in task.pieces() for _, document in task.read(piece)]
  assert read == ([content.decode()] if unit == "file" else lines)


def test_a_compressed_file_is_never_divided(small):
  files = task_files.Files("pattern", [task_files.epath.Path(f"x{i}.txt.gz") for i in range(3)], [4000, 10, 10])
  assert [part for part, _ in files.spans(whole_files=False)] == [[0, 0, 1, 0], [1, 0, 3, 0]]


def test_only_the_answer_of_a_prompt_and_answer_has_weight(tmp_path):
  (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json_lines({"q": q, "a": a} for q, a in PAIRS)))
  options = {"pattern": f"{tmp_path}/x.jsonl.gz", "prompt_key": "q", "answer_key": "a"}
  store = prepare("jsonl", "bytes", tmp_path / "store", options=options)
  assert has_targets("jsonl", options)
  assert not has_targets("jsonl", {"text_key": "q"})
  tokens, weights = store.windows("train", np.array([0]), store.num_tokens("train") - 1)
  weighted = "".join(chr(t) if t < END else "|" for t in tokens[0, 1:][weights[0] > 0])
  kept = [pair for pair in PAIRS if "".join(pair) in {d.text for d in open_task("jsonl", options).documents("train")}]
  assert weighted == "".join(f"{answer}|" for _, answer in kept)


def test_a_separator_is_written_between_prompt_and_answer():
  form = RecordForm(prompt_key="q", answer_key="a", separator=r"\n")
  document = form.document({"q": "Why?", "a": "So."}, "row 1")
  assert document.text == "Why?\nSo."
  # White space before the answer belongs to it, as in lm-evaluation-harness.
  assert document.weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_separate_files_are_the_held_out_splits(tmp_path):
  for name in ("train", "validation"):
    (tmp_path / f"{name}.jsonl").write_bytes(json_lines({"text": f"{name} {i}"} for i in range(50)))
  options = {"pattern": f"{tmp_path}/train.jsonl", "validation_pattern": f"{tmp_path}/validation.jsonl"}
  task = open_task("jsonl", options)
  assert task.splits == ("train", "validation")
  assert [document.text for document in task.documents("validation")] == [f"validation {i}" for i in range(50)]


BAD_ROWS = {
  "missing": ({"txt": "x"}, {}, ["text_key='text'", "line 3", "did you mean 'txt'?"]),
  "null": ({"text": None}, {}, ["text_key='text'", "line 3", "None is not a string"]),
  "number": ({"text": 7}, {}, ["line 3", "7 is not a string"]),
  "list": (["x"], {}, ["line 3 is ['x']", "an object with keys"]),
  "surrogate": ({"text": "half \ud800"}, {}, ["line 3", "lone surrogate"]),
  "answer": ({"text": "q", "a": ""}, {"prompt_key": "text", "answer_key": "a"}, ["line 3", "the answer is empty"]),
  "lone": ({"text": "q", "a": "\udc00"}, {"prompt_key": "text", "answer_key": "a"}, ["line 3", "lone surrogate"]),
  "chat": ({"text": "x", "m": "hello"}, {"messages_key": "m"}, ["line 3", "not a nonempty list of"]),
  "turns": (
    {"text": "x", "m": [{"role": "user", "content": "x"}]}, {"messages_key": "m"}, ["line 3", "no turn of the role"]
  ),
  "content": (
    {"text": "x", "m": [{"role": "assistant", "content": None}]}, {"messages_key": "m"}, ["line 3", "message 1: None"]
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_one_error_with_file_and_row(tmp_path, case):
  row, options, parts = BAD_ROWS[case]
  right = {"text": "x", "a": "y", "m": [{"role": "assistant", "content": "z"}]}
  path = tmp_path / "x.jsonl"
  path.write_bytes(json_lines([right, right, row]))
  task = open_task("jsonl", {"pattern": str(path)} | options)
  with pytest.raises(InputError) as caught:
    list(task.read(task.pieces()[0]))
  message = str(caught.value)
  assert "\n" not in message
  assert all(part in message for part in [str(path), *parts]), message


def test_a_bad_line_in_a_divided_file_is_reported_with_its_number(tmp_path, small):
  lines = json_lines({"text": text} for text in TEXTS).splitlines(keepends=True)
  lines[222] = b"{'text': 1}\n"
  (tmp_path / "x.jsonl").write_bytes(b"".join(lines))
  task = open_task("jsonl", {"pattern": f"{tmp_path}/x.jsonl"})
  with pytest.raises(InputError, match=r"x.jsonl, line 223 is not a JSON object"):
    [list(task.read(piece)) for piece in task.pieces()]


def test_a_bad_row_of_a_table_is_reported_with_its_number(tmp_path, small):
  write_parquet(tmp_path / "x.parquet", {"text": [*TEXTS[:99], None, "x"]}, row_group_size=30)
  task = open_task("parquet", {"pattern": f"{tmp_path}/x.parquet"})
  with pytest.raises(InputError, match=r"x.parquet, row 100: None is not a string"):
    [list(task.read(piece)) for piece in task.pieces()]


@pytest.mark.parametrize("suffix", [suffix for suffix in PACKERS if suffix])
@pytest.mark.parametrize("task", ["jsonl", "text_files"])
def test_a_truncated_file_is_an_error_that_names_it(tmp_path, task, suffix):
  rng = np.random.default_rng(0)
  rows = [{"text": bytes(rng.integers(97, 123, 100, np.uint8)).decode()} for _ in range(5000)]
  content = PACKERS[suffix](json_lines(rows) if task == "jsonl" else "\n".join(r["text"] for r in rows).encode())
  path = tmp_path / f"x.txt{suffix}"
  path.write_bytes(content[: len(content) // 2])
  with pytest.raises(InputError, match=rf"x.txt{suffix}.*is damaged or truncated"):
    prepare(task, "bytes", tmp_path / "store", options={"pattern": str(path)})
  # No incomplete files remain, except the lock.
  assert {p.name for p in tmp_path.iterdir()} <= {path.name, ".store.lock"}


NOT_TEXT = {
  "x.jsonl": (b'{"text": "x"}\n', "data.task='jsonl'"),
  "x.jsonl.gz": (gzip.compress(b'{"text": "x"}\n'), "data.task='jsonl'"),
  "x.txt": (b'{"text": "x"}\n{"text": "y"}\n', "data.task='jsonl'"),
  "x.json": (b'{"text": "x"}', "data.task='jsonl'"),
  "x": (b"PAR1....", "data.task='parquet'"),
  "y.txt": (gzip.compress(b"text"), "suffix .gz"),
  "long.txt": (b'{"text": "' + b"x" * 100_000 + b'"}\n' + b'{"text": "y"}\n', "data.task='jsonl'"),
  "array.json": (b'[\n {"text":\n "x"}\n]\n', "data.task='jsonl'"),
  "object.json": (b'{\n "text": "x"\n}\n', "data.task='jsonl'"),
  "bom.txt": (b'\xef\xbb\xbf{"text": "x"}\n{"text": "y"}\n', "data.task='jsonl'"),
  "z.txt": (b"PK\x03\x04....", "extract its files"),
}


@pytest.mark.parametrize("name", NOT_TEXT)
def test_text_files_rejects_other_formats_and_names_the_right_task(tmp_path, name):
  content, part = NOT_TEXT[name]
  (tmp_path / name).write_bytes(content)
  with pytest.raises(InputError) as caught:
    open_task("text_files", {"pattern": f"{tmp_path}/{name}"})
  assert name in str(caught.value)
  assert part in str(caught.value)


def test_prose_that_begins_with_a_brace_is_text(tmp_path):
  (tmp_path / "x.txt").write_text("{not json\n{}\n")
  assert open_task("text_files", {"pattern": f"{tmp_path}/x.txt"}).splits


REFUSED = {
  "pattern": ("jsonl", {}, None, "pattern=''"),
  "array": ("jsonl", {}, b'[{"text": "x"}]', "a single JSON array"),
  "same": ("jsonl", {"prompt_key": "q", "answer_key": "q"}, b"{}\n", "prompt_key is the same"),
  "both": ("jsonl", {"text_key": "a", "messages_key": "b"}, b"{}\n", "text_key is also given"),
  "prompt": ("jsonl", {"prompt_key": "a"}, b"{}\n", "give answer_key too"),
  "separator": ("jsonl", {"separator": "x"}, b"{}\n", "give prompt_key and answer_key"),
  "option": ("jsonl", {"textkey": "x"}, b"{}\n", "no such option"),
  "no_parquet": ("parquet", {}, b"text", "not a Parquet file"),
  "empty": ("parquet", {}, b"", "not a Parquet file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unreadable_source_is_rejected_before_data_is_read(tmp_path, case):
  task, options, content, part = REFUSED[case]
  if content is not None:
    (tmp_path / "x").write_bytes(content)
    options = options | {"pattern": f"{tmp_path}/x"}
  with pytest.raises(InputError, match=part.replace("(", r"\(")):
    open_task(task, options)


def test_a_table_without_rows_or_without_the_column_is_rejected(tmp_path):
  write_parquet(tmp_path / "empty.parquet", {"text": pyarrow.array([], pyarrow.string())})
  with pytest.raises(InputError, match=r"empty.parquet: these Parquet files have no rows"):
    open_task("parquet", {"pattern": f"{tmp_path}/empty.parquet"})
  write_parquet(tmp_path / "full.parquet", {"body": ["x"]})
  with pytest.raises(InputError, match=r"text_key='text': .*full.parquet has no such column; there are body"):
    open_task("parquet", {"pattern": f"{tmp_path}/full.parquet"})
  # One of many files has another schema.
  write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
  task = open_task("parquet", {"pattern": f"{tmp_path}/[af]*.parquet"})
  with pytest.raises(InputError, match=r"full.parquet has no such column"):
    [list(task.read(piece)) for piece in task.pieces()]


def test_a_missing_dataset_is_one_error(tmp_path, corpus):
  with pytest.raises(InputError, match=r"validation_split='dev': the dataset has no split 'dev'; it has train"):
    open_task("hf", corpus["hf"] | {"validation_split": "dev"})
  (tmp_path / "nothing").mkdir()
  with pytest.raises(InputError, match="no file matches"):
    open_task("hf", {"dataset": f"{tmp_path}/nothing"})
  with pytest.raises(InputError, match="it is a file; give its folder"):
    open_task("hf", {"dataset": f"{tmp_path}/folder/train.jsonl"})
  (tmp_path / "nothing" / "state.json").write_text("{}")
  with pytest.raises(InputError, match="it was written by save_to_disk"):
    open_task("hf", {"dataset": f"{tmp_path}/nothing"})
  with pytest.raises(InputError, match="has no revisions"):
    open_task("hf", corpus["hf"] | {"revision": "main"})
  with pytest.raises(InputError, match=r"line|row 1 has no such key; did you mean 'body'\?"):
    list(open_task("hf", corpus["hf"] | {"text_key": "bodies"}).documents("train"))


def test_a_string_of_a_table_that_is_not_utf8_is_reported_with_its_row(tmp_path):
  raw = pyarrow.array([b"right", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
  write_parquet(tmp_path / "x.parquet", {"text": raw})
  task = open_task("parquet", {"pattern": f"{tmp_path}/x.parquet"})
  with pytest.raises(InputError, match=r"x.parquet, row 2: a string is not UTF-8"):
    list(task.read(task.pieces()[0]))


def test_a_byte_order_mark_is_not_text(tmp_path):
  (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines([{"text": "x"}, {"text": "y"}]))
  task = open_task("jsonl", {"pattern": f"{tmp_path}/x.jsonl"})
  assert [document.text for _, document in task.read(task.pieces()[0])] == ["x", "y"]


def test_after_a_bad_row_nothing_remains_and_the_corrected_file_is_prepared(tmp_path, small):
  path = tmp_path / "x.jsonl"
  path.write_bytes(json_lines([*({"text": text} for text in TEXTS), {"text": None}]))
  with pytest.raises(InputError, match="line 301"):
    prepare("jsonl", "bytes", tmp_path / "store", options={"pattern": str(path)})
  assert {file.name for file in tmp_path.iterdir()} <= {"x.jsonl", ".store.lock"}
  path.write_bytes(json_lines([*({"text": text} for text in TEXTS), {"text": "last"}]))
  assert prepare("jsonl", "bytes", tmp_path / "store", options={"pattern": str(path)}).splits


def test_a_line_of_any_length_is_read(tmp_path):
  long = "x" * 3_000_000
  (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(json_lines([{"text": long}, {"text": "y"}])))
  task = open_task("jsonl", {"pattern": f"{tmp_path}/x.jsonl.gz"})
  assert [len(document.text) for _, document in task.read(task.pieces()[0])] == [3_000_000, 1]


def test_line_numbers_count_from_one(tmp_path):
  path = tmp_path / "x"
  path.write_bytes(b"a\nbb\n\nc")
  assert [task_files.line_number(task_files.epath.Path(path), at) for at in (0, 2, 5, 6)] == [1, 2, 3, 4]
  with io.BytesIO(path.read_bytes()) as file:
    assert list(task_files.lines(file, 1, None)) == [(2, b"bb\n"), (5, b"\n"), (6, b"c")]


def test_a_document_in_two_splits_remains_in_the_held_out_split(tmp_path):
  rows = {"train": [f"train {i}" for i in range(40)] + ["both"], "validation": ["both", "own"], "test": ["both", "own"]}
  for split, texts in rows.items():
    (tmp_path / f"{split}.jsonl").write_bytes(json_lines({"text": text} for text in texts))
  patterns = {"pattern": "train", "validation_pattern": "validation", "test_pattern": "test"}
  options = {name: f"{tmp_path}/{split}.jsonl" for name, split in patterns.items()}
  splits = prepare("jsonl", "bytes", tmp_path / "store", options=options).description["splits"]
  counts = {split: (of["documents"], of["duplicates_dropped"]) for split, of in splits.items()}
  # All documents of test also occur in validation, which keeps them, so there is no test split.
  assert counts == {"train": (40, 1), "validation": (2, 0)}


def test_a_train_split_of_duplicates_is_one_error(tmp_path):
  for split in ("train", "validation"):
    (tmp_path / f"{split}.jsonl").write_bytes(json_lines({"text": f"text {i % 5}"} for i in range(500)))
  options = {"pattern": f"{tmp_path}/train.jsonl", "validation_pattern": f"{tmp_path}/validation.jsonl"}
  with pytest.raises(InputError, match=r"all 500 documents of train also occur in a held-out split \(validation\)"):
    prepare("jsonl", "bytes", tmp_path / "store", options=options)
  assert not (tmp_path / "store").exists()
  assert not (tmp_path / ".store.pieces.partial").exists()
