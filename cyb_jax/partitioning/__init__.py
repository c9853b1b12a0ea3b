"""Sharding of arrays over devices: `rules` maps logical axes to mesh axes, and `mesh` builds meshes and shardings.

The core imports `cyb_jax.partitioning.rules`, which needs only jax, so this file imports nothing.
"""
