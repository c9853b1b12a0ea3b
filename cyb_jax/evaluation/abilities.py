"""What evaluation and reports ask a method about itself; no other module of these packages asks."""

from __future__ import annotations

from cyb_jax.methods import Adaptive, Batch, CachedDecoding, EvalOutput, EvaluatedAsTrained, Method, NonCausal, Params


def is_adaptive(method: Method) -> bool:
  """Whether the model itself decides at which slot of a token it stops, so that d has a meaning."""
  return isinstance(method, Adaptive)


def is_causal(method: Method) -> bool:
  """Whether `evaluate` predicts every token from the tokens before it alone."""
  return not isinstance(method, NonCausal)


def is_self_paced(method: Method) -> bool:
  """Whether the method can read a text whose context holds fewer slots than it has."""
  return isinstance(method, CachedDecoding)


def as_trained(method: Method, params: Params, batch: Batch, output: EvalOutput) -> EvalOutput | None:
  """`methods.EvaluatedAsTrained`; None where the training context is that of `evaluate`."""
  if not isinstance(method, EvaluatedAsTrained):
    return None
  return method.evaluate_as_trained(params, batch, output)
