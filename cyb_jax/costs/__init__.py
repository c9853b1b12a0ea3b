"""Compute cost of models (floating-point operations, parameters and memory) and the peak rates of chips."""
