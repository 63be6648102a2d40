"""Hugging Face checkpoints in and out: whole components, and LoRA factors apart."""

from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.checkpoint import load, save, save_adapter

__all__ = ["CheckpointError", "load", "save", "save_adapter"]
