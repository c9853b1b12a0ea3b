"""What holds for every method of the registry, found by its name alone."""

import re
import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from models import TINY, VOCABULARY, random_batch, tiny_config

from cyb_jax import configs, methods, training
from cyb_jax.cli import convert
from cyb_jax.costs import flops
from cyb_jax.errors import InputError
from cyb_jax.methods import METHODS, configure
from cyb_jax.studies import settings

SETTING = {settings.SETTINGS[name]["name"]: name for name in settings.representatives()}


def tiny(name):
  """A method with its own setting's options, and few of whatever it has several of."""
  config = configs.default()
  settings.apply(config, SETTING[name], "tiny", "1x1", from_scratch=True)
  options = configs.freeze(config).method
  return methods.build(options, TINY, vocab_size=VOCABULARY)


def params_of(method):
  return jax.jit(lambda: nn.unbox(method.init(jax.random.key(0))))()


def test_each_has_a_setting():
  assert set(SETTING) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_it_says_what_it_spends(name):
  method = tiny(name)
  forward, executed = method.costs(16).forward, method.costs(16).forward_executed
  train, once = method.costs(16).train, method.costs(16).inference
  assert isinstance(once, flops.Cost)
  assert 0 < forward.total <= executed.total
  assert 0 < once.total <= forward.total
  # Three products for one, and where passes are drawn evaluation takes the most.
  assert train.total > 2 * once.total
  assert method.costs(16).train_slots >= 16
  assert method.costs(16).forward_slots >= 16


@pytest.mark.parametrize("name", METHODS)
def test_rows_are_read_by_themselves(name):
  """What is in the other rows of a batch, and what has no weight behind a row's end, changes nothing."""
  method = tiny(name)
  params, batch = params_of(method), random_batch(3, 2, 6)
  other = {key: value.copy() for key, value in batch.items()}
  other["tokens"][1] = (other["tokens"][1] + 5) % VOCABULARY
  read = jax.jit(lambda params, batch: method.evaluate(params, batch).loss)
  np.testing.assert_allclose(read(params, batch)[0], read(params, other)[0], rtol=1e-5, atol=1e-5)
  padded = {key: value.copy() for key, value in batch.items()}
  padded["weights"][0, 4:] = 0.0
  tail = {key: value.copy() for key, value in padded.items()}
  tail["tokens"][0, 4:] = (tail["tokens"][0, 4:] + 5) % VOCABULARY
  np.testing.assert_allclose(read(params, padded)[0, :4], read(params, tail)[0, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].causal])
def test_it_looks_at_no_later_token(name):
  method = tiny(name)
  params, batch = params_of(method), random_batch(4, 2, 6)
  later = {key: value.copy() for key, value in batch.items()}
  later["tokens"][:, 4:] = (later["tokens"][:, 4:] + 5) % VOCABULARY
  read = jax.jit(lambda params, batch: method.evaluate(params, batch).loss)
  before, after = read(params, batch), read(params, later)
  np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-5)
  assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-4


@pytest.mark.parametrize("name", METHODS)
def test_another_methods_option_is_refused(name):
  given = {"stream_budget": 3.0, "jacobi": (1, 1), "pause_fraction": 0.2, "loss": "dp"}
  for option, value in given.items():
    if option not in METHODS[name].options:
      with pytest.raises(InputError, match=rf"method\.{option}: {re.escape(repr(value))} is set, but method '{name}'"):
        methods.build(configure(name=name, **{option: value}), TINY)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_half_batches_make_the_whole(name, tmp_path):
  """In two parts a step under pmap as in one under jit: what is drawn hangs on the step and the row."""
  records = []
  for accumulate, strategy in ((1, "jit"), (2, "pmap")):
    config = tiny_config(pause_input="pause")
    settings.apply(config, SETTING[name], "tiny", "1x3", from_scratch=True)
    config.data.batch_size, config.optimizer.accumulate, config.parallelism.strategy = 16, accumulate, strategy
    config.optimizer.epsilon = 1e-3  # else rounding decides the direction of small gradients
    config.train.update(steps=3, eval_every=0, log_every=1)
    if name == "ponderlm3":
      config.method.prune_below = 0.0
    records.append(training.train(configs.freeze(config), tmp_path / str(accumulate)))
  assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-4)
  assert records[0]["perplexity"] == pytest.approx(records[1]["perplexity"], rel=1e-4)
  assert records[0]["inference_flops"] == records[1]["inference_flops"] > 0


def test_what_is_no_plain_decoder_is_not_exported(monkeypatch, tmp_path):
  """Whoever reads the folder would run another model."""
  assert {name for name in METHODS if METHODS[name].exports} == {
    "baseline",
    "tbys",
    "cyb",
    "constant_stop",
    "mean_slots",
  }
  run = types.SimpleNamespace(method=tiny("looped"))
  monkeypatch.setattr("cyb_jax.runs.load", lambda *_: run)
  monkeypatch.setattr("cyb_jax.cli.flag_values.checkpoint_flag", lambda: None)
  with pytest.raises(InputError, match=r"--workdir: somewhere is of method 'looped', which is no plain decoder"):
    convert._export("somewhere", tmp_path / "out")
  assert not (tmp_path / "out").exists()
