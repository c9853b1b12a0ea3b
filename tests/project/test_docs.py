"""The code of docs/ is executed."""

import re
import sys
import types

import cli
import documents
import flax.linen as nn
import jax
import numpy as np
import pytest
from models import TINY, VOCABULARY, random_batch, tiny_config

from cyb_jax import configs, methods
from cyb_jax.errors import InputError
from cyb_jax.generation import Sampler, SamplingOptions
from cyb_jax.methods import Adaptive, CachedDecoding, Exportable, registry

GUIDE = cli.ROOT / "docs" / "adding_a_method.md"
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)


def registered(monkeypatch, block, config):
  """The method of a block of code, registered as the guide says."""
  module = types.ModuleType("method_of_the_guide")
  monkeypatch.setitem(sys.modules, module.__name__, module)
  exec(block, module.__dict__)
  found = getattr(module, config)
  monkeypatch.setitem(registry.METHODS, found.name, found)
  return found.name


def test_the_example_is_short():
  assert len(BLOCKS[0].splitlines()) < 60
  assert len(BLOCKS) == 2


def test_a_new_objective_over_pauses(monkeypatch):
  name = registered(monkeypatch, BLOCKS[0], "FadingSlotsConfig")
  config = tiny_config(name=name, pauses=2)
  config.method.unlock()
  config.method.decay = 0.25
  frozen = configs.freeze(config)
  assert frozen.method.decay == 0.25
  method = methods.build(frozen.method, TINY, vocab_size=VOCABULARY)
  assert isinstance(method, CachedDecoding)
  assert isinstance(method, Exportable)
  params = nn.unbox(jax.jit(method.init)(jax.random.key(0)))
  output = jax.jit(method.evaluate)(params, random_batch())
  np.testing.assert_allclose(np.exp(output.log_stopping[0, 0]), np.array([16, 4, 1]) / 21, rtol=1e-6)
  np.testing.assert_allclose(output.loss, -output.log_likelihood, rtol=1e-6)
  said = Sampler(method, SamplingOptions(mode="constant", temperature=0.0)).generate(params, [[3]], max_new_tokens=2)
  assert len(said.tokens[0]) == 2
  with pytest.raises(InputError, match=r"method.decay: 0.0 must be in \(0, 1\]"):
    methods.configure(name, decay=0.0)


def test_the_command_of_the_guide(monkeypatch):
  name = registered(monkeypatch, BLOCKS[0], "FadingSlotsConfig")
  (words,) = [words for words in documents.commands(GUIDE) if words[0] == "cyb-train"]
  (source,) = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
  fields = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
  method = documents.check_config(source, fields).method
  assert (method.name, method.pauses, method.decay) == (name, 3, 0.25)


def test_an_empty_cell_of_the_table(monkeypatch):
  name = registered(monkeypatch, BLOCKS[1], "CybCopiesConfig")
  method = methods.build(methods.configure(name, pauses=1), TINY, vocab_size=VOCABULARY)
  assert isinstance(method, Adaptive)
  params = nn.unbox(jax.jit(method.init)(jax.random.key(0)))
  output = jax.jit(method.evaluate)(params, random_batch())
  np.testing.assert_allclose(np.exp(output.log_stopping).sum(-1), 1, rtol=1e-5)
