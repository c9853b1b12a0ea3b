"""Teaches a model that has never paused to do so: fine-tuning on film reviews, from a run of reviews.py.

    cyb-train --config=experiments/reviews.py:baseline,tiny,1x2 --workdir=runs/plain
    cyb-train --config=experiments/finetune_reviews.py:ap --config.init_from=runs/plain --workdir=runs/tuned

SETTING, SIZE, REGIME as in reviews.py; size, tokenizer and data must be those of the run that it starts from.

Two things here are ours, not the paper's, and off in its configs. A confident model starts with d far below the prior
that it was given: method.calibration_batches = 4 adds the constant to the <don't know> logit that makes the median of d
over the first 4 batches the prior. And that prior is 0.5, where the paper has 0.9: with 0.9 the last slot gets 73% of
the gradient, and the model learns to always wait for it. The paper's start:
--config.method.calibration_batches=0 --config.method.dont_know_prior=0.9.

Rows of pauses start at draws around the mean of the embeddings (tuning.new_rows); with
--config.method.pause_input=token+pause they start near zero, so that all slots start as copies of the model's own.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, size, regime = settings.parse(argument, setting="ap", size="tiny", regime="1x1")
  config = configs.default()
  settings.apply(config, setting, size, regime)
  settings.calibrate(config)
  settings.on_reviews(config, size)
  # A quarter of what training from scratch starts with.
  config.optimizer.learning_rate /= 4
  return config
