"""A small version of the paper's experiment: SmolLM2-135M fine-tuned on C4 (arXiv 2510.13879 uses Gemma 2B).

    cyb-train --config=experiments/smollm2_c4.py:SETTING --config.init_from=WEIGHTS --workdir=DIR

WEIGHTS and SETTING are as in smollm2_reviews.py. As in the paper: windows of 2,048 tokens, a cosine schedule down to a
hundredth of the learning rate, and no calibration of d. Unlike the paper: 4,000 steps of 32 windows instead of 25,000
of 256.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, tuned = settings.parse_tuning(argument)
  config = configs.default()
  settings.fine_tune(config, setting, tuned, calibrated=False)
  config.data.task = "c4_en"
  config.data.sequence_length = 2048
  config.data.batch_size = 32
  if setting != "pretrained":
    config.train.steps = 4000
  config.decoder.remat = "dots"
  config.train.log_every = 20
  config.train.eval_every = 500
  config.train.eval_limit = 256
  config.train.checkpoint_every = 500
  return config
