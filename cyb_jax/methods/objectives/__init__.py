"""Objectives: how the states of a token's slots become a stopping-time distribution and a loss."""
