"""A run as a configuration describes it: its fields, the system and trainer made of them, its folder, its rounds."""

from sysdpo_jax.runs.caches import keep_compilations

__all__ = ["keep_compilations"]
