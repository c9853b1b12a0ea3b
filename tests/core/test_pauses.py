"""Layout, positions and masks against hand-written tables (the worked example of pauses.py)."""

import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax import pauses


def table(text):
  return np.array([[c == "1" for c in row.split()] for row in text.strip().splitlines()])


VISIBLE = table("""
1 . . . . .
1 1 . . . .
1 1 1 . . .
1 1 1 1 . .
1 1 1 1 1 .
1 1 1 1 1 1
""")
HIDDEN = table("""
1 . . . . .
1 1 . . . .
1 1 1 . . .
1 . . 1 . .
1 . . 1 1 .
1 . . 1 1 1
""")


def test_interleave_by_hand():
  slots = pauses.interleave(jnp.array([[5, 7, 5], [1, 2, 3]]), 2, 100)
  np.testing.assert_array_equal(
    slots.ids,
    [[[5, 100, 101], [7, 100, 101], [5, 100, 101]], [[1, 100, 101], [2, 100, 101], [3, 100, 101]]],
  )
  np.testing.assert_array_equal(slots.positions, [[[0, 0, 0], [1, 1, 1], [2, 2, 2]]] * 2)
  assert slots.ids.dtype == slots.positions.dtype == jnp.int32


def test_without_pauses_it_is_the_plain_sequence():
  slots = pauses.interleave(jnp.array([[5, 7]]), 0, 100)
  np.testing.assert_array_equal(slots.ids, [[[5], [7]]])
  assert pauses.attention_mask(2, 1, visibility="hidden") is None


def test_masks_by_hand():
  assert pauses.attention_mask(2, 3) is None  # plain causal: the attention kernel implements it
  np.testing.assert_array_equal(pauses.attention_mask(2, 3, visibility="hidden")[0, 0], HIDDEN)
  one_document = pauses.attention_mask(2, 3, segment_ids=jnp.zeros((1, 2), jnp.int32))
  np.testing.assert_array_equal(one_document[0, 0], VISIBLE)


def test_documents_do_not_attend_to_each_other():
  segment_ids = pauses.document_ids(jnp.array([[4, 0, 6], [4, 5, 6]]), end_id=0)
  np.testing.assert_array_equal(segment_ids, [[0, 1, 1], [0, 0, 0]])
  mask = pauses.attention_mask(3, 2, segment_ids=segment_ids)
  expected = table("""
    1 . . . . .
    1 1 . . . .
    . . 1 . . .
    . . 1 1 . .
    . . 1 1 1 .
    . . 1 1 1 1
  """)
  np.testing.assert_array_equal(mask[0, 0], expected)
  np.testing.assert_array_equal(mask[1, 0], np.tril(np.ones((6, 6), bool)))
  both = pauses.attention_mask(3, 2, visibility="hidden", segment_ids=segment_ids)
  np.testing.assert_array_equal(
    both[0, 0], expected & np.asarray(pauses.attention_mask(3, 2, visibility="hidden"))[0, 0]
  )


def test_errors():
  with pytest.raises(ValueError, match="num_pauses: -1"):
    pauses.interleave(jnp.zeros((1, 2), jnp.int32), -1, 5)
  with pytest.raises(ValueError, match="tokens: shape"):
    pauses.interleave(jnp.zeros(2, jnp.int32), 1, 5)
  with pytest.raises(ValueError, match="visibility: 'seen'"):
    pauses.attention_mask(2, 2, visibility="seen")
