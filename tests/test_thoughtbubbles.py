"""Streams that fork, against lists of streams in float64, one row at a time; selection by hand; prefixes against the
truncated text; and copies, which don't fork.
"""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import TINY, VOCABULARY, assert_trees_close, random_batch, tiny_config
from models import build as build_tiny

from cyb_jax import flops, methods, sharding
from cyb_jax.config import ParallelismConfig
from cyb_jax.decoder import DecoderConfig
from cyb_jax.errors import InputError
from cyb_jax.methods import MethodConfig
from cyb_jax.methods.thoughtbubbles import real_lengths, select, stream_positions

FOUR = dataclasses.replace(TINY, num_layers=4)


@functools.cache
def build(decoder=FOUR, router=1.5, **options):
  """A model whose router decides: at its own start all scores are about alike."""
  method, params = build_tiny(decoder, name="thoughtbubbles", **options)
  rng = np.random.default_rng(7)
  shape = params["fork_router"].shape
  drawn = {
    "fork_router": router * rng.normal(size=shape),
    "fork_norm": rng.uniform(0.5, 1.5, params["fork_norm"].shape),
    "fork_input": rng.normal(size=params["fork_input"].shape),
  }
  params = params | {name: jnp.asarray(value, jnp.float32) for name, value in drawn.items()}
  for name in ("read", "read_prefixes"):
    setattr(method, name, jax.jit(getattr(method, name)))
  return method, params


# The reference. A stream is a dict: x, c, token; a row a list of them.


def rms_norm(x, scale):
  return x / np.sqrt((x**2).mean() + 1e-5) * scale


def layer_norm(x, scale):
  return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * scale


def log_sigmoid(x):
  return -np.logaddexp(0.0, -x)


def turned(head, position, base=10_000.0):
  half = len(head) // 2
  angles = position * base ** (-np.arange(half) / half)
  first, second = head[:half], head[half:]
  return np.concatenate(
    [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)]
  )


def places(row):
  result = []
  for i, stream in enumerate(row):
    own = [j for j, other in enumerate(row) if other["token"] == stream["token"]]
    result.append(stream["token"] - 1 + (own.index(i) + 1) / len(own))
  return result


def run_layer(layer, row, documents):
  """Attention and mlp, attenuated."""
  at = places(row)
  normed = [rms_norm(stream["x"], layer["attention_norm"]["scale"]) for stream in row]
  heads = layer["attention"]["query"]["kernel"].shape[1]
  groups, size = layer["attention"]["key"]["kernel"].shape[1:]
  made = []
  for i, stream in enumerate(row):
    update = 0
    for head in range(heads):
      group = head // (heads // groups)
      query = turned(normed[i] @ layer["attention"]["query"]["kernel"][:, head], at[i])
      logits, values = [], []
      for j in range(i + 1):
        if documents is not None and documents[row[j]["token"]] != documents[stream["token"]]:
          continue
        key = turned(normed[j] @ layer["attention"]["key"]["kernel"][:, group], at[j])
        logits.append((query @ key + row[j]["c"]) / math.sqrt(size))
        values.append(np.exp(row[j]["c"]) * (normed[j] @ layer["attention"]["value"]["kernel"][:, group]))
      shares = np.exp(np.array(logits) - max(logits))
      update = update + (shares / shares.sum()) @ np.array(values) @ layer["attention"]["out"]["kernel"][head]
    made.append(stream["x"] + np.exp(stream["c"]) * update)
  for stream, x in zip(row, made):
    inner = rms_norm(x, layer["mlp_norm"]["scale"])
    gate = inner @ layer["mlp"]["gate"]["kernel"]
    update = (gate / (1 + np.exp(-gate)) * (inner @ layer["mlp"]["up"]["kernel"])) @ layer["mlp"]["down"]["kernel"]
    stream["x"] = x + np.exp(stream["c"]) * update


def fork(params, number, row, budget):
  """The row after a fork, and how many forced streams would not have been chosen for their score."""
  candidates = []
  for stream in row:
    logits = params["fork_router"][number] @ layer_norm(stream["x"], params["fork_norm"][number])
    f, k = np.maximum(log_sigmoid(logits), -20.0)
    candidates.append(stream | {"x": stream["x"] + params["fork_input"][number], "c": stream["c"] + f, "kept": False})
    candidates.append(stream | {"c": stream["c"] + k, "kept": True})
  last = {stream["token"]: i for i, stream in enumerate(candidates)}
  forced = set(last.values())
  assert all(candidates[i]["kept"] for i in forced)
  by_score = sorted(range(len(candidates)), key=lambda i: -candidates[i]["c"])
  chosen = list(forced) + [i for i in by_score if i not in forced][: budget - len(forced)]
  return [candidates[i] for i in sorted(chosen)], len(forced - set(by_score[:budget]))


def slow(method, params, tokens, targets, documents=None):
  """(log-likelihoods, what happened) of one row, all of whose tokens are real."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  decoder, config = params["decoder"], method.config
  row = [{"x": decoder["embedding"][token], "c": 0.0, "token": t} for t, token in enumerate(tokens)]
  budget, seen = math.floor(config.stream_budget * len(tokens) + 1e-9), {"forced": 0, "ended": 0, "dropped": 0}
  for layer in range(method.decoder.config.num_layers):
    if layer + 1 in method.fork_layers:
      before = len(row)
      row, forced = fork(params, method.fork_layers.index(layer + 1), row, budget)
      seen["forced"] += forced
      seen["ended"] += before - sum(stream["kept"] for stream in row)
      seen["dropped"] += 2 * before - len(row)
    run_layer(decoder[f"layers_{layer}"], row, documents)
  words = decoder["embedding"][:VOCABULARY]

  def log_share(x, target):
    logits = words @ rms_norm(x, decoder["final_norm"]["scale"])
    return logits[target] - np.logaddexp.reduce(logits)

  found = []
  for t, target in enumerate(targets):
    own = [stream for stream in row if stream["token"] == t]
    weights = np.exp([stream["c"] for stream in own])
    if config.combine == "states":
      found.append(log_share(sum(w * stream["x"] for w, stream in zip(weights, own)), target))
    else:
      shares = [np.exp(log_share(stream["x"], target)) for stream in own]
      found.append(np.log(weights @ shares / weights.sum()))
  seen["streams"] = [stream["token"] for stream in row]
  return np.array(found), seen


@pytest.mark.parametrize(
  ("options", "masked"),
  [
    ({"fork_layers": (1, 3, 4)}, False),
    ({"fork_layers": (2, 4), "stream_budget": 1.4, "combine": "states"}, True),
    ({"stream_budget": 8.0}, False),
  ],
)
def test_against_lists_of_streams(options, masked, exact):
  method, params = build(**options)
  batch = random_batch(3, 3, 7)
  documents = np.array([[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0, 1, 1, 1, 1, 2, 2]], np.int32)
  if masked:
    batch["documents"] = documents
  reading = method.read(params, batch)
  streams = method.streams(params, batch, real_lengths(batch))
  happened = []
  for row in range(3):
    expected, seen = slow(
      method, params, batch["tokens"][row], batch["targets"][row], documents[row] if masked else None
    )
    np.testing.assert_allclose(reading.scores.log_target[row, :, 0], expected, rtol=2e-4, atol=2e-5)
    assert streams.token[row].tolist() == seen["streams"]
    happened.append(seen)
  np.testing.assert_allclose(reading.loss, -reading.scores.log_target[..., 0])
  # What is to be tested took place; and with a budget of 2^F nothing was dropped.
  for name in ("forced", "ended", "dropped"):
    assert (sum(seen[name] for seen in happened) > 0) is (options.get("stream_budget") != 8.0), name
  losses = method.losses(params, batch, jax.random.key(0))
  np.testing.assert_array_equal(losses.loss, -losses.log_likelihood)
  np.testing.assert_allclose(losses.loss, reading.loss, rtol=1e-6)
