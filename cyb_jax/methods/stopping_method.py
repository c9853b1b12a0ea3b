"""The base class of methods with a stopping-time objective: calibration, and evaluation in the training context.

Dimensions: B batch, T tokens, W slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Float

from cyb_jax.methods.backbone import Backbone
from cyb_jax.methods.composite import CachedSlotMethod
from cyb_jax.methods.interface import Batch, EvalOutput, Params
from cyb_jax.methods.objectives.stopping import StoppingOptions, StoppingTime
from cyb_jax.methods.slot_models.plain import Plain
from cyb_jax.partitioning import arrays
from cyb_jax.stopping import SlotScores


class StoppingMethod(CachedSlotMethod):
  """The stopping-time losses over a slot model: `abilities.Calibrated` and `abilities.EvaluatedAsTrained`."""

  constants = frozenset({"dont_know_offset"})

  def __init__(self, config: StoppingOptions, backbone: Backbone, slot_model: Plain):
    super().__init__(config, backbone, slot_model, StoppingTime(backbone, config))

  def slot_scores(self, params: Params, batch: Batch) -> SlotScores:
    """All W slots of every token in one context: f32[B, T, W] each, raw."""
    return self.objective.scores(params, self.hidden(params, batch), batch["targets"])

  def decisions(self, params: Params, batch: Batch) -> SlotScores:
    """See `StoppingTime.decisions`."""
    return self.objective.decisions(params, self.hidden(params, batch), batch["targets"])

  def evaluate_as_trained(self, params: Params, batch: Batch, output: EvalOutput) -> EvalOutput | None:
    del params, batch
    return None if self.config.omega is None else self.objective.as_trained(output.scores)

  @property
  def calibration_batches(self) -> int:
    return self.config.calibration_batches

  def calibrate(self, params: Params, batches: Iterable[Batch]) -> Params:
    """Sets `dont_know_offset` so that the median of d over all slots but the last is `dont_know_prior`.

    Parameters from a calibrated run keep their offset, because the trained logits are relative to it.
    """
    if not self.config.calibration_batches or self.num_slots == 1:
      return params
    if float(params["dont_know_offset"]):
      logging.info("calibration skipped: parameters keep an offset of %+.3f nats", float(params["dont_know_offset"]))
      return params
    found = self.median_dont_know(params, batches)
    if found is None:
      logging.warning(
        "calibration skipped: the first %d batches have no token with weight", self.config.calibration_batches
      )
      return params
    median, tokens = found
    offset = self._offset(median)
    logging.info(
      "calibrated: the median of d over %d tokens was %.3g; an offset of %+.3f nats makes it %g",
      tokens, _sigmoid(median), offset, self.config.dont_know_prior,
    )  # fmt: skip
    return params | {"dont_know_offset": jnp.full_like(params["dont_know_offset"], offset)}

  def log_start(self, params: Params, batches: Iterable[Batch]) -> None:
    found = self.median_dont_know(params, batches)
    if found is None:
      return
    median, tokens = found
    text = f"the median of d over {tokens} tokens is {_sigmoid(median):.3g} at the start"
    if self.config.dont_know_prior is not None:
      text += (
        f"; method.calibration_batches would add {self._offset(median):+.3f} nats, which makes it"
        f" {self.config.dont_know_prior:g}"
      )
    logging.info("%s", text)

  def median_dont_know(self, params: Params, batches: Iterable[Batch]) -> tuple[float, int] | None:
    if self.num_slots == 1:
      return None

    @jax.jit
    def odds(params: Params, batch: Batch) -> Float[jax.Array, "B T W-1"]:
      scores = self.decisions(params, batch)
      return (scores.log_dont_know - scores.log_answer)[..., :-1]

    found = np.concatenate([arrays.fetch(odds(params, batch))[arrays.fetch(batch["weights"]) > 0] for batch in batches])
    return (float(np.median(found)), len(found)) if len(found) else None

  def _offset(self, median: float) -> float:
    """The offset that moves the median of log d - log a to its prior, in nats."""
    prior = self.config.dont_know_prior
    return math.log(prior) - math.log1p(-prior) - median


def _sigmoid(x: float) -> float:
  return 0.5 * (1 + math.tanh(x / 2))
