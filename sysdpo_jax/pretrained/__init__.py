"""Hugging Face checkpoints in and out: whole components, and LoRA factors apart."""

from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.checkpoint import load, save, save_adapter
from sysdpo_jax.pretrained.language import load_language_model

__all__ = ["CheckpointError", "load", "load_language_model", "save", "save_adapter"]
