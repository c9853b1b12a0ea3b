"""Compiling for TPUs on a machine without any: the memory and the time that a run's programs need there."""

STEPS = ("train", "evaluate", "decode")
