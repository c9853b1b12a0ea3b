"""Slot models compute the W hidden states of a token: one module for each kind of slot."""
