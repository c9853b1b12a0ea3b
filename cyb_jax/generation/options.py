"""The options of sampling, and the checks of single options, which do not depend on the method."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cyb_jax.errors import InputError

MODES = ("self_paced", "constant", "none")
READS = ("sample", "threshold", "mixture")
# The log-probabilities are divided by the temperature in f32, which overflows at lower temperatures.
_LOWEST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
  """How text is generated.

  Attributes:
    mode: 'self_paced': one slot at a time; a pause runs if the model requests it, and the context holds only the pauses
      that have run. 'constant': a token and all its pauses in one forward pass, as in training; one of the slots is
      read, and all of them stay in the context. 'none': no pauses, except the pauses of the method after a prompt.
      Methods with latent thoughts support only 'constant': the thoughts of a token run one after the other, and the
      method's own rule reads them; `read` has no effect.
    read: when a token is read. 'sample': a pause is requested with probability d; 'threshold': a pause is requested if
      d > `threshold`; 'mixture': the token is drawn from sum_i s_i p_i over all slots (only in mode 'constant').
    threshold: see `read`; 1/2 makes the decision greedy.
    max_pauses: K in generation, at most the K of training; None: the K of training.
    omega: the step budget, which may deny a pause: the probabilities that 1, 2, .. slots are allowed, max_pauses + 1
      weights; None: all slots are always allowed.
    pause_budget: the largest total of pauses in a row (mode 'self_paced'); None: no limit.
    prompt_pauses: 'all': pauses follow every token of the prompt; 'none': no pauses in the prompt. None: 'all' in mode
      'constant', as in training, else 'none'.
    temperature: the temperature of the token distribution; the decision to pause has no temperature. 0: the most likely
      token.
    top_k: only the k most likely tokens are drawn; 0: all.
    top_p: only the most likely tokens that together have this probability are drawn; 1: all.

  References: arXiv 2510.13879 (self-paced and constant inference); nucleus sampling, Holtzman et al. 2019,
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

  def check(self) -> None:
    """Checks each option alone; `pacing.choose_pacing` checks the options together with the method.

    Raises:
      InputError: an option is out of its range.
    """
    _check_choice("mode", self.mode, MODES)
    _check_choice("read", self.read, READS)
    if not 0 <= self.threshold <= 1:
      raise InputError(f"threshold: {self.threshold!r} must be in [0, 1]")
    if self.temperature and not _LOWEST_TEMPERATURE <= self.temperature < math.inf:
      raise InputError(
        f"temperature: {self.temperature!r} must be finite and at least {_LOWEST_TEMPERATURE:g}, or 0 for the most"
        " likely token"
      )
    if not is_count(self.top_k):
      raise InputError(f"top_k: {self.top_k!r} must be a whole number that is not negative; 0 keeps all tokens")
    if not 0 < self.top_p <= 1:
      raise InputError(f"top_p: {self.top_p!r} must be in (0, 1]; 1 keeps all tokens")
    if self.prompt_pauses not in (None, "all", "none"):
      raise InputError(f"prompt_pauses: {self.prompt_pauses!r} is not one of 'all', 'none'")


def is_count(value: Any) -> bool:
  """Whether the value is a whole number of at least 0 (and not a bool)."""
  return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  if value not in choices:
    raise InputError(f"{name}: {value!r} is not one of {', '.join(choices)}")
