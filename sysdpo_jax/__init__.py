"""sysdpo_jax: system-level direct preference optimisation of compound AI systems in JAX (arXiv 2502.17721)."""

from sysdpo_jax import pretrained
from sysdpo_jax.components import (
    Categorical,
    Component,
    Diffusion,
    FlowMatching,
    FrozenText,
    Gaussian,
    LanguageModel,
    LatentCodec,
    PixelCodec,
    RecordError,
    SD3Text,
    SDXLText,
    TextEncoder,
    Tool,
)
from sysdpo_jax.data import PreferenceRecord, epoch_batches, load_preferences, make_pairs, prepare_pairs, rollout
from sysdpo_jax.graph import CompoundSystem, GraphError, Node
from sysdpo_jax.models.lora import TRAINABLE as LORA_TRAINABLE
from sysdpo_jax.models.lora import LoRA, add_lora
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
    tree_shardings,
)

__version__ = "0.1.0"

__all__ = [
    "FROZEN",
    "LORA_TRAINABLE",
    "Categorical",
    "Component",
    "ComponentOptimizer",
    "CompoundSystem",
    "Diffusion",
    "DirectObjective",
    "FlowMatching",
    "FrozenText",
    "Gaussian",
    "GraphError",
    "LanguageModel",
    "LatentCodec",
    "LoRA",
    "Node",
    "NonFiniteError",
    "PairBatch",
    "PixelCodec",
    "PreferenceRecord",
    "RecordError",
    "SD3Text",
    "SDXLText",
    "TextEncoder",
    "Tool",
    "TrainState",
    "Trainer",
    "add_lora",
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
    "pretrained",
    "rollout",
    "tree_shardings",
]
