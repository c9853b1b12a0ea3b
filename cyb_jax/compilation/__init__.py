"""Compiling for TPUs on a machine without any: what a run's programs take there."""

STEPS = ("train", "evaluate", "decode")
