"""All settings of the paper can be trained and evaluated: the slow test uses reviews, the fast ones smaller data."""

import pathlib

import pytest

from cyb_jax import configs, training
from cyb_jax.studies import settings

SAMPLE = pathlib.Path(__file__).parents[3] / "shared" / "tfds"


def shrink(config):
  config.data.update(sequence_length=16, batch_size=8)
  config.decoder.update(num_layers=1, d_model=16, num_heads=2, num_kv_heads=2, head_size=8, mlp_size=32)
  config.train.update(steps=2 if config.train.epochs else 0, log_every=1, eval_every=0, eval_limit=4, trackers="")
  return config


@pytest.mark.slow
@pytest.mark.parametrize("setting", settings.SETTINGS)
def test_all_settings_on_the_reviews(setting, tmp_path):
  from experiments import reviews

  config = shrink(reviews.get_config(setting))
  config.data.tokenizer = "sentencepiece:2048"
  if setting == "thoughtbubbles4":
    config.decoder.num_layers = 3  # streams must fork twice
  record = training.train(configs.freeze(config), tmp_path / "run")
  assert record["tokens"] > 50_000
  assert record["perplexity"] > 1
  assert len(record["latency"]) == configs.freeze(config).build_method().num_slots


@pytest.mark.slow
def test_c4_prepares_and_trains_from_the_sample(tmp_path, monkeypatch):
  from experiments import c4

  if not SAMPLE.exists():
    pytest.skip(f"needs a prepared C4 sample in {SAMPLE}")
  monkeypatch.setenv("TFDS_DATA_DIR", str(SAMPLE))
  config = shrink(c4.get_config("ap,tiny,1x3"))
  config.data.tokenizer = "sentencepiece:1024"
  record = training.train(configs.freeze(config), tmp_path / "run")
  assert record["tokens"] > 50_000
  assert record["train_tokens"] == 2 * 8 * 16


@pytest.mark.slow
def test_regimes_read_their_fractions_of_the_data(tmp_path):
  """1x1 reads a third once, 2x1 reads the same third twice, and 1x3 reads everything once, which the steps show."""
  from experiments import reviews

  steps = {}
  for regime in ("1x1", "2x1", "1x2", "1x3"):
    config = shrink(reviews.get_config(f"baseline,tiny,{regime}"))
    config.data.update(task="synthetic_sums", tokenizer="bytes", options="documents=64", sequence_length=64)
    config.train.update(steps=0, log_every=50)
    steps[regime] = training.train(configs.freeze(config), tmp_path / regime)["step"]
  assert steps["2x1"] in (2 * steps["1x1"], 2 * steps["1x1"] - 1)
  assert steps["1x2"] in (2 * steps["1x1"], 2 * steps["1x1"] - 1)
  assert steps["1x3"] in range(3 * steps["1x1"] - 2, 3 * steps["1x1"] + 1)
