"""A control: a plain model whose layers are passed W times, one token a slot. What more steps buy without more slots.

The layers with all their parameters are run again on their own output; the final norm and the readout come once, behind
the last pass. Universal Transformers without their halting: Dehghani et al. 2019, https://arxiv.org/abs/1807.03819;
Saunshi et al. 2025, https://arxiv.org/abs/2502.17416

Dimensions: B batch, T tokens, S slots of a row, Q slots that run together, D model, L layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import Cache, DecoderConfig, SegmentMask
from cyb_jax.errors import InputError
from cyb_jax.methods.baseline import Plain
from cyb_jax.methods.interface import Batch, Params


class Looped(Plain):
  """Cross-entropy behind K + 1 passes through the layers."""

  name = "looped"
  exports = False
  one_pass = False

  def validate(self) -> None:
    super().validate()
    if not self.config.pauses:
      raise InputError(
        "method.pauses: 0, but method 'looped' needs at least 1 pass beside the first; without it is 'baseline'"
      )

  @property
  def passes_through_layers(self) -> int:
    """W = K + 1."""
    return self.config.pauses + 1

  @property
  def times_run(self) -> float:
    return float(self.passes_through_layers)

  @property
  def cache_config(self) -> DecoderConfig:
    config = self.decoder.config
    return dataclasses.replace(config, num_layers=self.passes_through_layers * config.num_layers)

  def hidden(self, params: Params, batch: Batch) -> Float[Array, "B T 1 D"]:
    tokens, segment_ids = batch["tokens"], batch.get("segment_ids")
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    mask = None if segment_ids is None else SegmentMask(segment_ids)
    inputs = self.decoder.apply({"params": params["decoder"]}, tokens, method="embed")
    return self._run(params, inputs, positions, mask)[:, :, None]

  def hidden_slots(
    self,
    params: Params,
    tokens: Int[Array, "B S"],
    slots: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    mask: Bool[Array, "B 1 S S"],
  ) -> Float[Array, "B S D"]:
    del slots
    inputs = self.decoder.apply({"params": params["decoder"]}, tokens, method="embed")
    return self._run(params, inputs, positions, mask)

  def _run(self, params: Params, inputs: Array, positions: Array, mask: Any) -> Float[Array, "B S D"]:
    variables, hidden = {"params": params["decoder"]}, inputs
    for _ in range(self.passes_through_layers):
      hidden, _ = self.decoder.apply(variables, hidden, positions, mask=mask, method="run_layers")
    return self.decoder.apply(variables, hidden, method="finish")

  def extend(
    self,
    params: Params,
    tokens: Int[Array, "B Q"],
    slots: Int[Array, "B Q"],
    positions: Int[Array, "B Q"],
    cache: Cache,
    start: Int[Array, "B"] | None,
    first: Int[Array, "B"] | None = None,
  ) -> tuple[Float[Array, "B Q D"], Cache]:
    """Each pass has keys and values of its own: the cache holds W L layers, those of the first pass first."""
    del slots
    variables, layers = {"params": params["decoder"]}, self.decoder.config.num_layers
    hidden = self.decoder.apply(variables, tokens, method="embed")
    parts = []
    for number in range(self.passes_through_layers):
      of_pass = slice(number * layers, (number + 1) * layers)
      part = Cache(cache.keys[of_pass], cache.values[of_pass])
      hidden, part = self.decoder.apply(variables, hidden, positions, part, start, first=first, method="extend_layers")
      parts.append(part)
    if self.decoder.config.scan_layers:
      cache = jax.tree.map(lambda *x: jnp.concatenate(x), *parts)
    else:
      cache = Cache(*(tuple(x for part in parts for x in getattr(part, name)) for name in ("keys", "values")))
    return self.decoder.apply(variables, hidden, method="finish"), cache

  def train_slots(self, tokens: int) -> float:
    return tokens * self.passes_through_layers

  def forward_slots(self, tokens: int) -> float:
    return tokens * self.passes_through_layers

  def forward_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    layers = self.passes_through_layers * self.decoder.config.num_layers
    keys = flops.causal_keys(tokens, executed)
    return flops.pass_cost(self.decoder.config, slots=1, keys=keys, slots_read=1, layers=layers)

  def train_cost(self, tokens: int, *, executed: bool = False) -> flops.Cost:
    return flops.train_pass_cost(
      self.decoder.config,
      slots=1,
      keys=flops.causal_keys(tokens, executed),
      slots_read=1,
      layers=self.passes_through_layers * self.decoder.config.num_layers,
      executed=executed,
      frozen=self.weights != "all",
    )
