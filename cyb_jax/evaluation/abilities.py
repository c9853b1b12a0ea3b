"""What evaluation and reports ask a method about itself; no other module of these packages asks."""

from __future__ import annotations

from cyb_jax.methods import Method


def is_adaptive(method: Method) -> bool:
  """Whether the model itself decides at which slot of a token it stops, so that d has a meaning."""
  return method.decides


def is_causal(method: Method) -> bool:
  """Whether `evaluate` predicts every token from the tokens before it alone."""
  return method.causal


def is_self_paced(method: Method) -> bool:
  """Whether the method can read a text whose context holds fewer slots than it has."""
  return method.self_paces
