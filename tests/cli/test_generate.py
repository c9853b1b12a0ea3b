"""cyb-generate, run as a program; conversion of ids to text."""

import io
import json
import subprocess
import sys

import cli
import pytest
from models import tiny_config

from cyb_jax import configs, training
from cyb_jax.cli import terminal
from cyb_jax.data import ByteTokenizer
from cyb_jax.data.tokenizers import encode_whole, train_sentencepiece
from cyb_jax.errors import InputError
from cyb_jax.generation import PAUSE_MARK, Continuation, printable


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run") / "cyb"
  training.train(configs.freeze(tiny_config(pauses=2)), folder)
  return folder


def test_generated_text_has_marked_pauses(workdir):
  process = cli.start(
    "generate", f"--workdir={workdir}", "--prompt=a=1", "--prompt=b", "--max_new_tokens=9", "--seed=2",
    "--mode=self_paced",
  )  # fmt: skip
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "the model was trained with all pauses of every token in the context" in err
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
  # Lines are split by splitlines, because an untrained model generates arbitrary characters.
  assert text.replace(PAUSE_MARK, "") == "\n".join(printable(f"a=1{first}\n\nb{second}\n").splitlines())


def test_flags(workdir):
  mixture = [
    f"--workdir={workdir}",
    "--prompt=a=1",
    "--mode=constant",
    "--read=mixture",
    "--temperature=0",
    "--nostream",
  ]
  constant, _ = cli.run("generate", *mixture)
  assert constant["tokens"] == 16 - 4  # the rest of the context
  assert constant["slots"] == 3 * constant["tokens"]
  (whole,) = constant["text"]
  ends = whole[3:5]
  stopped, _ = cli.run("generate", *mixture, f"--stop={ends}")
  assert stopped["text"] == [whole.partition(ends)[0]]
  assert stopped["tokens"] < constant["tokens"]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([], "--prompt: not given"),
    (["--prompt="], "--prompt: '' is empty"),
    (["--prompt=abcdefghijklmnopqrst"], "has 21 tokens, including the start token, but the context has"),
    (["--prompt=abcdef", "--max_new_tokens=40"], "--max_new_tokens: 40 after a prompt of 7 tokens"),
    (["--prompt=\udcff"], "--prompt: the vocabulary can't encode '\\udcff' (U+DCFF)"),
    (["--prompt=a", "--max_pauses=5"], "max_pauses: 5 must be in 0..2"),
    (["--prompt=a", "--omega=1:x"], "--omega: '1:x'"),
    (["--prompt=a", "--stop="], "--stop: '' would end every row"),
    (["--prompt=a", "--workdir=/nowhere"], "contains no run"),
    (["--prompt=a", "--workdir="], "--workdir: not given"),
    # Checks that need no model are done before a model is opened.
    (["--prompt=a", "--workdir=/nowhere", "--mode=slow"], "mode: 'slow' is not one of self_paced, constant, none"),
    (["--prompt=a", "--workdir=/nowhere", "--temperature=-1"], "temperature: -1.0 must be finite"),
    (["--prompt=a", "--workdir=/nowhere", "--seed=-1"], "--seed: -1 must be in [0, 2^32)"),
    (["--prompt=a", "--workdir=/nowhere", "--seed=4294967296"], "--seed: 4294967296 must be in [0, 2^32)"),
    (
      ["--prompt=a", "--prompt=b", "--workdir=/nowhere", "--seed=4294967295"],
      "--seed: of row 2: 4294967296 must be in [0, 2^32)",
    ),
  ],
)
def test_bad_input(flags, words, workdir):
  assert words in cli.complaint("generate", f"--workdir={workdir}", *flags)


def test_text_is_streamed():
  tokenizer = ByteTokenizer()
  said = list("né 1.2.".encode())
  row = Continuation(tokenizer, [tokenizer.separator_id, 97], stops=["2.", "1.2"])
  assert row.kept(said[:-2]) is None
  assert row.kept(said) == len(said) - 1
  assert row.text(said) == "né "
  assert "".join(text for _, text in row.pieces(said[:-1], [0] * 7)) + row.rest() == "né "
  free = Continuation(tokenizer, [97])
  shown = [*free.pieces(said[:2], [0, 2]), *free.pieces(said[2:], [1, 0, 0, 0, 0, 0])]
  assert shown == [(0, "n"), (2, ""), (1, "é"), (0, " "), (0, "1"), (0, "."), (0, "2"), (0, ".")]
  assert [*free.pieces(said[1:2], [0])] == [(0, "")]
  assert free.rest() == "\N{REPLACEMENT CHARACTER}"


def test_control_characters_are_made_visible():
  assert printable("a\x1b[2Jé\n\t\x07\u202e") == "a<U+001B>[2Jé\n\t<U+0007><U+202E>"


def test_characters_that_an_encoding_lacks_are_replaced(monkeypatch):
  shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
  monkeypatch.setattr(sys, "stdout", shown)
  terminal.show(f"a{PAUSE_MARK}b")
  assert shown.buffer.getvalue() == b"a?b"


def test_a_closed_pipe():
  program = "from cyb_jax.cli import launching, terminal; launching.launch(lambda argv: terminal.show('x' * 10**6))"
  pipe = subprocess.PIPE
  with subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, env=cli.environment()) as process:
    process.stdout.close()
    assert process.stderr.read() == b""
  assert process.returncode == 1


def test_characters_that_a_vocabulary_lacks():
  tokenizer = train_sentencepiece(["the cat sat on the mat, the cat that sat"] * 30, 272)
  assert encode_whole(tokenizer, "the cat é", "--prompt") == tokenizer.encode("the cat é")  # by its bytes
  plain = type(tokenizer)(_without_bytes())
  assert plain.unencodable("the cat") is None
  with pytest.raises(InputError, match=r"--prompt: the vocabulary can't encode 'é' \(U\+00E9\)"):
    encode_whole(plain, "the cat é", "--prompt")


def _without_bytes():
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
