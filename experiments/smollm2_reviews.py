"""Fine-tunes SmolLM2-135M to pause on film reviews: all weights, or LoRA.

    cyb-train --config=experiments/smollm2_reviews.py:SETTING --config.init_from=WEIGHTS --workdir=DIR
    cyb-train --config=experiments/smollm2_reviews.py:ap,lora --config.init_from=WEIGHTS --workdir=DIR

WEIGHTS: a Hugging Face folder of SmolLM2-135M, its GGUF file, or a folder that cyb-convert has written. The decoder's
shape is read from there; other models of the supported formats also work. SETTING is as in reviews.py. `lora` trains
adapters of rank 8 on queries and values and the new rows (pauses and <don't know>) instead of all weights, for a CPU or
a small device. The default is `ap_hidden,all`; see finetune_reviews.py.

In a confident model, d starts far below the prior. It is therefore calibrated to a prior of 0.5, which differs from the
paper; see finetune_reviews.py.
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, tuned = settings.parse_tuning(argument, setting="ap_hidden")
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
