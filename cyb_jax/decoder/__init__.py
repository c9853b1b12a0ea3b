"""A decoder-only transformer in Flax Linen."""

from cyb_jax.decoder.attention import HiddenSlots, KeyWeights, SegmentMask
from cyb_jax.decoder.cache import Cache, empty_cache
from cyb_jax.decoder.config import SIZES, DecoderConfig, LoraConfig
from cyb_jax.decoder.decoder import Decoder, init_params
from cyb_jax.decoder.initializers import embedding_init, unembedding_init
from cyb_jax.decoder.lora import merge_lora
from cyb_jax.decoder.presets import PRESETS, num_params, preset

__all__ = [
  "PRESETS",
  "SIZES",
  "Cache",
  "Decoder",
  "DecoderConfig",
  "HiddenSlots",
  "KeyWeights",
  "LoraConfig",
  "SegmentMask",
  "embedding_init",
  "empty_cache",
  "init_params",
  "merge_lora",
  "num_params",
  "preset",
  "unembedding_init",
]
