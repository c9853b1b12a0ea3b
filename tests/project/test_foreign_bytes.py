"""Damaged foreign files are refused with the project's errors: every reader, and valid files with random damages.

The readers are in tests/support/foreign_readers.py. The slow test runs each of them for CYB_JAX_FUZZ_SECONDS (20) in a
process of its own, whose memory is limited, and prints the cases that failed.
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys

import cli
import fuzzing
import mutations
import pytest
from foreign_readers import READERS

from cyb_jax import jsonl
from cyb_jax.cli import contexts
from cyb_jax.errors import InputError
from cyb_jax.studies import runner
from cyb_jax.training.metrics import read_metrics

# Cases that take a second or more.
_SLOW = {"export": 2, "checkpoint": 2, "sealed_checkpoint": 2}
_CASES = 8


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
  """name -> the valid files of a reader, written once."""
  written = {}

  def of(name):
    if name not in written:
      written[name] = fuzzing.Seeds(READERS[name], tmp_path_factory.mktemp(name))
    return written[name]

  return of


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused(seeds, name):
  of = seeds(name)
  for number in range(_SLOW.get(name, _CASES)):
    of.check(fuzzing.generator(of.reader, number))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_refused(name):
  seconds = float(os.environ.get("CYB_JAX_FUZZ_SECONDS", "20"))
  command = [sys.executable, fuzzing.__file__, f"--reader={name}", f"--seconds={seconds}"]
  done = subprocess.run(command, capture_output=True, text=True, env=cli.environment(), cwd=cli.ROOT)
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  assert json.loads(done.stdout.splitlines()[-1])["cases"] > 0


# Faults that were found, and the files with which they were found.


def _json(**fields):
  """Changes fields of a JSON object; a name may have dots."""

  def change(content):
    value = json.loads(content)
    for name, new in fields.items():
      place, keys = value, name.split("__")
      for key in keys[:-1]:
        place = place[int(key) if isinstance(place, list) else key]
      place[int(keys[-1]) if isinstance(place, list) else keys[-1]] = new
    return json.dumps(value).encode()

  return change


def _replaced(old, new):
  return lambda content: content.replace(old, new, 1)


def _always(content):
  return lambda _: content


def _nested(depth):
  return b'{"a": ' * depth + b"1" + b"}" * depth


def _gguf_arrays(depth):
  """A GGUF file with one key, whose value is an array of an array of an array and so on."""
  inner = struct.pack("<IQ", 9, 1) * depth
  return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 9) + inner


def _gguf_endless():
  """A GGUF file with one key, whose value is an array of 2^40 strings."""
  return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 8, 1 << 40)


def _with_long_entry(content):
  value = json.loads(content)
  value["added_tokens"][0] |= {"content": "a" * 5000, "id": 0}
  return json.dumps(value).encode()


def _without_unknown(content):
  value = json.loads(content)
  del value["model"]["unk_id"]
  return json.dumps(value).encode()


def _with_same_id(content):
  value = json.loads(content)
  value["added_tokens"].append(value["added_tokens"][0] | {"content": "other"})
  return json.dumps(value).encode()


FOUND = {
  "deep JSON": ("huggingface_config", "qwen2/config.json", _always(_nested(5000)), "nested too deeply"),
  "JSON that only Python's repr can't print": (
    "huggingface_config", "qwen2/config.json", _replaced(b"64", _nested(900)), "nested too deeply"),
  "layers": (
    "huggingface_config", "qwen2/config.json", _json(num_hidden_layers=2**31), "num_hidden_layers = 2147483648"),
  "a float beyond floats": (
    "huggingface_config", "qwen2/config.json", _json(rope_theta=10**400), "rope_theta = 10+... must be of type float"),
  "a negative rank": (
    "peft", "llama_lora/adapter_config.json", _json(r=-1, use_rslora=True), "r = -1 must be at least 1"),
  "negative rows": ("export", "model/config.json", _json(cyb_jax__rows=-(2**62)), "rows, 300 vocabulary entries"),
  "many rows": ("export", "model/config.json", _json(cyb_jax__table_rows=2**31), "300 of 2147483648 rows"),
  "a GGUF's architecture": ("gguf", "plain.gguf", _replaced(b"llama", b"ll\xffma"), "architecture' is damaged"),
  "a GGUF's nested arrays": ("gguf_tokenizer", "plain.gguf", _always(_gguf_arrays(5000)), "truncated or damaged"),
  "an infinite id": (
    "tokenizer_json", "qwen2/tokenizer.json", _json(added_tokens__0__id=float("inf")), "contains no tokenizer"),
  "an id of two entries": ("tokenizer_json", "qwen2/tokenizer.json", _with_same_id, "added_tokens assign the id 0"),
  "no unknown entry": ("tokenizer_json", "unigram/tokenizer.json", _without_unknown, "can't encode or decode with it"),
  "a byte as the end token": (
    "saved_tokenizer", "sentencepiece/tokenizer.json", _json(end_id=10), "can't be control pieces"),
  "an end token with a line end": (
    "saved_tokenizer", "huggingface/tokenizer.json", _json(end_id="\n"), r"end_id = '\\n' must be an integer"),
  "a store without its tokenizer": (
    "sealed_store", "store/store.json", _json(tokenizer=None), "tokenizer = None must be an object"),
  "tokens that don't add up": (
    "sealed_store", "store/store.json", _json(splits__train__tokens=5), "splits.train.tokens = 5 must be"),
  "a file of another folder": (
    "sealed_store", "store/store.json", _json(splits__train__shards__0__file="../a"), "must be the name of a file"),
  "a loss that is a list": (
    "sealed_checkpoint", "checkpoints/1/validation/metadata", _json(loss=[1.0]), r"has the loss \[1.0\], not a finite"),
  "a meta object that is not UTF-8": (
    "sealed_checkpoint", "checkpoints/2/meta/metadata", _always(b"\xff{}"), "meta/metadata: not UTF-8"),
  "an index of arrays": (
    "sealed_checkpoint", "checkpoints/2/state/manifest.ocdbt", lambda content: content[:40], "can't be read"),
  "a config that is not UTF-8": ("run", "config.json", _always(b"\xff{}"), "is not JSON"),
  "a config that is a list": ("run", "config.json", _always(b"[1]"), r"contains \[1\] instead of a JSON object"),
  "a format that is an object": ("run", "config.json", _json(format={}), "format: {} must be an integer"),
  "a group that is a list": ("run", "config.json", _json(format=1, decoder=[]), "decoder: .* must be a group"),
  "a method that is a list": ("run", "config.json", _json(method__name=[]), r"method.name: \[\] is unknown"),
  "a tensor's type with a line end": (
    "safetensors", "model/model.safetensors", _replaced(b'"F32"', b'"F\n2"'), r"file, .* bytes \([^\n]*\); "),
  "a head size beyond floats": (
    "huggingface_config", "qwen2/config.json", _json(head_dim=10**400), "head_dim = 10+... must be an integer of 64"),
  "a pattern of no layers": (
    "huggingface_config", "gemma3/config.json", _json(sliding_window_pattern=0, layer_types=None), "at least 1"),
  "a share that is not a number": (
    "huggingface_config", "pythia/config.json", _json(rotary_pct=float("nan")), "rotary_pct = nan must be finite"),
  "a share beyond floats": (
    "huggingface_config", "pythia/config.json", _json(rotary_pct=1e308), r"rotary_pct = 1e\+308 must be from 0 to 1"),
  "a long entry": ("tokenizer_json", "unigram/tokenizer.json", _with_long_entry, r"the id 0 to 'a+\.\.\., but"),
  "many pauses": ("run", "config.json", _json(method__pauses=2**31 - 1), "method.pauses: 2147483647 must be .* 1000"),
  "a scaling that is a number": ("run", "config.json", _json(decoder__rope_scaling=5), "rope_scaling: 5 must be"),
  "an int beyond floats": ("run", "config.json", _json(optimizer__learning_rate=10**400), "10+... must be finite"),
  "a column that is not UTF-8": (
    "parquet", "snappy.parquet", lambda content: content.replace(b"text", b"te\xfft"), "is damaged or not"),
  "a GGUF's endless array": ("gguf", "plain.gguf", _always(_gguf_endless()), "the file ends inside of its header"),
  "a deep request": ("request", "chat.json", _always(_nested(900)), "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_found_faults(seeds, tmp_path, case):
  name, file, change, message = FOUND[case]
  reader, folder = READERS[name], tmp_path / "files"
  shutil.copytree(seeds(name).valid, folder)
  path = folder / file
  path.write_bytes(change(path.read_bytes()))
  if reader.seal is not None:
    reader.seal(folder, path)
  with pytest.raises(reader.errors, match=message):
    reader.read(path)


def test_lines_of_metrics_that_are_no_objects_are_skipped(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n[1]\n\xff\n{"step": 2}\n{"st')
  assert read_metrics(tmp_path) == [{"step": 1}, {"step": 2}]


def test_damaged_records_of_studies_and_evaluations(tmp_path):
  path = tmp_path / "record.json"
  for content, message in ((b'{"a": 1', "invalid JSON"), (b"\xff", "not UTF-8"), (b"[1]", "a JSON list instead of")):
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"--workdir: .*record.json: {message}"):
      runner._kept(path, dict)
    (tmp_path / "evaluation.json").write_bytes(content)
    assert contexts.measured(str(tmp_path), 3) is None
  path.write_bytes(b'{"a": 1}')
  assert runner._kept(path, dict) == {"a": 1}


def test_json_has_a_limit_of_depth():
  assert jsonl.loads("[" * 100 + "]" * 100)
  for text in ("[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101):
    with pytest.raises(ValueError, match="nested too deeply, in more than 100 levels"):
      jsonl.loads(text)


# The tool itself.


def _reader(read, mutate=None, **options):
  write = lambda folder: (folder / "a.bin").write_bytes(bytes(range(256)))  # noqa: E731
  return fuzzing.Reader("example", write, read, ("*.bin",), mutate=mutate or (lambda content, _: b"damaged"), **options)


def _unless_valid(action):
  return lambda path: action() if path.read_bytes() == b"damaged" else None


def _raise(error):
  raise error


def test_the_tool_reports_every_fault(tmp_path, monkeypatch):
  def check(name, action, **options):
    (tmp_path / name).mkdir()
    return fuzzing.Seeds(_reader(_unless_valid(action), **options), tmp_path / name).check(random.Random(0))

  assert check("refused", lambda: _raise(InputError("a.bin: damaged; fetch it again"))) == "InputError"
  assert check("read", lambda: None) == "read"
  with pytest.raises(KeyError):
    check("crash", lambda: _raise(KeyError("a")))
  with pytest.raises(fuzzing.Violation, match="of several lines"):
    check("lines", lambda: _raise(InputError("one\ntwo")))
  with pytest.raises(UnicodeEncodeError):
    check("surrogate", lambda: _raise(InputError("\ud800")))
  with pytest.raises(fuzzing.Violation, match="MiB of memory for"):
    check("memory", lambda: b"a" * (fuzzing.MEMORY_CONSTANT + (32 << 20)))
  monkeypatch.setattr(fuzzing, "SECONDS", 1)
  with pytest.raises(fuzzing.Hang):
    check("hang", lambda: [None for _ in iter(int, 1)])


def test_a_case_is_its_number_and_the_valid_file_is_restored(tmp_path):
  seen = []
  of = fuzzing.Seeds(_reader(lambda path: seen.append(path.read_bytes()), mutations.mutated_bytes), tmp_path)
  for number in (0, 1, 2, 0):
    of.check(fuzzing.generator(of.reader, number))
  valid, *damaged = seen
  assert damaged[0] == damaged[3]
  assert len({valid, *damaged}) == 4
  assert (tmp_path / "scratch" / "a.bin").read_bytes() == valid


def test_mutations_of_json_keep_it_json_mostly():
  valid = json.dumps({"a": [1, {"b": "c"}], "d": 2.5}).encode()
  texts = [mutations.mutated_json(valid, random.Random(number)) for number in range(200)]
  parsed = 0
  for text in texts:
    try:
      jsonl.loads(text)
      parsed += 1
    except ValueError:
      pass
  assert parsed > 100
  assert len(set(texts)) > 150


def test_mutations_of_safetensors_keep_the_length_of_the_header():
  header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
  valid = struct.pack("<Q", len(header)) + header + bytes(4)
  found = [mutations.mutated_safetensors(valid, random.Random(number)) for number in range(100)]
  consistent = [x for x in found if len(x) >= 12 and struct.unpack_from("<Q", x)[0] == len(x) - 12]
  assert len(consistent) > 40
