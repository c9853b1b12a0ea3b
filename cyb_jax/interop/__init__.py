"""Import of Hugging Face folders, GGUF files and llama2.c binaries, and export to Hugging Face folders."""

from cyb_jax.interop.export import write_huggingface
from cyb_jax.interop.opening import open_source
from cyb_jax.interop.sources import Extras, Source, load_decoder, load_own

__all__ = ["Extras", "Source", "load_decoder", "load_own", "open_source", "write_huggingface"]
