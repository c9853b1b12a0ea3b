"""Fine-tunes a model without pauses, a run of reviews.py, to pause on film reviews.

    cyb-train --config=experiments/reviews.py:baseline,tiny,1x2 --workdir=runs/plain
    cyb-train --config=experiments/finetune_reviews.py:ap --config.init_from=runs/plain --workdir=runs/tuned

SETTING, SIZE and REGIME are as in reviews.py; size, tokenizer and data must equal those of the run in init_from. The
default setting is ap_hidden, because a model with visible pauses reads worse at its own pace ("Results of finetune" in
experiments/README.md).

Two choices differ from the paper and are off in the configs of its runs. In a confident model, d starts far below the
prior: method.calibration_batches = 4 adds a constant to the <don't know> logit so that the median of d over the first
4 batches equals the prior. And the prior is 0.5 instead of the paper's 0.9: with 0.9 the last slot gets 73% of the
gradient, and the model learns to always wait for it. To start as in the paper:
--config.method.calibration_batches=0 --config.method.dont_know_prior=0.9.

The rows of pauses are initialised with random draws around the mean of the embeddings (tuning.new_rows). With
--config.method.pause_input=token+pause they start near zero, so that all slots start close to the pretrained model.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, size, regime = settings.parse(argument, setting="ap_hidden", size="tiny", regime="1x1")
  config = configs.default()
  settings.apply(config, setting, size, regime)
  settings.calibrate(config)
  settings.on_reviews(config, size)
  # A quarter of the learning rate for training from scratch.
  config.optimizer.learning_rate /= 4
  return config
