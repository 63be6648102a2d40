"""sysdpo_jax: system-level direct preference optimisation of compound AI systems in JAX (arXiv 2502.17721)."""

from sysdpo_jax.components import (
    Categorical,
    Component,
    Diffusion,
    FlowMatching,
    Gaussian,
    LanguageModel,
    PixelCodec,
    RecordError,
    Tool,
)
from sysdpo_jax.data import PreferenceRecord, epoch_batches, load_preferences, make_pairs, prepare_pairs, rollout
from sysdpo_jax.graph import CompoundSystem, GraphError, Node
from sysdpo_jax.objectives import DirectObjective, PairBatch, log_ratio

__version__ = "0.1.0"

__all__ = [
    "Categorical",
    "Component",
    "CompoundSystem",
    "Diffusion",
    "DirectObjective",
    "FlowMatching",
    "Gaussian",
    "GraphError",
    "LanguageModel",
    "Node",
    "PairBatch",
    "PixelCodec",
    "PreferenceRecord",
    "RecordError",
    "Tool",
    "epoch_batches",
    "load_preferences",
    "log_ratio",
    "make_pairs",
    "prepare_pairs",
    "rollout",
]
