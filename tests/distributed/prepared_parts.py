"""Preferences prepared by several processes: `python -m tests.distributed.prepared_parts FOLDER PROCESSES PORT ID`.

It prints, as JSON, how many records this process prepared, a digest of all records and features, and one of each of
the batches, and of the blocks that this process has of them.
"""

import hashlib
import json
import sys
from pathlib import Path

import jax
import numpy as np
import optax

from sysdpo_jax import (
    ComponentOptimizer,
    batch_shard,
    create_state,
    initialize,
    load_preferences,
    make_mesh,
    make_optimizer,
    preference_dataset,
    replicate_per_process,
)
from sysdpo_jax.data import preferences, prepared
from tests.data.prepared_systems import pictures


def digest(tree) -> str:
    leaves = jax.tree.leaves(tree)
    return hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()


def main(folder: Path, number: int, port: str, process: int) -> None:
    if number > 1:
        initialize(f"127.0.0.1:{port}", number, process, heartbeat_timeout_seconds=10)
    made, original = [], prepared.prepare_records

    def counting(system, params, records):
        made.append(len(records))
        return original(system, params, records)

    preferences.PART_WITH_IMAGES, prepared.prepare_records = 3, counting
    system, mesh = pictures(), make_mesh(data=4)
    params = system.init(jax.random.key(0))
    optimizer = make_optimizer({"image": ComponentOptimizer(optax.sgd(1.0))})
    state = create_state(system, params, optimizer, mesh)
    own = replicate_per_process(system.frozen_params(state.params))
    found = load_preferences(folder / "pictures.jsonl", system, params=own, cache=folder / f"cache-{number}")
    features = [found.rows.features(row) for row in range(len(found))]
    whole = preference_dataset(system, found, 4, seed=0)
    part = preference_dataset(system, found, 4, seed=0, shard=batch_shard(mesh))
    halves = [[jax.tree.map(lambda x, at=at: x[at : at + 2], whole[step]) for at in (0, 2)] for step in range(3)]
    print(
        json.dumps(
            {
                "prepared": made,
                "features": digest(features),
                "records": [dict(record.inputs) for record in found],
                "blocks": [[*map(digest, blocks)] for blocks in halves],
                "own": [digest(part[step]) for step in range(3)],
                "whole": [digest(whole[step]) for step in range(3)],
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
