"""Data: preference records, rollouts and pairs, intermediates, and the batches that training reads."""

from sysdpo_jax.data.batches import epoch_batches
from sysdpo_jax.data.intermediates import draw_intermediates, sampled_batch
from sysdpo_jax.data.pipeline import preference_dataset
from sysdpo_jax.data.records import PreferenceRecord, load_preferences, prepare_pairs, without_intermediates
from sysdpo_jax.data.rollouts import make_pairs, rollout

__all__ = [
    "PreferenceRecord",
    "draw_intermediates",
    "epoch_batches",
    "load_preferences",
    "make_pairs",
    "preference_dataset",
    "prepare_pairs",
    "rollout",
    "sampled_batch",
    "without_intermediates",
]
