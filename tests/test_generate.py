"""cyb-generate as a user starts it; from ids to text."""

import json
import subprocess
import sys

import cli
import pytest
from models import tiny_config

from cyb_jax import config as configs
from cyb_jax import training
from cyb_jax.data import ByteTokenizer
from cyb_jax.data.tokenizers import encode_whole, train_sentencepiece
from cyb_jax.errors import InputError
from cyb_jax.generation import PAUSE_MARK, Continuation

# One process for many command lines: most of a process's time is its imports.
MANY = """
import json, sys
from absl import flags
from cyb_jax import generate
from cyb_jax.errors import InputError
generate.define_flags()
said = []
for words in json.load(sys.stdin):
  flags.FLAGS.unparse_flags()
  for name in flags.FLAGS:
    flags.FLAGS[name].unparse()
  flags.FLAGS(["generate", *words])
  try:
    said.append(generate.main(["generate"]))
  except InputError as error:
    said.append(str(error))
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "cyb"
  training.train(configs.freeze(tiny_config(pauses=2)), folder)
  return folder


def many(*lines):
  process = subprocess.run(
    [sys.executable, "-c", MANY], input=json.dumps(lines), capture_output=True, text=True, env=cli.environment()
  )
  assert process.returncode == 0, process.stderr[-4000:]
  return json.loads(process.stdout.strip().splitlines()[-1])


def test_it_speaks_with_marked_pauses(workdir):
  process = cli.start(
    "generate", f"--workdir={workdir}", "--prompt=a=1", "--prompt=b", "--max_new_tokens=9", "--seed=2"
  )
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  *shown, last = out.strip().splitlines()
  result = json.loads(last)
  assert {
    "text", "pauses", "tokens", "slots", "mean_pauses", "tokens_per_second", "slots_per_second", "cache_bytes",
  } <= set(result)  # fmt: skip
  assert len(result["text"]) == len(result["pauses"]) == 2
  in_all = sum(sum(row) for row in result["pauses"])
  assert result["tokens"] == sum(len(row) for row in result["pauses"])
  assert result["slots"] == result["tokens"] + in_all
  assert result["mean_pauses"] == pytest.approx(in_all / result["tokens"])
  # One layer's keys and values: 2 rows of 16 + 8 * 3 + 3 places, 2 heads of 8 numbers, 4 bytes each.
  assert result["cache_bytes"] == 2 * 2 * (16 + 8 * 3 + 3) * 2 * 8 * 4
  text = "\n".join(shown)
  assert text.startswith("a=1")
  assert text.count(PAUSE_MARK) == in_all > 0
  first, second = result["text"]
  # Lines as splitlines has them: an untrained model says whatever.
  assert text.replace(PAUSE_MARK, "") == "\n".join(f"a=1{first}\n\nb{second}\n".splitlines())


def test_flags(workdir):
  run = f"--workdir={workdir}"
  constant, again, stopped, *complaints = many(
    [run, "--prompt=a=1", "--mode=constant", "--read=mixture", "--temperature=0", "--nostream"],
    [run, "--prompt=a=1", "--mode=constant", "--read=mixture", "--temperature=0", "--nostream"],
    [run, "--prompt=a=1", "--mode=constant", "--read=mixture", "--temperature=0", "--nostream", "--stop= "],
    [run],
    [run, "--prompt="],
    [run, "--prompt=abcdefghijklmnopqrst"],
    [run, "--prompt=abcdef", "--max_new_tokens=40"],
    [run, "--prompt=\udcff"],
    [run, "--prompt=a", "--max_pauses=5"],
    [run, "--prompt=a", "--omega=1:x"],
    [run, "--prompt=a", "--stop="],
    ["--workdir=/nowhere", "--prompt=a"],
    ["--prompt=a"],
  )
  assert constant["tokens"] == 16 - 4  # what the context has room for
  assert constant["slots"] == 3 * constant["tokens"]
  for timing in ("tokens_per_second", "slots_per_second"):
    assert constant.pop(timing) > 0
    again.pop(timing)
  assert constant == again
  (whole,) = constant["text"]
  assert stopped["text"] == [whole.partition(" ")[0]]
  for complaint, words in zip(
    complaints,
    [
      "--prompt: not given",
      "--prompt: '' is empty",
      "20 characters",
      "--max_new_tokens: 40 behind a prompt of 7 tokens",
      "--prompt: the vocabulary can't encode '\\udcff' (U+DCFF)",
      "max_pauses: 5 must lie in 0..2",
      "--omega: '1:x'",
      "--stop: an empty text",
      "holds no run",
      "--workdir: not given",
    ],
    strict=True,
  ):
    if words == "20 characters":
      assert "has 21 tokens" in complaint
      assert "give at most 15" in complaint
    else:
      assert words in complaint


def test_text_as_it_comes():
  tokenizer = ByteTokenizer()
  said = list("né 1.2.".encode())
  row = Continuation(tokenizer, [tokenizer.end_id, 97], stops=["2.", "1.2"])
  assert row.kept(said[:-2]) is None
  assert row.kept(said) == len(said) - 1
  assert row.text(said) == "né "
  assert "".join(text for _, text in row.pieces(said[:-1], [0] * 7)) + row.rest() == "né "
  free = Continuation(tokenizer, [97])
  shown = [*free.pieces(said[:2], [0, 2]), *free.pieces(said[2:], [1, 0, 0, 0, 0, 0])]
  assert shown == [(0, "n"), (2, ""), (1, "é"), (0, " "), (0, "1"), (0, "."), (0, "2"), (0, ".")]
  assert [*free.pieces(said[1:2], [0])] == [(0, "")]
  assert free.rest() == "\N{REPLACEMENT CHARACTER}"


def test_what_a_vocabulary_cannot_encode():
  tokenizer = train_sentencepiece(["the cat sat on the mat, the cat that sat"] * 30, 272)
  assert encode_whole(tokenizer, "the cat é", "--prompt") == tokenizer.encode("the cat é")  # by its bytes
  plain = type(tokenizer)(_without_bytes())
  assert plain.unencodable("the cat") is None
  with pytest.raises(InputError, match=r"--prompt: the vocabulary can't encode 'é' \(U\+00E9\)"):
    encode_whole(plain, "the cat é", "--prompt")


def _without_bytes():
  import io

  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["the cat sat on the mat, the cat that sat"] * 30),
    model_writer=model,
    vocab_size=25,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  return model.getvalue()
