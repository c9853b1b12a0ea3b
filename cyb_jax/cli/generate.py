"""Continues prompts with a trained run, at its own pace; what it says is shown as it comes, a dot for each pause.

python -m cyb_jax.cli.generate --workdir=DIR --prompt='The film' [--prompt=...] [--mode=self_paced|constant|none]
python -m cyb_jax.cli.generate --init_from=WEIGHTS --prompt='The film'
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax.cli import flag_values, launching, models, terminal
from cyb_jax.errors import InputError

if TYPE_CHECKING:
  from cyb_jax.generation import Continuation

_DEFAULT_NEW = 64


def define_flags() -> None:
  models.define_model_flags()
  flags.DEFINE_multi_string("prompt", [], "A text to go on from, as a document begins; once for each row.")
  flags.DEFINE_integer(
    "max_new_tokens", None, f"Tokens to say at most; not given: what the context has room for, at most {_DEFAULT_NEW}."
  )
  flags.DEFINE_string(
    "mode", "", "self_paced: one slot at a time, the pauses that are asked for stay in the context; constant: a token"
    " and all its pauses in one forward, as in training; none: no pauses. '': what suits the method."
  )  # fmt: skip
  flags.DEFINE_string(
    "read", "sample", "When to answer: sample (pause with probability d), threshold (pause where d is above"
    " --threshold), or, in mode constant, mixture (of all slots)."
  )  # fmt: skip
  flags.DEFINE_float("threshold", 0.5, "Of --read=threshold.")
  flags.DEFINE_integer("max_pauses", None, "Pauses a token, at most those of training; not given: those.")
  flags.DEFINE_integer("pause_budget", None, "Pauses that a row may ask for in all (mode self_paced).")
  flags.DEFINE_string("omega", "", "A world that may deny pauses: max_pauses + 1 weights such as 1:1:1:1.")
  flags.DEFINE_string(
    "prompt_pauses", "", "all or none: whether the prompt's tokens are followed by their pauses. '': all in mode"
    " constant, none else."
  )  # fmt: skip
  flags.DEFINE_float("temperature", 1.0, "Of the words; 0: the likeliest one.")
  flags.DEFINE_integer("top_k", 0, "Only the k likeliest words are drawn; 0: all.")
  flags.DEFINE_float("top_p", 1.0, "Only the likeliest words that make up this probability are drawn.")
  flags.DEFINE_integer("seed", 0, "Of the first row; the others count on from it.")
  flags.DEFINE_multi_string("stop", [], "A text that ends a row; may be given several times.")
  flags.DEFINE_bool("stream", True, "Whether the text is shown as it comes.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  if not args.prompt:
    raise InputError("--prompt: not given; give a text to go on from")
  if any(not stop for stop in args.stop):
    raise InputError("--stop: an empty text would end every row at once; leave it out")
  import jax

  from cyb_jax.data import tokenizers
  from cyb_jax.generation import Continuation, Sampler, SamplingOptions, default_mode

  run = models.load_model()
  prompts = []
  for text in args.prompt:
    if not text:
      raise InputError("--prompt: '' is empty; give a text to go on from")
    # A document begins behind an end token, or whatever else the model has seen there.
    prompts.append([run.tokenizer.start_id, *tokenizers.encode_whole(run.tokenizer, text, "--prompt")])
  context = run.config.data.sequence_length
  room = context - min(len(prompt) for prompt in prompts)
  for text, prompt in zip(args.prompt, prompts):
    if len(prompt) >= context:
      raise InputError(
        f"--prompt: {text[:30]!r}... has {len(prompt)} tokens, the one that begins a document included, but the run was"
        f" trained on {context} (data.sequence_length); give at most {context - 1}"
      )
  new = min(room, _DEFAULT_NEW) if args.max_new_tokens is None else args.max_new_tokens
  if new > room:
    raise InputError(
      f"--max_new_tokens: {new} behind a prompt of {context - room} tokens are more than the {context} that the run was"
      f" trained on (data.sequence_length); give at most {room}"
    )
  sampler = Sampler(
    run.method,
    SamplingOptions(
      mode=args.mode or default_mode(run.method),
      read=args.read,
      threshold=args.threshold,
      max_pauses=args.max_pauses,
      omega=flag_values.weights_flag("omega"),
      pause_budget=args.pause_budget,
      prompt_pauses=args.prompt_pauses or None,
      temperature=args.temperature,
      top_k=args.top_k,
      top_p=args.top_p,
    ),
  )
  chosen = sampler.options
  always = run.method.num_slots > 1 and run.config.method.recipe == "constant" and not run.method.hides_pauses
  if always and chosen.mode == "self_paced" and chosen.prompt_pauses != "all":
    logging.info("it was trained with pauses behind every token; --prompt_pauses=all puts them behind the prompt's too")
  rows = [Continuation(run.tokenizer, prompt, args.stop) for prompt in prompts]
  options = {"max_new_tokens": new, "seeds": args.seed, "context": context}
  with jax.default_matmul_precision(run.config.precision.matmul):
    logging.info("compiling for %d rows", len(prompts))
    # No iteration: the loop is compiled, and nothing is said.
    jax.block_until_ready(sampler.advance(run.params, sampler.start(run.params, prompts, **options), 0))
    shown = _Shown(args.prompt, rows) if args.stream else None
    start = time.perf_counter()
    said = sampler.generate(
      run.params,
      prompts,
      end_id=run.tokenizer.end_id,
      stop=(lambda row, tokens: rows[row].kept(tokens)) if args.stop else None,
      callback=shown,
      **options,
    )
    seconds = time.perf_counter() - start
  if shown:
    shown.end()
  tokens = sum(len(row) for row in said.tokens)
  pauses = sum(sum(row) for row in said.pauses)
  return {
    "method": run.config.method.name,
    "step": run.step,
    "mode": sampler.options.mode,
    "read": sampler.options.read,
    "text": [row.text(ids) for row, ids in zip(rows, said.tokens)],
    "pauses": said.pauses,
    "tokens": tokens,
    "slots": sum(said.slots),
    "mean_pauses": pauses / tokens,
    "iterations": said.iterations,
    "tokens_per_second": tokens / seconds,
    "slots_per_second": sum(said.slots) / seconds,
    "cache_bytes": said.cache_bytes,
  }


class _Shown:
  """Shows rows on standard output: the first one as it comes, the others, whole, behind it."""

  def __init__(self, prompts: Sequence[str], rows: Sequence[Continuation]):
    from cyb_jax.generation import PAUSE_MARK, printable

    styled = terminal.shows_colour()
    self._mark = f"\x1b[33m{PAUSE_MARK}\x1b[0m" if styled else PAUSE_MARK
    self._rows, self._printable = rows, printable
    self._later = [f"\x1b[1m{printable(prompt)}\x1b[0m" if styled else printable(prompt) for prompt in prompts]
    terminal.show(self._later[0])

  def __call__(self, row: int, tokens: list[int], pauses: list[int]) -> None:
    pieces = self._rows[row].pieces(tokens, pauses)
    text = "".join(self._mark * count + self._printable(piece) for count, piece in pieces)
    if row == 0:
      terminal.show(text)
    else:
      self._later[row] += text

  def end(self) -> None:
    rests = [self._printable(row.rest()) for row in self._rows]
    later = (text + rest for text, rest in zip(self._later[1:], rests[1:]))
    terminal.show("\n\n".join([rests[0], *later]) + "\n")


def run() -> None:
  """Console script."""
  define_flags()
  launching.launch(main)


if __name__ == "__main__":
  run()
