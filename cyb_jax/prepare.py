"""Prepares a task's tokens once: `python -m cyb_jax.prepare --task=imdb_reviews`.

    cyb-prepare --task=imdb_reviews                                      # into the user's cache folder
    cyb-prepare --task=text_files --option pattern='books/*.txt' --tokenizer=sentencepiece:16384 --output=books
    cyb-prepare --verify=books                                           # checks every byte of a store

The last line of standard output is one JSON object: what the store holds and where it is.
"""

from __future__ import annotations

import os
import time
from typing import Any

from absl import flags

from cyb_jax.data import TASKS, TokenStore, default_tokenizer, prepare
from cyb_jax.errors import InputError
from cyb_jax.programs import launch

_COUNTS = ("tokens", "weighted_tokens", "documents", "bytes", "duplicates_dropped")


def define_flags() -> None:
  flags.DEFINE_string("task", None, f"what to prepare: {', '.join(TASKS)}, or seqio:NAME")
  flags.DEFINE_string(
    'tokenizer', None, "'bytes', 'sentencepiece:N', a .model or .gguf file, or a Hugging Face folder; by default "
    'sentencepiece:8192, for the synthetic tasks bytes'
  )  # fmt: skip
  flags.DEFINE_string("output", None, "the store's folder; by default one in the user's cache folder")
  flags.DEFINE_integer("limit", None, "at most so many documents of each split")
  flags.DEFINE_multi_string("option", [], "an option of the task, as key=value; may be repeated")
  flags.DEFINE_string("verify", None, "check the store in this folder instead, byte for byte")


def main(argv: list[str]) -> dict[str, Any]:
  start = time.perf_counter()
  args = flags.FLAGS
  del argv
  if (args.task is None) == (args.verify is None):
    raise InputError("--task: give --task=NAME to prepare it, or --verify=PATH to check a store")
  if args.verify is not None:
    store = TokenStore.open(args.verify, verify=True)
  else:
    store = prepare(
      args.task,
      args.tokenizer or default_tokenizer(args.task),
      args.output,
      options=dict(_parse_option(text) for text in args.option),
      limit=args.limit,
    )
  description = store.description
  return {
    "output": os.fspath(store.path),
    "task": description["task"],
    "tokenizer": description["tokenizer"],
    "vocab_size": store.vocab_size,
    "fingerprint": store.fingerprint,
    "splits": {
      name: {key: split[key] for key in _COUNTS if key in split} for name, split in description["splits"].items()
    },
    "timing": {"seconds": round(time.perf_counter() - start, 3)},
  }


def _parse_option(text: str) -> tuple[str, str]:
  name, equals, value = text.partition("=")
  if not equals or not name:
    raise InputError(f"--option={text}: give key=value")
  return name, value


def run() -> None:
  define_flags()
  launch(main)


if __name__ == "__main__":
  run()
