"""Placement on devices: the mesh, the rules of partitioning, several processes."""

from sysdpo_jax.parallel.sharding import batch_parts
from sysdpo_jax.parallel.topology import USABLE_HBM_GIB, topology_mesh

__all__ = [
    "USABLE_HBM_GIB",
    "batch_parts",
    "topology_mesh",
]
