"""A decoder-only transformer in Flax Linen."""

from cyb_jax.decoder.attention import HiddenSlots, KeyWeights, SegmentMask
from cyb_jax.decoder.cache import Cache, empty_cache
from cyb_jax.decoder.decoder import SIZES, Decoder, DecoderConfig, embedding_init, init_params, unembedding_init
from cyb_jax.decoder.lora import LoraConfig, merge_lora
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
