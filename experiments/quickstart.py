"""A tiny self-paced model on film reviews, in minutes on two CPU cores.

The default is CYB-AP with up to 3 pauses, on a part of the reviews. The pauses' inputs include the embedding of their
token, which is recommended for training from scratch.

    python -m cyb_jax.cli.train --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m cyb_jax.cli.train --config=experiments/quickstart.py:baseline --workdir=runs/quickstart-baseline

Any setting of experiments/README.md can replace `baseline`. `make quickstart` runs `dp_early_strong`: in so few steps
from scratch AP, the paper's best setting, collapses to the last slot, so that the report would show few differences
between tokens.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, size, _ = settings.parse(argument, setting="ap", size="tiny", regime="1x3")
  config = configs.default()
  settings.apply(config, setting, size, "1x3", from_scratch=True)
  config.data.tokenizer = "sentencepiece:2048"
  config.data.sequence_length = 64
  config.data.batch_size = 16
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_fraction = 0.05
  if setting != "pretrained":
    config.train.steps = 400
  config.train.log_every = 20
  config.train.eval_every = 100
  config.train.eval_limit = 64
  config.train.checkpoint_every = 100
  return config
