"""Every setting of the paper on C4, from scratch, on the part of `c4/en` that TFDS finds on disk.

    TFDS_DATA_DIR=DIR python -m cyb_jax.cli.train --config=experiments/c4.py:SETTING,SIZE,REGIME --workdir=DIR
    TFDS_DATA_DIR=DIR python -m cyb_jax.cli.train --config=experiments/c4.py:ap,gpt2_124m,1x1 --workdir=runs/c4-ap

SETTING, SIZE and REGIME are as in reviews.py. For the complete C4, set a number of steps instead of epochs
(--config.train.steps=...) and prepare the tokens first (python -m cyb_jax.cli.prepare --task=c4_en --output=DIR, then
--config.data.store=DIR).
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, size, regime = settings.parse(argument, setting="ap", size="gpt2_124m", regime="1x1")
  config = configs.default()
  settings.apply(config, setting, size, regime, from_scratch=True)
  config.data.task = "c4_en"
  small = size in ("nano", "tiny", "small")
  config.data.tokenizer = "sentencepiece:4096" if small else "sentencepiece:32000"
  config.data.sequence_length = 128 if small else 1024
  config.data.batch_size = 16 if small else 256
  config.optimizer.learning_rate = 1e-3 if small else 6e-4
  config.optimizer.warmup_fraction = 0.02
  config.train.log_every = 50
  config.train.eval_every = 1000
  config.train.eval_limit = 512
  config.train.checkpoint_every = 1000
  large = size in ("llama_1b", "gemma1_2b", "gemma1_7b")
  if large:
    # Compiles one layer, saves only the input of each layer, and processes a few windows per chip at a time.
    config.decoder.scan_layers = True
    config.optimizer.accumulate = 4
  elif not small:
    # Half of the batch at a time, so that the kept results fit on 16 chips of v5e.
    config.optimizer.accumulate = 2
  if not small:
    config.decoder.remat = "full" if large else "dots"
  return config
