"""Damaged foreign files are refused with the project's errors: every reader, and valid files with random damages.

The readers are in tests/support/foreign_readers.py. The slow test runs each of them for CYB_JAX_FUZZ_SECONDS (20) in a
process of its own, whose memory is limited, and prints the cases that failed.
"""

import json
import os
import random
import struct
import subprocess
import sys

import cli
import fuzzing
import mutations
import pytest
from foreign_readers import READERS

from cyb_jax import jsonl
from cyb_jax.errors import InputError

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
