"""The results of a planned study in one JSON file, which may be part of a repository.

    {
    "plan": "scratch",            the name of the plan
    "identity": {...},            the options that all of its runs share
    "documents": {DIGEST: [...]}  the number of targets of each validation document; most runs share one list
    "runs": {KEY: {...}}          an entry for each finished run, see `Entry`
    }

Runs and documents are sorted, and each value of an entry has its own line, so that a finished run adds a few lines to a
diff. A run with an entry is never run again.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from cyb_jax import __version__, jsonl
from cyb_jax.errors import InputError, writing
from cyb_jax.storage import atomic_write
from cyb_jax.studies.planned_runs import Run, expand
from cyb_jax.studies.plans import PlannedStudy

Entry: TypeAlias = dict[str, Any]
"""The record of a run: `stage`, `row`, `setting`, `fields`, `seed`, `steps`, `rate` and `start` of its `Run`; `version`
of the package; `seconds` of training and evaluation; the numbers of NUMBERS; those of PACED in `self_paced`, if it was
evaluated self-paced; and for compared runs `documents`, a digest, and `document_losses`, nats per token. Floats are
rounded to 7 significant digits. A run that diverges has the perplexity null and no other numbers."""

# Keys of the run's evaluation, see `evaluation.evaluate_split`.
NUMBERS = (
  "perplexity", "loss", "loss_perplexity", "bits_per_byte", "mean_pauses", "latency", "slot_perplexity",
  "oracle_perplexity", "hard_perplexity", "calibration", "training_omega", "tokens", "inference_slots",
  "inference_flops", "train_tokens", "train_slots", "train_flops",
)  # fmt: skip
# Keys of the run's self-paced evaluation.
PACED = (
  "limit", "perplexity", "constant_perplexity", "context_pauses", "kept_pauses", "inference_slots", "inference_flops",
)  # fmt: skip
# How earlier versions wrote fields that plans set.
_RENAMED = {"train.tensorboard=False": "train.trackers="}
# Attributes of the run that its entry repeats.
_RUN = ("stage", "row", "setting", "fields", "seed", "steps")
_REQUIRED = {*_RUN, "rate", "start", "version", "seconds", "perplexity"}


def entry_of(
  run: Run,
  record: Mapping[str, Any],
  seconds: float,
  paced: Mapping[str, Any] | None = None,
  losses: Sequence[float] | None = None,
) -> Entry:
  """The entry of a finished run, without its documents' digest.

  Args:
    run: the run.
    record: the record of its evaluation.
    seconds: the time of training and evaluation.
    paced: the record of the self-paced evaluation.
    losses: the loss of each validation document.
  """
  entry: Entry = {name: getattr(run, name) for name in (*_RUN, "rate", "start")}
  entry |= {"version": __version__, "seconds": round(seconds, 1)}
  entry |= {name: record.get(name) for name in NUMBERS if name == "perplexity" or name in record}
  if paced is not None:
    entry["self_paced"] = {name: paced[name] for name in PACED if name in paced}
  if losses is not None:
    entry["document_losses"] = list(losses)
  return _rounded(entry)


class ResultsFile:
  """The results of a plan. The file is read again before it is written, so that entries from other programs are kept.

  Args:
    path: the path of the file, which need not exist.
    plan: the plan that it belongs to.

  Attributes:
    runs: the entries, by key.
    documents: the number of targets of each validation document, by digest.

  Raises:
    InputError: the file is damaged, or belongs to another plan.
  """

  def __init__(self, path: pathlib.Path, plan: PlannedStudy):
    self.path, self._plan = path, plan
    self.runs: dict[str, Entry] = {}
    self.documents: dict[str, list[int]] = {}
    self._read()

  def add(self, key: str, entry: Entry, tokens: Sequence[int] | None = None) -> None:
    """Adds a finished run and writes the file.

    Args:
      key: the key of the run.
      entry: the entry of the run.
      tokens: the number of targets of each validation document.

    Raises:
      StorageError: the file can't be written.
    """
    self._read()
    if tokens is not None:
      digest = hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:12]
      self.documents[digest] = list(tokens)
      entry = entry | {"documents": digest}
    self.runs[key] = entry
    with writing(f"--results: {self.path}"):
      self.path.parent.mkdir(parents=True, exist_ok=True)
      atomic_write(self.path, self._text())

  def _read(self) -> None:
    if not self.path.exists():
      return
    try:
      content = jsonl.loads(self.path.read_bytes())
      if not isinstance(content, dict):
        raise ValueError("it is not an object")
      self._check_plan(content)
      runs, documents = content["runs"], content["documents"]
      for key, entry in runs.items():
        missing = _REQUIRED - set(entry)
        if missing:
          raise ValueError(f"run {key!r} has no {', '.join(sorted(missing))}")
        _check_numbers(key, entry, documents)
    except InputError:
      raise
    except OSError as error:
      raise InputError(f"--results: {self.path} can't be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      reason = f"it has no {error}" if isinstance(error, KeyError) else error
      raise InputError(
        f"--results: {self.path} is damaged ({reason}); restore it from the repository, or give another path"
      ) from None
    self._check_runs(runs)
    self.runs, self.documents = runs, documents

  def _check_plan(self, content: Mapping[str, Any]) -> None:
    found, identity = content["plan"], content["identity"]
    if found != self._plan.name:
      raise InputError(
        f"--results: {self.path} has the results of the plan {found!r}, not {self._plan.name!r}; give another path"
      )
    for name, value in self._plan.identity.items():
      if _renamed(identity.get(name)) != value:
        raise InputError(
          f"--results: {self.path} has the results of another version of the plan {found!r} with {name} ="
          f" {identity.get(name)!r}, not {value!r}; give another path"
        )

  def _check_runs(self, runs: Mapping[str, Entry]) -> None:
    """Raises InputError for an entry that does not belong to a run of the plan."""
    planned = {run.key: run for run in expand(self._plan, runs)}
    for key, entry in runs.items():
      if key not in planned:
        raise InputError(f"--results: {self.path}: the plan {self._plan.name!r} has no run {key!r}; remove its entry")
      for name in (*_RUN, "rate"):
        value = getattr(planned[key], name)
        wanted = list(value) if isinstance(value, tuple) else value
        # The rate is unknown if entries of the search were removed.
        if entry[name] != wanted and not (name == "rate" and wanted is None):
          raise InputError(
            f"--results: {self.path}: {key!r} was run with {name} = {entry[name]!r}, but the plan has {wanted!r};"
            " remove its entry"
          )

  def _text(self) -> str:
    lines = ["{", f'"plan": {jsonl.dumps(self._plan.name)},']
    lines += [f'"identity": {_object(self._plan.identity)},']
    lines += [f'"documents": {_object(self.documents)},', '"runs": {']
    entries = [f"{jsonl.dumps(key)}: {_object(entry)}" for key, entry in sorted(self.runs.items())]
    return "\n".join([*lines, ",\n".join(entries), "}", "}"]) + "\n"


def _renamed(value: Any) -> Any:
  """A part of an identity with the fields of earlier versions as they are written now."""
  if isinstance(value, dict):
    return {name: _renamed(item) for name, item in value.items()}
  if isinstance(value, list):
    return [_renamed(item) for item in value]
  return _RENAMED.get(value, value) if isinstance(value, str) else value


def _object(values: Mapping[str, Any]) -> str:
  """An object as JSON, with one value per line, sorted."""
  lines = [f" {jsonl.dumps(name)}: {jsonl.dumps(value)}" for name, value in sorted(values.items())]
  return "{\n" + ",\n".join(lines) + "\n}"


def _check_numbers(key: str, entry: Entry, documents: Mapping[str, Sequence[int]]) -> None:
  perplexity = entry["perplexity"]
  if perplexity is not None and not (isinstance(perplexity, int | float) and perplexity >= 1):
    raise ValueError(f"run {key!r} has the perplexity {perplexity!r}")
  if "document_losses" in entry and len(documents[entry["documents"]]) != len(entry["document_losses"]):
    raise ValueError(f"run {key!r} has different numbers of losses and documents")


def _rounded(value: Any) -> Any:
  """The value with floats of 7 significant digits, and tuples as lists."""
  if isinstance(value, dict):
    return {name: _rounded(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_rounded(item) for item in value]
  return float(f"{value:.7g}") if isinstance(value, float) else value
