"""The interface to SeqIO and TFDS: no other module imports them, and this module imports them only on use."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from cyb_jax.errors import InputError

# Documents are transferred between Python and TensorFlow in blocks, because a transfer costs far more than a document.
_BLOCK_BYTES = 1 << 20
_BLOCK_DOCUMENTS = 64
# The features that may contain a document's text, in order of precedence.
_TEXT_FEATURES = ("targets", "text", "targets_pretokenized")


def import_seqio():
  """The module seqio.

  Raises:
    InputError: seqio or TensorFlow is not installed.
  """
  try:
    with _quiet_stderr():
      return importlib.import_module("seqio")
  except ImportError as error:
    raise InputError(
      f'data.task: reading a task needs seqio and TensorFlow ({error}); run pip install "cyb_jax", '
      "or set data.store to a prepared store"
    ) from error


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
  """Discards the messages about missing drivers that the C++ part of TensorFlow writes while it is loaded.

  The C++ part writes to the file descriptor before it reads any log level. Python exceptions are not affected.
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


def documents_of(name: str, provider: Any, split: str) -> Iterator[str]:
  """The texts of a split of a SeqIO task or mixture.

  Args:
    name: name of the task, for errors.
    provider: the SeqIO task or mixture.
    split: one of its splits.

  Raises:
    InputError: no feature contains text, or a text is not UTF-8.
  """
  # By default SeqIO caches a small dataset in memory and repeats a mixture endlessly. A mixture samples from its tasks
  # at random, so it needs the seed.
  dataset = provider.get_dataset(
    sequence_length=None, split=split, shuffle=False, seed=0, num_epochs=1, try_in_mem_cache=False
  )
  specs = dataset.element_spec
  names = [name for name in _TEXT_FEATURES if name in specs and specs[name].dtype.name == "string"]
  if not names:
    raise InputError(
      f"data.task={name!r}: features {sorted(specs)} contain no text; one of {', '.join(_TEXT_FEATURES)} must be a"
      " string"
    )
  blocks = dataset.map(lambda example: example[names[0]]).batch(_BLOCK_DOCUMENTS)
  for number, text in enumerate(itertools.chain.from_iterable(_unwrapped(blocks.as_numpy_iterator()))):
    try:
      yield text.decode()
    except UnicodeDecodeError as error:
      raise InputError(
        f"data.task={name!r}: document {number} of {split} is not UTF-8 at byte {error.start}; convert it"
      ) from error


def _unwrapped(examples: Iterable[Any]) -> Iterator[Any]:
  """Yields `examples`; an InputError that TensorFlow has wrapped in an error of its own is raised as an InputError."""
  import tensorflow as tf

  try:
    yield from examples
  except tf.errors.OpError as error:
    message = re.search(r"InputError: (.*)", str(error))
    if message:
      raise InputError(message[1]) from error
    raise


def task_of_documents(
  name: str, splits: Sequence[str], documents: Callable[[str], Iterable[Any]], annotations: Sequence[str]
):
  """A SeqIO task whose examples have a feature `targets`, a complete document, and a feature for each annotation.

  The feature of an annotation is a string with one byte for each byte of the document.

  Args:
    name: name of the task.
    splits: names of the splits.
    documents: split -> objects with the text and uint8 arrays as attributes, such as `Document`.
    annotations: names of the arrays, such as 'weights'.
  """
  seqio = import_seqio()
  import tensorflow as tf

  names = ("targets", *annotations)

  def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None):
    del shuffle_files, seed  # documents are in the source's order; the store's reader shuffles windows

    def blocks():
      block, size = {name: [] for name in names}, 0
      for document in documents(split):
        block["targets"].append(document.text.encode())
        for name in annotations:
          block[name].append(getattr(document, name).tobytes())
        size += len(block["targets"][-1])
        if size >= _BLOCK_BYTES:
          yield block
          block, size = {name: [] for name in names}, 0
      yield block

    signature = dict.fromkeys(names, tf.TensorSpec([None], tf.string))
    return tf.data.Dataset.from_generator(blocks, output_signature=signature).unbatch()

  # SeqIO accepts only names of the characters \w.
  registered = "cyb_" + re.sub(r"\W", "_", name)
  data = seqio.FunctionDataSource(dataset_fn, splits=splits)
  return seqio.Task(registered, source=data, output_features={"targets": _text_feature()}, preprocessors=[])


def tfds_task(name: str, tfds: str, data_dir: str | None, splits: Mapping[str, str], **options: Any):
  """A SeqIO task over a TFDS dataset; its feature `targets` is a complete document.

  Args:
    name: name of the task.
    tfds: name and version of the dataset.
    data_dir: folder of TFDS; None means the default of TFDS.
    splits: TFDS slices by split name.
    options: further arguments of `seqio.TfdsDataSource`.
  """
  seqio = import_seqio()

  def texts(dataset):
    return dataset.map(lambda example: {"targets": next(example[key] for key in _TEXT_FEATURES if key in example)})

  source = seqio.TfdsDataSource(tfds, data_dir, splits=dict(splits), **options)
  return seqio.Task(f"cyb_{name}", source=source, output_features={"targets": _text_feature()}, preprocessors=[texts])


def _text_feature():
  """A feature for strings that SeqIO does not tokenize."""
  import seqio
  import tensorflow as tf

  return seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.string, rank=0)


def registered_task(name: str, module: str):
  """The SeqIO task or mixture that a user has registered.

  Args:
    name: its name in the registry of SeqIO.
    module: the Python module that registers it; '' if no module has to be imported.

  Raises:
    InputError: the module cannot be imported, or there is no such task or mixture.
  """
  seqio = import_seqio()
  if module:
    try:
      importlib.import_module(module)
    except ImportError as error:
      raise InputError(
        f"data.options.module={module!r}: it cannot be imported ({error}); give a module on the Python path"
      ) from error
  try:
    return seqio.get_mixture_or_task(name)
  except ValueError as error:
    raise InputError(
      f'data.task="seqio:{name}": SeqIO has no such task or mixture; set data.options.module to the module that '
      "registers it"
    ) from error
