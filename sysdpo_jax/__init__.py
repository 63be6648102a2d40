"""System-level direct preference optimisation of compound AI systems in JAX (arXiv 2502.17721).

Five names are enough for a first system:

- `Node`: one value of the system, the component that produces it, and what it reads.
- `CompoundSystem`: the graph of the nodes. It samples whole runs and gives every node's log-probability.
- `load_preferences`: reads which of two runs people, or a judge, prefer.
- `DirectObjective`: the loss, a sum over nodes. (`SamplingObjective` is for preferences on final values alone.)
- `Trainer`: trains every component at once, in a directory from which the same call goes on.
"""

from sysdpo_jax import pretrained, serving
from sysdpo_jax.batch import PairBatch, SampledBatch, encode_batch
from sysdpo_jax.components import (
    Categorical,
    ChatPrompt,
    Component,
    Diffusion,
    FlowMatching,
    FrozenText,
    Functions,
    Gaussian,
    LanguageModel,
    LatentCodec,
    PixelCodec,
    RecordError,
    RemoteModel,
    SD3Text,
    SDXLText,
    Switch,
    TextEncoder,
    Tool,
    ToolCall,
    bucket_sizes,
    tool_calls,
)
from sysdpo_jax.data import (
    PreferenceRecord,
    Preferences,
    Ranked,
    SearchedBatches,
    draw_intermediates,
    epoch_batches,
    load_preferences,
    make_pairs,
    preference_dataset,
    prepare_pairs,
    rollout,
    sampled_batch,
    save_preferences,
    without_intermediates,
)
from sysdpo_jax.decoding.beam_search import BeamSearch
from sysdpo_jax.graph import CompoundSystem, GraphError, Loop, Node
from sysdpo_jax.models.lora import TRAINABLE as LORA_PARAMS
from sysdpo_jax.models.lora import LoRA, add_lora, lora_factors
from sysdpo_jax.objectives import Aux, DirectObjective, SamplingObjective, log_ratio
from sysdpo_jax.runs.online import OnlineResult, online
from sysdpo_jax.runs.rounds import Rounds, RoundSummary
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    Evaluation,
    NonFiniteError,
    Preempted,
    Trainer,
    TrainState,
    batch_shard,
    create_state,
    describe_sharding,
    ema_params,
    initialize,
    make_mesh,
    make_optimizer,
    make_train_step,
    precompute_reference,
    replicate_per_process,
    tree_shardings,
)

__version__ = "0.1.0"

# The five that a newcomer needs stand first; the reference keeps this order.
__all__ = [  # noqa: RUF022
    "Node",
    "CompoundSystem",
    "load_preferences",
    "DirectObjective",
    "Trainer",
    "FROZEN",
    "LORA_PARAMS",
    "Aux",
    "BeamSearch",
    "Categorical",
    "ChatPrompt",
    "Component",
    "ComponentOptimizer",
    "Diffusion",
    "Evaluation",
    "FlowMatching",
    "FrozenText",
    "Functions",
    "Gaussian",
    "GraphError",
    "LanguageModel",
    "LatentCodec",
    "LoRA",
    "Loop",
    "NonFiniteError",
    "OnlineResult",
    "PairBatch",
    "PixelCodec",
    "Preempted",
    "PreferenceRecord",
    "Preferences",
    "Ranked",
    "RecordError",
    "RemoteModel",
    "RoundSummary",
    "Rounds",
    "SD3Text",
    "SDXLText",
    "SampledBatch",
    "SamplingObjective",
    "SearchedBatches",
    "Switch",
    "TextEncoder",
    "Tool",
    "ToolCall",
    "TrainState",
    "add_lora",
    "batch_shard",
    "bucket_sizes",
    "create_state",
    "describe_sharding",
    "draw_intermediates",
    "ema_params",
    "encode_batch",
    "epoch_batches",
    "initialize",
    "log_ratio",
    "lora_factors",
    "make_mesh",
    "make_optimizer",
    "make_pairs",
    "make_train_step",
    "online",
    "precompute_reference",
    "preference_dataset",
    "prepare_pairs",
    "pretrained",
    "serving",
    "replicate_per_process",
    "rollout",
    "sampled_batch",
    "save_preferences",
    "tool_calls",
    "tree_shardings",
    "without_intermediates",
]
