"""RoPE in config.json: its base, the rotated fraction of a head, and the scaling of wavelengths.

Older files have separate fields (`rope_theta`, `partial_rotary_factor`) and `rope_scaling`; newer ones have all of it
in `rope_parameters`. If both are present, `rope_scaling` takes precedence, as in transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cyb_jax.decoder import DecoderConfig, rope_scaling
from cyb_jax.errors import InputError
from cyb_jax.interop.tensors import Fields

# Our names of a scaling's numbers, and those in config.json.
_CONTEXT = "original_max_position_embeddings"
_NAMES: dict[str, dict[str, str]] = {
  "linear": {"factor": "factor"},
  # The context is `max_position_embeddings`, outside of the object.
  "dynamic": {"factor": "factor"},
  "llama3": {"context": _CONTEXT, "factor": "factor", "high": "high_freq_factor", "low": "low_freq_factor"},
  "yarn": {
    "attention": "attention_factor", "context": _CONTEXT, "factor": "factor", "fast": "beta_fast", "slow": "beta_slow",
  },
}  # fmt: skip
# Numbers that need not be given, with their values.
_DEFAULTS = {"fast": 32.0, "slow": 1.0}


@dataclasses.dataclass(frozen=True)
class Rope:
  """RoPE of a model, or of one kind of its layers.

  Attributes:
    base, fraction, scaling: `rope_base`, `rope_fraction` and `rope_scaling` of DecoderConfig.
  """

  base: float
  fraction: float
  scaling: str = ""


def read(
  fields: Fields,
  base_name: str = "rope_theta",
  fraction_name: str = "partial_rotary_factor",
  fraction: float = 1.0,
  base: float = 10_000.0,
) -> Rope:
  """RoPE of a model whose layers have the same one.

  Args:
    fields: the fields of config.json.
    base_name, fraction_name: the names of the older fields in the model's family.
    fraction, base: the values without these fields.

  Raises:
    InputError: a kind of scaling is unsupported, or one of its numbers is missing or invalid.
  """
  base = fields.take(base_name, float, base)
  rope = Rope(base, fields.take(fraction_name, float, fraction))
  if base_name != "rope_theta":  # the files of this family have either name
    rope = dataclasses.replace(rope, base=fields.take("rope_theta", float, base))
  for name in ("rope_parameters", "rope_scaling"):
    rope = _read_object(fields, name, fields.take(name, dict, {}), rope)
  return rope


def read_by_layer(fields: Fields, global_base: float, local_base: float) -> tuple[Rope, Rope]:
  """RoPE of the global and of the local layers (Gemma 3).

  Args:
    fields: the fields of config.json.
    global_base, local_base: the bases if the fields do not give them.
  """
  everywhere = Rope(fields.take("rope_theta", float, global_base), 1.0)
  local = Rope(fields.take("rope_local_base_freq", float, local_base), 1.0)
  given = _block(fields, "rope_parameters", fields.take("rope_parameters", dict, {}))
  everywhere, local = (
    _read_object(fields, f"rope_parameters.{kind}", given.take(kind, dict, {}), rope)
    for kind, rope in (("full_attention", everywhere), ("sliding_attention", local))
  )
  given.finish()
  everywhere = _read_object(fields, "rope_scaling", fields.take("rope_scaling", dict, {}), everywhere)
  if local.scaling:
    raise InputError(
      f"{fields.where}: rope_parameters.sliding_attention has the scaling {local.scaling!r}; this version supports"
      " scaling in layers without a window only"
    )
  return everywhere, local


def _block(fields: Fields, name: str, values: Mapping[str, Any]) -> Fields:
  return Fields(fields.where, {f"{name}.{key}": value for key, value in values.items()}, f"{name}.")


def _read_object(fields: Fields, name: str, values: Mapping[str, Any], rope: Rope) -> Rope:
  """RoPE with the values of an object such as `rope_parameters`."""
  inner = _block(fields, name, values)
  for spelling in ("rope_type", "type"):
    inner.demand(spelling, (None, "default", *_NAMES))
  kind = inner.take("rope_type", str, None) or inner.take("type", str, "default")
  base, fraction = inner.take("rope_theta", float, rope.base), inner.take("partial_rotary_factor", float, rope.fraction)
  scaling = rope.scaling if kind == "default" else _scaling(fields, inner, name, kind)
  inner.finish()
  return Rope(base, fraction, scaling)


def _scaling(fields: Fields, inner: Fields, name: str, kind: str) -> str:
  context = fields.count("max_position_embeddings")
  numbers: dict[str, float] = {}
  for ours, theirs in _NAMES[kind].items():
    if ours == "context":
      value = inner.take(theirs, int, context)
    elif ours == "attention" or (ours == "factor" and kind == "yarn"):
      value = inner.take(theirs, float, None)
    else:
      value = inner.take(theirs, float, _DEFAULTS.get(ours, ...))
    if value is not None:
      numbers[ours] = value
  if kind == "dynamic":
    inner.demand(_CONTEXT, (None, context))
    numbers["context"] = context
  if numbers.get("context") is None and "context" in (*_NAMES[kind], *numbers):
    raise InputError(f"{fields.where}: max_position_embeddings is missing, and {name} has no {_CONTEXT}; give one")
  if kind == "yarn":
    numbers |= _yarn(inner, numbers, context)
  return str(rope_scaling.scaling(f"{fields.where}: {name}", kind, numbers))


def _yarn(inner: Fields, numbers: Mapping[str, float], context: int | None) -> dict[str, float]:
  """The numbers of YaRN that follow from others."""
  factor = numbers.get("factor")
  if factor is None:
    # DeepSeek-V3 gives the two contexts instead.
    factor = (context or numbers["context"]) / numbers["context"]
  found = {"factor": factor, "truncate": float(inner.take("truncate", bool, True))}
  weight, weight_below = inner.take("mscale", float, None), inner.take("mscale_all_dim", float, None)
  if "attention" not in numbers and weight and weight_below:
    above, below = (rope_scaling.yarn_attention(factor, x) for x in (weight, weight_below))
    found["attention"] = above / below
  return found


def write(config: DecoderConfig) -> dict[str, Any]:
  """The fields of a model whose layers have the same RoPE, in the older and the newer spelling."""
  scaling = _written(config)
  written = {
    "rope_theta": config.rope_base,
    "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base} | scaling,
  }
  return written | _older(config, scaling)


def write_by_layer(config: DecoderConfig) -> dict[str, Any]:
  """The fields of a model whose global and local layers differ in RoPE (Gemma 3)."""
  local = config.rope_base if config.local_rope_base is None else config.local_rope_base
  scaling = _written(config)
  written = {
    "rope_theta": config.rope_base,
    "rope_local_base_freq": local,
    "rope_parameters": {
      "full_attention": {"rope_type": "default", "rope_theta": config.rope_base} | scaling,
      "sliding_attention": {"rope_type": "default", "rope_theta": local},
    },
  }
  return written | _older(config, scaling)


def _older(config: DecoderConfig, scaling: dict[str, Any]) -> dict[str, Any]:
  if not scaling:
    return {}
  written: dict[str, Any] = {"rope_scaling": scaling}
  if config.scaling.kind == "dynamic":
    written["max_position_embeddings"] = int(config.scaling["context"])
  return written


def _written(config: DecoderConfig) -> dict[str, Any]:
  """The object of the scaling; empty without one."""
  scaling = config.scaling
  if scaling is None:
    return {}
  written: dict[str, Any] = {"rope_type": scaling.kind}
  left_out = _DEFAULTS | {"attention": rope_scaling.yarn_attention(scaling["factor"])}
  for ours, theirs in _NAMES[scaling.kind].items():
    value = scaling[ours]
    if left_out.get(ours) != value:
      written[theirs] = int(value) if ours == "context" else value
  if scaling.kind == "yarn" and not scaling["truncate"]:
    written["truncate"] = False
  return written
