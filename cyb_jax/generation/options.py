"""How text is sampled, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
import math

from cyb_jax.errors import InputError
from cyb_jax.methods import METHODS, Method
from cyb_jax.methods.paused import PausedMethod
from cyb_jax.stopping import normalize

MODES = ("self_paced", "constant", "none")
READS = ("sample", "threshold", "mixture")
# Colder, and f32 can't divide by it.
_COLDEST = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  """How text is sampled.

  Attributes:
    mode: 'self_paced': one slot at a time, and a pause is run where the model asks for it; the context holds those
      alone. 'constant': a token and all its pauses in one forward, as in training; the answer is read from one of
      them, and all stay in the context. 'none': no pauses but those that the method has behind a prompt. Latent
      thoughts, each fed with the one before it, are run in mode 'constant' alone, one after the other, and read by the
      method's rule whatever `read` says.
    read: when to answer. 'sample': pause with probability d; 'threshold': pause where d > `threshold`; 'mixture': the
      word is drawn from sum_i s_i p_i, of all slots (mode 'constant').
    threshold: see there; 1/2 is the greedy reader.
    max_pauses: K at inference, at most the K of training; None: that.
    omega: a world that may deny a pause: the probability that it grants 1, 2, .. slots, max_pauses + 1 weights; None:
      it grants all of them.
    pause_budget: how many pauses a row may ask for in all (mode 'self_paced'); None: no limit.
    prompt_pauses: 'all': the prompt's tokens are followed by their pauses; 'none'. None: 'all' in mode 'constant', as
      in training, else 'none'.
    temperature: of the words, not of the decision to pause; 0: the likeliest word.
    top_k: only the k likeliest words are drawn; 0: all.
    top_p: only the likeliest words that make up this much probability are drawn; 1: all.

  References: method of arXiv 2510.13879 (self-paced and constant inference); nucleus sampling, Holtzman et al. 2019,
  https://arxiv.org/abs/1904.09751
  """

  mode: str = "self_paced"
  read: str = "sample"
  threshold: float = 0.5
  max_pauses: int | None = None
  omega: tuple[float, ...] | None = None
  pause_budget: int | None = None
  prompt_pauses: str | None = None
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class Plan:
  """What the compiled program hangs on, of a method's sampling.

  Attributes:
    parallel: whether a token's slots run together, in one forward.
    in_turn: whether all of a token's slots run in one iteration, one after the other; see `PausedMethod.run_token`.
    num_slots: W, slots that a token may have.
    prompt_slots: slots of each token of the prompt.
    read: see `SamplingOptions`.
    greedy: whether the likeliest word is taken.
    truncated: whether top_k or top_p leave words out.
    denies: whether the world may deny a pause.
    keeps_pauses: whether a pause stays in the context of later tokens.
    shifts: whether a pause takes a position of its own.
    prompt_stride: how far a token of the prompt is, in positions, from the next.
    stride: the same of tokens that are said; None: as far as it has slots that were run.
  """

  parallel: bool
  in_turn: bool
  num_slots: int
  prompt_slots: int
  read: str
  greedy: bool
  truncated: bool
  denies: bool
  keeps_pauses: bool
  shifts: bool
  prompt_stride: int
  stride: int | None


def default_mode(method: Method) -> str:
  """'self_paced' where the model decides when to answer; 'constant' where a rule does; 'none' without pauses."""
  if method.feeds_back:
    return "constant"
  if method.num_slots == 1:
    return "none"
  return "self_paced" if method.decides else "constant"


def check_decodes(method: Method) -> None:
  """
  Raises:
    InputError: the method doesn't run slot by slot.
  """
  if not method.decodes:
    having = ", ".join(name for name, found in METHODS.items() if found.decodes)
    raise InputError(
      f"method.name: {method.name!r} doesn't run slot by slot: its text can't be generated or scored; {having} do"
    )


def _check_fed_back(method: PausedMethod, options: SamplingOptions) -> None:
  """
  Raises:
    InputError: an option of pauses, which such methods haven't got.
  """
  always = f"but method {method.name!r} always runs a token's latent thoughts one after the other"
  if options.mode != "constant":
    raise InputError(f"mode: {options.mode!r}, {always}; take 'constant'")
  if options.max_pauses not in (None, method.num_slots - 1):
    raise InputError(f"max_pauses: {options.max_pauses}, {always}, {method.num_slots - 1} of them; leave it out")
  if options.prompt_pauses == "none":
    raise InputError(f"prompt_pauses: 'none', {always}, the prompt's too; take 'all'")
  if options.omega is not None:
    raise InputError(f"omega: {options.omega} is set, {always}; leave it out")


def plan(method: PausedMethod, options: SamplingOptions) -> Plan:
  """The program that a method and options ask for.

  Raises:
    InputError: an option out of its range, or two that don't go together.
  """
  check_decodes(method)
  trained = method.num_slots - 1
  for name, choices in (("mode", MODES), ("read", READS)):
    if getattr(options, name) not in choices:
      raise InputError(f"{name}: {getattr(options, name)!r} is none of {', '.join(choices)}")
  pauses = trained if options.max_pauses is None else options.max_pauses
  if isinstance(pauses, bool) or not isinstance(pauses, int) or not 0 <= pauses <= trained:
    raise InputError(f"max_pauses: {pauses!r} must lie in 0..{trained}, the pauses that the model was trained with")
  if method.feeds_back:
    _check_fed_back(method, options)
  if options.mode == "none":
    if options.max_pauses:
      raise InputError(f"max_pauses: {pauses} is set, but mode 'none' has no pauses; take 'self_paced' or 'constant'")
    pauses = 0
  if options.mode == "constant" and method.prompt_pauses:
    raise InputError(
      f"mode: 'constant' gives all tokens the same pauses, but method {method.name!r} has them behind the prompt alone;"
      " take 'none'"
    )
  if options.mode != "constant" and options.read == "mixture":
    raise InputError(
      f"read: 'mixture' reads all slots of a token, but mode {options.mode!r} doesn't run them; take mode 'constant'"
    )
  if not 0 <= options.threshold <= 1:
    raise InputError(f"threshold: {options.threshold!r} must lie in [0, 1]")
  if options.temperature and not _COLDEST <= options.temperature < math.inf:
    raise InputError(
      f"temperature: {options.temperature!r} must be finite and at least {_COLDEST:g}, or 0, the likeliest word"
    )
  if isinstance(options.top_k, bool) or not isinstance(options.top_k, int) or options.top_k < 0:
    raise InputError(f"top_k: {options.top_k!r} must be a whole number that is not negative; 0 keeps all words")
  if not 0 < options.top_p <= 1:
    raise InputError(f"top_p: {options.top_p!r} must lie in (0, 1]; 1 keeps all words")
  if options.prompt_pauses not in (None, "all", "none"):
    raise InputError(f"prompt_pauses: {options.prompt_pauses!r} is none of 'all', 'none'")
  if options.prompt_pauses == "all" and not pauses:
    raise InputError("prompt_pauses: 'all', but no pauses are asked for; take 'none'")
  if options.pause_budget is not None:
    if options.mode != "self_paced":
      raise InputError(
        f"pause_budget: {options.pause_budget} is set, but mode {options.mode!r} doesn't ask for pauses; take"
        " 'self_paced'"
      )
    if options.pause_budget < 0:
      raise InputError(f"pause_budget: {options.pause_budget} must not be negative")
  if options.omega is not None:
    try:
      normalize(options.omega, pauses + 1, name="omega")
    except ValueError as error:
      raise InputError(f"{error}; give max_pauses + 1 = {pauses + 1} weights") from None
  in_prompt = options.prompt_pauses or ("all" if options.mode == "constant" else "none")
  # Hidden pauses of the prompt would be seen by nobody.
  prompt_slots = pauses + 1 if in_prompt == "all" and not method.hides_pauses else 1
  # Where pauses are hidden, and stand at positions of their own, they stand there in training whether seen or not.
  strides = (method.num_slots, method.num_slots) if method.hides_pauses else (prompt_slots, None)
  if not method.shifts_positions:
    strides = (1, 1)
  return Plan(
    parallel=options.mode == "constant" and not method.feeds_back,
    in_turn=method.feeds_back,
    num_slots=pauses + 1,
    prompt_slots=prompt_slots,
    read=options.read,
    greedy=options.temperature == 0,
    truncated=options.top_k > 0 or options.top_p < 1,
    denies=options.omega is not None,
    keeps_pauses=not method.hides_pauses,
    shifts=method.shifts_positions,
    prompt_stride=strides[0],
    stride=strides[1],
  )
