"""Continues prompts with a trained run; the text is shown while it is generated, with a dot for each pause.

cyb-generate --workdir=DIR --prompt='The film' [--prompt=...] [--mode=self_paced|constant|none]
cyb-generate --init_from=WEIGHTS --prompt='The film'
cyb-generate --init_from=WEIGHTS --chat --prompt='Say hi.'

For a model that was trained by this project, a prompt is encoded as plain text. For an imported model, the name of a
special entry such as <|im_start|> in a prompt is encoded as that entry, as in transformers. With --chat, a prompt is a
user's message: it is encoded as plain text, and the template adds the special entries.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from cyb_jax.cli import contexts, flag_values, launching, models, terminal
from cyb_jax.errors import InputError, check_seed

if TYPE_CHECKING:
  from cyb_jax.generation import Continuation, Sampler, SamplingOptions
  from cyb_jax.runs import Run

_DEFAULT_NEW = 64


def define_flags() -> None:
  models.define_model_flags()
  flags.DEFINE_multi_string("prompt", [], "The beginning of a text to continue; may be given several times.")
  flags.DEFINE_bool(
    "chat", False, "Whether each prompt is a user's message, which the chat template of the model's tokenizer renders."
  )  # fmt: skip
  flags.DEFINE_string("system", None, "With --chat, the system message before each prompt; not given: none.")
  flags.DEFINE_integer(
    "max_new_tokens", None, "The largest number of generated tokens; not given: the rest of the context, but at most"
    f" {_DEFAULT_NEW}."
  )  # fmt: skip
  flags.DEFINE_string(
    "mode", "", "How slots are computed. self_paced: one slot at a time; only the pauses that the model requests are in"
    " the context; constant: a token and all its pauses in one forward pass, as in training; none: without pauses. '':"
    " self_paced if the model was trained with such contexts (hidden pauses, or a drawn number of pauses), otherwise"
    " constant."
  )  # fmt: skip
  flags.DEFINE_string(
    "read", "sample", "When the model answers. sample: it pauses with probability d; threshold: it pauses if d is above"
    " --threshold; mixture (mode constant only): the token is drawn from the mixture of all slots."
  )  # fmt: skip
  flags.DEFINE_float("threshold", 0.5, "With --read=threshold, the model pauses if d is above this value.")
  flags.DEFINE_integer("max_pauses", None, "The largest number of pauses per token; not given: as in training.")
  flags.DEFINE_integer("pause_budget", None, "The total number of pauses that a row may request (mode self_paced).")
  flags.DEFINE_string("omega", "", "The distribution of the step budget: max_pauses + 1 weights such as 1:1:1:1.")
  flags.DEFINE_string(
    "prompt_pauses", "", "Whether the prompt's tokens are followed by their pauses: all or none. '': all in mode"
    " constant, none in other modes."
  )  # fmt: skip
  flags.DEFINE_float("temperature", 1.0, "The temperature of the token distribution; 0: the most likely token.")
  flags.DEFINE_integer("top_k", 0, "Tokens are sampled from the k most likely tokens; 0: from all tokens.")
  flags.DEFINE_float("top_p", 1.0, "Tokens are sampled from the most likely tokens with this total probability.")
  flags.DEFINE_integer("seed", 0, "The seed of the first row; the seeds of the other rows are the following numbers.")
  flags.DEFINE_multi_string(
    "stop", [], "A text that ends a row; may be given several times. It may contain names of special entries, such as"
    " <|im_end|>."
  )  # fmt: skip
  flags.DEFINE_bool("stream", True, "Whether the text is shown while it is generated.")


def main(argv: Sequence[str]) -> dict[str, Any]:
  del argv
  args = flags.FLAGS
  if not args.prompt:
    raise InputError("--prompt: not given; give a text to continue")
  if args.system is not None and not args.chat:
    raise InputError(f"--system: {args.system!r} is the system message of a chat; give --chat too")
  if any(not stop for stop in args.stop):
    raise InputError("--stop: '' would end every row immediately; give a nonempty text")
  check_seed("--seed", args.seed)
  check_seed(f"--seed: of row {len(args.prompt)}", args.seed + len(args.prompt) - 1)
  from cyb_jax.generation import Sampler, default_mode

  _sampling_options(args.mode or "constant").check()
  run = models.load_model()
  prompts = _encoded_prompts(run)
  new = _new_tokens(run, min(map(len, prompts)))
  sampler = Sampler(run.method, _sampling_options(args.mode or default_mode(run.method)))
  chosen = sampler.options
  if _pauses_follow_every_token(run) and chosen.mode == "self_paced" and chosen.prompt_pauses != "all":
    logging.info(
      "the model was trained with pauses after every token; --prompt_pauses=all also inserts them in the prompt"
    )
  if chosen.mode == "self_paced":
    contexts.warn_of_untrained_context(run.method, contexts.measured(args.workdir, run.step))
  return _generate(run, sampler, prompts, new)


def _encoded_prompts(run: Run) -> list[list[int]]:
  """The tokens of `--prompt`, one list per row.

  Raises:
    InputError: a prompt is empty, has characters that the vocabulary lacks, or fills the context; or `--chat` is set
      and the tokenizer has no chat template.
  """
  if flags.FLAGS.chat and run.tokenizer.chat_template is None:
    raise InputError(
      "--chat: the model's tokenizer has no chat template; omit --chat, or give an instruct model, or a run whose"
      " data.tokenizer has one"
    )
  texts, context = flags.FLAGS.prompt, run.config.data.sequence_length
  prompts = []
  for text in texts:
    if not text:
      raise InputError("--prompt: '' is empty; give a text to continue")
    prompts.append(_encoded_message(run, text) if flags.FLAGS.chat else _encoded_text(run, text))
  for text, prompt in zip(texts, prompts):
    if not prompt:
      raise InputError(f"--prompt: {text!r} has no tokens, and the model has no start token; give another text")
    if len(prompt) >= context:
      raise InputError(
        f"--prompt: {text[:30]!r}... has {len(prompt)} tokens, including {_included()}, but the context has"
        f" {context} (data.sequence_length); give at most {context - 1}"
      )
  return prompts


def _encoded_text(run: Run, text: str) -> list[int]:
  """The tokens of a text to continue."""
  from cyb_jax.data import tokenizers

  # In training, a document begins with a start token; an imported model gets one if its tokenizer adds it.
  return run.boundaries.begun(tokenizers.encode_whole(run.tokenizer, text, "--prompt", special=run.imported))


def _encoded_message(run: Run, text: str) -> list[int]:
  """The tokens of a chat with a user's message, up to the beginning of the reply."""
  from cyb_jax.data import tokenizers

  messages = [{"role": "user", "content": text}]
  tokenizers.check_encodable(run.tokenizer, text, "--prompt")
  if flags.FLAGS.system is not None:
    tokenizers.check_encodable(run.tokenizer, flags.FLAGS.system, "--system")
    messages.insert(0, {"role": "system", "content": flags.FLAGS.system})
  # As in training, chats are rendered without a clock, and every document begins with a start token. An imported model
  # gets exactly the output of its template.
  ids = tokenizers.encode_chat(run.tokenizer, messages, clock=run.imported)
  return ids if run.imported else run.boundaries.begun(ids)


def _included() -> str:
  return "the tokens of the chat template" if flags.FLAGS.chat else "the start token"


def _new_tokens(run: Run, shortest: int) -> int:
  """The largest number of generated tokens.

  Args:
    run: the model.
    shortest: the number of tokens of the shortest prompt.

  Raises:
    InputError: `--max_new_tokens` exceeds the context.
  """
  context, given = run.config.data.sequence_length, flags.FLAGS.max_new_tokens
  free = context - shortest
  new = min(free, _DEFAULT_NEW) if given is None else given
  if new > free:
    raise InputError(
      f"--max_new_tokens: {new} after a prompt of {shortest} tokens exceeds the context of {context} tokens"
      f" (data.sequence_length); give at most {free}"
    )
  return new


def _sampling_options(mode: str) -> SamplingOptions:
  """The options of the sampler that the flags specify, for a mode of generation."""
  from cyb_jax.generation import SamplingOptions

  args = flags.FLAGS
  return SamplingOptions(
    mode=mode,
    read=args.read,
    threshold=args.threshold,
    max_pauses=args.max_pauses,
    omega=flag_values.weights_flag("omega"),
    pause_budget=args.pause_budget,
    prompt_pauses=args.prompt_pauses or None,
    temperature=args.temperature,
    top_k=args.top_k,
    top_p=args.top_p,
  )


def _pauses_follow_every_token(run: Run) -> bool:
  """Whether every token of the training text is followed by pauses to which later tokens attend."""
  from cyb_jax.generation.abilities import trained_with_all_pauses

  return trained_with_all_pauses(run.method) and not run.method.hides_pauses


def _generate(run: Run, sampler: Sampler, prompts: list[list[int]], new: int) -> dict[str, Any]:
  """Generates, shows the text if `--stream` is set, and returns the JSON object."""
  import jax

  from cyb_jax.data import tokenizers
  from cyb_jax.generation import Continuation

  args = flags.FLAGS
  chat_ends = tokenizers.turn_end_ids(run.tokenizer) if args.chat else ()
  rows = [Continuation(run.tokenizer, prompt, args.stop) for prompt in prompts]
  options = {"max_new_tokens": new, "seeds": args.seed, "context": run.config.data.sequence_length}
  with jax.default_matmul_precision(run.config.precision.matmul):
    logging.info("compiling for %d rows", len(prompts))
    # Zero iterations compile the loop without generating tokens.
    jax.block_until_ready(sampler.advance(run.params, sampler.start(run.params, prompts, **options), 0))
    # The reply to a message begins on a new line; other text is continued on the same line.
    shown = _Display([f"{text}\n" if args.chat else text for text in args.prompt], rows) if args.stream else None
    start = time.perf_counter()
    generated = sampler.generate(
      run.params,
      prompts,
      end_id=list(dict.fromkeys([*run.boundaries.end_ids, *chat_ends])),
      stop=(lambda row, tokens: rows[row].kept(tokens)) if args.stop else None,
      callback=shown,
      **options,
    )
    seconds = time.perf_counter() - start
  if shown:
    shown.end()
  tokens = sum(len(row) for row in generated.tokens)
  return {
    "method": run.config.method.name,
    "step": run.step,
    "mode": sampler.options.mode,
    "read": sampler.options.read,
    "text": [row.text(ids) for row, ids in zip(rows, generated.tokens)],
    "pauses": generated.pauses,
    "tokens": tokens,
    "slots": sum(generated.slots),
    "mean_pauses": sum(sum(row) for row in generated.pauses) / tokens,
    "iterations": generated.iterations,
    "tokens_per_second": tokens / seconds,
    "slots_per_second": sum(generated.slots) / seconds,
    "cache_bytes": generated.cache_bytes,
  }


class _Display:
  """Writes rows to standard output: the first row while it is generated, and the other rows at the end."""

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
