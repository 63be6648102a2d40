"""Placement on devices: the mesh, the rules of partitioning, several processes."""
