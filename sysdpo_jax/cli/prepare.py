"""Read, check and encode the preferences of a run, so that training starts at once.

example:
  sysdpo prepare my_run.yaml --data.source preferences.jsonl

The result is kept in --prepared-cache, where `sysdpo train` with the same file finds it. The models are loaded, because
they encode; nothing is trained.
"""

import jax

from sysdpo_jax.data.batches import PreferenceBatches
from sysdpo_jax.runs.caches import keep_compilations
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.evaluation import check_first
from sysdpo_jax.runs.run import assemble, make_batches, owned, read_preferences

SHOWN = ("directory", "data.source", "data.reader", "data.split", "data.on_error", "data.ignore", "prepared_cache")
Config = TrainConfig


def run(config: TrainConfig) -> None:
    """Prepare, and print what was read and what a step takes of it. Raises as `sysdpo train` before its first step."""
    keep_compilations(config.compilation_cache)
    check_first(config)
    with owned(config):
        made = assemble(config)
        records = read_preferences(made)
        batches = make_batches(made, records)
    if jax.process_index() == 0:
        print(records.summary())
        if isinstance(batches, PreferenceBatches):
            print(batches.describe())
