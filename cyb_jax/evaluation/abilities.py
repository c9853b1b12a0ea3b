"""The abilities of methods that evaluation and reports depend on; no other module of these packages reads them."""

from __future__ import annotations

from cyb_jax.methods import Adaptive, Batch, CachedDecoding, EvalOutput, EvaluatedAsTrained, Method, NonCausal, Params


def is_adaptive(method: Method) -> bool:
  """Whether the model itself decides at which slot of a token it stops, so that d is meaningful."""
  return isinstance(method, Adaptive)


def is_causal(method: Method) -> bool:
  """Whether `evaluate` predicts every token only from the tokens before it."""
  return not isinstance(method, NonCausal)


def is_self_paced(method: Method) -> bool:
  """Whether the method can read a text with fewer than W slots per token in the context."""
  return isinstance(method, CachedDecoding)


def as_trained(method: Method, params: Params, batch: Batch, output: EvalOutput) -> EvalOutput | None:
  """See `methods.EvaluatedAsTrained`; None if the training context equals that of `evaluate`."""
  if not isinstance(method, EvaluatedAsTrained):
    return None
  return method.evaluate_as_trained(params, batch, output)
