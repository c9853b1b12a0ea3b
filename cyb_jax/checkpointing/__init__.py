"""Checkpoints, and the folder of a run that they are stored in."""
