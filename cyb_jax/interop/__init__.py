"""Weights of others: Hugging Face folders, GGUF files and llama2.c binaries in, Hugging Face folders out."""

from cyb_jax.interop.sources import Source, load_decoder, open_source

__all__ = ["Source", "load_decoder", "open_source"]
