"""Methods: a slot model and an objective each, by name. `interface` says what a method is, `registry` lists them."""

from cyb_jax.methods.abilities import (
  Adaptive,
  CachedDecoding,
  Calibrated,
  Decoding,
  EarlyExit,
  EvaluatedAsTrained,
  Exportable,
  ExtraMetrics,
  FusedSlots,
  NonCausal,
  PromptPauses,
  SequentialDecoding,
  SlotInputs,
)
from cyb_jax.methods.interface import (
  WEIGHTS,
  Batch,
  DataFacts,
  EvalOutput,
  Method,
  MethodCosts,
  Params,
  TokenLosses,
)
from cyb_jax.methods.options import MethodConfig
from cyb_jax.methods.registry import METHODS, build, config_class, configure, option_names

__all__ = [
  "METHODS",
  "WEIGHTS",
  "Adaptive",
  "Batch",
  "CachedDecoding",
  "Calibrated",
  "DataFacts",
  "Decoding",
  "EarlyExit",
  "EvalOutput",
  "EvaluatedAsTrained",
  "Exportable",
  "ExtraMetrics",
  "FusedSlots",
  "Method",
  "MethodConfig",
  "MethodCosts",
  "NonCausal",
  "Params",
  "PromptPauses",
  "SequentialDecoding",
  "SlotInputs",
  "TokenLosses",
  "build",
  "config_class",
  "configure",
  "option_names",
]
