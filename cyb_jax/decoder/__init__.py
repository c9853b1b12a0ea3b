"""A decoder-only transformer in Flax Linen."""

from cyb_jax.decoder.attention import HiddenSlots
from cyb_jax.decoder.cache import Cache, empty_cache
from cyb_jax.decoder.decoder import Decoder, DecoderConfig, embedding_init, init_params, unembedding_init
from cyb_jax.decoder.presets import PRESETS, num_params, preset

__all__ = [
  "PRESETS",
  "Cache",
  "Decoder",
  "DecoderConfig",
  "HiddenSlots",
  "embedding_init",
  "empty_cache",
  "init_params",
  "num_params",
  "preset",
  "unembedding_init",
]
