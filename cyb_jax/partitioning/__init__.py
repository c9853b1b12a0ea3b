"""How arrays are split over devices: `rules` is the one table from logical axes to mesh axes, `mesh` builds meshes and
places parameters and batches on them.

The core imports `cyb_jax.partitioning.rules`, which needs jax alone, so nothing is imported here.
"""
