"""The adapter for lm-evaluation-harness: any method, on the harness's tasks, from its own command line.

python -m cyb_jax.generation.harness run --model cyb_jax --model_args workdir=DIR --tasks lambada_openai,hellaswag

Likelihoods are `generation.scoring`'s, text is the sampler's. Needs the extra `harness`.
"""

from __future__ import annotations

import dataclasses
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
from cyb_jax.errors import InputError
from cyb_jax.generation.options import Plan, SamplingOptions, default_mode
from cyb_jax.generation.sampler import Sampler
from cyb_jax.generation.scoring import Score, Scorer
from cyb_jax.generation.text import Continuation
from cyb_jax.interop import pretrained
from cyb_jax.partitioning.mesh import make_mesh

try:
  from lm_eval.api.instance import Instance
  from lm_eval.api.model import LM
  from lm_eval.api.registry import register_model
except ImportError as error:
  raise InputError(f"lm_eval: can't be imported ({error}); pip install 'cyb_jax[harness]'") from None

_BATCH_SIZE = 16
_NEW_TOKENS = 256  # the harness's own default
# Names of one option, by the harness's priority; and the others that are read.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READ = {"until", "do_sample", "temperature", "top_k", "top_p"}
# Prompts are padded to a multiple of this: a program of a deep model takes longer to compile than so many slots to run.
_PROMPT_MULTIPLE = 128
# A text is decoded behind the end of its prompt, which says how its first word begins.
_PROMPT_END = 16


@dataclasses.dataclass
class Spent:
  """What the requests of a task have spent.

  Attributes:
    requests: how many.
    tokens: that were scored or said.
    pauses: of these: expected where they were scored, run where they were said.
    slots, flops: see `Score`; of text that is said, those of its prompt too.
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
    """`requests`, `tokens`, `mean_pauses` a token, and `slots_per_request` and `flops_per_request`."""
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

  Args:
    workdir: the run's folder.
    checkpoint: 'last', 'best' or a step.
    init_from: weights that a run could start from, in place of a run's folder; see `cyb_jax.interop.pretrained`.
    run: a loaded run, in place of either.
    batch_size: rows of text that are said together; 'auto' is 16. Scoring fills rows of slots, whatever this is.
    max_length: tokens that the model can take; None: what it was trained on.
    mode: how text is said, see `SamplingOptions`; '': with pauses where training has them: 'constant' under the recipe
      of that name, else what suits the method.
    read: when to answer; '': where the likeliest words are asked for, 'threshold' in mode self_paced and 'mixture' in
      mode constant, else 'sample'.
    add_bos_token: whether the start token stands in front of a text; None: as the tokenizer's model expects it.
    overlap: see `Scorer.score_rolling`.
    pauses: between a context and what is scored or said, of methods that have such; None: as in training.
    seed: of text that is drawn.
    mesh: where a loaded run's parameters lie, if on several devices.
    max_batch_size, device: taken since the harness gives them; they change nothing.

  Attributes:
    spent: `Spent` by the name of the task.

  Raises:
    InputError: no run, or an option that won't do.
  """

  def __init__(
    self,
    workdir: str | None = None,
    checkpoint: str | int = "last",
    *,
    init_from: str | None = None,
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
        "workdir: give model_args workdir=DIR, the run's folder, or init_from=WEIGHTS, or a loaded run, and one of them"
      )
    if run is None:
      if jax.device_count() > 1:
        mesh = make_mesh(ParallelismConfig())
      run = (
        runs.load(workdir, checkpoint, mesh)
        if init_from is None
        else pretrained.load(init_from, checkpoint=checkpoint, mesh=mesh)
      )
    if pauses is not None:
      run = dataclasses.replace(run, method=run.method.with_prompt_pauses(pauses))
    text = str(batch_size or "auto").partition(":")[0]
    if text != "auto" and not (text.isdecimal() and int(text)):
      raise InputError(f"batch_size: {batch_size!r} must be a number of at least 1, or 'auto'")
    self.run, self.batch_size = run, _BATCH_SIZE if text == "auto" else int(text)
    self.max_length = run.config.data.sequence_length if max_length is None else max_length
    tokenizer = run.tokenizer
    self.start_id = tokenizer.start_id
    self._adds_start = tokenizer.adds_start if add_bos_token is None else bool(add_bos_token)
    constant = run.method.num_slots > 1 and run.method.config.recipe == "constant"
    self._mode = mode or ("constant" if constant else default_mode(run.method))
    self._read, self._overlap, self._seed = read, overlap, seed
    Sampler(run.method, self._sampling({}))  # whose errors are to come now
    self._scorer = Scorer(run.method, run.params, context=self.max_length, start_id=self.start_id, mesh=mesh)
    self._samplers: dict[SamplingOptions, Sampler] = {}
    self.spent: dict[str | None, Spent] = {}

  @property
  def tokenizer_name(self) -> str:
    """Kind and hash of the tokenizer."""
    described = self.run.tokenizer.describe()
    return f"{described['kind']}-{described['sha256'][:12]}"

  def get_model_info(self) -> dict[str, Any]:
    """What the harness writes into its results, under `config`: what was evaluated, and what each task has spent."""
    return {
      "cyb_jax": {
        "method": self.run.config.method.name,
        "step": self.run.step,
        "tasks": {str(name): spent.describe() for name, spent in self.spent.items()},
      }
    }

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of every continuation. Spaces that end a context begin its continuation, and
    both are encoded together, as the harness does; the continuation's ids are those behind as many as the context has.
    """
    del disable_tqdm
    pairs = []
    for request in requests:
      context, continuation = request.args
      stripped = context.rstrip()
      pairs.append((stripped, context[len(stripped) :] + continuation) if context else (context, continuation))
    contexts = sorted({context for context, _ in pairs})
    before = dict(zip(contexts, self._encode(contexts)))
    whole = self._encode([context + continuation for context, continuation in pairs])
    ids = [(before[context], ids[len(before[context]) :]) for (context, _), ids in zip(pairs, whole)]
    with self._precision():
      scores = self._scorer.score(ids)
    results = [(score.log_likelihood, score.greedy) for score in scores]
    self._note("loglikelihood", requests, scores, results)
    return results

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """The log-likelihood of whole texts."""
    del disable_tqdm
    texts = self.run.tokenizer.encode_batch([request.args[0] for request in requests])
    with self._precision():
      scores = self._scorer.score_rolling(texts, self._overlap)
    results = [score.log_likelihood for score in scores]
    self._note("loglikelihood_rolling", requests, scores, results)
    return results

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """What is said behind every context, up to the first of its stop texts.

    Of a request's options `until`, `max_gen_toks` (and the harness's other names of it), `do_sample`, `temperature`,
    `top_k` and `top_p` are read. Without `do_sample` the likeliest words are taken. A prompt is cut on the left where
    it and the new tokens don't fit.
    """
    del disable_tqdm
    prompts = self._encode([request.args[0] for request in requests])
    alike: dict[tuple[SamplingOptions, int, tuple[str, ...]], list[int]] = {}
    for number, request in enumerate(requests):
      options = request.args[1]
      until = options.get("until") or []
      stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
      new = next((int(options[name]) for name in _LENGTHS if options.get(name) is not None), _NEW_TOKENS)
      unread = sorted(options.keys() - _READ - {*_LENGTHS})
      if unread:
        logging.log_first_n(logging.WARNING, "options of requests that change nothing here: %s", 1, ", ".join(unread))
      alike.setdefault((self._sampling(options), new, stops), []).append(number)
    texts, scores = [""] * len(requests), [Score()] * len(requests)
    for (options, new, stops), numbers in alike.items():
      if new >= self.max_length:
        logging.warning("max_gen_toks: %d leave no room in a context of %d; %d are said", new, self.max_length,
          max(1, self.max_length // 2))  # fmt: skip
        new = max(1, self.max_length // 2)
      kept = self.max_length - new
      cut = sum(len(prompts[number]) > kept for number in numbers)
      if cut:
        logging.warning("%d of %d prompts were cut on the left to %d tokens", cut, len(numbers), kept)
      sampler = self._samplers.setdefault(options, Sampler(self.run.method, options))
      # Of alike length together, the longest first: what doesn't fit into memory fails at once.
      numbers = sorted(numbers, key=lambda number: (-len(prompts[number]), number))
      for start in range(0, len(numbers), self.batch_size):
        batch = numbers[start : start + self.batch_size]
        said = self._say(sampler, [prompts[number][-kept:] or [self.start_id] for number in batch], batch, new, stops)
        for number, (text, score) in zip(batch, said):
          texts[number], scores[number] = text, score
        logging.log_every_n_seconds(logging.INFO, "said %d of %d texts", 10, start + len(batch), len(numbers))
    self._note("generate_until", requests, scores, texts)
    return texts

  def _say(
    self, sampler: Sampler, prompts: list[list[int]], seeds: list[int], new: int, stops: tuple[str, ...]
  ) -> list[tuple[str, Score]]:
    tokenizer = self.run.tokenizer
    rows = [Continuation(tokenizer, prompt[-_PROMPT_END:], stops) for prompt in prompts]
    count = len(prompts)
    # Whole batches have one program; a last one of fewer rows is filled up with its own first row.
    padding = min(self.batch_size, 1 << (count - 1).bit_length()) - count
    with self._precision():
      said = sampler.generate(
        self.run.params,
        [*prompts, *prompts[:1] * padding],
        max_new_tokens=new,
        seeds=[self._seed + number for number in [*seeds, *seeds[:1] * padding]],
        end_id=tokenizer.end_id,
        context=self.max_length,
        stop=lambda row, tokens: rows[row if row < count else 0].kept(tokens),
        prompt_multiple=_PROMPT_MULTIPLE,
      )
    return [
      (rows[row].text(said.tokens[row]), self._cost(sampler.plan, len(prompts[row]), said.pauses[row]))
      for row in range(count)
    ]

  def _cost(self, plan: Plan, prompt: int, pauses: list[int]) -> Score:
    """What a prompt and the tokens behind it have spent, from how many pauses each of these had."""
    counts = [plan.num_slots if plan.parallel else 1 + count for count in pauses]
    before = (prompt - 1) * plan.prompt_slots
    slots = before + sum(counts)
    if plan.keeps_pauses:
      keys = slots * (slots + 1) / 2
    else:
      keys = before * (before + 1) / 2
      keys += sum(count * (prompt + number) + count * (count - 1) / 2 for number, count in enumerate(counts))
    # Pauses behind a prompt, and thoughts, are run without looking.
    looks = not (plan.in_turn or self.run.method.prompt_pauses)
    read = sum(counts) if looks else len(counts)
    cost = flops.slot_flops(self.run.method.cache_config, slots=slots, keys=keys, slots_read=read)
    return Score(tokens=len(pauses), pauses=float(sum(pauses)), slots=float(slots), flops=cost)

  def _sampling(self, options: dict[str, Any]) -> SamplingOptions:
    """The sampler's options for those of a request."""
    temperature = float(options.get("temperature") or 0.0)
    draws = options.get("do_sample")
    if draws is None:
      draws = temperature > 0
    if draws and not temperature:
      temperature = 1.0 if options.get("temperature") is None else 0.0
    greedy = not draws or not temperature
    greedy_read = "mixture" if self._mode == "constant" else "threshold"
    return SamplingOptions(
      mode=self._mode,
      read=self._read or (greedy_read if greedy else "sample"),
      temperature=0.0 if greedy else temperature,
      top_k=0 if greedy else int(options.get("top_k") or 0),
      top_p=1.0 if greedy else float(options.get("top_p") or 1.0),
    )

  def _encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of texts that are given alone. An empty one has none: where one is needed the start token stands in."""
    start = [self.start_id] if self._adds_start else []
    encoded = self.run.tokenizer.encode_batch(list(texts))
    return [[*start, *ids] for ids in encoded]

  def _precision(self):
    return jax.default_matmul_precision(self.run.config.precision.matmul)

  def _note(self, kind: str, requests: list[Instance], scores: list[Score], results: list[Any]) -> None:
    """Adds to what the tasks have spent; and tells the harness's cache."""
    for request, score, result in zip(requests, scores, results):
      self.spent.setdefault(request.task_name, Spent()).add(score)
      self.cache_hook.add_partial(kind, request.args, result)


def main() -> int | None:
  """The harness's command line, which knows the model `cyb_jax`."""
  from lm_eval.__main__ import cli_evaluate

  # Its tokenizers' threads don't outlive a fork.
  os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
  try:
    cli_evaluate()
  except InputError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  return None


if __name__ == "__main__":
  sys.exit(main())
