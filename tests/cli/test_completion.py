"""The scripts of `--completion`, run by the shells if they are installed."""

import shutil
import subprocess

import cli
import pytest

from cyb_jax.cli import benchmark, completion
from cyb_jax.errors import InputError

WORDS = completion.Words(
  flags={"": {"--workdir=": "The run's folder.", "--config=": "A file.", "--dry_run": "Don't write."}},
  fields={"--config.optimizer.learning_rate=": "the rate", "--config.train.steps=": "steps"},
  experiments=("experiments/quickstart.py", "experiments/pause_training.py"),
  settings={"experiments/quickstart.py": ("ap", "ap1", "tbys3"), "experiments/pause_training.py": ("finetune_pause",)},
)
# The word before the cursor, and its completions.
COMPLETED = {
  "--work": ["--workdir="],
  "--config.opt": ["--config.optimizer.learning_rate="],
  "--config.train.": ["--config.train.steps="],
  "--config=experiments/q": ["--config=experiments/quickstart.py"],
  "--config=experiments/quickstart.py:ap": [f"--config=experiments/quickstart.py:{name}" for name in ("ap", "ap1")],
  "--config=experiments/pause_training.py:f": ["--config=experiments/pause_training.py:finetune_pause"],
}  # fmt: skip


def shell(name, *arguments, text):
  if not shutil.which(name):
    pytest.skip(f"{name} is not installed")
  done = subprocess.run([name, *arguments], input=text, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stderr == ""
  return done.stdout.split("\n")[:-1]


def in_bash(script, line, breaks=" =:"):
  quoted = line.replace("'", "'\\''")
  text = f"{script}\nCOMP_WORDBREAKS='{breaks}' COMP_LINE='{quoted}' COMP_POINT={len(line)} COMP_WORDS=({line})\n"
  function = script.split("-F ")[1].split()[0]
  return shell("bash", "--norc", text=text + f'{function}\nprintf "%s\\n" "${{COMPREPLY[@]}}"')


@pytest.mark.parametrize("word", COMPLETED)
def test_bash(word):
  script = completion._bash("cyb-train", WORDS)
  assert in_bash(script, f"cyb-train --dry_run {word}", breaks=" ") == COMPLETED[word]
  # If = and : separate words, the shell expects only the part after the last one.
  cut = max(word.rfind("="), word.rfind(":")) + 1
  assert in_bash(script, f"cyb-train --dry_run {word}") == [full[cut:] for full in COMPLETED[word]]


@pytest.mark.parametrize("word", COMPLETED)
def test_fish(word):
  found = shell("fish", "--no-config", text=completion._fish("cyb-train", WORDS) + f"\ncomplete -C 'cyb-train {word}'")
  found = [line.split("\t")[0] for line in found]
  expected = [full.removesuffix("=") for full in COMPLETED[word]]
  assert {line.removesuffix("=") for line in found} >= set(expected)


# The functions of zsh's completion system exist only while a line is edited.
_ZSH_STUBS = """
compdef() { }
compset() { }
_files() { }
compadd() { print -l -- ${(P)argv[-1]} }
"""


@pytest.mark.parametrize("word", COMPLETED)
def test_zsh(word):
  text = (
    f"{_ZSH_STUBS}\n{completion._zsh('cyb-train', WORDS)}\nwords=(cyb-train '{word}')\nPREFIX='{word}'\n_cyb_train\n"
  )
  found = shell("zsh", "-f", text=text)
  cut = max(word.rfind("="), word.rfind(":")) + 1
  # zsh itself selects the candidates that begin with the word.
  assert [line for line in found if line.startswith(word[cut:])] == [full[cut:] for full in COMPLETED[word]]


def test_the_scripts_of_the_programs():
  code, script, _ = cli.forked("train", "--completion=bash")
  assert code == 0
  assert in_bash(script, "cyb-train --config.optimizer.learn", breaks=" ") == ["--config.optimizer.learning_rate="]
  assert (
    "experiments/reviews.py:dp_early_strong"
    in in_bash(script, "cyb-train --config=experiments/reviews.py:dp_e", " ")[1]
  )
  code, script, _ = cli.forked("report", "--completion=bash")
  assert code == 0
  assert in_bash(script, "cyb-report --text_w") == ["--text_windows="]
  assert in_bash(script, "cyb-report --config.") == [""]


def test_the_flags_of_a_part_are_completed_after_its_name():
  code, script, _ = cli.forked("benchmark", "--completion=bash")
  assert code == 0
  assert set(benchmark.BENCHMARKS) <= set(in_bash(script, "cyb-benchmark "))
  assert "--batch_sizes=" in in_bash(script, "cyb-benchmark decode --batch")
  assert "--batch_sizes=" not in in_bash(script, "cyb-benchmark readout --batch")


def test_an_unknown_shell():
  assert "--completion: 'csh' is unknown; " in cli.complaint("report", "--completion=csh")
  with pytest.raises(InputError, match="'csh' is unknown; there are bash, zsh, fish"):
    completion.script("csh", "cyb-train", {})
