"""Plain models of the same cost as another method: controls that use the FLOPs for layers instead of pauses.

`deeper@ap` has more layers; `wider@ap` has more heads, with all widths in proportion. The width of the mlp then
compensates the remaining difference. FLOPs per real token are counted by hand (`cyb_jax.costs.flops`), so the sizes
follow from the config and the size of its vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import logging

from cyb_jax import configs, methods
from cyb_jax.configs import Config
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.methods import Method
from cyb_jax.studies import settings
from cyb_jax.studies.settings import Match

# The width of the mlp is a multiple of the largest of these numbers for which the cost is within the tolerance.
_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)
_TOLERANCE = 0.005
# The largest relative difference of the cost at which a model is accepted as a control.
_FURTHEST = 0.05


def fill_plain_model(source: Mapping[str, Any]) -> Mapping[str, Any]:
  """Replaces a method's name such as 'deeper@ap' in a nested config by the plain model; other configs are unchanged.

  Args:
    source: otherwise complete, see `configs.freeze`.

  Raises:
    InputError: see `configs.freeze`; or no plain model has nearly the same cost.
  """
  match = _requested(source)
  if match is None:
    return source
  source = dict(source)
  method = {name: value for name, value in source["method"].items() if name not in ("name", "pauses")}
  frozen = configs.freeze(source | {"method": method | settings.SETTINGS[match.setting]})
  plain = configs.freeze(source | {"method": method | settings.SETTINGS[settings.PLAIN]})
  rows = vocabulary(frozen)
  length = frozen.data.sequence_length
  wanted = _cost(frozen.build_method(rows), match.measure, length)

  def cost(decoder: DecoderConfig) -> float:
    built = methods.build(plain.method, decoder, vocab_size=rows, weights=plain.tuning.weights)
    return _cost(built, match.measure, length)

  decoder = plain.decoder_config(rows)
  grown = grow(decoder, match.direction, cost, wanted)
  _check_cost(source["method"]["name"], match, grown, cost(grown), wanted)
  changed = {
    field: getattr(grown, field)
    for field in ("num_layers", "d_model", "num_heads", "num_kv_heads", "mlp_size")
    if getattr(grown, field) != getattr(decoder, field)
  }
  return dict(plain.source) | {"decoder": {**source.get("decoder", {}), **changed}}


def _requested(source: Mapping[str, Any]) -> Match | None:
  """The plain model that a method's name such as 'deeper@ap' requests."""
  method = source.get("method")
  name = method.get("name") if isinstance(method, Mapping) else None
  return settings.parse_match(name) if isinstance(name, str) else None


def _check_cost(name: str, match: Match, grown: DecoderConfig, cost: float, wanted: float) -> None:
  """Logs the difference between the plain model's cost and the wanted cost, in FLOPs per token.

  Raises:
    InputError: the difference is too large.
  """
  off = cost / wanted - 1
  if abs(off) > _FURTHEST:
    raise InputError(
      f"method.name: {name!r} must cost {wanted:,.0f} FLOPs per token, but the nearest plain model costs"
      f" {cost:,.0f}; match a method of higher cost"
    )
  logging.info(
    "%s: %d layers, width %d, mlp %d: %s %s MFLOPs per token, %+.2f%% relative to %s", name, grown.num_layers,
    grown.d_model, grown.mlp_size, f"{cost / 1e6:,.3f}", match.measure, 100 * off, match.setting,
  )  # fmt: skip


def vocabulary(config: Config) -> int | None:
  """The vocabulary size of a config, without preparing its data; None: the vocabulary of `init_from`, whose entries are
  assumed to fill the decoder's rows.
  """
  from cyb_jax.data.tokenizers import vocabulary_size

  spec = config.data.tokenizer
  return vocabulary_size(spec, config.decoder.get("vocab_size")) if spec else None


def grow(
  decoder: DecoderConfig, direction: str, cost: Callable[[DecoderConfig], float], wanted: float
) -> DecoderConfig:
  """The decoder with a number of layers or heads for which its cost is nearly the wanted cost.

  Args:
    decoder: the decoder; its other fields, including head_size, are kept.
    direction: 'deeper': num_layers grows; 'wider': num_heads grows, with the other widths in proportion.
    cost: the cost of a decoder, which increases with layers, heads and mlp_size.
    wanted: the wanted cost, in the same unit.

  Returns:
    The decoder with the nearest number of layers or heads, and an mlp_size that compensates the remaining difference.
  """
  family = _deeper(decoder) if direction == "deeper" else _wider(decoder)
  below = above = next(family)
  while cost(above) < wanted:
    below, above = above, next(family)
  nearest = sorted((below, above), key=lambda found: abs(cost(found) - wanted))
  fitted = [_fit(found, cost, wanted) for found in nearest]
  close = [found for found in fitted if abs(cost(found) / wanted - 1) <= 2 * _TOLERANCE]
  return close[0] if close else min(fitted, key=lambda found: abs(cost(found) / wanted - 1))


def _deeper(decoder: DecoderConfig) -> Iterator[DecoderConfig]:
  layers = 0
  while True:
    layers += 1
    yield dataclasses.replace(decoder, num_layers=layers)


def _wider(decoder: DecoderConfig) -> Iterator[DecoderConfig]:
  # Query heads of a group share a kv head, so complete groups are added; a single kv head stays single.
  shared = decoder.num_kv_heads == 1
  stride = 1 if shared else decoder.num_heads // decoder.num_kv_heads
  heads = 0
  while True:
    heads += stride
    yield dataclasses.replace(
      decoder,
      num_heads=heads,
      num_kv_heads=1 if shared else heads // stride,
      d_model=max(1, round(decoder.d_model * heads / decoder.num_heads)),
      mlp_size=max(1, round(decoder.mlp_size * heads / decoder.num_heads)),
    )


def _fit(decoder: DecoderConfig, cost: Callable[[DecoderConfig], float], wanted: float) -> DecoderConfig:
  """The decoder with the mlp_size for which its cost is the wanted cost: the roundest size within the tolerance."""
  size = decoder.mlp_size
  found = cost(decoder)
  exact = size + (wanted - found) / (cost(dataclasses.replace(decoder, mlp_size=size + 1)) - found)
  for multiple in _MULTIPLES:
    fitted = dataclasses.replace(decoder, mlp_size=max(1, round(exact / multiple) * multiple))
    if abs(cost(fitted) / wanted - 1) <= _TOLERANCE:
      break
  return fitted


def _cost(method: Method, measure: str, length: int) -> float:
  costs = method.costs(length)
  cost = costs.inference if measure == "inference" else costs.train
  return cost.total
