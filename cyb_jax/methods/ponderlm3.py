"""PonderLM-3: PonderLM-2 whose tokens think as long as a router says.

The router reads h, what comes out of a token's first slot, and gives a distribution over depths 0 .. K. Slot k of token
t counts as w_{t,k} = Pr(depth >= k): log w is added to the attention logits of its key, for all queries, so w_{t,0} = 1
and w falls with k. What is read is one state, h_t = sum_k Pr(depth = k) h_t^(k).

The passes are those of PonderLM-2, with these weights from the second one on: the router reads the first pass, which is
that of a plain model, and again each pass over the whole stream; the last one's distribution fuses. At inference slots
with w < `prune_below` are neither run nor cached: no key of theirs is seen, and the sum goes without them, not
normalised again (what is missing is less than `prune_below`).

Parameters beside the decoder's: `router` f32[D, W], zero at the start, and `router_bias` f32[W], which starts with most
of the distribution at K.

Ours, where nothing is published: log w from log-sum-exps of the router's logits, at least -20; the penalty,
`router_penalty` times sum_{k>=1} w_{t,k} for each token; the start; what is pruned. Evaluation reads the text pruned,
and beside it as it was trained, and records both (`pruning`): a hidden state with a large logit may see more in a key
than its weight says.

Dimensions: as in `ponderlm2`; C places in the cache.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import Cache, KeyWeights
from cyb_jax.errors import InputError
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.ponderlm2 import PonderLM2

# The start's Pr(depth = K).
_FULL_DEPTH = 0.9
# Of log w. Further down there is nothing to learn, and f32 has room.
_LEAST = -20.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeighedCache:
  """A cache whose keys count differently.

  Attributes:
    slots: keys and values.
    log_weights: f32[B, C].
  """

  slots: Cache
  log_weights: Float[Array, "B C"]

  @property
  def nbytes(self) -> int:
    return self.slots.nbytes + self.log_weights.nbytes


class PonderLM3(PonderLM2):
  """Cross-entropy at the fused state, and what thoughts cost."""

  name = "ponderlm3"
  options = PonderLM2.options | {"router_penalty", "prune_below"}
  fuses = True

  def validate(self) -> None:
    super().validate()
    config = self.config
    if not 0 <= config.router_penalty < math.inf:
      raise InputError(f"method.router_penalty: {config.router_penalty!r} must be finite and not negative")
    if not 0 <= config.prune_below < 1:
      raise InputError(f"method.prune_below: {config.prune_below!r} must lie in [0, 1); 0 prunes nothing")
    if self.decoder.config.attention not in ("auto", "xla"):
      raise InputError(
        f"decoder.attention: {self.decoder.config.attention!r} takes no weights of keys, which method {self.name!r}"
        " has; use 'auto' or 'xla'"
      )

  def init_own(self, rng: Array) -> Params:
    del rng
    width, slots = self.decoder.config.d_model, self.num_slots
    bias = jnp.full(slots, math.log((1 - _FULL_DEPTH) / (slots - 1))).at[-1].set(math.log(_FULL_DEPTH))
    return {
      "router": nn.LogicallyPartitioned(jnp.zeros((width, slots)), ("embed", None)),
      "router_bias": nn.LogicallyPartitioned(bias, (None,)),
    }

  def log_depths(
    self, params: Params, first: Float[Array, "... D"]
  ) -> tuple[Float[Array, "... W"], Float[Array, "... W"]]:
    """(log Pr(depth = k), log Pr(depth >= k)) of tokens, f32, from what came out of their first slots."""
    first = first.astype(jnp.promote_types(first.dtype, jnp.float32))
    logits = jnp.matmul(first, params["router"], precision="highest") + params["router_bias"]
    tails = [jax.nn.logsumexp(logits[..., k:], -1, keepdims=True) for k in range(self.num_slots)]
    tails = jnp.concatenate(tails, -1)
    return logits - tails[..., :1], jnp.maximum(tails - tails[..., :1], _LEAST)

  def kept(self, log_weights: Float[Array, "... W"]) -> Bool[Array, "... W"]:
    """Which slots inference runs, by their log w: the first ones of each token, at least one."""
    below = self.config.prune_below
    return log_weights >= (math.log(below) if below else -math.inf)

  def fuse(self, params: Params, hidden: Float[Array, "... W D"], *, pruned: bool = True) -> Float[Array, "... D"]:
    """sum_k Pr(depth = k) h^(k), over the slots that are kept or over all; summed in f32."""
    log_depth, log_weights = self.log_depths(params, hidden[..., 0, :])
    shares = jnp.exp(log_depth)
    if pruned:
      shares = jnp.where(self.kept(log_weights), shares, 0.0)
    return (shares[..., None] * hidden).sum(-2).astype(hidden.dtype)

  def _key_weights(self, params: Params, first: Float[Array, "B T D"], pruned: bool) -> Float[Array, "B T W"]:
    _, log_weights = self.log_depths(params, first)
    return jnp.where(self.kept(log_weights), log_weights, -jnp.inf) if pruned else log_weights

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    hidden = self._hidden(params, batch, self.draw_passes(rng), pruned=False)
    log_depth, _ = self.log_depths(params, hidden[..., 0, :])
    log_likelihood, loss = self._as_trained(params, hidden, batch["targets"])
    return TokenLosses(loss=loss, log_likelihood=log_likelihood, stopping=jnp.exp(log_depth))

  def _as_trained(
    self, params: Params, hidden: Float[Array, "B T W D"], targets: Int[Array, "B T"]
  ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-likelihood, objective) without pruning."""
    fused = self.fuse(params, hidden, pruned=False)
    log_likelihood = self.scores(params, fused[..., None, :], targets).log_target[..., 0]
    return log_likelihood, self._penalty(params, hidden) - log_likelihood

  def _penalty(self, params: Params, hidden: Float[Array, "B T W D"]) -> Float[Array, "B T"]:
    _, log_weights = self.log_depths(params, hidden[..., 0, :])
    return self.config.router_penalty * jnp.exp(log_weights[..., 1:]).sum(-1)

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    """`log_stopping` is the router's distribution over depths, and `scores` are those of each slot's state by itself.
    What is read is neither of them nor their mixture, but the fused state: `fused`.
    """
    targets, hidden = batch["targets"], self.hidden(params, batch)
    states = jnp.concatenate([hidden, self.fuse(params, hidden)[..., None, :]], -2)
    scores = self.scores(params, states, targets)
    fused = scores.log_target[..., -1]
    log_depth, log_weights = self.log_depths(params, hidden[..., 0, :])
    slots = self.kept(log_weights).sum(-1).astype(jnp.float32)
    if self.config.prune_below:
      trained = self._hidden(params, batch, self.config.jacobi[1], pruned=False)
      unpruned, loss = self._as_trained(params, trained, targets)
      extra_metrics = {"unpruned": unpruned, "change": jnp.abs(fused - unpruned), "slots": slots}
    else:
      loss, extra_metrics = self._penalty(params, hidden) - fused, {}
    return EvalOutput(
      loss=loss,
      scores=jax.tree.map(lambda x: x[..., :-1], scores),
      log_stopping=log_depth,
      slots=slots,
      fused=fused,
      extra_metrics=extra_metrics,
    )

  def summarize_metrics(self, means: dict[str, float]) -> dict[str, Any]:
    """`pruning`: `below`, the threshold; `perplexity_unpruned`; `change`, by how many nats a token's log-likelihood is
    moved, on average; `slots`, that are kept of a token.
    """
    if not means:
      return {}
    pruning = {"below": self.config.prune_below, "perplexity_unpruned": math.exp(-means["unpruned"])}
    return {"pruning": pruning | {"change": means["change"], "slots": means["slots"]}}

  @property
  def passes(self) -> int:
    return 2 if self.config.prune_below else 1

  def mixture_log_probs(
    self, params: Params, hidden: Float[Array, "... W D"]
  ) -> tuple[Float[Array, "... V"], Float[Array, "... W"]]:
    log_depth, _ = self.log_depths(params, hidden[..., 0, :])
    return self._token_scores(params, self.fuse(params, hidden)).log_probs, log_depth

  def empty_cache(self, rows: int, capacity: int) -> WeighedCache:
    return WeighedCache(super().empty_cache(rows, capacity), jnp.zeros((rows, capacity), jnp.float32))

  def run_token(
    self, params: Params, token: Int[Array, "B"], position: Int[Array, "B"], cache: WeighedCache, place: Int[Array, "B"]
  ) -> tuple[Float[Array, "B D"], WeighedCache, Int[Array, "B"]]:
    """A slot is run while a row keeps it; what other rows then write lies behind their ends."""
    variables = {"params": params["decoder"]}
    rows = jnp.arange(len(token))

    def run(slot: int, state: Array, slots: Cache, log_weights: Array) -> tuple[Array, Cache]:
      state, slots = self.decoder.apply(
        variables,
        state, position[:, None], slots, place + slot,
        key_weights=KeyWeights(log_weights),
        method="extend_layers",
      )  # fmt: skip
      return self.decoder.apply(variables, state, method="finish"), slots

    state = self.decoder.apply(variables, token[:, None], method="embed")
    log_weights = cache.log_weights.at[rows, place].set(0.0)
    state, slots = run(0, state, cache.slots, log_weights)
    _, of_token = self.log_depths(params, state[:, 0])
    kept = self.kept(of_token)
    states = [state]
    for slot in range(1, self.num_slots):
      log_weights = log_weights.at[rows, place + slot].set(of_token[:, slot])
      state, slots = jax.lax.cond(
        kept[:, slot].any(),
        lambda state, slots, weights, slot=slot: run(slot, state, slots, weights),
        lambda state, slots, weights: (state, slots),
        state, slots, log_weights,
      )  # fmt: skip
      states.append(state)
    fused = self.fuse(params, jnp.concatenate(states, 1))
    return fused, WeighedCache(slots, log_weights), kept.sum(-1).astype(jnp.int32)

  @property
  def _router_flops(self) -> float:
    """Of one token."""
    return 2 * self.decoder.config.d_model * self.num_slots

  def _routing_cost(self, jacobi: float) -> flops.Cost:
    return flops.Cost(routing=(jacobi + 2) * self._router_flops)

  @property
  def _slots_read(self) -> float:
    # All slots and the fused state; and behind a second pass the fused state again.
    return (self.num_slots + self.passes) / self.passes

  def inference_cost(self, tokens: int, *, slots: float | None = None) -> flops.Cost:
    cost = self._decoding_cost(tokens, self.num_slots if slots is None else slots)
    return cost + flops.Cost(routing=self._router_flops)
