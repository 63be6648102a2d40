"""Data: preference records, rollouts and pairs, and the batches that training reads."""

from sysdpo_jax.data.batches import epoch_batches
from sysdpo_jax.data.records import PreferenceRecord, load_preferences, prepare_pairs
from sysdpo_jax.data.rollouts import make_pairs, rollout

__all__ = ["PreferenceRecord", "epoch_batches", "load_preferences", "make_pairs", "prepare_pairs", "rollout"]
