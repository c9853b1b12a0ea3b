"""The paper's run, as far as it is published (arXiv 2510.13879): Gemma 1 2B on C4, 2,048 real tokens per window, 25k
steps of 256 windows.

    python -m cyb_jax.cli.train --config=experiments/gemma2b_c4.py:SETTING --workdir=DIR \
        --config.init_from=GEMMA --config.data.store=DIR \
        --config.parallelism.fsdp=CHIPS --config.optimizer.learning_rate=RATE

CHIPS: the number of chips of the slice; parameters and AdamW's moments (28 GiB) are sharded over all of them. The batch
is processed in 16 parts (`optimizer.accumulate`), so that every setting fits on 8 chips of v5p, and on 16 of v5e or
v6e; launch/README.md has the memory of each setting. On 64 chips: --config.optimizer.accumulate=4. On v5p
--config.decoder.remat=dots recomputes less and is faster.

GEMMA: the Hugging Face folder of google/gemma-2b, downloaded after accepting its licence; pauses and <don't know> are
initialised from its `<unused*>` entries, as in the paper. RATE: one of RATES below, swept per setting and chosen on
validation; it is divided by d_model = 2048. Published: the cosine schedule with linear warm-up, the rates, min =
max/100, the batch size, the number of steps, the window length. Our choice, because nothing is published: AdamW
0.9/0.95 with weight decay 0.1 except on norms and embeddings, 1% warm-up, clipping at 1, bf16 activations and f32
parameters. The size is gemma1_2b without a second argument. The third argument is the data regime. Pauses are those of
the paper: the input is the pause embedding alone, and pauses are always visible.
"""

from cyb_jax import configs
from cyb_jax.studies import settings

RATES = (1e-2, 5e-3, 1e-3, 5e-4, 5e-5, 1e-5, 1e-6)
STEPS = 25_000
# C4 has about 156e9 tokens, 76e6 windows of 2,048. Regime 2x1 passes twice over the part that 1x1 passes over once.
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
  # 8 chips process two windows each at a time, 16 chips one; 64 chips need accumulate=4.
  config.optimizer.accumulate = 16
  # The gradient of 256,000 rows is read and written once per chunk; larger chunks reduce HBM traffic by a fifth.
  config.parallelism.chunk_size = 1024
  config.decoder.remat = "full"
  config.decoder.scan_layers = True
  config.precision.activations = "bfloat16"
  config.train.log_every = 50
  config.train.eval_every = 1000
  config.train.eval_limit = 2048
  config.train.checkpoint_every = 1000
  return config
