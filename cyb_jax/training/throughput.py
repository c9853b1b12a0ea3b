"""Speed of a run: tokens, slots and FLOPs per second, and the share of the time that is spent waiting for data."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from cyb_jax.costs.flops import peak_flops
from cyb_jax.data import Prefetch
from cyb_jax.training.preflight import RunPlan


@dataclasses.dataclass(frozen=True)
class Lap:
  """What was measured between two times at which numbers were ready.

  Attributes:
    steps: how many steps ran.
    seconds: how long they took.
    data_wait: the share of the seconds in which the trainer waited for data.
    tokens_per_second, slots_per_second: None where no step ran.
    mfu: model FLOPs utilisation; 0 where no step ran; None where the device's peak is unknown.
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
  """Measures between the times at which numbers were ready, since steps are dispatched long before they run.

  Args:
    plan: the run's.
    ahead: the source of the trainer's batches.
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
    """Starts a lap after `step`, whose numbers are ready."""
    self._step, self._ready, self._waited = step, time.perf_counter(), self._ahead.waited

  def lap(self, step: int) -> Lap:
    """The lap that ends at `step`, whose numbers are ready; the next lap starts."""
    now, waited = time.perf_counter(), self._ahead.waited
    seconds = max(now - self._ready, 1e-9)
    steps, data_wait = step - self._step, min(1.0, (waited - self._waited) / seconds)
    self._step, self._ready, self._waited = step, now, waited
    # No step ran where the lap started at this step, the first one, which was compiled.
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
