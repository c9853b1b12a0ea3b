"""Perplexity and its relatives over a split (method.md 5): every real token scored once, the same tokens for every
method.

Dimensions: B batch, T tokens, W slots.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, PyTree
from scipy import stats

from cyb_jax.errors import InputError
from cyb_jax.evaluation.self_paced import evaluate_self_paced
from cyb_jax.methods import Batch, EvalOutput, Method
from cyb_jax.partitioning import arrays
from cyb_jax.partitioning.mesh import batch_sharding, data_shards, host_rows, shard_batch
from cyb_jax.stopping import hard_slot, log_stopping_distribution

# Ranks need all values at once: at 4M tokens and W = 4 they take 100 MB. Of a larger split the first tokens are taken.
_CALIBRATION_TOKENS = 4_000_000


class Evaluator:
  """Evaluates a method's parameters; compiled once, used as often as wanted.

  Args:
    method: what is evaluated.
    mesh: the batch is spread over it.
    omega: W weights, what the world grants in this evaluation; None: all W slots, always.
    context: 'constant': every token is followed by all its pauses, as in training; 'self_paced': by those alone that
      the model asks for, see `evaluation.self_paced`.

  Attributes:
    shards: into how many parts a batch is split.
  """

  def __init__(self, method: Method, mesh: Mesh, omega: ArrayLike | None = None, context: str = "constant"):
    if context == "self_paced" and not method.self_paces:
      raise InputError(f"context: 'self_paced', but method {method.name!r} has no pauses that it could go without")
    self.method = method
    self.omega = omega
    self.context = context
    self.shards = data_shards(mesh)
    self._mesh, self._batch_sharding = mesh, batch_sharding(mesh)
    sums = _sums if context == "constant" else _sums_self_paced
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
    """Compiles what is run for each batch, from shapes alone; those of `params` with shardings."""
    return self._sums.lower(params, batch).compile()

  def __call__(
    self, params: PyTree, batches: Iterable[dict[str, Any]], *, num_bytes: int | None = None
  ) -> dict[str, Any]:
    """The numbers of method.md 5.

    Args:
      params: of the method, bare arrays.
      batches: this host's `rows` of batches [B, T], see `methods.Batch`; padding has weight 0.
      num_bytes: UTF-8 bytes of the text that the tokens stand for; None: unknown.

    Returns:
      The keys of the README's table from `loss` to `flops`; what is undefined for the method is None. Beside them
      `inference_flops`, of a token decoded with a cache, and `inference_slots`, that it was seen to take where that is
      decided token by token; and what the method adds (`Method.summarize_metrics`);
      `loss_perplexity` (exp of the loss), `bits_per_byte`, and `training_omega` (perplexity, mean_pauses and latency
      under the omega and the recipe of training, where they are others). In a self-paced context `loss` is that of
      perplexity, and beside it are `constant_perplexity`, of the same text read in a constant context, and
      `context_pauses`, how many a token the context kept.
    """
    totals: dict[str, np.ndarray] = {}
    decisions: list[np.ndarray] = []
    gains: list[np.ndarray] = []
    windows = length = kept = 0
    for batch in batches:
      placed = self.shard_batch(batch)
      with jax.set_mesh(self._mesh):
        outputs = self._sums(params, placed)
      sums, decided, gained = arrays.fetch(outputs)
      for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + np.asarray(value, np.float64)
      real = arrays.fetch(placed["weights"]) > 0  # of all hosts
      windows += int(real.any(-1).sum())
      length = batch["tokens"].shape[1]
      if decided is not None and kept < _CALIBRATION_TOKENS:
        decisions.append(decided[real])
        gains.append(gained[real])
        kept += int(real.sum())
    tokens = totals["tokens"]
    if not tokens:
      raise InputError("limit: no target has weight in the windows that were read; give more, or another split")

    def perplexity(name: str) -> Any:
      return np.exp(-totals[name] / tokens).tolist() if name in totals else None

    def stopping(name: str) -> dict[str, Any]:
      latency = totals[name] / tokens
      return {"mean_pauses": float(latency @ np.arange(len(latency))), "latency": latency.tolist()}

    loss = float(totals["loss"] / tokens)
    training = None
    if "training_stopping" in totals:
      training = {"perplexity": perplexity("training_log_likelihood")} | stopping("training_stopping")
    passes = self.method.passes if self.context == "constant" else 2
    slots = windows * self.method.forward_slots(length) * passes
    measured = None  # slots a token that inference was seen to run
    if "inference_slots" in totals:
      measured = float(totals["inference_slots"] / totals["inference_tokens"])
    means = {name: float(sums / tokens) for name, sums in totals.items() if name.startswith("beside/")}
    beside = self.method.summarize_metrics({name.removeprefix("beside/"): mean for name, mean in means.items()})
    if self.context == "self_paced":
      beside = {
        "constant_perplexity": perplexity("constant_log_likelihood"),
        "context_pauses": float(totals["kept"] / tokens) - 1,
      }
      measured = float(totals["kept"] / tokens)
    return {
      "loss": loss,
      "loss_perplexity": float(np.exp(loss)),
      "perplexity": perplexity("log_likelihood"),
      "bits_per_byte": float(-totals["log_likelihood"] / np.log(2) / num_bytes) if num_bytes else None,
      **stopping("stopping"),
      "slot_perplexity": perplexity("slots"),
      "oracle_perplexity": perplexity("oracle"),
      "hard_perplexity": perplexity("hard"),
      "calibration": spearman(np.concatenate(decisions), np.concatenate(gains)) if decisions else None,
      "training_omega": training,
      "tokens": int(tokens),
      "slots": round(slots),
      "inference_slots": measured,
      "inference_flops": float(self.method.inference_cost(length, slots=measured).total),
      "flops": float(self.method.forward_flops(length) * windows * length * passes),
      **beside,
    }

  def autoregressive(self, params: PyTree, batches: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What a method that isn't causal says of text as a language model would have to: every target from the tokens
    before it alone. It costs a pass for every token.

    Args:
      params, batches: as in `__call__`.

    Returns:
      `perplexity`; `blockwise_perplexity`, of the same targets read at once, as `__call__` does; `tokens`, how many
      these are; `windows`.
    """
    totals: dict[str, float] = {}
    windows = 0
    for batch in batches:
      placed = self.shard_batch(batch)
      with jax.set_mesh(self._mesh):
        sums = self._sums_of_prefixes(params, placed)
      for name, value in arrays.fetch(sums).items():
        totals[name] = totals.get(name, 0.0) + float(value)
      windows += int((arrays.fetch(placed["weights"]) > 0).any(-1).sum())
    tokens = totals["tokens"]
    if not tokens:
      raise InputError("limit: no target has weight in the windows that were read; give more, or another split")
    return {
      "perplexity": float(np.exp(-totals["log_likelihood"] / tokens)),
      "blockwise_perplexity": float(np.exp(-totals["blockwise"] / tokens)),
      "tokens": int(tokens),
      "windows": windows,
    }


def _sums(
  method: Method, omega: ArrayLike | None, params: PyTree, batch: Batch
) -> tuple[dict[str, Array], Array | None, Array | None]:
  """Weighted sums over a batch; and, where the method decides, d_i and t_{i+1} - t_i per token."""
  output = method.evaluate(params, batch, omega)
  return _sums_of(method, output, method.evaluate_as_trained(params, batch, output), batch["weights"])


def _sums_of_prefixes(method: Method, params: PyTree, batch: Batch) -> dict[str, Array]:
  output, weights = method.evaluate(params, batch), batch["weights"]
  blockwise = jax.nn.logsumexp(output.log_stopping + output.scores.log_target, -1)
  return {
    "tokens": weights.sum(),
    "log_likelihood": (method.autoregressive_log_likelihood(params, batch) * weights).sum(),
    "blockwise": (blockwise * weights).sum(),
  }


def _sums_self_paced(
  method: Method, omega: ArrayLike | None, params: PyTree, batch: Batch
) -> tuple[dict[str, Array], Array | None, Array | None]:
  """The same of a self-paced context; and of the constant one, what they are compared by."""
  output, kept = evaluate_self_paced(method, params, batch, omega)
  sums, decisions, gains = _sums_of(method, output, None, batch["weights"])
  constant = method.evaluate(params, batch)
  log_stopping = constant.log_stopping
  if omega is not None:  # which a recipe that draws would draw from
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
  sums |= {f"beside/{name}": total(values) for name, values in output.extra_metrics.items()}
  if output.slots is not None:
    # Of all tokens of a window, learnt or read alone: they are run too. Of windows that only fill a batch none.
    real = jnp.broadcast_to((weights > 0).any(-1, keepdims=True), weights.shape).astype(jnp.float32)
    sums |= {"inference_slots": (output.slots * real).sum(), "inference_tokens": real.sum()}
  if output.lengths is None:  # else a slot is that of some tokens alone
    sums["slots"] = total(scores.log_target)
  if training is not None:
    sums["training_log_likelihood"] = total(training.log_likelihood)
    sums["training_stopping"] = total(jnp.exp(training.log_stopping))
  if not method.decides:
    return sums, None, None
  chosen = hard_slot(scores.log_dont_know)[..., None]
  sums["hard"] = total(jnp.take_along_axis(scores.log_target, chosen, -1)[..., 0])
  if method.num_slots == 1 or output.lengths is not None:
    return sums, None, None
  target = jnp.exp(scores.log_target)
  return sums, jnp.exp(scores.log_dont_know[..., :-1]), target[..., 1:] - target[..., :-1]


def spearman(decisions: np.ndarray, gains: np.ndarray) -> list[float | None]:
  """Rank correlation over tokens of d_i with t_{i+1} - t_i, per step i; None where one of them is constant.

  Args:
    decisions: f32[N, W-1].
    gains: f32[N, W-1].
  """
  result = []
  for d, gain in zip(decisions.T, gains.T):
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", stats.ConstantInputWarning)
      value = stats.spearmanr(d, gain).statistic if len(d) > 1 else np.nan
    result.append(float(value) if np.isfinite(value) else None)
  return result
