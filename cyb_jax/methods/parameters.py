"""A method's parameters as nested dicts: the part of them that is trained, and their numbers by component."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import PyTree

from cyb_jax.decoder.lora import LEAVES
from cyb_jax.methods.interface import Method


def trained_part(params: PyTree, is_trained: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> PyTree:
  """The parameters that are trained: the same nested dicts, without the names of the others.

  Args:
    params: nested dicts with leaves of any kind.
    is_trained: see `Method.is_trained`.
    path: the names that lead to `params` itself.
  """
  part = {}
  for name, value in params.items():
    here = (*path, name)
    if isinstance(value, dict):
      value = trained_part(value, is_trained, here)
      if value:
        part[name] = value
    elif is_trained(here):
      part[name] = value
  return part


def with_trained(params: PyTree, part: PyTree) -> PyTree:
  """All parameters, in which the leaves of `part` replace those of `params`.

  Args:
    params: nested dicts.
    part: as `trained_part` returns it.
  """
  merged = dict(params)
  for name, value in part.items():
    merged[name] = with_trained(params[name], value) if isinstance(value, dict) else value
  return merged


def count_parameters(method: Method) -> dict[str, int]:
  """Numbers of parameters, from shapes alone.

  Returns:
    `total`; `trained`; and by component `embedding` (with the output table of an untied decoder), `layers` (with the
    final norm), `lora`, `pauses` and `dont_know`. Other parameters of a method are counted under their own names.
  """
  params = nn.unbox(jax.eval_shape(method.init, jax.random.key(0)))
  counts = {"total": 0, "trained": _size(trained_part(params, method.is_trained))}
  counts |= dict.fromkeys(("embedding", "layers", "lora", "pauses", "dont_know"), 0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    component = _component([key.key for key in path])
    counts[component] = counts.get(component, 0) + math.prod(leaf.shape)
    counts["total"] += math.prod(leaf.shape)
  return counts


def _component(names: list[str]) -> str:
  if names[0] == "decoder":
    if names[-1] in LEAVES:
      return "lora"
    return "embedding" if names[1] in ("embedding", "unembedding") else "layers"
  for component, start in (("pauses", "pause_"), ("dont_know", "dont_know")):
    if names[0].startswith(start):
      return component
  return names[0]


def _size(tree: PyTree) -> int:
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
