"""Compilation for TPUs on a machine without TPUs: the memory and the time that a run's programs need."""

STEPS = ("train", "evaluate", "decode")
