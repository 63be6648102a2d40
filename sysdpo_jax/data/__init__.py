"""Data: preference records, rollouts and pairs, intermediates, and the batches that training reads."""

from sysdpo_jax.data.batches import PreferenceBatches, epoch_batches, preference_dataset, read_ahead
from sysdpo_jax.data.files import save_preferences
from sysdpo_jax.data.formats import Ranked
from sysdpo_jax.data.intermediates import SearchedBatches, sampled_batch
from sysdpo_jax.data.preferences import Preferences, load_preferences
from sysdpo_jax.data.records import PreferenceRecord, prepare_pairs, without_intermediates
from sysdpo_jax.data.rollouts import draw_intermediates, make_pairs, rollout

__all__ = [
    "PreferenceBatches",
    "PreferenceRecord",
    "Preferences",
    "Ranked",
    "SearchedBatches",
    "draw_intermediates",
    "epoch_batches",
    "load_preferences",
    "make_pairs",
    "preference_dataset",
    "prepare_pairs",
    "read_ahead",
    "rollout",
    "sampled_batch",
    "save_preferences",
    "without_intermediates",
]
