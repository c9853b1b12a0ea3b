"""The score of a request; the scores of a request's parts add up."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of one request.

  Attributes:
    log_likelihood: the log-likelihood of the continuation, in nats.
    greedy: whether each of its tokens is the most likely token at its position, or within 1e-5 nats of it.
    tokens: the number of scored tokens.
    pauses: the sum over these tokens of the expected number of pauses, sum_i (i - 1) s_i, plus the pauses after the
      context.
    slots: the number of decoder slots that ran; a slot counts each time that it ran. If several requests share a
      context, its slots are divided among them.
    flops: the model's operations, divided in the same way.
  """

  log_likelihood: float = 0.0
  greedy: bool = True
  tokens: int = 0
  pauses: float = 0.0
  slots: float = 0.0
  flops: float = 0.0

  def __add__(self, other: Score) -> Score:
    return Score(
      log_likelihood=self.log_likelihood + other.log_likelihood,
      greedy=self.greedy and other.greedy,
      tokens=self.tokens + other.tokens,
      pauses=self.pauses + other.pauses,
      slots=self.slots + other.slots,
      flops=self.flops + other.flops,
    )
