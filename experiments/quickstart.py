"""A tiny self-paced model on film reviews, in minutes on two CPU cores.

    python -m cyb_jax.cli.train --config=experiments/quickstart.py --workdir=runs/quickstart
    python -m cyb_jax.cli.train --config=experiments/quickstart.py:baseline --workdir=runs/quickstart-baseline

`make quickstart` runs both and compares them. The default setting is CYB-AP with up to 3 hidden pauses: from scratch,
hidden pauses and a prior of 0.5 (the paper's 0.9 is meant for pretrained models) keep all slots in use, and only the
pauses that the model requests have to be run. Every setting of experiments/README.md can replace `baseline`.

The rate is the best one of `baseline` and of `ap_hidden` after 1,000 steps, see experiments/README.md. One run of each
at one rate shows where the model pauses, not that pauses pay: with the best rate of each, `ap_hidden` is not ahead
after 1,000 steps, and `ap` is 1.7% ahead.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, size, _ = settings.parse(argument, setting="ap_hidden", size="nano", regime="1x3")
  config = configs.default()
  settings.apply(config, setting, size, "1x3", from_scratch=True)
  if config.method.name in ("cyb", "cyb_looped"):
    config.method.dont_know_prior = 0.5
  # The initialisation of PonderLM-2, as in the planned study `scratch`.
  config.decoder.update(settings.PONDER_DECODER)
  config.data.tokenizer = "sentencepiece:1024"
  config.data.sequence_length = 64
  config.data.batch_size = 32
  config.optimizer.learning_rate = 1.6e-2
  config.optimizer.warmup_fraction = 0.02
  if setting != "pretrained":
    config.train.steps = 600
  config.train.log_every = 50
  config.train.eval_every = 200
  config.train.eval_limit = 64
  config.train.checkpoint_every = 200
  return config
