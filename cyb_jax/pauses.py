"""Where the slots go: pauses laid out between the tokens, their positions, and who may see whom.

Every real token is followed by K pauses, so it owns W = K + 1 slots: slot 0 is the token itself, slots 1..K are
`<pause_1>`..`<pause_K>` (counted from 0 in code; the paper counts from 1). All slots of a token try to predict the
next real token. Arrays keep the slots as an axis of their own; only attention sees them flattened. This file needs
jax alone.

Worked example, T = 2 tokens "a b", K = 2 pauses each, pauses numbered p = V, q = V + 1:

    flattened slot   0  1  2  3  4  5
    id               a  p  q  b  p  q
    position         0  0  0  1  1  1      a pause stands where its token stands: later tokens aren't shifted

    may see (row: query, column: key)
          visible (plain causal)      hidden (a pause is seen by the later slots of its own token alone)
            a p q b p q                 a p q b p q
        a   1 . . . . .             a   1 . . . . .
        p   1 1 . . . .             p   1 1 . . . .
        q   1 1 1 . . .             q   1 1 1 . . .
        b   1 1 1 1 . .             b   1 . . 1 . .
        p   1 1 1 1 1 .             p   1 . . 1 1 .
        q   1 1 1 1 1 1             q   1 . . 1 1 1

Recipes: how many of its W slots a token gets. *constant*: all of them. *sampled*: W_n ~ Cat(omega), drawn per token.
*on_policy*: W_n drawn from the model's own stopping distribution. Where W_n varies, the slots that tokens have are
packed, one after the other, into rows of a fixed number of slots, so that shapes stay static:

    W_n = 2, 1, 3, 1 in a row of 6 slots    a p b c p q      what doesn't fit (here the fourth token) has no weight

Pauses of earlier work lie between some tokens alone, all alike (`lengths_at_random`, `lengths_behind_prefixes`); W_n
says how many, and they are packed in the same way.

Dimensions: B batch, T tokens, W slots per token, S slots of a row: T*W flattened, or as many as it is packed into.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # annotations alone: these files need jax and nothing else
  from jaxtyping import Array, ArrayLike, Bool, Float, Int

Visibility = Literal["visible", "hidden"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Tokens with their pauses.

  Attributes:
    ids: i32[B, T, W], what is fed: the token, then the ids of its pauses.
    positions: i32[B, T, W], the position for rotary embeddings, from 0.
  """

  ids: Int[Array, "B T W"]
  positions: Int[Array, "B T W"]


def interleave(tokens: Int[Array, "B T"], num_pauses: int, first_pause_id: int) -> Slots:
  """Lays `num_pauses` pauses out after every token (recipe *constant*).

  Args:
    tokens: i32[B, T].
    num_pauses: K >= 0.
    first_pause_id: the id of `<pause_1>`; `<pause_k>` is `first_pause_id + k - 1`.

  Returns:
    `Slots`, each array i32[B, T, K + 1].

  Raises:
    ValueError: if `num_pauses` is negative or tokens has no two axes.

  Example:
    >>> interleave(jnp.array([[5, 7]]), 2, 100).ids.tolist()
    [[[5, 100, 101], [7, 100, 101]]]
    >>> interleave(jnp.array([[5, 7]]), 2, 100).positions.tolist()
    [[[0, 0, 0], [1, 1, 1]]]
  """
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2:
    raise ValueError(f"tokens: shape {tokens.shape}, but [batch, tokens] is needed")
  if num_pauses < 0:
    raise ValueError(f"num_pauses: {num_pauses} is negative")
  batch, length = tokens.shape
  pauses = first_pause_id + jnp.arange(num_pauses, dtype=jnp.int32)
  ids = jnp.concatenate(
    [tokens.astype(jnp.int32)[..., None], jnp.broadcast_to(pauses, (batch, length, num_pauses))], axis=-1
  )
  return Slots(ids=ids, positions=slot_positions(batch, length, num_pauses + 1))


def slot_positions(batch: int, length: int, num_slots: int) -> Int[Array, "B T W"]:
  """The rotary position of every slot: that of its real token; i32[B, T, W]."""
  return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[:, None], (batch, length, num_slots))


def document_ids(tokens: Int[Array, "B T"], end_id: int) -> Int[Array, "B T"]:
  """Numbers the documents of each row from 0; an end token opens the next document, whose first token it predicts.

  Example:
    >>> document_ids(jnp.array([[4, 5, 0, 6, 0, 7]]), end_id=0).tolist()
    [[0, 0, 1, 1, 2, 2]]
  """
  return jnp.cumsum((tokens == end_id).astype(jnp.int32), axis=-1)


def attention_mask(
  length: int,
  num_slots: int,
  *,
  visibility: Visibility = "visible",
  segment_ids: Int[Array, "B T"] | None = None,
  packing: Packing | None = None,
) -> Bool[Array, "b 1 S S"] | None:
  """Which slot (query, third axis) may see which (key, fourth axis), over the flattened slots.

  Args:
    length: T.
    num_slots: W.
    visibility: 'visible': plain causal, the paper's form; 'hidden': a pause is seen by the later slots of its own
      token alone.
    segment_ids: i32[B, T], see `document_ids`; None: attention crosses documents.
    packing: where the slots lie, see `pack`; None: all W slots of every token, in order.

  Returns:
    bool[1 or B, 1, S, S], or None where the mask is plain causal, which every attention kernel does for itself.

  Raises:
    ValueError: on another visibility.
  """
  if visibility not in ("visible", "hidden"):
    raise ValueError(f"visibility: {visibility!r} is none of 'visible', 'hidden'")
  hidden = visibility == "hidden" and num_slots > 1
  if segment_ids is None and not hidden:
    return None
  if packing is None:
    order = jnp.arange(length * num_slots)[None]
    token, slot = order // num_slots, order % num_slots
  else:
    token, slot = packing.token, packing.slot
    order = jnp.arange(token.shape[-1])[None]
  mask = order[:, :, None] >= order[:, None, :]
  if hidden:
    mask &= (slot[:, None, :] == 0) | (token[:, :, None] == token[:, None, :])
  if segment_ids is not None:
    segment_ids = jnp.take_along_axis(segment_ids, jnp.broadcast_to(token, (len(segment_ids), token.shape[-1])), -1)
    mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
  return mask[:, None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packing:
  """Ragged tokens, their slots packed into rows of S.

  Attributes:
    token: i32[B, S], the token that a place belongs to. Places behind the last slot repeat the last token.
    slot: i32[B, S], which of its token's slots lies there.
    places: i32[B, T, W], where a token's slots lie. A token with fewer than W slots repeats the place of its last one.
    kept: bool[B, T], whether all slots of a token fit into its row. Those of the others must have no weight.
  """

  token: Int[Array, "B S"]
  slot: Int[Array, "B S"]
  places: Int[Array, "B T W"]
  kept: Bool[Array, "B T"]


def pack(lengths: Int[Array, "B T"], num_slots: int, row_slots: int) -> Packing:
  """Packs the slots of every row, in order, into rows of a fixed number of slots.

  Args:
    lengths: i32[B, T], W_n, how many slots each token has, in 1..W.
    num_slots: W.
    row_slots: S. Tokens at the end of a row that don't fit are not kept.

  Example:
    >>> packing = pack(jnp.array([[2, 1, 3, 1]]), 3, 6)
    >>> packing.token.tolist(), packing.slot.tolist()
    ([[0, 0, 1, 2, 2, 2]], [[0, 1, 0, 0, 1, 2]])
    >>> packing.kept.tolist()
    [[True, True, True, False]]
  """
  ends = jnp.cumsum(lengths, -1)
  starts = ends - lengths
  place = jnp.arange(row_slots, dtype=jnp.int32)
  token = jax.vmap(lambda ends: jnp.searchsorted(ends, place, side="right"))(ends)
  token = jnp.minimum(token, lengths.shape[1] - 1).astype(jnp.int32)
  # Behind the last slot of a row this would grow without end.
  slot = jnp.minimum(place - jnp.take_along_axis(starts, token, -1), num_slots - 1)
  places = starts[..., None] + jnp.minimum(jnp.arange(num_slots), lengths[..., None] - 1)
  return Packing(token=token, slot=slot, places=jnp.minimum(places, row_slots - 1), kept=ends <= row_slots)


def draw_lengths(
  rng: Array, tokens: Int[Array, "B T"], shares: Float[Array, "W"] | Float[Array, "B T W"]
) -> Int[Array, "B T"]:
  """W_n, how many slots each token has: drawn from Cat(shares), i32[B, T] in 1..W.

  A row's draw hangs on `rng` and on its own tokens alone: it is the same on whatever device and in whatever part of a
  batch the row lies.

  Args:
    rng: a jax.random key.
    tokens: i32[B, T].
    shares: probabilities of 1..W slots, for all tokens or for each.
  """
  log_shares = jnp.broadcast_to(jnp.log(shares), (*tokens.shape, shares.shape[-1]))
  return jax.vmap(jax.random.categorical)(row_keys(rng, tokens), log_shares).astype(jnp.int32) + 1


def lengths_at_random(rng: Array, tokens: Int[Array, "B T"], num_pauses: int) -> Int[Array, "B T"]:
  """How many slots each token has where so many pauses lie at random places of its row; i32[B, T], T + pauses in all.

  All ways of mixing the pauses in behind the row's first token are equally likely; several may follow each other. A
  row's draw hangs on `rng` and on its own tokens alone.

  Args:
    rng: a jax.random key.
    tokens: i32[B, T].
    num_pauses: of each row.
  """
  length = tokens.shape[1]

  def draw(key: Array) -> Int[Array, "T"]:
    is_pause = jax.random.permutation(key, length - 1 + num_pauses) < num_pauses
    token = jnp.cumsum(~is_pause)
    return jnp.ones(length, jnp.int32).at[token].add(is_pause)

  return jax.vmap(draw)(row_keys(rng, tokens))


def lengths_behind_prefixes(
  weights: Float[Array, "B T"], num_pauses: int, most: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
  """How many slots each token has where pauses lie between prefixes, whose tokens aren't learnt, and their targets.

  A prefix ends with the token before the first target of weight. Where a row begins with a target of weight its prefix,
  if it has one, lies in the row before, and gets no pauses here.

  Args:
    weights: f32[B, T], of the targets.
    num_pauses: behind each prefix.
    most: so many prefixes of a row get pauses.

  Returns:
    i32[B, T]; and bool[B, T], False from the first prefix on that gets none.

  Example:
    >>> lengths, given = lengths_behind_prefixes(jnp.array([[1.0, 0, 0, 1, 1, 0, 1]]), 2, 1)
    >>> lengths.tolist(), given.tolist()
    ([[1, 1, 1, 3, 1, 1, 1]], [[True, True, True, True, True, True, False]])
  """
  learnt = weights > 0
  ends = learnt & ~jnp.pad(learnt[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  given = jnp.cumsum(ends, -1) <= most
  return jnp.where(ends & given, num_pauses + 1, 1).astype(jnp.int32), given


def row_keys(rng: Array, tokens: Int[Array, "B T"]) -> Array:
  """A key for every row, key[B], that hangs on `rng` and on the row's own tokens alone."""
  # A hash of the row's tokens and their order, in wrapping arithmetic.
  mixed = (tokens.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
  mixed ^= mixed >> 15
  digests = (mixed * (2 * jnp.arange(tokens.shape[1], dtype=jnp.uint32) + 1)).sum(-1, dtype=jnp.uint32)
  return jax.vmap(lambda digest: jax.random.fold_in(rng, digest))(digests)


def packed_row_slots(shares: Float[ArrayLike, "W"], length: int) -> int:
  """Slots of a row that W_n ~ Cat(shares) fills: the mean and four standard deviations, about one row in 30,000 is
  longer. At most T*W, and just that where all shares are in one place.

  Args:
    shares: concrete weights of 1..W slots, normalised.
    length: T.
  """
  shares = np.asarray(shares, np.float64)
  counts = np.arange(1, len(shares) + 1)
  mean = float(shares @ counts)
  variance = float(shares @ (counts - mean) ** 2)
  # The guard keeps rounding in the mean from adding a slot.
  return min(length * len(shares), math.ceil(length * mean + 4 * math.sqrt(length * variance) - 1e-6))
