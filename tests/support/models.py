"""Small models, batches and stores for tests."""

import contextlib
import dataclasses
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cyb_jax import configs, methods
from cyb_jax.decoder import DecoderConfig
from cyb_jax.methods import configure, option_names

VOCABULARY = 29

TINY = DecoderConfig(
  vocab_size=32, num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_size=8, mlp_size=24, initializer="scaled"
)


@contextlib.contextmanager
def constant_initializers(seed=0):
  """Initial weights of the decoder are drawn by NumPy while a function is traced, with the same deviations.

  Compiling the truncated normal of every matrix takes longer than compiling the model. The weights do not depend on
  the key of the traced function.
  """
  rng = np.random.default_rng(seed)

  def normal(stddev=1e-2):
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(stddev * rng.normal(size=shape), dtype)

  def truncated(stddev=1e-2):
    return normal(0.87962566103423978 * stddev)

  with mock.patch.multiple(nn.initializers, normal=normal, truncated_normal=truncated):
    yield


def initial_params(method):
  """Parameters of a method, whose matrices are drawn by NumPy."""
  with constant_initializers():
    return jax.jit(lambda: nn.unbox(method.init(jax.random.key(0))))()


def build(decoder=TINY, **options):
  """(method, params) of a tiny model; compiled if possible, because op-by-op initialisation takes seconds."""
  method = methods.build(configure(**options), decoder, vocab_size=VOCABULARY)
  params = initial_params(method)
  for name in ("hidden", "loss"):
    setattr(method, name, jax.jit(getattr(method, name)))
  return method, params


def random_batch(seed=0, batch_size=4, length=6, *, uneven=False):
  """A batch of random tokens; uneven: rows with unequal weights, one of them zero."""
  rng = np.random.default_rng(seed)
  stream = rng.integers(0, VOCABULARY, (batch_size, length + 1)).astype(np.int32)
  weights = np.ones((batch_size, length), np.float32)
  if uneven:
    weights = (np.arange(length) < rng.integers(0, length + 1, (batch_size, 1))).astype(np.float32)
    weights[0], weights[1] = 1.0, 0.0
  return {"tokens": stream[:, :-1], "targets": stream[:, 1:], "weights": weights}


def tiny_config(**method):
  """A config that trains in seconds on generated data."""
  config = configs.default()
  # In methods with this option, the input of a pause includes the embedding of its token.
  if "pause_input" in option_names(method.get("name", "cyb")):
    method = {"pause_input": "token+pause"} | method
  config.method.update(method)
  config.data.update(
    task="synthetic_lookups", tokenizer="bytes", options="documents=64", sequence_length=16, batch_size=8
  )
  config.decoder.update(num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_size=8, mlp_size=32)
  config.train.update(steps=12, log_every=3, eval_every=6, eval_limit=8, checkpoint_every=5, trackers="")
  return config


def with_part(config, part, **fields):
  """A copy of a frozen config with some fields of one part replaced."""
  return dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **fields)})


def assert_trees_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, rtol=1e-5, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(jnp.asarray(x), jnp.asarray(y), rtol=rtol, atol=atol), a, b)
