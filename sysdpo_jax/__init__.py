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
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    NonFiniteError,
    Trainer,
    TrainState,
    create_state,
    ema_params,
    make_mesh,
    make_optimizer,
    make_train_step,
)

__version__ = "0.1.0"

__all__ = [
    "FROZEN",
    "Categorical",
    "Component",
    "ComponentOptimizer",
    "CompoundSystem",
    "Diffusion",
    "DirectObjective",
    "FlowMatching",
    "Gaussian",
    "GraphError",
    "LanguageModel",
    "Node",
    "NonFiniteError",
    "PairBatch",
    "PixelCodec",
    "PreferenceRecord",
    "RecordError",
    "Tool",
    "TrainState",
    "Trainer",
    "create_state",
    "ema_params",
    "epoch_batches",
    "load_preferences",
    "log_ratio",
    "make_mesh",
    "make_optimizer",
    "make_pairs",
    "make_train_step",
    "prepare_pairs",
    "rollout",
]
