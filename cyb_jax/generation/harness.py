"""The adapter for lm-evaluation-harness, which evaluates any method on the harness's tasks from its own command line.

python -m cyb_jax.generation.harness run --model cyb_jax --model_args workdir=DIR --tasks lambada_openai,hellaswag

Likelihoods come from `generation.scoring`, generated text from `generation.sampler`. The module needs the extra
`harness`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from cyb_jax import runs
from cyb_jax.configs import ParallelismConfig
from cyb_jax.costs import flops
from cyb_jax.data import tokenizers
from cyb_jax.errors import InputError, check_seed
from cyb_jax.generation.abilities import (
  default_mode,
  slots_share_cache_index,
  trained_with_all_pauses,
  with_prompt_pauses,
)
from cyb_jax.generation.options import SamplingOptions
from cyb_jax.generation.pacing import Pacing
from cyb_jax.generation.sampler import Sampler
from cyb_jax.generation.score import Score
from cyb_jax.generation.scoring import Scorer
from cyb_jax.generation.text import Continuation
from cyb_jax.interop import pretrained
from cyb_jax.partitioning.mesh import make_mesh
from cyb_jax.progress import track

try:
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise InputError(f"lm_eval: can't be imported ({error}); pip install 'cyb_jax[harness]'") from None

_BATCH_SIZE = 16
_NEW_TOKENS = 256  # the harness's own default
# The names of the option for the number of new tokens, by the harness's priority.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# The other options of a request that have an effect here.
_READ = {"until", "do_sample", "temperature", "top_k", "top_p"}
# Prompts are padded to a multiple of this: compiling a deep model takes longer than running that many extra slots.
_PROMPT_MULTIPLE = 128
# New tokens are decoded together with this many prompt tokens, because the text of the first new token depends on them.
_PROMPT_END = 16


_TextOptions = tuple[SamplingOptions, int, tuple[str, ...]]
"""(options of the sampler, the maximum number of new tokens, the stop strings)."""


@dataclasses.dataclass
class Spent:
  """The compute cost of a task's requests.

  Attributes:
    requests: the number of requests.
    tokens: the number of scored or generated tokens.
    pauses: the pauses of these tokens: the expected number for scored tokens, the number that ran for generated tokens.
    slots, flops: see `Score`; for generated text they include the prompt.
  """

  requests: int = 0
  tokens: int = 0
  pauses: float = 0.0
  slots: float = 0.0
  flops: float = 0.0

  def add(self, score: Score) -> None:
    self.requests += 1
    for name in ("tokens", "pauses", "slots", "flops"):
      setattr(self, name, getattr(self, name) + getattr(score, name))

  def describe(self) -> dict[str, Any]:
    """`requests`, `tokens`, `mean_pauses` per token, `slots_per_request` and `flops_per_request`."""
    return {
      "requests": self.requests,
      "tokens": self.tokens,
      "mean_pauses": self.pauses / self.tokens if self.tokens else None,
      "slots_per_request": self.slots / self.requests if self.requests else None,
      "flops_per_request": self.flops / self.requests if self.requests else None,
    }


@register_model("cyb_jax")
class CybLM(LM):
  """A trained run as the harness's model.

  For a model that was trained by this project, the name of a special entry in a text is encoded as plain text. For an
  imported model the name is encoded as the special entry, as in transformers. With the harness's option
  `apply_chat_template`, names in rendered chats are encoded as special entries for every model, including names in a
  task's own text, as in the harness's other models.

  Args:
    workdir: the run's folder.
    checkpoint: 'last', 'best' or a step.
    init_from: pretrained weights instead of a run's folder; see `cyb_jax.interop.pretrained`.
    base: the model from which a run with a frozen decoder started, if it has been moved.
    run: a loaded run, instead of a folder or weights.
    batch_size: the number of rows that are generated together; 'auto' is 16. It does not affect scoring, which packs
      rows of slots.
    max_length: the maximum number of tokens of a context; None: the length of the training windows.
    mode: how text is generated, see `SamplingOptions`; '': 'constant' for runs with the recipe *constant*, so that the
      contexts have the same pauses as in training, else the method's default mode.
    read: when a token is read, see `SamplingOptions`; '': for greedy requests 'threshold' in mode self_paced and
      'mixture' in mode constant, for other requests 'sample'.
    add_bos_token: whether the start token precedes a text; None: as in training (`Run.boundaries`).
    overlap: see `Scorer.score_rolling`.
    pauses: the number of pauses between a context and the scored or generated text, for methods with such pauses; None:
      as in training.
    seed: the seed of random draws.
    mesh: the mesh over which a loaded run's parameters are sharded, if any.
    max_batch_size, device: the harness passes them; they have no effect.

  Attributes:
    spent: `Spent` by the name of the task.

  Raises:
    InputError: the run is missing, or an option is invalid.
  """

  def __init__(
    self,
    workdir: str | None = None,
    checkpoint: str | int = "last",
    *,
    init_from: str | None = None,
    base: str = "",
    run: runs.Run | None = None,
    batch_size: str | int | None = None,
    max_length: int | None = None,
    mode: str = "",
    read: str = "",
    add_bos_token: bool | None = None,
    overlap: int = 1,
    pauses: int | None = None,
    seed: int = 0,
    mesh: Mesh | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
  ):
    super().__init__()
    del max_batch_size, device
    if [workdir, init_from, run].count(None) != 2:
      raise InputError(
        "workdir: model_args needs exactly one of workdir=DIR, the run's folder, init_from=WEIGHTS, or a loaded run"
      )
    if run is not None and base:
      raise InputError(f"base: {base!r} is given, but a loaded run has all parameters; omit it")
    if run is None:
      mesh = make_mesh(ParallelismConfig()) if jax.device_count() > 1 else mesh
      moved = {"base": base, "base_option": "base in --model_args"}
      if init_from is None:
        run = pretrained.load_run(workdir, checkpoint, mesh, **moved)
      else:
        run = pretrained.load(init_from, checkpoint=checkpoint, mesh=mesh, **moved)
    check_seed("seed", seed)
    if pauses is not None:
      run = dataclasses.replace(run, method=with_prompt_pauses(run.method, pauses))
    text = str(batch_size or "auto").partition(":")[0]
    if text != "auto" and not (text.isdecimal() and int(text)):
      raise InputError(f"batch_size: {batch_size!r} must be a number of at least 1, or 'auto'")
    self.run, self.batch_size = run, _BATCH_SIZE if text == "auto" else int(text)
    self.max_length = run.config.data.sequence_length if max_length is None else max_length
    self.start_id = run.tokenizer.start_id
    self._boundaries = run.boundaries
    if add_bos_token is not None:
      self._boundaries = dataclasses.replace(run.boundaries, start=(self.start_id,) if add_bos_token else ())
    # Whether the name of a special entry in a text is encoded as the entry.
    self._special = run.imported
    constant = trained_with_all_pauses(run.method)
    # The ids that end an assistant's message; None: the texts are not chats.
    self._chat_ends: tuple[int, ...] | None = None
    self._mode = mode or ("constant" if constant else default_mode(run.method))
    self._read, self._overlap, self._seed = read, overlap, seed
    Sampler(run.method, self._sampling({}))  # raises the errors of invalid options before the first request
    self._scorer = Scorer(run.method, run.params, context=self.max_length, start_id=self.start_id, mesh=mesh)
    self._samplers: dict[SamplingOptions, Sampler] = {}
    self.spent: dict[str | None, Spent] = {}

  @property
  def tokenizer_name(self) -> str:
    """The kind and the hash of the tokenizer, and the hash of its chat template if it has one."""
    described, template = self.run.tokenizer.describe(), self.run.tokenizer.chat_template
    hashes = [described["sha256"], *([] if template is None else [hashlib.sha256(template.encode()).hexdigest()])]
    return "-".join([described["kind"], *(value[:12] for value in hashes)])

  def chat_template(self, chat_template: bool | str = False) -> str:
    """The tokenizer's template, which the harness records; '' without the option `apply_chat_template`.

    Raises:
      InputError: the tokenizer has no template, or the option names a template.
    """
    if not chat_template:
      return ""
    if chat_template not in (True, "default"):
      raise InputError(
        f"apply_chat_template: {chat_template!r} is unsupported, because a tokenizer has one template; omit the name"
      )
    template = self.run.tokenizer.chat_template
    if template is None:
      raise InputError("apply_chat_template: the model's tokenizer has no chat template; leave it out")
    self._begin_chats()
    return template

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """The text of a chat; without `add_generation_prompt` it ends inside the last message, to be continued.

    Raises:
      InputError: see `render_chat`; or the template omits the last message.
    """
    self._begin_chats()
    text = tokenizers.render_chat(self.run.tokenizer, chat_history, add_generation_prompt, clock=self.run.imported)
    if add_generation_prompt:
      return text
    message = chat_history[-1]["content"].lstrip()
    place = text.rfind(message.rstrip())
    if place < 0:
      raise InputError(
        f"messages: the chat template omits the last message, {message[:30]!r}, so it can't be continued"
      )
    # Some templates drop the space after a message.
    return text[:place] + (message if text.startswith(message, place) else message.rstrip())

  def _begin_chats(self) -> None:
    """Encodes all later texts as rendered chats."""
    if self._chat_ends is None:
      self._chat_ends = tokenizers.turn_end_ids(self.run.tokenizer)
      self._special = True

  def get_model_info(self) -> dict[str, Any]:
    """The method, the step and the compute cost of each task; the harness stores them in its results under `config`."""
    return {
      "cyb_jax": {
        "method": self.run.config.method.name,
        "step": self.run.step,
        "tasks": {str(name): spent.describe() for name, spent in self.spent.items()},
      }
    }

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of every continuation.

    As in the harness itself, spaces at the end of a context are moved to its continuation, and both are encoded
    together. A token that contains any character of the continuation is scored; the harness counts a token that also
    contains characters of the context as part of the context.
    """
    del disable_tqdm
    pairs = []
    for request in requests:
      context, continuation = request.args
      stripped = context.rstrip()
      pairs.append((stripped, context[len(stripped) :] + continuation))
    encoded = tokenizers.encode_pairs(self.run.tokenizer, pairs, special=self._special)
    ids = [(self._boundaries.begun(before), after) for before, after in encoded]
    with self._precision():
      scores = self._scorer.score(ids)
    results = [(score.log_likelihood, score.greedy) for score in scores]
    self._note("loglikelihood", requests, scores, results)
    return results

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """The log-likelihood of complete texts."""
    del disable_tqdm
    texts = self._encode([request.args[0] for request in requests])
    with self._precision():
      scores = self._scorer.score_rolling(texts, self._overlap)
    results = [score.log_likelihood for score in scores]
    self._note("loglikelihood_rolling", requests, scores, results)
    return results

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """The text that is generated after every context, up to the first stop string.

    The request options `until`, `max_gen_toks` (and the harness's other names for it), `do_sample`, `temperature`,
    `top_k` and `top_p` have an effect. Without `do_sample` decoding is greedy. If the prompt and the new tokens exceed
    the context, the prompt is cut on the left.
    """
    del disable_tqdm
    # Texts begin with the start token if the model was trained with it; the ids of an empty text may be empty.
    prompts = list(map(self._boundaries.begun, self._encode([request.args[0] for request in requests])))
    by_options: dict[_TextOptions, list[int]] = {}
    for number, request in enumerate(requests):
      by_options.setdefault(self._text_options(request.args[1]), []).append(number)
    # Invalid options are refused before any text is generated.
    for options, _, _ in by_options:
      if options not in self._samplers:
        self._samplers[options] = Sampler(self.run.method, options)
    texts, scores = [""] * len(requests), [Score()] * len(requests)
    for (options, new, stops), numbers in by_options.items():
      if new >= self.max_length:
        logging.warning("max_gen_toks: %d new tokens do not fit into a context of %d tokens; generating %d", new,
          self.max_length, max(1, self.max_length // 2))  # fmt: skip
        new = max(1, self.max_length // 2)
      kept = self.max_length - new
      cut = sum(len(prompts[number]) > kept for number in numbers)
      if cut:
        logging.warning("cut %d of %d prompts on the left to %d tokens", cut, len(numbers), kept)
      sampler = self._samplers[options]
      # Prompts of similar length share a batch. The longest come first, so that running out of memory happens early.
      numbers = sorted(numbers, key=lambda number: (-len(prompts[number]), number))
      starts = range(0, len(numbers), self.batch_size)
      for start in track(starts, "generating", total=len(numbers), unit="texts", size=self.batch_size):
        batch = numbers[start : start + self.batch_size]
        generated = self._generate(
          sampler, [prompts[number][-kept:] or [self.start_id] for number in batch], batch, new, stops
        )
        for number, (text, score) in zip(batch, generated):
          texts[number], scores[number] = text, score
    self._note("generate_until", requests, scores, texts)
    return texts

  def _text_options(self, options: dict[str, Any]) -> _TextOptions:
    """The options of a request for text."""
    until = options.get("until") or []
    stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
    length = next((name for name in _LENGTHS if options.get(name) is not None), None)
    new = _NEW_TOKENS if length is None else _number(options, length, int)
    if new < 1:
      raise InputError(f"{length}: {new} must be at least 1")
    unread = sorted(options.keys() - _READ - {*_LENGTHS})
    if unread:
      logging.log_first_n(logging.WARNING, "ignored options of requests: %s", 1, ", ".join(unread))
    return self._sampling(options), new, stops

  def _generate(
    self, sampler: Sampler, prompts: list[list[int]], seeds: list[int], new: int, stops: tuple[str, ...]
  ) -> list[tuple[str, Score]]:
    """The text after each prompt, and its cost."""
    tokenizer = self.run.tokenizer
    rows = [Continuation(tokenizer, prompt[-_PROMPT_END:], stops) for prompt in prompts]
    count = len(prompts)
    # Copies of the first row pad the last batch, so that only a few batch sizes are compiled.
    padding = min(self.batch_size, 1 << (count - 1).bit_length()) - count
    with self._precision():
      generated = sampler.generate(
        self.run.params,
        [*prompts, *prompts[:1] * padding],
        max_new_tokens=new,
        seeds=[self._seed + number for number in [*seeds, *seeds[:1] * padding]],
        end_id=list(dict.fromkeys([*self._boundaries.end_ids, *(self._chat_ends or ())])),
        context=self.max_length,
        stop=lambda row, tokens: rows[row if row < count else 0].kept(tokens),
        prompt_multiple=_PROMPT_MULTIPLE,
      )
    return [
      (
        rows[row].text(generated.tokens[row]),
        self._cost(sampler.pacing, len(prompts[row]), generated.pauses[row]),
      )
      for row in range(count)
    ]

  def _cost(self, pacing: Pacing, prompt: int, pauses: list[int]) -> Score:
    """The cost of a prompt of `prompt` tokens and of the tokens generated after it, from the pauses before each."""
    layout, counts = pacing.layout, [pacing.slots_run(count) for count in pauses]
    loops = self.run.method.num_slots if slots_share_cache_index(self.run.method) else 1
    counts = [loops * layout.prompt_slots] * (prompt - 1) + counts
    slots, config = sum(counts), self.run.method.cache_config
    if layout.keeps_pauses and layout.shifts_positions:
      counts = [1] * slots  # a window counts slots
    options = {"of_own": loops == 1, "hidden": not layout.keeps_pauses}
    keys, local = (flops.total_keys(counts, window, **options) for window in (None, config.window))
    read = sum(map(pacing.states_read, pauses))
    cost = flops.slot_flops(config, slots=slots, keys=keys, slots_read=read, local_keys=local)
    return Score(tokens=len(pauses), pauses=float(sum(pauses)), slots=float(slots), flops=cost)

  def _sampling(self, options: dict[str, Any]) -> SamplingOptions:
    """The sampler's options for the options of a request."""
    temperature = _number(options, "temperature", float, 0.0)
    draws = options.get("do_sample")
    if draws is None:
      draws = temperature != 0
    if draws and not temperature:
      temperature = 1.0 if options.get("temperature") is None else 0.0
    greedy = not draws or not temperature
    greedy_read = "mixture" if self._mode == "constant" else "threshold"
    return SamplingOptions(
      mode=self._mode,
      read=self._read or (greedy_read if greedy else "sample"),
      temperature=0.0 if greedy else temperature,
      top_k=_number(options, "top_k", int, 0),
      top_p=_number(options, "top_p", float, 1.0),
    )

  def _encode(self, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts, without the start token."""
    tokenizer = self.run.tokenizer
    return list(map(tokenizer.encode_with_special, texts)) if self._special else tokenizer.encode_batch(list(texts))

  def _precision(self):
    return jax.default_matmul_precision(self.run.config.precision.matmul)

  def _note(self, kind: str, requests: list[Instance], scores: list[Score], results: list[Any]) -> None:
    """Adds the scores to the costs of their tasks, and the results to the harness's cache."""
    for request, score, result in zip(requests, scores, results):
      self.spent.setdefault(request.task_name, Spent()).add(score)
      self.cache_hook.add_partial(kind, request.args, result)


def _number(options: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
  """The value of a request's option, a whole number (kind int) or a number (float); the default if it is None.

  Raises:
    InputError: the value is not a number of this kind.
  """
  given = options.get(name)
  if given is None:
    return default
  try:
    value = math.nan if isinstance(given, bool) else float(given)  # YAML parses 1e-5 as a string
  except (TypeError, ValueError, OverflowError):
    value = math.nan
  if math.isnan(value) or (kind is int and not value.is_integer()):
    raise InputError(f"{name}: {given!r} must be a {'whole ' if kind is int else ''}number")
  return kind(value)


def main() -> int | None:
  """The harness's command line, with the model `cyb_jax` registered."""
  from lm_eval.__main__ import cli_evaluate

  # The harness forks, and the threads of Hugging Face tokenizers do not survive a fork.
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  try:
    cli_evaluate()
  except InputError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  return None


if __name__ == "__main__":
  sys.exit(main())
