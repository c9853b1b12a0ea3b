"""Where the rows of pauses and of `<don't know>` start that the model of `init_from` has not got.

`tuning.new_rows` chooses the start, and the log says what was taken:

- zero: the rows of pauses are zero plus a little noise. With `method.pause_input` = 'token+pause', which this start
  needs, the input of a pause is then that of its token, and all slots of a token start as nearly the same. A token's
  last slot sees W equal keys of every token, so but for the noise it starts as the original model; its first slot sees
  its own key once and those of the tokens before it W times. Of a model of 15M parameters with W = 4 that costs the
  first slot 3.5% of its perplexity at the start and the mixture nothing, so it is left: a weight on a slot's own key
  would rule out the attention kernels that take none. With hidden pauses the first slot starts exact. `<don't know>`
  starts at a draw.
- unused: entries of the vocabulary that are meant for no text (Gemma's `<unused0>`, `<unused1>`, ..: the pauses in
  order, then `<don't know>`; the set-up of arXiv 2510.13879).
- draws: every row is a draw of its own around the mean of the embeddings, with a tenth of the standard deviation that
  they have in each dimension. With more, the inputs of pauses differ from the mean by as much as those of rare entries,
  and the model predicts worse.
- mean: entries as in 'unused', or the mean of the embeddings, the same for all rows, where the vocabulary has too few
  of them. This was the only start before there was a choice. Slots whose pauses have one common row predict far
  worse than the model did, until training has made the rows differ.
- auto: pauses as in 'zero' where their input includes their token's embedding; the other rows as in 'unused' where the
  vocabulary has enough entries, and else as in 'draws'.

In unit form the row of `<don't know>` is no output row: it starts at zero whatever is chosen.

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

# Shares of the embeddings' standard deviation: the noise of 'zero', which tells the rows apart and changes next to
# nothing, and the spread of 'draws'.
NOISE = 0.02
DEVIATION = 0.1
# The random streams of the rows; those of `method.init` are split from the same key, not folded.
_STREAMS = {"pause_input": 1, "dont_know": 2}
_NAMES = {"pause_input": "pauses start", "dont_know": "<don't know> starts"}
_WORDS = {
  "zero": f"at zero plus noise of {NOISE:g} of the embeddings' deviation",
  "draws": "at a draw around the mean of the embeddings",
  "mean": "from the mean of the embeddings",
}


def check(choice: str, method: Method, unused: Sequence[int]) -> None:
  """Checks that the vocabulary has the entries that `tuning.new_rows` = 'unused' takes.

  Args:
    choice: `tuning.new_rows`.
    method: of the run.
    unused: the tokenizer's entries that are meant for no text.

  Raises:
    InputError: it has fewer than the method has new rows.
  """
  if choice != "unused":
    return
  needed = sum(_counts(runs.abstract_params(method, None)).values())
  if len(unused) < needed:
    raise InputError(
      f"tuning.new_rows: 'unused', but the vocabulary has {len(unused)} entries that are meant for no text, and method"
      f" {method.name!r} has {needed} new rows with these options; take 'auto' or 'draws'"
    )


def start(
  choice: str, method: Method, missing: Mapping[str, Any], decoder: Mapping[str, Any], unused: Sequence[int], seed: int
) -> dict[str, Array]:
  """The missing rows of pauses and of `<don't know>`, at their start; none where the decoder has no embedding.

  Args:
    choice: `tuning.new_rows`.
    method: of the run.
    missing: shapes of the parameters outside of the decoder that are missing.
    decoder: the decoder's parameters.
    unused: the tokenizer's entries that are meant for no text.
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
      words = f"from the unused entries {ids}"
    else:
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), _STREAMS[name])
      rows[name] = _started(way, table, key, method.vocab_size, count).reshape(missing[name].shape)
      words = _WORDS[way]
    logging.info("init_from: %s %s (tuning.new_rows = %r)", _NAMES[name], words, choice)
  return rows


def _counts(shapes: Mapping[str, Any]) -> dict[str, int]:
  """How many rows there are of pauses, and of `<don't know>` where it is an output row."""
  counts = {}
  if "pause_input" in shapes:
    counts["pause_input"] = shapes["pause_input"].shape[0]
  if "dont_know" in shapes and "dont_know_bias" not in shapes:
    counts["dont_know"] = 1
  return counts


def _ways(choice: str, counts: Mapping[str, int], unused: int, pause_input: str) -> dict[str, str]:
  """How each kind of row starts, when `unused` entries are meant for no text: 'zero', 'unused', 'draws' or 'mean'."""
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
  """Rows that start 'zero', 'draws' or 'mean'. One program, since a table may be spread over several hosts."""
  entries = table[:vocab_size].astype(jnp.float32)
  noise = jax.random.normal(key, (count, entries.shape[1]))
  if way == "zero":
    return NOISE * entries.std(0) * noise
  mean = jnp.broadcast_to(entries.mean(0), noise.shape)
  return mean if way == "mean" else mean + DEVIATION * entries.std(0) * noise
