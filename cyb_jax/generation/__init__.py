"""Text at the model's own pace."""

from cyb_jax.generation.sampler import Generation, Sampler, SamplerState, SamplingOptions, default_mode

__all__ = ["Generation", "Sampler", "SamplerState", "SamplingOptions", "default_mode"]
