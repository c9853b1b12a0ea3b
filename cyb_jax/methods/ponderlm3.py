"""PonderLM-3: PonderLM-2 with a router that decides the number of thoughts of each token.

The router reads h, the state of a token's first slot, and gives a distribution over depths 0 .. K. Slot k of token t
has the weight w_{t,k} = Pr(depth >= k): log w is added to the attention logits of its key, for all queries. So w_{t,0}
= 1, and w decreases with k. One state is read, h_t = sum_k Pr(depth = k) h_t^(k).

The passes are those of PonderLM-2, with these weights from the second pass on. The router reads the first pass, which
equals a pass of a plain model, and then each pass over all slots; the distribution of the last pass fuses the states.
At inference slots with w < `prune_below` are neither run nor cached: no query sees their keys, and the sum omits them
without being normalised again (the missing probability is less than `prune_below`).

Parameters: `router` f32[D, W], initialised to zero, and `router_bias` f32[W], initialised so that most of the
distribution is at K.

Our choices for unpublished details: log w is computed from log-sum-exps of the router's logits and is at least -20; the
penalty is `router_penalty` times sum_{k>=1} w_{t,k} for each token; the initial values; `full_depth` and `router_rate`;
and the rule of pruning. A router that learns at the full rate from the first step collapses to no thoughts before
thoughts become useful, because Adam changes it as fast as the decoder. Therefore all depths are K for the share
`full_depth` of the steps, without a penalty and without a gradient of the router, which then learns at `router_rate`
times the learning rate. Evaluation reads the text with pruning and again as in training, and records both (`pruning`):
a query with a large attention logit may give a key more attention than its weight suggests.

Slot model and objective share the router, so this file implements both.

Dimensions: B batch, T tokens, W slots, K = W - 1 latent slots, C cache entries, D model, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from cyb_jax.costs import flops
from cyb_jax.decoder import Cache, KeyWeights, empty_cache
from cyb_jax.errors import InputError
from cyb_jax.field_rules import DECAY, NOT_NEGATIVE, SHARE, Rule, not_negative
from cyb_jax.losses import last_slot_cross_entropy
from cyb_jax.methods.backbone import Backbone, boxed
from cyb_jax.methods.composite import SequentialSlotMethod
from cyb_jax.methods.interface import Batch, EvalOutput, Params, TokenLosses
from cyb_jax.methods.objectives.last import LastSlot, cross_entropy
from cyb_jax.methods.ponderlm2 import PonderOptions
from cyb_jax.methods.slot_models.thoughts import Thoughts

# The initial Pr(depth = K).
_FULL_DEPTH = 0.9
# The lower bound of log w. Smaller weights have no effect on training, and f32 represents exp(-20) well.
_LEAST = -20.0
# A logit of the router whose probability is zero in f32.
_NEVER = -1e4


@dataclasses.dataclass(frozen=True, kw_only=True)
class PonderLM3Config(PonderOptions):
  """The options of `ponderlm3`: the options of latent thoughts, and of the router.

  Attributes:
    router_penalty: the penalty on each latent thought of a token, in nats.
    full_depth: the share of the run's steps, at its start, in which all tokens have K thoughts and the router is not
      trained.
    router_rate: a factor of the learning rate of the router.
    prune_below: inference does not run latent thoughts whose weight is below this.
  """

  name: ClassVar[str] = "ponderlm3"
  RULES: ClassVar = {
    "router_penalty": NOT_NEGATIVE,
    "full_depth": SHARE,
    "router_rate": not_negative("keeps the router at its initial values"),
    "prune_below": Rule(DECAY.accepts, f"{DECAY.wanted}; 0 prunes nothing"),
  }

  pauses: int = 3
  router_penalty: float = 0.0
  full_depth: float = 0.0
  router_rate: float = 1.0
  prune_below: float = 1e-4

  def build(self, backbone: Backbone) -> PonderLM3:
    if backbone.decoder_config.attention not in ("auto", "xla"):
      raise InputError(
        f"decoder.attention: {backbone.decoder_config.attention!r} does not support key weights, which method"
        f" {self.name!r} needs; use 'auto' or 'xla'"
      )
    return PonderLM3(self, backbone)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WeightedCache:
  """A cache whose keys have weights.

  Attributes:
    slots: keys and values.
    log_weights: f32[B, C].
  """

  slots: Cache
  log_weights: Float[Array, "B C"]

  @property
  def nbytes(self) -> int:
    return self.slots.nbytes + self.log_weights.nbytes


class RoutedThoughts(Thoughts):
  """Latent thoughts whose keys are weighted by a router."""

  def __init__(self, backbone: Backbone, config: PonderLM3Config):
    super().__init__(backbone, config.pauses + 1, config.jacobi)
    self.prune_below = config.prune_below

  def init(self, rng: Array) -> Params:
    del rng
    width, slots = self.backbone.decoder_config.d_model, self.num_slots
    bias = jnp.full(slots, math.log((1 - _FULL_DEPTH) / (slots - 1))).at[-1].set(math.log(_FULL_DEPTH))
    return {"router": boxed(jnp.zeros((width, slots)), "embed", None), "router_bias": boxed(bias)}

  def log_depths(
    self, params: Params, first: Float[Array, "... D"]
  ) -> tuple[Float[Array, "... W"], Float[Array, "... W"]]:
    """(log Pr(depth = k), log Pr(depth >= k)) for each token, f32, from the states of first slots."""
    first = first.astype(jnp.promote_types(first.dtype, jnp.float32))
    logits = jnp.matmul(first, params["router"], precision="highest") + params["router_bias"]
    tails = [jax.nn.logsumexp(logits[..., k:], -1, keepdims=True) for k in range(self.num_slots)]
    tails = jnp.concatenate(tails, -1)
    return logits - tails[..., :1], jnp.maximum(tails - tails[..., :1], _LEAST)

  def kept(self, log_weights: Float[Array, "... W"]) -> Bool[Array, "... W"]:
    """Which slots inference runs, from their log w: the first slots of each token, at least one."""
    below = self.prune_below
    return log_weights >= (math.log(below) if below else -math.inf)

  def fuse(self, params: Params, hidden: Float[Array, "... W D"], *, is_pruned: bool = True) -> Float[Array, "... D"]:
    """sum_k Pr(depth = k) h^(k), over the kept slots or over all slots; summed in f32."""
    log_depth, log_weights = self.log_depths(params, hidden[..., 0, :])
    shares = jnp.exp(log_depth)
    if is_pruned:
      shares = jnp.where(self.kept(log_weights), shares, 0.0)
    return (shares[..., None] * hidden).sum(-2).astype(hidden.dtype)

  def key_weights(self, params: Params, first: Float[Array, "B T D"], is_pruned: bool) -> Float[Array, "B T W"]:
    _, log_weights = self.log_depths(params, first)
    return jnp.where(self.kept(log_weights), log_weights, -jnp.inf) if is_pruned else log_weights

  def empty_cache(self, rows: int, capacity: int) -> WeightedCache:
    cache = empty_cache(self.cache_config, rows, capacity)
    return WeightedCache(cache, jnp.zeros((rows, capacity), jnp.float32))

  def run_token(
    self,
    params: Params,
    *,
    token: Int[Array, "B"],
    position: Int[Array, "B"],
    cache: WeightedCache,
    cache_index: Int[Array, "B"],
  ) -> tuple[Float[Array, "B D"], WeightedCache, Int[Array, "B"]]:
    """Runs a slot if any row keeps it. The other rows write after their last slot, where it is overwritten later."""
    rows = jnp.arange(len(token))

    def run(slot: int, state: Array, slots: Cache, log_weights: Array) -> tuple[Array, Cache]:
      state, slots = self.backbone.apply(
        params,
        state, position[:, None], slots, cache_index + slot,
        key_weights=KeyWeights(log_weights),
        method="extend_layers",
      )  # fmt: skip
      return self.backbone.apply(params, state, method="finish"), slots

    state = self.backbone.embed(params, token[:, None])
    log_weights = cache.log_weights.at[rows, cache_index].set(0.0)
    state, slots = run(0, state, cache.slots, log_weights)
    _, of_token = self.log_depths(params, state[:, 0])
    kept = self.kept(of_token)
    states = [state]
    for slot in range(1, self.num_slots):
      log_weights = log_weights.at[rows, cache_index + slot].set(of_token[:, slot])
      state, slots = jax.lax.cond(
        kept[:, slot].any(),
        lambda state, slots, weights, slot=slot: run(slot, state, slots, weights),
        lambda state, slots, weights: (state, slots),
        state, slots, log_weights,
      )  # fmt: skip
      states.append(state)
    fused = self.fuse(params, jnp.concatenate(states, 1))
    return fused, WeightedCache(slots, log_weights), kept.sum(-1).astype(jnp.int32)

  @property
  def _router_flops(self) -> float:
    """The FLOPs of the router per token."""
    return 2 * self.backbone.decoder_config.d_model * self.num_slots

  def routing_cost(self, jacobi: float) -> flops.Cost:
    return flops.Cost(routing=(jacobi + 2) * self._router_flops)

  def inference_cost(self, sequence_length: int, *, slots_read: float, slots: float | None) -> flops.Cost:
    cost = self.decoding_cost(sequence_length, self.num_slots if slots is None else slots)
    return cost + flops.Cost(routing=self._router_flops)


class PonderLM3(SequentialSlotMethod):
  """Cross-entropy at the fused state, and a penalty on thoughts.

  Also implements `abilities.FusedSlots`, `ExtraMetrics`, `Scheduled` and `OwnRates`.
  """

  config: PonderLM3Config
  slot_model: RoutedThoughts
  # The number of first steps with full depth; `with_steps` sets it.
  _held_steps = 0

  def __init__(self, config: PonderLM3Config, backbone: Backbone):
    slots = RoutedThoughts(backbone, config)
    super().__init__(config, backbone, slots, LastSlot(backbone, slots.num_slots))

  def fuse(self, params: Params, hidden: Float[Array, "... W D"]) -> Float[Array, "... D"]:
    return self.slot_model.fuse(params, hidden)

  def with_steps(self, steps: int) -> PonderLM3:
    method = PonderLM3(self.config, self.backbone)
    method._held_steps = round(self.config.full_depth * steps)
    return method

  @property
  def rate_factors(self) -> dict[str, float]:
    return dict.fromkeys(("router", "router_bias"), self.config.router_rate)

  def loss(self, params: Params, batch: Batch, rng: Array, step: Any = None) -> TokenLosses:
    penalty = 1.0
    if self._held_steps and step is not None:
      held = step < self._held_steps
      params, penalty = self._at_full_depth(params, held), jnp.where(held, 0.0, 1.0)
    hidden = self.slot_model.ponder(params, batch, self.slot_model.draw_passes(rng), is_pruned=False)
    log_depth, _ = self.slot_model.log_depths(params, hidden[..., 0, :])
    fused = self.slot_model.fuse(params, hidden, is_pruned=False)
    total, scores = self.backbone.weighted_loss(params, fused[..., None, :], batch, cross_entropy)
    loss, penalties = last_slot_cross_entropy(scores), penalty * self._penalty(params, hidden)
    return TokenLosses(
      loss=penalties + loss,
      log_likelihood=-loss,
      stopping=jnp.exp(log_depth),
      total=total + (batch["weights"] * penalties).sum(),
    )

  def _at_full_depth(self, params: Params, held: Any) -> Params:
    """The parameters; if `held`, with a router that always gives every token full depth."""
    bias = jnp.where(jnp.arange(self.num_slots) < self.num_slots - 1, _NEVER, 0.0)
    return params | {
      "router": jnp.where(held, 0.0, params["router"]),
      "router_bias": jnp.where(held, bias, params["router_bias"]),
    }

  def _as_trained(
    self, params: Params, hidden: Float[Array, "B T W D"], targets: Int[Array, "B T"]
  ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """(log-likelihood, objective) without pruning."""
    fused = self.slot_model.fuse(params, hidden, is_pruned=False)
    log_likelihood = self.backbone.slot_scores(params, fused[..., None, :], targets).log_target[..., 0]
    return log_likelihood, self._penalty(params, hidden) - log_likelihood

  def _penalty(self, params: Params, hidden: Float[Array, "B T W D"]) -> Float[Array, "B T"]:
    _, log_weights = self.slot_model.log_depths(params, hidden[..., 0, :])
    return self.config.router_penalty * jnp.exp(log_weights[..., 1:]).sum(-1)

  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    """`log_stopping` is the router's distribution over depths, `scores` are the scores of each slot's own state, and
    `fused` is the log-likelihood: the model reads the fused state, not a mixture of slots.
    """
    del omega
    targets, hidden = batch["targets"], self.hidden(params, batch)
    states = jnp.concatenate([hidden, self.slot_model.fuse(params, hidden)[..., None, :]], -2)
    scores = self.backbone.slot_scores(params, states, targets)
    fused = scores.log_target[..., -1]
    log_depth, log_weights = self.slot_model.log_depths(params, hidden[..., 0, :])
    slots = self.slot_model.kept(log_weights).sum(-1).astype(jnp.float32)
    if self.config.prune_below:
      trained = self.slot_model.ponder(params, batch, self.config.jacobi[1], is_pruned=False)
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
    """`pruning`: `below`, the threshold; `perplexity_unpruned`; `change`, the mean absolute change of a token's
    log-likelihood in nats; `slots`, the mean number of kept slots of a token.
    """
    if not means:
      return {}
    pruning = {"below": self.config.prune_below, "perplexity_unpruned": math.exp(-means["unpruned"])}
    return {"pruning": pruning | {"change": means["change"], "slots": means["slots"]}}

  def mixture_log_probs(
    self, params: Params, hidden: Float[Array, "... W D"]
  ) -> tuple[Float[Array, "... V"], Float[Array, "... W"]]:
    log_depth, _ = self.slot_model.log_depths(params, hidden[..., 0, :])
    return self.backbone.token_scores(params, self.fuse(params, hidden)).log_probs, log_depth

  @property
  def evaluation_passes(self) -> int:
    return 2 if self.config.prune_below else 1

  def forward_cost(self, sequence_length: int, *, executed: bool) -> flops.Cost:
    # The first pass reads all slots and the fused state; a second pass reads only the fused state.
    slots_read = (self.num_slots + self.evaluation_passes) / self.evaluation_passes
    return self.slot_model.forward_cost(sequence_length, slots_read=slots_read, executed=executed)
