"""Initial values of the rows of pauses and of `<don't know>` that the model of `init_from` does not have.

`tuning.new_rows` chooses the initialisation, and the log reports it:

- zero: the rows of pauses are zero plus a little noise. This requires `method.pause_input` = 'token+pause': the input
  of a pause is then initially the input of its token, so all slots of a token are initially almost equal. A token's
  last slot sees W equal keys for every token, so up to the noise it equals the original model. Its first slot sees its
  own key once and the keys of earlier tokens W times. For a model of 15M parameters with W = 4 this raises the initial
  perplexity of the first slot by 3.5%, and that of the mixture not at all. It is not corrected, because a weight on a
  slot's own key would exclude attention kernels without key weights. With hidden pauses the first slot is exact.
  `<don't know>` is drawn as in 'draws'.
- unused: unused entries of the vocabulary (Gemma's `<unused0>`, `<unused1>`, ..: the pauses in order, then
  `<don't know>`; the setup of arXiv 2510.13879).
- draws: every row is an independent draw around the mean of the embeddings, with a tenth of their standard deviation in
  each dimension. With a larger deviation the inputs of pauses differ from the mean as much as those of rare entries,
  and the model predicts worse.
- mean: entries as in 'unused', or, if the vocabulary has too few, the mean of the embeddings for all rows. This was
  the only initialisation in early versions. Slots whose pauses have the same row predict far worse than the original
  model until training has made the rows differ.
- auto: pauses as in 'zero' if their input includes their token's embedding; the other rows as in 'unused' if the
  vocabulary has enough unused entries, otherwise as in 'draws'.

In unit form the row of `<don't know>` is not an output row: it always starts at zero.

Dimensions: K pauses, D model, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jaxtyping import Array, Float

from cyb_jax import runs
from cyb_jax.errors import InputError
from cyb_jax.methods import Method

# Fractions of the embeddings' standard deviation: the noise of 'zero', which makes the rows differ with almost no
# effect on the model, and the spread of 'draws'.
NOISE = 0.02
DEVIATION = 0.1
# The random streams of the rows; `method.init` splits the same key instead of folding numbers into it.
_STREAMS = {"pause_input": 1, "dont_know": 2}
_NAMES = {"pause_input": "pauses start", "dont_know": "<don't know> starts"}
_DESCRIPTIONS = {
  "zero": f"at zero plus noise of {NOISE:g} of the embeddings' deviation",
  "draws": "at a draw around the mean of the embeddings",
  "mean": "from the mean of the embeddings",
}


def check(choice: str, method: Method, unused: Sequence[int]) -> None:
  """Checks that the vocabulary has enough unused entries for `tuning.new_rows` = 'unused'.

  Args:
    choice: `tuning.new_rows`.
    method: the run's method.
    unused: the tokenizer's unused entries.

  Raises:
    InputError: there are fewer unused entries than new rows of the method.
  """
  if choice != "unused":
    return
  needed = sum(_counts(runs.abstract_params(method, None)).values())
  if len(unused) < needed:
    raise InputError(
      f"tuning.new_rows: 'unused', but the vocabulary has {len(unused)} unused entries, and method {method.name!r} has"
      f" {needed} new rows with these options; use 'auto' or 'draws'"
    )


def start(
  choice: str, method: Method, missing: Mapping[str, Any], decoder: Mapping[str, Any], unused: Sequence[int], seed: int
) -> dict[str, Array]:
  """The initial values of the missing rows of pauses and of `<don't know>`; empty if the decoder has no embedding.

  Args:
    choice: `tuning.new_rows`.
    method: the run's method.
    missing: the shapes of the missing parameters outside of the decoder.
    decoder: the decoder's parameters.
    unused: the tokenizer's unused entries.
    seed: `train.seed`.

  Returns:
    `pause_input` [K, D] and `dont_know` [D], in f32 or in the dtype of the decoder's tables.
  """
  if "embedding" not in decoder:
    return {}
  tables = {"pause_input": decoder["embedding"], "dont_know": decoder.get("unembedding", decoder["embedding"])}
  counts = _counts(missing)
  rows, first = {}, 0
  for name, way in _ways(choice, counts, len(unused), getattr(method.config, "pause_input", "pause")).items():
    count, table = counts[name], tables[name]
    if way == "unused":
      ids = list(unused[first : first + count])
      first += count
      rows[name] = table[jnp.asarray(ids)].reshape(missing[name].shape)
      description = f"from the unused entries {ids}"
    else:
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), _STREAMS[name])
      rows[name] = _started(way, table, key, method.vocab_size, count).reshape(missing[name].shape)
      description = _DESCRIPTIONS[way]
    logging.info("init_from: %s %s (tuning.new_rows = %r)", _NAMES[name], description, choice)
  return rows


def _counts(shapes: Mapping[str, Any]) -> dict[str, int]:
  """The number of rows of pauses, and of `<don't know>` if it is an output row."""
  counts = {}
  if "pause_input" in shapes:
    counts["pause_input"] = shapes["pause_input"].shape[0]
  if "dont_know" in shapes and "dont_know_bias" not in shapes:
    counts["dont_know"] = 1
  return counts


def _ways(choice: str, counts: Mapping[str, int], unused: int, pause_input: str) -> dict[str, str]:
  """The initialisation of each kind of row with `unused` unused entries: 'zero', 'unused', 'draws' or 'mean'."""
  if choice == "zero" or (choice == "auto" and pause_input == "token+pause"):
    others = {name: count for name, count in counts.items() if name != "pause_input"}
    zero = {"pause_input": "zero"} if "pause_input" in counts else {}
    return zero | _ways("draws" if choice == "zero" else "auto", others, unused, "pause")
  way = choice
  if choice in ("auto", "mean"):
    enough = unused >= sum(counts.values())
    way = "unused" if enough else {"auto": "draws", "mean": "mean"}[choice]
  return dict.fromkeys(counts, way)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _started(way: str, table: Float[Array, "V D"], key: Array, vocab_size: int, count: int) -> Float[Array, "count D"]:
  """Rows for 'zero', 'draws' or 'mean'. This is one program, because a table may be sharded over several hosts."""
  entries = table[:vocab_size].astype(jnp.float32)
  noise = jax.random.normal(key, (count, entries.shape[1]))
  if way == "zero":
    return NOISE * entries.std(0) * noise
  mean = jnp.broadcast_to(entries.mean(0), noise.shape)
  return mean if way == "mean" else mean + DEVIATION * entries.std(0) * noise
