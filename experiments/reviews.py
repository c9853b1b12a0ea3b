"""Every setting of the paper on film reviews, from scratch: IMDB and Rotten Tomatoes, 6.0M words.

    python -m cyb_jax.cli.train --config=experiments/reviews.py:SETTING,SIZE,REGIME --workdir=DIR
    python -m cyb_jax.cli.train --config=experiments/reviews.py:ap,tiny,1x1 --workdir=runs/reviews-ap

SETTING: baseline, tbys1..3, ap, ap1, ap2, ap_discount, ap_uniform, ap_bimodal, va_*, dp_*, dp_*_strong, pretrained.
SIZE: a decoder preset. REGIME: 1x1 (one pass over a third of the data), 2x1 (two passes over it), 1x2 (one pass over
two thirds), 1x3 (one pass over all data).

The training of the router of `ponderlm3` is unpublished. Our choice: full depth for the first 15% of the steps
(method.full_depth), then a tenth of the learning rate for the router (method.router_rate), and a penalty of 1e-3 nats
per thought (method.router_penalty). `thoughtbubbles` forks before layers 3, 7 and 11 of 12 or more layers, and before 3
and 5 of 6 to 8, as published; the fork layers of smaller decoders are our choice.

The pauses' inputs include the embedding of their token; trained from scratch, pauses without it collapse to the first
slot. Choose the learning rate on the validation split: --config.optimizer.learning_rate=...
"""

from cyb_jax import configs
from cyb_jax.studies import settings


def get_config(argument: str = ""):
  setting, size, regime = settings.parse(argument, setting="ap", size="tiny", regime="1x1")
  config = configs.default()
  settings.apply(config, setting, size, regime, from_scratch=True)
  settings.on_reviews(config, size)
  return config
