"""Properties of every method in the registry, which the tests find by name."""

import functools
import types

import jax
import numpy as np
import pytest
from models import TINY, VOCABULARY, assert_trees_close, initial_params, random_batch, tiny_config

from cyb_jax import configs, methods, training
from cyb_jax.cli import convert
from cyb_jax.costs import flops
from cyb_jax.errors import InputError
from cyb_jax.methods import METHODS, Exportable, NonCausal, configure, option_names
from cyb_jax.studies import settings

SETTING = {settings.SETTINGS[name]["name"]: name for name in settings.representatives()}


def tiny(name):
  """A method with the options of its setting, and small numbers of slots and layers."""
  config = configs.default()
  settings.apply(config, SETTING[name], "tiny", "1x1", from_scratch=True)
  options = configs.freeze(config).method
  return methods.build(options, TINY, vocab_size=VOCABULARY)


@functools.cache
def loss_of(name):
  """A method's loss for each token as a compiled function of a batch."""
  method = tiny(name)
  params = initial_params(method)
  return jax.jit(lambda batch: method.evaluate(params, batch).loss)


def test_each_method_has_a_setting():
  assert set(SETTING) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_it_reports_its_compute_cost(name):
  method = tiny(name)
  forward, executed = method.costs(16).forward, method.costs(16).forward_executed
  train, once = method.costs(16).train, method.costs(16).inference
  assert isinstance(once, flops.Cost)
  assert 0 < forward.total <= executed.total
  assert 0 < once.total <= forward.total
  # Training has three products for one; with drawn passes, evaluation uses the maximum.
  assert train.total > 2 * once.total
  assert method.costs(16).train_slots >= 16
  assert method.costs(16).forward_slots >= 16


@pytest.mark.parametrize("name", METHODS)
def test_rows_do_not_depend_on_each_other(name):
  """The content of other rows, and tokens without weight at a row's end, change nothing."""
  loss, batch = loss_of(name), random_batch(3, 2, 6)
  other = {key: value.copy() for key, value in batch.items()}
  other["tokens"][1] = (other["tokens"][1] + 5) % VOCABULARY
  np.testing.assert_allclose(loss(batch)[0], loss(other)[0], rtol=1e-5, atol=1e-5)
  padded = {key: value.copy() for key, value in batch.items()}
  padded["weights"][0, 4:] = 0.0
  tail = {key: value.copy() for key, value in padded.items()}
  tail["tokens"][0, 4:] = (tail["tokens"][0, 4:] + 5) % VOCABULARY
  np.testing.assert_allclose(loss(padded)[0, :4], loss(tail)[0, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if not isinstance(tiny(name), NonCausal)])
def test_it_sees_no_later_token(name):
  loss, batch = loss_of(name), random_batch(4, 2, 6)
  later = {key: value.copy() for key, value in batch.items()}
  later["tokens"][:, 4:] = (later["tokens"][:, 4:] + 5) % VOCABULARY
  before, after = loss(batch), loss(later)
  np.testing.assert_allclose(before[:, :4], after[:, :4], rtol=1e-5, atol=1e-5)
  assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-4


_SLOW = {"cyb_looped", "looped", "ponderlm2", "ponderlm3"}


@pytest.mark.parametrize(
  "name", [pytest.param(name, marks=pytest.mark.slow) if name in _SLOW else name for name in METHODS]
)
def test_the_gradient_of_the_sum_is_that_of_the_losses(name, exact):
  method, batch, rng = tiny(name), random_batch(5, 2, 6), jax.random.key(1)
  batch["weights"][0, 2] = 0.0
  params = initial_params(method)

  @jax.jit
  def gradients(params):
    def of_tokens(params):
      losses = method.loss(params, batch, rng, 3)
      kept = 1.0 if losses.kept is None else losses.kept
      return (losses.loss * batch["weights"] * kept).sum()

    def of_sum(params):
      losses = method.loss(params, batch, rng, 3)
      return losses.weighted_sum(batch["weights"] if losses.kept is None else batch["weights"] * losses.kept)

    return jax.value_and_grad(of_sum)(params), jax.value_and_grad(of_tokens)(params)

  of_sum, of_tokens = gradients(params)
  assert_trees_close(of_sum, of_tokens, rtol=2e-5, atol=2e-5)
  assert max(np.abs(x).max() for x in jax.tree.leaves(of_sum[1])) > 1e-3


# An accepted value of each option, as in a config.
VALUES = {
  "alpha": 0.1, "calibration_batches": 1, "combine": "states", "dont_know": "unit", "dont_know_prior": 0.5,
  "fork_layers": "1:2", "full_depth": 0.1, "gamma": "1:1:1:1", "head_activation": "none", "heads": 3,
  "jacobi": "1:1", "loss": "dp",
  "omega": "1:1:1:1",
  "pause_fraction": 0.2, "pause_input": "token+pause", "pause_offset": True, "pause_places": "prefix",
  "pause_positions": "shifting", "pause_shared": True, "pause_visibility": "hidden", "pauses": 2, "policy_floor": 0.2,
  "prune_below": 0.1, "recipe": "sampled", "rho": "1:1:1:1", "router_penalty": 0.1, "router_rate": 0.5,
  "slot_budget": 2.0, "slot_heads": True,
  "stopping_warmup": 1, "stream_budget": 3.0,
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_another_methods_option_is_refused(name):
  """`configure` and a config reject it; the hint names the options of the method and the methods with the option."""
  assert set(VALUES) == set(configs.all_options())
  own = option_names(name)
  for option, value in VALUES.items():
    if option in own:
      continue
    with pytest.raises(InputError) as refused:
      configure(name, **{option: value})
    assert str(refused.value) == (
      f"method.{option}: unknown field; method {name!r} has no such option. It has: {', '.join(own) or 'none'}"
    )
    config = configs.default()
    config.method.update({"name": name, option: value})
    with pytest.raises(InputError) as refused:
      configs.freeze(config)
    having = ", ".join(other for other in METHODS if option in option_names(other))
    assert str(refused.value) == (
      f"config.method.{option}: unknown field; method {name!r} has no such option; it accepts"
      f" {', '.join(own) or 'none'} (methods with this option: {having})"
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_written_config_is_read_unchanged(name):
  """The options of each setting of the method, its defaults, and numbers without a short decimal form."""
  found = [configure(name)]
  for setting, fields in settings.SETTINGS.items():
    if fields["name"] == name:
      config = configs.default()
      settings.apply(config, setting, "tiny", "1x1", from_scratch=True)
      found.append(configs.freeze(config).method)
  unusual = {
    "omega": (1 / 3, 0.0, 0.7, 1e-7), "gamma": (1.0, 0.99, 0.99**2, 0.99**7), "dont_know_prior": None,
    "jacobi": (1, 2), "fork_layers": (1, 2), "stopping_warmup": 0,
  }  # fmt: skip
  found.append(configure(name, **{key: value for key, value in unusual.items() if key in option_names(name)}))
  for options in found:
    source = configs.to_dict(configs.default()) | {"method": configs.written_method(options)}
    assert configs.freeze(source).method == options
    # A config.json and a ConfigDict give the same result.
    config = configs.default()
    config.method.update(configs.written_method(options))
    assert configs.freeze(config).method == options


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_accumulated_half_batches_equal_the_full_batch(name, tmp_path):
  """A step in two parts under pmap equals a step under jit: random draws depend on the step and the row."""
  records = []
  for accumulate, strategy in ((1, "jit"), (2, "pmap")):
    config = tiny_config(name=name)
    settings.apply(config, SETTING[name], "tiny", "1x3", from_scratch=True)
    config.data.batch_size, config.optimizer.accumulate, config.parallelism.strategy = 16, accumulate, strategy
    config.optimizer.epsilon = 1e-3  # otherwise rounding decides the direction of small gradients
    config.train.update(steps=3, eval_every=0, log_every=1)
    if name == "ponderlm3":
      config.method.prune_below = 0.0
    records.append(training.train(configs.freeze(config), tmp_path / str(accumulate)))
  assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=1e-4)
  assert records[0]["perplexity"] == pytest.approx(records[1]["perplexity"], rel=1e-4)
  assert records[0]["inference_flops"] == records[1]["inference_flops"] > 0


def test_methods_that_are_no_plain_decoder_are_not_exported(monkeypatch, tmp_path):
  """A program that reads the folder would run another model."""
  assert {name for name in METHODS if isinstance(tiny(name), Exportable)} == {
    "baseline",
    "tbys",
    "cyb",
    "constant_stop",
    "mean_slots",
  }
  run = types.SimpleNamespace(method=tiny("looped"))
  monkeypatch.setattr("cyb_jax.interop.pretrained.load_run", lambda *_, **__: run)
  monkeypatch.setattr("cyb_jax.cli.flag_values.checkpoint_flag", lambda: None)
  monkeypatch.setattr("cyb_jax.cli.convert.flags.FLAGS", types.SimpleNamespace(base=""))
  with pytest.raises(InputError, match=r"--workdir: the method of somewhere is 'looped', which is not a plain decoder"):
    convert._export("somewhere", tmp_path / "out")
  assert not (tmp_path / "out").exists()
