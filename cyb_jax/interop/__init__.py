"""Weights of others: Hugging Face folders, GGUF files and llama2.c binaries in, Hugging Face folders out."""
