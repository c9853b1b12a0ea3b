"""The paper's run, as far as published: Gemma 1 2B on C4, 2,048 real tokens, 25k steps of 256 windows (arXiv
2510.13879).

    python -m cyb_jax.cli.train --config=experiments/gemma2b_c4.py:SETTING --workdir=DIR \
        --config.init_from=GEMMA --config.data.store=DIR \
        --config.parallelism.fsdp=CHIPS --config.optimizer.learning_rate=RATE

CHIPS: of the slice, over all of which parameters and AdamW's moments (28 GiB) are shared out. The batch is worked on in
16 parts (`optimizer.accumulate`): then 8 chips of v5p, or 16 of v5e or v6e, hold every setting; launch/README.md has
what each takes. On 64 chips: --config.optimizer.accumulate=4.

GEMMA: the Hugging Face folder of google/gemma-2b, fetched after its licence was accepted; pauses and <don't know> start
from its `<unused*>` entries, as the paper has it. RATE: one of RATES below, swept per setting and chosen on validation;
it is divided by d_model = 2048. Published: the cosine schedule with linear
warm-up, the rates, min = max/100, the batch, the steps, the windows. Ours, because nothing is published: AdamW
0.9/0.95 with weight decay 0.1 but none on norms and embeddings, 1% warm-up, clipping at 1, bf16 activations over f32
parameters. A second argument is left out: the size is gemma1_2b. The third is the data regime. Pauses are the
paper's: an embedding of their own alone, always visible.
"""

from cyb_jax import configs
from cyb_jax.studies import settings

RATES = (1e-2, 5e-3, 1e-3, 5e-4, 5e-5, 1e-5, 1e-6)
STEPS = 25_000
# C4 has about 156e9 tokens, 76e6 windows of 2,048: 2x1 passes twice over the part that 1x1 passes over once.
WINDOWS = 156e9 / 2048


def get_config(argument: str = ""):
  setting, size, regime = settings.parse(argument, setting="ap", size="gemma1_2b", regime="1x1")
  config = configs.default()
  settings.apply(config, setting, size, regime)
  epochs, parts = settings.REGIMES[regime]
  config.data.task = "c4_en"
  config.data.tokenizer = ""
  config.data.sequence_length = 2048
  config.data.batch_size = 256
  config.data.fraction = min(1.0, parts * STEPS * config.data.batch_size / WINDOWS)
  if setting != "pretrained":
    config.train.steps = int(epochs * parts * STEPS)
  config.optimizer.learning_rate = RATES[2]
  config.optimizer.rate_over_width = True
  config.optimizer.final_fraction = 0.01
  config.optimizer.warmup_fraction = 0.01
  # Eight chips work on two windows each at once, sixteen on one; 64 take 4.
  config.optimizer.accumulate = 16
  # The gradient of 256,000 rows goes through memory once a chunk: with larger ones a step moves a fifth less.
  config.parallelism.chunk_size = 1024
  config.decoder.remat = "full"
  config.decoder.scan_layers = True
  config.precision.activations = "bfloat16"
  config.train.log_every = 50
  config.train.eval_every = 1000
  config.train.eval_limit = 2048
  config.train.checkpoint_every = 1000
  return config
