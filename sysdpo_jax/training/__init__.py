"""Training: state, step, placement on devices, checkpoints, and the loop that drives them."""

from sysdpo_jax.manifest import CheckpointMismatchError
from sysdpo_jax.parallel.distributed import initialize
from sysdpo_jax.parallel.sharding import ShardingError, batch_shard, make_mesh, replicate_per_process, tree_shardings
from sysdpo_jax.training.ahead_of_time import compile_step, describe_sharding
from sysdpo_jax.training.checkpoints import Checkpoints, CorruptCheckpointError
from sysdpo_jax.training.evaluation import Evaluation, EvaluationError
from sysdpo_jax.training.metrics import MetricsLog, read_metrics
from sysdpo_jax.training.optimizer import FROZEN, ComponentOptimizer, OptimizerError, SystemOptimizer, make_optimizer
from sysdpo_jax.training.preemption import Preempted
from sysdpo_jax.training.progress import Board, ProgressFactory, Report, progress
from sysdpo_jax.training.reference import precompute_reference
from sysdpo_jax.training.state import TrainState, abstract_state, create_state, ema_params, partition
from sysdpo_jax.training.step import TrainStep, make_train_step
from sysdpo_jax.training.throughput import count_flops, count_units, memory, peak_flops, plain_attention, step_flops
from sysdpo_jax.training.trainer import NonFiniteError, Trainer

__all__ = [
    "FROZEN",
    "Board",
    "CheckpointMismatchError",
    "Checkpoints",
    "ComponentOptimizer",
    "CorruptCheckpointError",
    "Evaluation",
    "EvaluationError",
    "MetricsLog",
    "NonFiniteError",
    "OptimizerError",
    "Preempted",
    "ProgressFactory",
    "Report",
    "ShardingError",
    "SystemOptimizer",
    "TrainState",
    "TrainStep",
    "Trainer",
    "abstract_state",
    "batch_shard",
    "compile_step",
    "count_flops",
    "count_units",
    "create_state",
    "describe_sharding",
    "ema_params",
    "initialize",
    "make_mesh",
    "make_optimizer",
    "make_train_step",
    "memory",
    "partition",
    "peak_flops",
    "plain_attention",
    "precompute_reference",
    "progress",
    "read_metrics",
    "replicate_per_process",
    "step_flops",
    "tree_shardings",
]
