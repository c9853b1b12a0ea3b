"""Evaluation of a trained model: perplexities and stopping times over a split."""

from cyb_jax.evaluation.perplexity import Evaluator
from cyb_jax.evaluation.ranks import spearman
from cyb_jax.evaluation.record import AUTOREGRESSIVE_WINDOWS, evaluate_split, read_autoregressively
from cyb_jax.evaluation.self_paced import evaluate_self_paced
from cyb_jax.evaluation.statistics import PauseStatistics, statistics_of_split

__all__ = [
  "AUTOREGRESSIVE_WINDOWS",
  "Evaluator",
  "PauseStatistics",
  "evaluate_self_paced",
  "evaluate_split",
  "read_autoregressively",
  "spearman",
  "statistics_of_split",
]
