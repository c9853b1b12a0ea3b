"""A lower bound of a step's time: the longest of computation, memory traffic and communication."""

from __future__ import annotations

import dataclasses

from cyb_jax.compilation.traffic import Traffic
from cyb_jax.costs.flops import Chip

MODEL = (
  "step_seconds is a roofline, a lower bound that is not measured: the longest of executed FLOPs over the chip's peak"
  " in bfloat16, HBM bytes over its bandwidth, and bytes sent to other chips over the bandwidth of all of its links,"
  " with numbers from data sheets and perfect overlap. FLOPs are analytic and count matrix products. HBM bytes are the"
  " operands and results of the optimised HLO's instructions, except arrays that stay on the chip; a kernel's operands"
  " count once, and the largest branch of a conditional. Bytes sent are those of ring algorithms. Loop bodies count as"
  " often as they run. Decoding counts one iteration, without what runs before and after its loop."
)


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Seconds of a step, on each device.

  Attributes:
    compute, hbm, interconnect: the seconds of each resource alone.
  """

  compute: float
  hbm: float
  interconnect: float

  @property
  def seconds(self) -> float:
    return max(self.compute, self.hbm, self.interconnect)

  @property
  def bound(self) -> str:
    """The longest of the three: 'compute', 'hbm' or 'interconnect'."""
    values = dataclasses.asdict(self)
    return max(values, key=values.get)


def roofline(chip: Chip, flops: float, traffic: Traffic) -> Roofline:
  """The roofline of a program with `flops` operations on each device."""
  return Roofline(
    compute=flops / chip.peak_flops,
    hbm=traffic.hbm_bytes / chip.hbm_bandwidth,
    interconnect=traffic.sent / chip.link_bandwidth,
  )
