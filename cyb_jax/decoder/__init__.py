"""A decoder-only transformer in Flax Linen."""

from cyb_jax.decoder.decoder import Decoder, DecoderConfig, init_params
from cyb_jax.decoder.presets import PRESETS, num_params, preset

__all__ = ["PRESETS", "Decoder", "DecoderConfig", "init_params", "num_params", "preset"]
