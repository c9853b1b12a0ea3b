"""Teaches SmolLM2-135M to pause, on film reviews: all of its weights, or LoRA.

    cyb-train --config=experiments/smollm2_reviews.py:SETTING --config.init_from=WEIGHTS --workdir=DIR
    cyb-train --config=experiments/smollm2_reviews.py:ap,lora --config.init_from=WEIGHTS --workdir=DIR

WEIGHTS: a Hugging Face folder of SmolLM2-135M, its GGUF file, or what cyb-convert has made of either. The decoder is as
found there, and any other that can be read will do. SETTING as in reviews.py; `lora` trains adapters of rank 8 on
queries and values and the rows that the model hasn't got, in place of all weights: for a CPU, or a small device.

A confident model starts with d far below the prior that it was given, so that d is calibrated to a prior of 0.5, which
is ours and not the paper's, see finetune_reviews.py.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, tuned = settings.parse_tuning(argument)
  config = configs.default()
  settings.fine_tune(config, setting, tuned)
  config.data.task = "imdb_reviews"
  config.data.sequence_length = 256
  config.data.batch_size = 16
  if setting != "pretrained":
    config.train.steps = 1000
  config.train.log_every = 20
  config.train.eval_every = 250
  config.train.eval_limit = 64
  config.train.checkpoint_every = 250
  return config
