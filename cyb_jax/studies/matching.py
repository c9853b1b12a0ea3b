"""Plain models of the same cost as another method: a control that spends its FLOPs on layers, not on pauses.

`deeper@ap` has more layers, `wider@ap` more heads with all widths in proportion; the width of the mlp is adjusted to
the remaining difference. FLOPs per real token are counted by hand (`cyb_jax.costs.flops`), so the sizes follow from the
config and the size of its vocabulary.
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

# The width of the mlp is a multiple of the largest of these with which the cost is off by no more than the tolerance.
_MULTIPLES = (128, 64, 32, 16, 8, 4, 2, 1)
_TOLERANCE = 0.005
# A model whose cost is further off than this is no control.
_FURTHEST = 0.05


def fill_plain_model(source: Mapping[str, Any]) -> Mapping[str, Any]:
  """A nested config with the plain model in place of a method's name such as 'deeper@ap'; any other one as it is.

  Args:
    source: otherwise complete, see `configs.freeze`.

  Raises:
    InputError: see `configs.freeze`; or no plain model has about the same cost.
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
  """Logs how far the plain model's cost is from the wanted one, in FLOPs a token.

  Raises:
    InputError: it is too far.
  """
  off = cost / wanted - 1
  if abs(off) > _FURTHEST:
    raise InputError(
      f"method.name: {name!r} is to take {wanted:,.0f} FLOPs a token, and the nearest plain model takes"
      f" {cost:,.0f}; match a method that takes more"
    )
  logging.info(
    "%s: %d layers, width %d, mlp %d: %s MFLOPs a token of %s, %+.2f%% of %s's", name, grown.num_layers, grown.d_model,
    grown.mlp_size, f"{cost / 1e6:,.3f}", match.measure, 100 * off, match.setting,
  )  # fmt: skip


def vocabulary(config: Config) -> int | None:
  """The size of the vocabulary that a config will have, without preparing its data; None: the vocabulary is that of
  `init_from`, which is assumed to fill the decoder's rows.
  """
  from cyb_jax.data.tokenizers import vocabulary_size

  spec = config.data.tokenizer
  return vocabulary_size(spec, config.decoder.get("vocab_size")) if spec else None


def grow(
  decoder: DecoderConfig, direction: str, cost: Callable[[DecoderConfig], float], wanted: float
) -> DecoderConfig:
  """The decoder with so many layers or heads that its cost is about the wanted one.

  Args:
    decoder: all its other fields are kept, head_size too.
    direction: 'deeper': num_layers grows; 'wider': num_heads, with the other widths in proportion.
    cost: of a decoder; more layers, heads or mlp cost more.
    wanted: the cost, in the same unit.

  Returns:
    The nearest in layers or heads, with an mlp_size that is adjusted to the remaining difference.
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
  # Query heads of a group share their keys and values, so whole groups are added; a single pair stays single.
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
  """The decoder with the mlp_size at which its cost is the wanted one: the roundest size within the tolerance."""
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
