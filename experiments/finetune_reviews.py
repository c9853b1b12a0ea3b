"""Teaches a model that has never paused to do so: fine-tuning on film reviews, from a run of reviews.py.

    cyb-train --config=experiments/reviews.py:baseline,tiny,1x2 --workdir=runs/plain
    cyb-train --config=experiments/finetune_reviews.py:ap --config.init_from=runs/plain --workdir=runs/tuned

SETTING, SIZE, REGIME as in reviews.py; size, tokenizer and data must be those of the run that it starts from.

Two things here are ours, not the paper's, and off in its configs. A confident model starts with d far below the prior
that it was given: method.calibration_batches = 4 adds the constant to the <don't know> logit that makes the median of d
over the first 4 batches the prior, 0.9. And method.stopping_warmup = 50 holds d at the prior for the first 50 steps, so
that the new pauses learn to answer before the model learns that they don't. Compare with
--config.method.calibration_batches=0 --config.method.stopping_warmup=0.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, size, regime = settings.parse(argument, setting="ap", size="tiny", regime="1x1")
  config = configs.default()
  settings.apply(config, setting, size, regime)
  if config.method.name == "cyb":
    config.method.calibration_batches = 4
    config.method.stopping_warmup = 50
  settings.on_reviews(config, size)
  # A quarter of what training from scratch starts with.
  config.optimizer.learning_rate /= 4
  return config
