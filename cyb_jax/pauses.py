"""The layout of slots: pauses after the tokens, their positions, and the attention mask.

Every real token is followed by K pauses, so it has W = K + 1 slots: slot 0 is the token itself, slots 1..K are
`<pause_1>`..`<pause_K>` (slots are counted from 0 in code; the paper counts from 1). All slots of a token predict the
next real token. Arrays have a separate axis of slots, which only attention flattens. This module depends only on jax.

Worked example with T = 2 tokens "a b" and K = 2 pauses each; the ids of the pauses are p = V and q = V + 1:

    flattened slot   0  1  2  3  4  5
    id               a  p  q  b  p  q
    position         0  0  0  1  1  1      a pause has the position of its token, so later tokens are not shifted

    attention mask (row: query, column: key)
          visible (plain causal)      hidden (a pause is a key only for the later slots of its own token)
            a p q b p q                 a p q b p q
        a   1 . . . . .             a   1 . . . . .
        p   1 1 . . . .             p   1 1 . . . .
        q   1 1 1 . . .             q   1 1 1 . . .
        b   1 1 1 1 . .             b   1 . . 1 . .
        p   1 1 1 1 1 .             p   1 . . 1 1 .
        q   1 1 1 1 1 1             q   1 . . 1 1 1

Recipes determine how many of its W slots a token gets. *constant*: all of them. *sampled*: W_n ~ Cat(omega), drawn for
each token. *on_policy*: W_n is drawn from the stopping-time distribution of the model. Where W_n varies, the slots are
packed, one token after the other, into rows of a fixed number of slots, so that shapes are static:

    W_n = 2, 1, 3, 1 in a row of 6 slots    a p b c p q      the fourth token does not fit and has weight 0

In pause-training (`lengths_at_random`, `lengths_after_prefixes`), only some tokens have pauses, and all pauses have the
same id. W_n is again the number of slots of a token, and the slots are packed in the same way.

Dimensions: B batch, T tokens, W slots per token, S slots of a row: T*W flattened, or the size of a packed row.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:  # at run time, the core needs only jax
  from jaxtyping import Array, ArrayLike, Bool, Float, Int

Visibility = Literal["visible", "hidden"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Tokens with their pauses.

  Attributes:
    ids: i32[B, T, W], the input ids: the token, then its pauses.
    positions: i32[B, T, W], the positions for rotary embeddings, from 0.
  """

  ids: Int[Array, "B T W"]
  positions: Int[Array, "B T W"]


def interleave(tokens: Int[Array, "B T"], num_pauses: int, first_pause_id: int) -> Slots:
  """Returns every token followed by `num_pauses` pauses (recipe *constant*).

  Args:
    tokens: i32[B, T].
    num_pauses: K >= 0.
    first_pause_id: the id of `<pause_1>`; `<pause_k>` is `first_pause_id + k - 1`.

  Returns:
    `Slots`, each array i32[B, T, K + 1].

  Raises:
    ValueError: `num_pauses` is negative, or `tokens` does not have two axes.

  Example:
    >>> interleave(jnp.array([[5, 7]]), 2, 100).ids.tolist()
    [[[5, 100, 101], [7, 100, 101]]]
    >>> interleave(jnp.array([[5, 7]]), 2, 100).positions.tolist()
    [[[0, 0, 0], [1, 1, 1]]]
  """
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2:
    raise ValueError(f"tokens: shape {tokens.shape} must have two axes, [batch, tokens]")
  if num_pauses < 0:
    raise ValueError(f"num_pauses: {num_pauses} must not be negative")
  batch, length = tokens.shape
  pauses = first_pause_id + jnp.arange(num_pauses, dtype=jnp.int32)
  ids = jnp.concatenate(
    [tokens.astype(jnp.int32)[..., None], jnp.broadcast_to(pauses, (batch, length, num_pauses))], axis=-1
  )
  return Slots(ids=ids, positions=slot_positions(batch, length, num_pauses + 1))


def slot_positions(batch: int, length: int, num_slots: int) -> Int[Array, "B T W"]:
  """Returns the rotary position of every slot, which is the position of its token.

  Args:
    batch: B.
    length: T.
    num_slots: W.

  Returns:
    i32[B, T, W].

  Example:
    >>> slot_positions(1, 2, 3).tolist()
    [[[0, 0, 0], [1, 1, 1]]]
  """
  return jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[:, None], (batch, length, num_slots))


def document_ids(tokens: Int[Array, "B T"], end_id: int) -> Int[Array, "B T"]:
  """Returns the number of each token's document within its row, from 0.

  An end token belongs to the document that follows it, because it predicts the first token of that document.

  Args:
    tokens: i32[B, T].
    end_id: the end token.

  Returns:
    i32[B, T].

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
  """Returns the attention mask over the flattened slots; queries are on the third axis, keys on the fourth.

  Args:
    length: T.
    num_slots: W.
    visibility: 'visible': plain causal attention, as in the paper; 'hidden': a pause is a key only for the later slots
      of its own token.
    segment_ids: i32[B, T], see `document_ids`; None means that attention crosses documents.
    packing: the places of the slots in their row, see `pack`; None means all W slots of every token, in order.

  Returns:
    bool[1 or B, 1, S, S]; None if the mask is plain causal, which attention kernels implement without a mask.

  Raises:
    ValueError: `visibility` is unknown.

  Example:
    >>> attention_mask(2, 2, visibility="hidden")[0, 0].astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
  """
  if visibility not in ("visible", "hidden"):
    raise ValueError(f"visibility: {visibility!r} is unknown; give 'visible' or 'hidden'")
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
  """Tokens with different numbers of slots, packed into rows of S places.

  Attributes:
    token: i32[B, S], the index of the token at a place. Places after the last slot repeat the last token.
    slot: i32[B, S], the index of the slot within its token.
    places: i32[B, T, W], the places of the slots of a token. A token with fewer than W slots repeats its last place.
    kept: bool[B, T], whether all slots of a token fit into its row. The other tokens must have weight 0.
  """

  token: Int[Array, "B S"]
  slot: Int[Array, "B S"]
  places: Int[Array, "B T W"]
  kept: Bool[Array, "B T"]


def pack(lengths: Int[Array, "B T"], num_slots: int, row_slots: int) -> Packing:
  """Returns the slots of every row, packed in order into rows of a fixed number of slots.

  Args:
    lengths: i32[B, T], W_n, the number of slots of each token, in 1..W.
    num_slots: W.
    row_slots: S. Tokens at the end of a row that do not fit are not kept.

  Returns:
    See `Packing`.

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
  # At places after the last slot of a row, the difference exceeds W - 1.
  slot = jnp.minimum(place - jnp.take_along_axis(starts, token, -1), num_slots - 1)
  places = starts[..., None] + jnp.minimum(jnp.arange(num_slots), lengths[..., None] - 1)
  return Packing(token=token, slot=slot, places=jnp.minimum(places, row_slots - 1), kept=ends <= row_slots)


def draw_lengths(
  rng: Array, tokens: Int[Array, "B T"], shares: Float[Array, "W"] | Float[Array, "B T W"]
) -> Int[Array, "B T"]:
  """Returns W_n ~ Cat(shares), the number of slots of each token (recipe *sampled*).

  The draw for a row depends only on `rng` and on the tokens of the row, so it is the same on every device and in every
  batch that contains the row.

  Args:
    rng: a jax.random key.
    tokens: i32[B, T].
    shares: f32[W] or f32[B, T, W], the probabilities of 1..W slots, for all tokens or for each token.

  Returns:
    i32[B, T], in 1..W.

  Example:
    >>> draw_lengths(jax.random.key(0), jnp.array([[5, 7]]), jnp.array([0.0, 1.0, 0.0])).tolist()
    [[2, 2]]
  """
  log_shares = jnp.broadcast_to(jnp.log(shares), (*tokens.shape, shares.shape[-1]))
  return jax.vmap(jax.random.categorical)(row_keys(rng, tokens), log_shares).astype(jnp.int32) + 1


def lengths_at_random(rng: Array, tokens: Int[Array, "B T"], num_pauses: int) -> Int[Array, "B T"]:
  """Returns the number of slots of each token if a fixed number of pauses is inserted at random places of each row.

  All orders of the pauses and of the tokens after the first token are equally likely; pauses may be adjacent. The draw
  for a row depends only on `rng` and on the tokens of the row.

  Args:
    rng: a jax.random key.
    tokens: i32[B, T].
    num_pauses: the number of pauses in each row.

  Returns:
    i32[B, T], at least 1 each; the sum of a row is T + num_pauses.

  Example:
    >>> int(lengths_at_random(jax.random.key(0), jnp.array([[5, 7, 3]]), num_pauses=4).sum())
    7
  """
  length = tokens.shape[1]

  def draw(key: Array) -> Int[Array, "T"]:
    is_pause = jax.random.permutation(key, length - 1 + num_pauses) < num_pauses
    token = jnp.cumsum(~is_pause)
    return jnp.ones(length, jnp.int32).at[token].add(is_pause)

  return jax.vmap(draw)(row_keys(rng, tokens))


def lengths_after_prefixes(
  weights: Float[Array, "B T"], num_pauses: int, max_prefixes: int
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
  """Returns the number of slots of each token if pauses are inserted between prefixes and their targets.

  A prefix is a run of tokens whose targets have weight 0, and the token after them, whose target is the first one with
  a positive weight. If the first target of a row has a positive weight, its prefix is in the previous row and gets no
  pauses.

  Args:
    weights: f32[B, T], the loss weights of the targets.
    num_pauses: the number of pauses after each prefix.
    max_prefixes: the number of prefixes of a row, from its start, that get pauses.

  Returns:
    i32[B, T], the number of slots; and bool[B, T], False from the end of the first prefix that gets no pauses.

  Example:
    >>> lengths, given = lengths_after_prefixes(jnp.array([[1.0, 0, 0, 1, 1, 0, 1]]), 2, 1)
    >>> lengths.tolist(), given.tolist()
    ([[1, 1, 1, 3, 1, 1, 1]], [[True, True, True, True, True, True, False]])
  """
  is_target = weights > 0
  ends = is_target & ~jnp.pad(is_target[:, :-1], ((0, 0), (1, 0)), constant_values=True)
  given = jnp.cumsum(ends, -1) <= max_prefixes
  return jnp.where(ends & given, num_pauses + 1, 1).astype(jnp.int32), given


def row_keys(rng: Array, tokens: Int[Array, "B T"]) -> Array:
  """Returns a random key for every row, key[B], that depends only on `rng` and on the tokens of the row.

  Args:
    rng: a jax.random key.
    tokens: i32[B, T].

  Example:
    >>> keys = row_keys(jax.random.key(0), jnp.array([[5, 7], [7, 5], [5, 7]]))
    >>> bool(keys[0] == keys[2]), bool(keys[0] == keys[1])
    (True, False)
  """
  # A hash of the tokens and of their order, in arithmetic modulo 2^32.
  mixed = (tokens.astype(jnp.uint32) + 1) * jnp.uint32(0x9E3779B1)
  mixed ^= mixed >> 15
  digests = (mixed * (2 * jnp.arange(tokens.shape[1], dtype=jnp.uint32) + 1)).sum(-1, dtype=jnp.uint32)
  return jax.vmap(lambda digest: jax.random.fold_in(rng, digest))(digests)


def packed_row_slots(shares: Float[ArrayLike, "W"], length: int) -> int:
  """Returns the size S of a packed row for W_n ~ Cat(shares): the mean number of slots plus four standard deviations.

  About one row in 30,000 has more slots. S is at most T*W; it is exact if one number of slots has probability 1.

  Args:
    shares: [W], the probabilities of 1..W slots; concrete and normalised.
    length: T.

  Example:
    >>> packed_row_slots([0.5, 0.5], 64), packed_row_slots([0.0, 1.0], 64)
    (112, 128)
  """
  shares = np.asarray(shares, np.float64)
  counts = np.arange(1, len(shares) + 1)
  mean = float(shares @ counts)
  variance = float(shares @ (counts - mean) ** 2)
  # 1e-6 is subtracted so that rounding of the mean does not add a slot.
  return min(length * len(shares), math.ceil(length * mean + 4 * math.sqrt(length * variance) - 1e-6))
