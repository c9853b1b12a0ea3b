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

Dimensions: B batch, T tokens, W slots per token, S = T*W slots flattened.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import jax
import jax.numpy as jnp

if TYPE_CHECKING:  # annotations alone: these files need jax and nothing else
  from jaxtyping import Array, Bool, Int

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
  documents: Int[Array, "B T"] | None = None,
) -> Bool[Array, "b 1 S S"] | None:
  """Which slot (query, third axis) may see which (key, fourth axis), over the flattened slots.

  Args:
    length: T.
    num_slots: W.
    visibility: 'visible': plain causal, the paper's form; 'hidden': a pause is seen by the later slots of its own
      token alone.
    documents: i32[B, T], see `document_ids`; None: attention crosses documents.

  Returns:
    bool[1 or B, 1, T*W, T*W], or None where the mask is plain causal, which every attention kernel does for itself.

  Raises:
    ValueError: on another visibility.
  """
  if visibility not in ("visible", "hidden"):
    raise ValueError(f"visibility: {visibility!r} is none of 'visible', 'hidden'")
  hidden = visibility == "hidden" and num_slots > 1
  if documents is None and not hidden:
    return None
  order = jnp.arange(length * num_slots)
  token, slot = order // num_slots, order % num_slots
  mask = (order[:, None] >= order[None, :])[None, None]
  if hidden:
    mask &= (slot[None, :] == 0) | (token[:, None] == token[None, :])
  if documents is not None:
    documents = jnp.repeat(documents, num_slots, axis=-1)
    mask &= (documents[:, :, None] == documents[:, None, :])[:, None]
  return mask
