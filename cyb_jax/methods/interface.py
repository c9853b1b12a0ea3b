"""The seam: what a method is to the trainer, to evaluation and to the programs, which know none by name.

Dimensions: B batch, T tokens, W slots, V vocabulary.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
from jaxtyping import Array, Bool, Float, Int, PyTree

from cyb_jax.costs.flops import Cost
from cyb_jax.decoder import Decoder, DecoderConfig
from cyb_jax.decoder.lora import LEAVES
from cyb_jax.errors import InputError
from cyb_jax.stopping import SlotScores

Batch = dict[str, Array]
"""`tokens` i32[B, T], `targets` i32[B, T], `weights` f32[B, T]; with `segment_ids` i32[B, T] attention stays inside a
document.
"""

Params = PyTree

# What of the parameters is trained: all; adapters and what stands beside the decoder; the latter alone.
WEIGHTS = ("all", "lora", "new")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodConfig:
  """Which method, and its options. An option that the method doesn't have must be left at its default.

  Attributes:
    name: a name of the registry, `cyb_jax.methods.METHODS`.
    loss: 'ap', 'va' or 'dp'.
    pauses: K, extra steps of every token: pauses behind it; latent thoughts (ponderlm2, ponderlm3); passes through the
      layers beside the first one (looped); copies beside it (copy_k). Of pause_training: M, pauses between prefix and
      target.
    omega: how many slots the world grants in training, W numbers; None: always all of them.
    gamma: the discount over slots, W numbers in [0, 1]; None: all ones.
    rho: the prior over slots of VA and DP, W numbers.
    alpha: the coefficient of DP's penalty.
    recipe: how many of its W = K + 1 slots a token gets in training. 'constant': all of them; 'sampled': W_n ~
      Cat(omega); 'on_policy': W_n drawn from the model's own stopping distribution, see `cyb_jax.methods.cyb`.
    slot_budget: of sampled and on_policy, slots per token of the rows that slots are packed into, in [1, W]. 0:
      sampled, enough for all but one row in 30,000; on_policy, W.
    policy_floor: of on_policy, the share of tokens whose W_n is drawn from all W alike, so that every slot is trained.
    dont_know: 'token': `<don't know>` competes with the vocabulary; 'unit': a logistic unit of its own.
    dont_know_prior: the probability of abstaining that the prior shift gives to a model that knows nothing; None: no
      shift. The shares of `constant_stop` start where it puts them; None: alike.
    calibration_batches: before the first step a constant is added to the `<don't know>` logit so that over the first so
      many batches the median of d is `dont_know_prior`; 0: off.
    stopping_warmup: for the first so many steps d is held at `dont_know_prior`, so that slots learn to answer before
      the model learns when to; 0: off.
    pause_input: 'pause': a pause's own embedding alone (the paper); 'token+pause': plus that of its token.
    pause_visibility: 'visible' or 'hidden', see `cyb_jax.pauses`.
    pause_offset: a learned offset per pause index before the query and key projections.
    pause_shared: one embedding for all pauses (the form of earlier work).
    pause_positions: 'token': a pause stands at its token's position; 'shifting': it takes a position of its own (the
      form of earlier work).
    pause_places: of pause_training, where pauses are in training: 'random', all over the text; 'prefix', M between
      each prefix and its target, which is what has weight; 'none', none (and at inference as with 'prefix').
    pause_fraction: of 'random', pauses as a share of the window's length, before it is cut back to that.
    jacobi: of ponderlm2 and ponderlm3, how many passes refine all latent thoughts at once: the fewest and the most of a
      step, drawn alike; evaluation takes the most.
    router_penalty: of ponderlm3, nats per latent thought that a token is given, on average.
    prune_below: of ponderlm3, latent thoughts whose weight is below this aren't run at inference.
    fork_layers: of thoughtbubbles, the layers (from 1) before which streams fork; None: 3, 7 and 11 of 12, and the same
      places of others.
    stream_budget: of thoughtbubbles, streams per token that a row may have.
    combine: of thoughtbubbles, how a token's streams are read: 'probabilities', their mixture (the paper); 'states',
      the head of their sum (the authors' code).
  """

  name: str = "cyb"
  loss: str = "ap"
  pauses: int = 0
  omega: tuple[float, ...] | None = None
  gamma: tuple[float, ...] | None = None
  rho: tuple[float, ...] | None = None
  alpha: float = 0.0
  recipe: str = "constant"
  slot_budget: float = 0.0
  policy_floor: float = 0.1
  dont_know: str = "token"
  dont_know_prior: float | None = 0.9
  calibration_batches: int = 0
  stopping_warmup: int = 0
  pause_input: str = "pause"
  pause_visibility: str = "visible"
  pause_offset: bool = False
  pause_shared: bool = False
  pause_positions: str = "token"
  pause_places: str = "random"
  pause_fraction: float = 0.1
  jacobi: tuple[int, ...] = (2, 3)
  router_penalty: float = 0.0
  prune_below: float = 1e-4
  fork_layers: tuple[int, ...] | None = None
  stream_budget: float = 2.0
  combine: str = "probabilities"


# `pauses` has no default that suits all methods, and `name` picks one.
_COMMON = frozenset({"name", "pauses"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenLosses:
  """What a training step needs of every token.

  Attributes:
    loss: f32[B, T], the training objective, nats.
    log_likelihood: f32[B, T], log-probability of the target as the model would be read, without discount or penalty.
    stopping: f32[B, T, W], the probability of reading each slot.
    slots: f32[B, T], how many slots each token was given; None: W.
    kept: bool[B, T], False where a token's slots didn't fit into its row: it then has no weight. None: all fit.
  """

  loss: Float[Array, "B T"]
  log_likelihood: Float[Array, "B T"]
  stopping: Float[Array, "B T W"]
  slots: Float[Array, "B T"] | None = None
  kept: Bool[Array, "B T"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EvalOutput:
  """What evaluation needs of every token: all slots, read.

  Attributes:
    loss: f32[B, T], the training objective, nats.
    scores: f32[B, T, W] each.
    log_stopping: f32[B, T, W], under the evaluation's omega.
    lengths: i32[B, T], how many slots each token was given; the scores of a token's later slots repeat its last one.
      None: all W.
    slots: f32[B, T], how many slots inference runs for each token, where that is decided token by token; None: see
      `Method.inference_cost`.
    fused: f32[B, T], log-probability of the target where one state is read that is made of all slots'; None: the slots
      are a mixture.
    extra_metrics: f32[B, T] each, numbers whose means `Method.summarize_metrics` is told.
  """

  loss: Float[Array, "B T"]
  scores: SlotScores
  log_stopping: Float[Array, "B T W"]
  lengths: Int[Array, "B T"] | None = None
  slots: Float[Array, "B T"] | None = None
  fused: Float[Array, "B T"] | None = None
  extra_metrics: dict[str, Float[Array, "B T"]] = dataclasses.field(default_factory=dict)

  @property
  def log_likelihood(self) -> Float[Array, "B T"]:
    """f32[B, T], log-probability of the target as the model is read: log sum_i s_i t_i, or `fused`."""
    if self.fused is not None:
      return self.fused
    return jax.nn.logsumexp(self.log_stopping + self.scores.log_target, -1)


class Method(abc.ABC):
  """Turns (params, batch) into per-token losses and log-likelihoods, and says what it spends.

  Methods hold no state; params are a tree that `init` makes and everything else takes.

  Attributes:
    name: in the registry.
    options: the fields of `MethodConfig` that this method has.
    decides: whether the model itself decides when it stops (then d means something).
    constants: names of parameters that `calibrate` sets and no step changes.
    exports: whether a Hugging Face folder holds all of it: a plain decoder, with pauses and `<don't know>` as entries.
    one_pass: whether a step passes one row of `train_slots` slots through all layers, once.
    decodes: whether it runs slot by slot on a cache: text is generated and scored so.
    feeds_back: whether a slot is fed what came out of the one before it: a token's slots are then decoded one after the
      other, see `PausedMethod.run_token`.
    self_paces: whether it can read a text whose context holds fewer slots than it has.
    fuses: whether one state is read that is made of all slots', see `EvalOutput.fused`.
    causal: whether `evaluate` predicts every token from the tokens before it alone. If not,
      `autoregressive_log_likelihood` does.
  """

  name: ClassVar[str]
  options: ClassVar[frozenset[str]]
  decides: ClassVar[bool] = False
  constants: ClassVar[frozenset[str]] = frozenset()
  exports: ClassVar[bool] = False
  one_pass: ClassVar[bool] = False
  decodes: ClassVar[bool] = False
  feeds_back: ClassVar[bool] = False
  self_paces: ClassVar[bool] = False
  fuses: ClassVar[bool] = False
  causal: ClassVar[bool] = True

  def __init__(
    self,
    config: MethodConfig,
    decoder_config: DecoderConfig,
    *,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    shards: int = 1,
    weights: str = "all",
  ):
    """
    Args:
      config: validated here.
      decoder_config: its vocab_size counts the rows of the tables.
      vocab_size: how many of those rows are real; None: all.
      chunk_size: of the readout; see `readout.slot_scores`.
      shards: devices that a batch is split over under jit; see there.
      weights: of `WEIGHTS`, what of the parameters is trained; see `is_trained`.

    Raises:
      InputError: an option that this method doesn't have, or a value that it can't work with.
    """
    self.config = config
    self.decoder = Decoder(decoder_config)
    self.vocab_size = decoder_config.vocab_size if vocab_size is None else vocab_size
    self.chunk_size = chunk_size
    self.shards = shards
    self.weights = weights
    for field in dataclasses.fields(MethodConfig):
      value = getattr(config, field.name)
      if field.name not in self.options | _COMMON and value != field.default:
        raise InputError(
          f"method.{field.name}: {value!r} is set, but method {self.name!r} has no such option; leave it at"
          f" {field.default!r}. It has: {', '.join(sorted(self.options)) or 'none'}"
        )
    if isinstance(config.pauses, bool) or not isinstance(config.pauses, int) or config.pauses < 0:
      raise InputError(f"method.pauses: {config.pauses!r} must be a whole number that is not negative")
    self.validate()

  @abc.abstractmethod
  def validate(self) -> None:
    """Raises InputError if the options don't go together."""

  def check_length(self, tokens: int) -> None:
    """Raises InputError if windows of so many tokens don't go with the options."""
    del tokens

  @property
  @abc.abstractmethod
  def num_slots(self) -> int:
    """W, slots of a token that can be read."""

  @abc.abstractmethod
  def init(self, rng: Array) -> Params:
    """Fresh parameters, leaves boxed with their logical axes (`flax.linen.LogicallyPartitioned`)."""

  def is_trained(self, path: tuple[str, ...]) -> bool:
    """Whether steps may change a parameter; what they don't has neither gradient nor optimizer state.

    Args:
      path: the names that lead to it in the tree of parameters.
    """
    if self.weights == "all":
      # Constants too, at a gradient of zero: such runs hold moments for them.
      return True
    if path[0] == "decoder":
      return self.weights == "lora" and path[-1] in LEAVES
    return path[0] not in self.constants

  def new_parameters(self) -> frozenset[str]:
    """Names of the parameters that stand beside the decoder, which a pretrained model hasn't got."""
    return frozenset(jax.eval_shape(self.init, jax.random.key(0))) - {"decoder"}

  @abc.abstractmethod
  def loss(self, params: Params, batch: Batch, rng: Array, step: Int[Array, ""] | int | None = None) -> TokenLosses:
    """The training objective, per token.

    Args:
      params: bare arrays.
      batch: see `Batch`.
      rng: a key of this step alone, for methods that draw. All devices and all parts of an accumulated batch are given
        the same one: what is drawn for a row must hang on the row as well (`pauses.draw_lengths`).
      step: how many steps were taken before this one; None: all warm-ups are over.
    """

  @abc.abstractmethod
  def evaluate(self, params: Params, batch: Batch, omega: Any = None) -> EvalOutput:
    """Reads every slot, for evaluation; `omega`: see `stopping.log_stopping_distribution`."""

  def evaluate_as_trained(self, params: Params, batch: Batch, reading: EvalOutput) -> EvalOutput | None:
    """The same batch as training sees it, where that is another world than the evaluation's default.

    Args:
      params: as in `read`.
      batch: the one that was read.
      reading: `read(params, batch)`, to be used again where it will do.

    Returns:
      None where training grants all slots to every token, as `read` does by default.
    """
    del params, batch, reading
    return None

  def autoregressive_log_likelihood(self, params: Params, batch: Batch) -> Float[Array, "B T"]:
    """Log-probabilities of the targets, each from the tokens before it alone, at the cost of a pass for every token; of
    methods that aren't `causal`.
    """
    raise NotImplementedError

  def summarize_metrics(self, means: dict[str, float]) -> dict[str, Any]:
    """What an evaluation records beside the rest, from the means over tokens of `EvalOutput.extra_metrics`."""
    del means
    return {}

  @property
  def prompt_pauses(self) -> int:
    """Pauses that inference runs behind a prompt, once, before anything is said; of methods that have such."""
    return 0

  def with_prompt_pauses(self, pauses: int) -> Method:
    """The same method, for the same parameters, with another number of `prompt_pauses`.

    Raises:
      InputError: it has none, or can't have so many.
    """
    raise InputError(
      f"--pauses: {pauses} is set, but method {self.name!r} has no pauses between a prompt and what is said; leave it"
      " out"
    )

  @property
  def learns_targets(self) -> bool:
    """Whether it needs tasks whose documents are a prefix and a target, which alone has weight."""
    return False

  def prefixes_at_most(self, tokens: int) -> int | None:
    """How many prefixes of a window it can do justice to, where it `learns_targets`; None: all."""
    del tokens
    return None

  @property
  def passes(self) -> int:
    """How often `read` and `evaluate_as_trained` together pass a batch through the decoder."""
    return 1

  @property
  def calibration_batches(self) -> int:
    """On how many batches `calibrate` wants to look before the first step."""
    return 0

  def calibrate(self, params: Params, batches: Iterable[Batch]) -> Params:
    """Fresh parameters, adjusted to the first batches."""
    del batches
    return params

  def tell_start(self, params: Params, batches: Iterable[Batch]) -> None:
    """Logs how a model that has never paused decides, before the first step; for methods that decide."""
    del params, batches

  def train_slots(self, tokens: int) -> float:
    """Decoder slots that training runs for a window of `tokens`, a slot counted each time it passes all layers; where
    that is drawn, the mean.
    """
    return tokens * self.num_slots

  def forward_slots(self, tokens: int) -> float:
    """The same of one evaluation forward."""
    return tokens * self.num_slots

  @abc.abstractmethod
  def forward_cost(self, tokens: int, *, executed: bool = False) -> Cost:
    """Of one evaluation forward, per real token of a window of `tokens`; see `cyb_jax.costs.flops`."""

  def inference_cost(self, tokens: int, *, slots: float | None = None) -> Cost:
    """Of decoding a text of `tokens` with a cache, per real token: every slot passes the layers once, over the keys
    before it. Where a method needs no other passes to be evaluated, that is `forward_cost`.

    Args:
      tokens: T.
      slots: per token, where a method was measured to run fewer than it has; None: all.
    """
    if slots is not None:
      raise ValueError(f"slots: {slots}, but method {self.name!r} runs all of them")
    return self.forward_cost(tokens)

  def autoregressive_cost(self, tokens: int) -> Cost:
    """Of saying a text of `tokens` one by one, per real token: `inference_cost`, but for methods that have no cache."""
    return self.inference_cost(tokens)

  def tokens_learnt(self, tokens: int) -> float:
    """How many tokens of a window of `tokens` training has a loss at; where that is drawn, the mean."""
    return float(tokens)

  @abc.abstractmethod
  def train_cost(self, tokens: int, *, executed: bool = False) -> Cost:
    """Of one training step, per real token of a window of `tokens`."""

  def forward_flops(self, tokens: int, *, executed: bool = False) -> float:
    """The sum of `forward_cost`."""
    return self.forward_cost(tokens, executed=executed).total

  def train_flops(self, tokens: int, *, executed: bool = False) -> float:
    """The sum of `train_cost`."""
    return self.train_cost(tokens, executed=executed).total
