"""Prepares a task's tokens once: `cyb-prepare --task=imdb_reviews`.

    cyb-prepare --task=imdb_reviews                                      # into the user's cache folder
    cyb-prepare --task=text_files --option pattern='books/*.txt' --tokenizer=sentencepiece:16384 --output=books
    cyb-prepare --task=c4_en --workers=16 --output=gs://bucket/c4 --shard=3/32   # the third of 32 hosts
    cyb-prepare --verify=books                                           # checks every byte of a store

The last line of standard output is one JSON object: the path of the store and its counts; or, if pieces of other shards
are missing, the number of complete pieces. `timing` has the tokens per second of a core, and the hours that C4 would
take.

After a failure, the same command continues; the store does not depend on the numbers of workers and shards.
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from absl import flags

from cyb_jax import command_line
from cyb_jax.cli.launching import launch
from cyb_jax.data import TASKS, Prepared, default_tokenizer, open_token_store, prepare_shard
from cyb_jax.data.tokenizers import num_threads
from cyb_jax.errors import Failed, InputError

# The number of tokens of English C4 with a vocabulary of 32,000; `timing` is extrapolated to it.
_C4_TOKENS = 156e9
_C4_HOSTS = (1, 32)
_EXTRAPOLATED_TOKENS = 10_000_000
_COUNTS = ("tokens", "weighted_tokens", "documents", "bytes", "duplicates_dropped")

# What a signal means.
INTERRUPTED = "ended; complete pieces are kept, and the same command continues the preparation"


def define_flags() -> None:
  flags.DEFINE_string("task", None, f"The task to prepare: {', '.join(TASKS)}, or seqio:NAME.")
  flags.DEFINE_string(
    "tokenizer", None, "The tokenizer: 'bytes', 'sentencepiece:N', a .model or .gguf file, or a Hugging Face folder."
    " The default is sentencepiece:8192, or bytes for the synthetic tasks."
  )  # fmt: skip
  command_line.define_path("output", None, "The store's folder; by default a folder in the user's cache folder.")
  flags.DEFINE_integer("limit", None, "The largest number of documents of each split that are prepared.")
  flags.DEFINE_integer("workers", 1, "The number of processes that tokenize; 1: threads of this process.")
  flags.DEFINE_string(
    "shard", "1/1", "This host's part of the work, as i/n: the i-th of n hosts, which all write to the same --output;"
    " the host that finishes last builds the store."
  )  # fmt: skip
  flags.DEFINE_multi_string("option", [], "An option of the task, as key=value.")
  command_line.define_path("verify", None, "Check every byte of the store in this folder instead of preparing one.")


def main(argv: list[str]) -> dict[str, Any]:
  start = time.perf_counter()
  args = flags.FLAGS
  del argv
  if (args.task is None) == (args.verify is None):
    raise InputError("--task: give --task=NAME to prepare it, or --verify=PATH to check a store")
  if args.verify is not None:
    store = open_token_store(args.verify, verify=True)
    prepared = Prepared(store.path, store.description)
  else:
    try:
      prepared = prepare_shard(
        args.task,
        args.tokenizer or default_tokenizer(args.task),
        args.output,
        options=dict(_parse_option(text) for text in args.option),
        limit=args.limit,
        workers=args.workers,
        shard=_parse_shard(args.shard),
      )
    except ChildProcessError as error:
      raise Failed(str(error), {"task": args.task, "finished": False}) from error
  timing = {"seconds": round(time.perf_counter() - start, 3)} | _speed(prepared)
  description = prepared.description
  if description is None:
    pieces = {"whole": prepared.pieces_done, "all": prepared.pieces}
    return {
      "output": os.fspath(prepared.path),
      "task": args.task,
      "finished": False,
      "pieces": pieces,
      "timing": timing,
    }
  return {
    "output": os.fspath(prepared.path),
    "task": description["task"],
    "tokenizer": description["tokenizer"],
    "vocab_size": description["tokenizer"]["vocab_size"],
    "fingerprint": description["fingerprint"],
    "splits": {
      name: {key: split[key] for key in _COUNTS if key in split} for name, split in description["splits"].items()
    },
    "timing": timing,
  }


def _speed(prepared: Prepared) -> dict[str, Any]:
  """The measured speed, and the hours that C4 would take on hosts like this one.

  The estimate assumes that pieces are processed on all cores of all hosts, at the measured CPU time per token, and that
  one host builds the store with the same number of workers as here. The latter time is only reported if the store is so
  large that the constant part of the time doesn't dominate.
  """
  if not prepared.cpu_seconds or not prepared.tokens:
    return {}
  cores = num_threads()
  per_core = prepared.tokens / prepared.cpu_seconds
  hours = {f"pieces_{n}_hosts": round(_C4_TOKENS / (per_core * cores * n) / 3600, 2) for n in _C4_HOSTS}
  splits = prepared.description["splits"].values() if prepared.description else ()
  tokens = sum(split["tokens"] for split in splits)
  if prepared.finish_seconds and tokens >= _EXTRAPOLATED_TOKENS:
    hours["finish"] = round(_C4_TOKENS / (tokens / prepared.finish_seconds) / 3600, 2)
  return {
    "piece_seconds": round(prepared.piece_seconds, 3),
    "finish_seconds": round(prepared.finish_seconds, 3),
    "tokens_per_second_per_core": round(per_core),
    "cores": cores,
    "workers": prepared.workers,
    "c4_hours": hours,
  }


def _parse_shard(text: str) -> tuple[int, int]:
  match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
  if not match:
    raise InputError(f"--shard={text}: give i/n with 1 <= i <= n, such as 1/4")
  return int(match[1]), int(match[2])


def _parse_option(text: str) -> tuple[str, str]:
  name, equals, value = text.partition("=")
  if not equals or not name:
    raise InputError(f"--option={text}: give key=value")
  return name, value


def run() -> None:
  define_flags()
  launch(main, interrupted=INTERRUPTED)


if __name__ == "__main__":
  run()
