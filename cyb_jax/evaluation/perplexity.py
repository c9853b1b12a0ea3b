"""Perplexity and related metrics over a split: every real token is scored once, and all methods score the same tokens.

Dimensions: B batch, T tokens, W slots.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, PyTree

from cyb_jax.errors import InputError
from cyb_jax.evaluation.abilities import as_trained, is_adaptive, is_self_paced
from cyb_jax.evaluation.ranks import spearman
from cyb_jax.evaluation.self_paced import KEPT, evaluate_self_paced
from cyb_jax.methods import Batch, EvalOutput, ExtraMetrics, Method, NonCausal
from cyb_jax.partitioning import arrays
from cyb_jax.partitioning.mesh import batch_sharding, data_shards, host_rows, shard_batch
from cyb_jax.stopping import hard_slot, log_stopping_distribution

# Ranks need all values in memory: 4M tokens with W = 4 take 100 MB. For a larger split only the first tokens are used.
_CALIBRATION_TOKENS = 4_000_000
# The prefix of the names of a method's extra metrics among the sums.
_EXTRA = "extra/"


class Evaluator:
  """Evaluates a method's parameters; compiles once for any number of splits.

  Args:
    method: the method.
    mesh: the mesh over which batches are sharded.
    omega: W weights, the step budget of this evaluation; None: every token may use all W slots.
    context: 'constant': every token is followed by all its pauses, as in training; 'self_paced': only by the pauses
      that the model requests, see `evaluation.self_paced`.
    kept: how the slots that stay in a self-paced context are drawn: 'posterior' or 'stopping', see
      `evaluation.self_paced`.

  Attributes:
    shards: the number of shards of a batch.
  """

  def __init__(
    self,
    method: Method,
    mesh: Mesh,
    omega: ArrayLike | None = None,
    context: str = "constant",
    kept: str = "posterior",
  ):
    if context == "self_paced" and not is_self_paced(method):
      raise InputError(
        f"context: 'self_paced', but method {method.name!r} can't run with fewer than all pauses; use 'constant'"
      )
    if kept not in KEPT:
      raise InputError(f"kept: {kept!r} is not one of {', '.join(map(repr, KEPT))}")
    self.method = method
    self.omega = omega
    self.context, self.kept = context, kept
    self.shards = data_shards(mesh)
    self._mesh, self._batch_sharding = mesh, batch_sharding(mesh)
    sums = _sums if context == "constant" else functools.partial(_sums_self_paced, kept)
    compiled = functools.partial(jax.jit, in_shardings=(None, self._batch_sharding), out_shardings=None)
    self._sums = compiled(functools.partial(sums, method, omega))
    self._sums_of_prefixes = compiled(functools.partial(_sums_of_prefixes, method))

  def rows(self, batch_size: int) -> np.ndarray:
    """int64[R]: which rows of a batch this host reads."""
    return host_rows(self._batch_sharding, batch_size)

  def shard_batch(self, batch: dict[str, Any]) -> Batch:
    """This host's rows of a batch, on the devices."""
    return shard_batch(batch, self._batch_sharding)

  def compile_abstract(self, params: PyTree, batch: Batch) -> jax.stages.Compiled:
    """Compiles the program that runs for each batch from abstract shapes; `params` have shardings."""
    return self._sums.lower(params, batch).compile()

  def __call__(
    self, params: PyTree, batches: Iterable[dict[str, Any]], *, num_bytes: int | None = None
  ) -> dict[str, Any]:
    """Perplexities, latency, calibration and compute cost of a split.

    Args:
      params: the method's parameters, bare arrays.
      batches: this host's `rows` of batches [B, T], see `methods.Batch`; padding has weight 0.
      num_bytes: the number of UTF-8 bytes of the text that the tokens encode; None: unknown.

    Returns:
      The keys of the table in docs/guides/evaluation.md from `loss` to `flops`; keys that are undefined for the method
      are None. In addition: `inference_flops` of a token decoded with a cache; `inference_slots`, the measured slots
      per token at inference, for methods that decide this number for each token; the method's own keys
      (`methods.ExtraMetrics`); `loss_perplexity` (exp of the loss); `bits_per_byte`; and `training_omega` (perplexity,
      mean_pauses and latency under the omega and recipe of training, if they differ). In a self-paced context `loss` is
      the mean negative log-likelihood, and there are the keys `constant_perplexity` of the same text in a constant
      context, `context_pauses`, the number of pauses per token in the context, and `kept_pauses`, how they were drawn.

    Raises:
      InputError: no token has weight.
    """
    totals, pairs = _Totals(), _CalibrationPairs()
    for batch in batches:
      placed = self.shard_batch(batch)
      with jax.set_mesh(self._mesh):
        outputs = self._sums(params, placed)
      sums, decided, gained = arrays.fetch(outputs)
      real = totals.add(sums, placed["weights"])
      if decided is not None:
        pairs.add(decided[real], gained[real])
    return self._record(totals, pairs.correlations(), num_bytes)

  def _record(self, totals: _Totals, calibration: list[float | None] | None, num_bytes: int | None) -> dict[str, Any]:
    """The record that `__call__` returns, from the sums over all batches."""
    loss, length = totals.mean("loss"), totals.length
    measured, more = self._measured(totals)
    costs = self.method.costs(length, slots=measured)
    passes = costs.evaluation_passes if self.context == "constant" else 2
    slots = totals.windows * costs.forward_slots * passes
    training = None
    if "training_stopping" in totals:
      training = {"perplexity": totals.perplexity("training_log_likelihood")} | totals.latency("training_stopping")
    return {
      "loss": loss,
      "loss_perplexity": float(np.exp(loss)),
      "perplexity": totals.perplexity("log_likelihood"),
      "bits_per_byte": float(-totals["log_likelihood"] / np.log(2) / num_bytes) if num_bytes else None,
      **totals.latency("stopping"),
      "slot_perplexity": totals.perplexity("slots"),
      "oracle_perplexity": totals.perplexity("oracle"),
      "hard_perplexity": totals.perplexity("hard"),
      "calibration": calibration,
      "training_omega": training,
      "tokens": totals.tokens,
      "slots": round(slots),
      "inference_slots": measured,
      "inference_flops": float(costs.inference.total),
      "flops": float(costs.forward.total * totals.windows * length * passes),
      **more,
    }

  def _measured(self, totals: _Totals) -> tuple[float | None, dict[str, Any]]:
    """The measured slots per token at inference (None: the method does not decide this number for each token), and the
    keys that only some methods or contexts have.
    """
    if self.context == "self_paced":
      kept = totals.mean("kept")
      constant = totals.perplexity("constant_log_likelihood")
      return kept, {"constant_perplexity": constant, "context_pauses": kept - 1, "kept_pauses": self.kept}
    measured = None
    if "inference_slots" in totals:
      measured = float(totals["inference_slots"] / totals["inference_tokens"])
    more = self.method.summarize_metrics(totals.extra_means()) if isinstance(self.method, ExtraMetrics) else {}
    return measured, more

  def autoregressive(self, params: PyTree, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The autoregressive perplexity of a non-causal method: every target is predicted only from the tokens before it,
    which costs one pass per token.

    Args:
      params, batches: as in `__call__`.

    Returns:
      `perplexity`; `blockwise_perplexity`, of the same targets read in one pass, as in `__call__`; `tokens`, the number
      of targets; `windows`.
    """
    totals = _Totals()
    for batch in batches:
      placed = self.shard_batch(batch)
      with jax.set_mesh(self._mesh):
        sums = self._sums_of_prefixes(params, placed)
      totals.add(arrays.fetch(sums), placed["weights"])
    return {
      "perplexity": totals.perplexity("log_likelihood"),
      "blockwise_perplexity": totals.perplexity("blockwise"),
      "tokens": totals.tokens,
      "windows": totals.windows,
    }


class _Totals:
  """Weighted sums over the batches of all hosts, in float64.

  Attributes:
    windows: the number of windows that have a target with weight.
    length: T.
  """

  def __init__(self):
    self._sums: dict[str, Any] = {}
    self.windows = self.length = 0

  def add(self, sums: dict[str, Any], weights: Array) -> np.ndarray:
    """Adds the sums of a batch; returns bool[B, T], which tokens of all hosts have weight.

    Args:
      sums: the sums of the global batch, on this host.
      weights: f32[B, T], on the devices.
    """
    for name, value in sums.items():
      self._sums[name] = self._sums.get(name, 0.0) + np.asarray(value, np.float64)
    real = arrays.fetch(weights) > 0
    self.windows += int(real.any(-1).sum())
    self.length = real.shape[1]
    return real

  def __contains__(self, name: str) -> bool:
    return name in self._sums

  def __getitem__(self, name: str) -> Any:
    return self._sums[name]

  @property
  def tokens(self) -> int:
    """The number of tokens with weight.

    Raises:
      InputError: no token has weight.
    """
    return int(self._tokens)

  @property
  def _tokens(self) -> float:
    tokens = self._sums["tokens"]
    if not tokens:
      raise InputError(
        "limit: no target has weight in the evaluated windows; increase the limit, or choose another split"
      )
    return tokens

  def mean(self, name: str) -> float:
    """The mean over tokens."""
    return float(self._sums[name] / self._tokens)

  def perplexity(self, name: str) -> Any:
    """exp(-mean) of log-likelihoods, a number or a list with one number per slot; None if there is no such sum."""
    return np.exp(-self._sums[name] / self._tokens).tolist() if name in self._sums else None

  def latency(self, name: str) -> dict[str, Any]:
    """`mean_pauses`, and `latency`, the mean of s."""
    latency = self._sums[name] / self._tokens
    return {"mean_pauses": float(latency @ np.arange(len(latency))), "latency": latency.tolist()}

  def extra_means(self) -> dict[str, float]:
    """The means of `EvalOutput.extra_metrics`."""
    names = (name for name in self._sums if name.startswith(_EXTRA))
    return {name.removeprefix(_EXTRA): self.mean(name) for name in names}


class _CalibrationPairs:
  """d_i and t_{i+1} - t_i of about the first 4M tokens, because ranks need all values in memory."""

  def __init__(self):
    self._decisions: list[np.ndarray] = []
    self._gains: list[np.ndarray] = []
    self._kept = 0

  def add(self, decisions: np.ndarray, gains: np.ndarray) -> None:
    """Adds f32[N, W-1] each, of the tokens with weight in a batch."""
    if self._kept < _CALIBRATION_TOKENS:
      self._decisions.append(decisions)
      self._gains.append(gains)
      self._kept += len(decisions)

  def correlations(self) -> list[float | None] | None:
    """Spearman's coefficient of each step; None if nothing was added."""
    return spearman(np.concatenate(self._decisions), np.concatenate(self._gains)) if self._decisions else None


def _sums(
  method: Method, omega: ArrayLike | None, params: PyTree, batch: Batch
) -> tuple[dict[str, Array], Array | None, Array | None]:
  """Weighted sums over a batch; and, if the method is adaptive, d_i and t_{i+1} - t_i of each token."""
  output = method.evaluate(params, batch, omega)
  return _sums_of(method, output, as_trained(method, params, batch, output), batch["weights"])


def _sums_of_prefixes(method: NonCausal, params: PyTree, batch: Batch) -> dict[str, Array]:
  output, weights = method.evaluate(params, batch), batch["weights"]
  blockwise = jax.nn.logsumexp(output.log_stopping + output.scores.log_target, -1)
  return {
    "tokens": weights.sum(),
    "log_likelihood": (method.autoregressive_log_likelihood(params, batch) * weights).sum(),
    "blockwise": (blockwise * weights).sum(),
  }


def _sums_self_paced(
  kept_by: str, method: Method, omega: ArrayLike | None, params: PyTree, batch: Batch
) -> tuple[dict[str, Array], Array | None, Array | None]:
  """`_sums` in a self-paced context, and the log-likelihood in a constant context for comparison."""
  output, kept = evaluate_self_paced(method, params, batch, omega, kept=kept_by)
  sums, decisions, gains = _sums_of(method, output, None, batch["weights"])
  constant = method.evaluate(params, batch)
  log_stopping = constant.log_stopping
  if omega is not None:  # not passed to `evaluate`, because a recipe that draws slots would draw from it
    log_stopping = log_stopping_distribution(constant.scores.log_dont_know, constant.scores.log_answer, omega)
  log_likelihood = jax.nn.logsumexp(log_stopping + constant.scores.log_target, -1)
  sums["constant_log_likelihood"] = (log_likelihood * batch["weights"]).sum()
  sums["kept"] = (kept * batch["weights"]).sum()
  return sums, decisions, gains


def _sums_of(
  method: Method, output: EvalOutput, training: EvalOutput | None, weights: Array
) -> tuple[dict[str, Array], Array | None, Array | None]:
  scores = output.scores

  def total(values: Array) -> Array:
    # Not an einsum: accelerators would round a matrix product.
    return (values * weights.reshape(weights.shape + (1,) * (values.ndim - 2))).sum((0, 1))

  sums = {
    "tokens": weights.sum(),
    "loss": total((training or output).loss),
    "log_likelihood": total(output.log_likelihood),
    "oracle": total(scores.log_target.max(-1)),
    "stopping": total(jnp.exp(output.log_stopping)),
  }
  sums |= {f"{_EXTRA}{name}": total(values) for name, values in output.extra_metrics.items()}
  if output.slots is not None:
    # All tokens of a window run, whether or not they have weight; windows that only pad a batch don't count.
    real = jnp.broadcast_to((weights > 0).any(-1, keepdims=True), weights.shape).astype(jnp.float32)
    sums |= {"inference_slots": (output.slots * real).sum(), "inference_tokens": real.sum()}
  if output.lengths is None:  # otherwise only some tokens have a given slot
    sums["slots"] = total(scores.log_target)
  if training is not None:
    sums["training_log_likelihood"] = total(training.log_likelihood)
    sums["training_stopping"] = total(jnp.exp(training.log_stopping))
  if not is_adaptive(method):
    return sums, None, None
  chosen = hard_slot(scores.log_dont_know)[..., None]
  sums["hard"] = total(jnp.take_along_axis(scores.log_target, chosen, -1)[..., 0])
  if method.num_slots == 1 or output.lengths is not None:
    return sums, None, None
  target = jnp.exp(scores.log_target)
  return sums, jnp.exp(scores.log_dont_know[..., :-1]), target[..., 1:] - target[..., :-1]
