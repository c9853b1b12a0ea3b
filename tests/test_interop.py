"""Weights of others. The goldens are transformers' own logits, written by `make test-parity`."""

import dataclasses
import functools
import os
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cyb_jax import config as configs
from cyb_jax import interop, sharding
from cyb_jax.decoder import Decoder, init_params

GOLDENS = pathlib.Path(os.environ.get("CYB_JAX_GOLDENS", pathlib.Path(__file__).parent / "parity" / "goldens"))
MODELS = ("gemma", "llama", "llama_untied_biased", "neox_serial", "pythia", "qwen2")


def abstract(decoder_config, mesh=None):
  """Shapes and shardings of params['decoder']."""
  boxed = jax.eval_shape(functools.partial(init_params, Decoder(decoder_config)), jax.random.key(0))
  if mesh is None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = jax.tree.map(lambda _: here, nn.unbox(boxed))
  else:
    placed = sharding.shardings(boxed, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), nn.unbox(boxed), placed)


def load(path, **fields):
  """(source, config, params['decoder']) of a model, with some fields of its config replaced."""
  source = interop.open_source(path)
  config = dataclasses.replace(source.decoder, **fields)
  return source, config, interop.load_decoder(source, abstract(config))


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, tokens):
  decoder, variables = Decoder(config), {"params": params}
  inputs = decoder.apply(variables, tokens, method="embed")
  hidden = decoder.apply(variables, inputs, jnp.arange(tokens.shape[1])[None])
  return hidden @ decoder.apply(variables, method="unembedding").T


def golden(name):
  """(tokens, logits)"""
  with np.load(GOLDENS / name / "goldens.npz") as arrays:
    return arrays["tokens"], arrays["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, exact):
  tokens, expected = golden(name)
  assert expected.std() > 1.5  # nats: a mistake would show
  _, config, params = load(GOLDENS / name)
  np.testing.assert_allclose(logits(config, params, tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_untied_biased", "pythia"])
def test_stacked_layers_on_a_mesh_are_the_same_weights(name):
  source, config, params = load(GOLDENS / name)
  mesh = sharding.make_mesh(configs.ParallelismConfig(fsdp=2, tensor=2))
  stacked = dataclasses.replace(config, scan_layers=True)
  placed = interop.load_decoder(source, abstract(stacked, mesh))
  together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layers_{i}"] for i in range(2)))
  jax.tree.map(np.testing.assert_array_equal, placed["layers"], together)
  np.testing.assert_array_equal(placed["embedding"], params["embedding"])
  kernel = placed["layers"]["mlp"]["up"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape)[1:] == (config.d_model // 2, config.mlp_size // 2)
