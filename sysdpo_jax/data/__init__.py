"""Data: preference records, rollouts and pairs, intermediates, and the batches that training reads."""

from sysdpo_jax.data.batches import epoch_batches
from sysdpo_jax.data.intermediates import draw_intermediates, sampled_batch
from sysdpo_jax.data.pipeline import preference_dataset
from sysdpo_jax.data.preferences import Preferences, load_preferences
from sysdpo_jax.data.readers import Ranked
from sysdpo_jax.data.records import PreferenceRecord, prepare_pairs, without_intermediates
from sysdpo_jax.data.rollouts import make_pairs, rollout
from sysdpo_jax.data.saving import save_preferences

__all__ = [
    "PreferenceRecord",
    "Preferences",
    "Ranked",
    "draw_intermediates",
    "epoch_batches",
    "load_preferences",
    "make_pairs",
    "preference_dataset",
    "prepare_pairs",
    "rollout",
    "sampled_batch",
    "save_preferences",
    "without_intermediates",
]
