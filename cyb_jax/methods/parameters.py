"""The trained part of a method's parameters. Parameters are nested dicts."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, PyTree


def trained_part(params: PyTree, is_trained: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()) -> PyTree:
  """The trained parameters: the same nested dicts without the other parameters.

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


def new_parameters(init: Callable[[Array], PyTree]) -> frozenset[str]:
  """The names of a method's parameters outside of the decoder, which a pretrained model does not have.

  Args:
    init: see `Method.init`.
  """
  return frozenset(jax.eval_shape(init, jax.random.key(0))) - {"decoder"}
