"""Executes the tutorials and the Python code of README and guides, with small models and little data."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys

import cli
import documents
import imported_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import served
from models import tiny_config

import cyb_jax
from cyb_jax import configs, losses, training

TUTORIALS = cli.ROOT / "docs" / "tutorials"
GUIDES = cli.ROOT / "docs" / "guides"
SMALL_DECODER = [
  "--config.decoder.num_layers=1", "--config.decoder.d_model=16", "--config.decoder.num_heads=2",
  "--config.decoder.num_kv_heads=2", "--config.decoder.head_size=8", "--config.decoder.mlp_size=32",
]  # fmt: skip
SHORT = [
  "--config.train.steps=2", "--config.train.eval_every=0", "--config.train.last_eval_limit=4",
  "--config.train.trackers=", "--config.data.sequence_length=32", "--config.data.batch_size=2",
]  # fmt: skip
# Flags that print a text and exit.
TEXTS = ("--config_help", "--list_")


def fast(words):
  """A fast variant of a command."""
  words = [word.replace("imdb_reviews:", "synthetic_lookups(documents=64):") for word in words]
  program, rest = words[0], words[1:]
  if program == "cyb-train":
    given = {word.partition("=")[0] for word in rest}
    extra = list(SHORT)
    if "--config.init_from" not in given:
      extra += [*SMALL_DECODER, *["--config.data.tokenizer=bytes"] * ("--config.data.store" not in given)]
    if not given & {"--config.data.task", "--config.data.mixture", "--config.data.store"}:
      extra += ["--config.data.task=text_files", "--config.data.options=pattern=books/*.txt"]
    return [program, *rest, *extra]
  if program in ("cyb-evaluate", "cyb-report"):
    return [program, *[word for word in rest if not word.startswith("--limit")], "--limit=4"]
  if program == "cyb-generate":
    return [program, *rest, "--max_new_tokens=3"]
  return [program, *rest]


def execute(tutorial, folder, skipped=()):
  """Runs the commands of a tutorial in order. `skipped`: the prefixes of commands to leave out, each of which must
  occur.

  Returns: ||   The JSON object of each program's last line.
  """
  results, left = [], set(skipped)
  for words in documents.commands(TUTORIALS / f"{tutorial}.md"):
    line = " ".join(words)
    beginning = next((beginning for beginning in skipped if line.startswith(beginning)), None)
    if beginning is not None:
      left.discard(beginning)
      continue
    assert words[0].startswith("cyb-"), f"{line!r} is neither executed nor left out"
    if any(word.startswith(TEXTS) for word in words):
      code, out, _ = cli.forked(words[0].removeprefix("cyb-"), *words[1:], cwd=folder)
      assert (code, bool(out.strip())) == (0, True), line
      continue
    program, *flags = fast(words)
    result, _ = cli.run(program.removeprefix("cyb-"), *flags, cwd=folder)
    results.append(result)
  assert left == set(), "these commands are no longer in the tutorial"
  return results


def write_texts(folder):
  """Writes the files that the tutorial on own text reads."""
  pyarrow = pytest.importorskip("pyarrow")
  from pyarrow import parquet

  texts = [f"review number {i}: it was {'very ' * (i % 5)}good" for i in range(300)]
  for name in ("books", "docs", "table"):
    (folder / name).mkdir()
  for i, text in enumerate(texts):
    (folder / "books" / f"{i}.txt").write_text(text)
  (folder / "docs" / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
  pairs = [json.dumps({"question": f"{i} + 1?", "answer": f" {i + 1}"}) + "\n" for i in range(300)]
  (folder / "qa.jsonl.gz").write_bytes(gzip.compress("".join(pairs).encode()))
  parquet.write_table(pyarrow.table({"text": texts}), folder / "table" / "a.parquet")
  chats = [[{"role": role, "content": f"a{i}"} for role in ("user", "assistant")] for i in range(300)]
  (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def write_model(folder):
  """An instruct model instead of models/smollm2."""
  path = imported_models.write_folder(folder / "models" / "smollm2", next(iter(imported_models.MODELS)), [0])
  settings = json.loads((path / "tokenizer_config.json").read_text())
  settings["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
  (path / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.slow
def test_first_run(tmp_path):
  write_texts(tmp_path)
  _, trained, compared, generated, evaluated, *_ = execute("first_run", tmp_path, ["make quickstart"])
  assert trained["perplexity"] > 1
  assert len(compared["groups"]) == 2
  assert (tmp_path / "runs" / "quickstart-report" / "index.html").exists()
  assert len(generated["text"]) == 1
  assert evaluated["split"] == "test"
  assert (tmp_path / "runs" / "report" / "index.html").exists()
  rates = [
    json.loads((tmp_path / "runs" / name / "config.json").read_text())["optimizer"]["learning_rate"]
    for name in ("quickstart", "rate")
  ]
  assert rates == [1.6e-2, 8e-3]


def test_make_quickstart_runs_the_commands_of_the_tutorial():
  makefile = (cli.ROOT / "Makefile").read_text()
  recipe = re.search(r"^quickstart: setup\n((?:\t.*\n)+)", makefile, re.MULTILINE)[1]
  recipe = re.sub(r"\$\(BIN\)/python -m cyb_jax\.cli\.", "cyb-", recipe).replace("$(WORKDIR)", "runs/quickstart")
  ran = [line.strip() for line in recipe.splitlines() if line.startswith("\tcyb-")]
  shown = [" ".join(words) for words in documents.commands(TUTORIALS / "first_run.md")]
  assert shown[0] == "make quickstart"
  assert shown[1 : 1 + len(ran)] == ran


@pytest.mark.slow
def test_own_text(tmp_path):
  write_texts(tmp_path)
  write_model(tmp_path)
  results = execute("own_text", tmp_path)
  assert len(results) == 8
  assert all("perplexity" in result for result in results if "task" not in result)


@pytest.mark.slow
def test_fine_tuning(tmp_path):
  write_texts(tmp_path)
  write_model(tmp_path)
  skipped = ["mkdir", "pip download", "unzip", "cyb-convert --from=gguf", "cyb-evaluate --init_from"]
  before, trained, evaluated, after, exported = execute("fine_tune", tmp_path, skipped)
  assert trained["perplexity"] > 1
  assert "mean_pauses" in evaluated
  assert len(before["text"]) == len(after["text"]) == 1
  assert (tmp_path / "models" / "smollm2-cyb" / "config.json").exists()
  assert exported


def test_the_launch_command_of_the_tpu_tutorial():
  (words,) = [words for words in documents.commands(TUTORIALS / "tpu.md") if words[:1] == ["python"]]
  assert words[1:4] == ["launch/tpu.py", "train", "--dry_run"]
  words = [word.replace("BUCKET", "bucket") for word in words[1:]]
  done = subprocess.run(
    [sys.executable, *words], cwd=cli.ROOT, env=cli.environment(), text=True, capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr
  assert "gcloud" in done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """A folder with the runs that the Python code loads."""
  folder = tmp_path_factory.mktemp("code")
  config = tiny_config(pauses=1)
  config.train.update(steps=1, eval_every=0)
  training.train(configs.freeze(config), str(folder / "runs" / "ap"))
  os.symlink("ap", folder / "runs" / "quickstart")
  return folder


def names_of_the_losses():
  keys = jax.random.split(jax.random.key(0), 4)
  return {
    "logits": jax.random.normal(keys[0], (2, 3, 4, 7)), "hidden": jax.random.normal(keys[1], (2, 3, 4, 5)),
    "unembedding": jax.random.normal(keys[2], (6, 5)), "dont_know_row": jax.random.normal(keys[3], (5,)),
    "targets": jnp.zeros((2, 3), int), "dont_know_id": 6, "weights": jnp.ones((2, 3)),
  }  # fmt: skip


def test_code_of_the_losses():
  for path in (documents.README, GUIDES / "losses.md"):
    names = names_of_the_losses()
    exec(documents.blocks(path, "python")[0], names)
    assert names["per_token"].shape == (2, 3)
    assert names["per_token"].dtype == jnp.float32
    assert np.isfinite(names["per_token"]).all()
    if "loss" in names:
      assert names["loss"] == pytest.approx(float(losses.cyb(names["scores"]).mean()), rel=1e-5)


@pytest.mark.parametrize(
  ("path", "block"),
  [
    (documents.README, 1),
    (GUIDES / "evaluation.md", 0),
    (GUIDES / "generation.md", 0),
    (TUTORIALS / "first_run.md", 0),
  ],
  ids=lambda value: getattr(value, "stem", None),
)
def test_code_with_a_run(path, block, runs, monkeypatch):
  monkeypatch.chdir(runs)
  names = {"run": cyb_jax.load("runs/ap")} if path.stem == "generation" else {}
  exec(documents.blocks(path, "python")[block].replace("max_new_tokens=40", "max_new_tokens=2"), names)
  assert names["run"].config.method.name == "cyb"
  if "output" in names:
    assert names["output"].loss.shape == names["batch"]["tokens"].shape
  if "generation" in names:
    assert {len(tokens) for tokens in names["generation"].tokens} <= {1, 2}


def test_code_of_an_openai_client(runs):
  openai = pytest.importorskip("openai", reason="openai isn't installed")
  pytest.importorskip("uvicorn", reason="the extra serve isn't installed")
  run = cyb_jax.load(runs / "runs" / "quickstart")
  (block,) = documents.blocks(GUIDES / "serving.md", "python")
  with served.serving(run, name="quickstart") as server:
    names = {"openai": openai}
    exec(block.replace("http://127.0.0.1:8000", server.url).replace("max_tokens=20", "max_tokens=2"), names)
    names["client"].close()
    (curl,) = [words for words in documents.commands(GUIDES / "serving.md") if words[0] == "curl"]
    if shutil.which("curl"):
      words = [word.replace("http://127.0.0.1:8000", server.url).replace("20", "2") for word in curl]
      done = subprocess.run([*words, "--silent", "--noproxy", "*"], capture_output=True, text=True, check=True)
      assert len(json.loads(done.stdout)["choices"][0]["pauses"]) <= 2
  assert len(names["choice"].pauses) == len(names["choice"].slots) <= 2


def test_all_code_is_executed():
  """A new code block needs a test here."""
  counts = {documents.name_of(path): len(documents.blocks(path, "python")) for path in documents.PAGES}
  assert {name: count for name, count in counts.items() if count} == {
    "README.md": 2, "docs/adding_a_method.md": 2, "docs/guides/evaluation.md": 1, "docs/guides/generation.md": 1,
    "docs/guides/losses.md": 1, "docs/guides/serving.md": 1, "docs/tutorials/first_run.md": 1,
  }  # fmt: skip
