"""The score of a request, which adds up over its parts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Score:
  """The score of one request.

  Attributes:
    log_likelihood: of the continuation, nats.
    greedy: whether each of its tokens is the likeliest one at its position, or within 1e-5 nats of that one.
    tokens: how many tokens were scored.
    pauses: sum over these tokens of the expected number of pauses, sum_i (i - 1) s_i, and the pauses after the context.
    slots: decoder slots that were run, each counted as often as it ran. The slots of a context that several requests
      share are divided among them.
    flops: operations of the model, divided in the same way.
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
