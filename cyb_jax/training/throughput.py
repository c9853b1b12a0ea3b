"""The throughput of a run: tokens, slots and FLOPs per second, and the fraction of the time spent waiting for data."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from cyb_jax.costs.flops import peak_flops
from cyb_jax.data import Prefetch
from cyb_jax.training.preflight import RunPlan


@dataclasses.dataclass(frozen=True)
class Lap:
  """A measurement between two times at which the results of steps were ready.

  Attributes:
    steps: the number of steps.
    seconds: the duration of these steps.
    data_wait: the fraction of the time in which the trainer waited for data.
    tokens_per_second, slots_per_second: the rates; None if there was no step.
    mfu: model FLOPs utilisation; 0 if there was no step; None if the device's peak rate is unknown.
  """

  steps: int
  seconds: float
  data_wait: float
  tokens_per_second: float | None
  slots_per_second: float | None
  mfu: float | None

  def timing(self) -> dict[str, Any]:
    """The object `timing` of a line of metrics."""
    return {
      "tokens_per_second": self.tokens_per_second,
      "slots_per_second": self.slots_per_second,
      "mfu": self.mfu,
      "data_wait": self.data_wait,
      "seconds": self.seconds,
    }


class Throughput:
  """Measures between the times at which results of steps were ready, because steps are dispatched long before they run.

  Args:
    plan: the plan of the run.
    ahead: the prefetched batches of the trainer.
    step: the last step before the measurement.
  """

  def __init__(self, plan: RunPlan, ahead: Prefetch, step: int):
    data, method = plan.config.data, plan.method
    self._ahead = ahead
    self._tokens_per_step = data.batch_size * data.sequence_length
    costs = method.costs(data.sequence_length)
    self._slots_per_token = costs.train_slots / data.sequence_length
    self._flops_per_token = costs.train.total
    self._devices, self._peak = plan.mesh.size, peak_flops(plan.mesh.devices.flat[0])
    self.restart(step)

  def restart(self, step: int) -> None:
    """Starts a lap after `step`, whose results are ready."""
    self._step, self._ready, self._waited = step, time.perf_counter(), self._ahead.waited

  def lap(self, step: int) -> Lap:
    """The lap that ends at `step`, whose results are ready; the next lap starts."""
    now, waited = time.perf_counter(), self._ahead.waited
    seconds = max(now - self._ready, 1e-9)
    steps, data_wait = step - self._step, min(1.0, (waited - self._waited) / seconds)
    self._step, self._ready, self._waited = step, now, waited
    # There is no step in a lap that started at this step, the first one, which includes compilation.
    rate = steps * self._tokens_per_step / seconds if steps else None
    flops = self._flops_per_token * (rate or 0.0)
    return Lap(
      steps=steps,
      seconds=seconds,
      data_wait=data_wait,
      tokens_per_second=rate,
      slots_per_second=rate * self._slots_per_token if rate else None,
      mfu=flops / (self._peak * self._devices) if self._peak else None,
    )
