"""Servers that sample for language models that are trained here: vLLM, SGLang."""

from sysdpo_jax.serving.handover import Gap, Handover
from sysdpo_jax.serving.served_model import MismatchError, ServedModel, gaps_in, served
from sysdpo_jax.serving.server import Server, ServingError

__all__ = ["Gap", "Handover", "MismatchError", "ServedModel", "Server", "ServingError", "gaps_in", "served"]
