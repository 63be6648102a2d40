"""One process of online rounds: `python online_run.py DIRECTORY ROUNDS PORT COUNT ID`. Prints what they came to."""

import json
import sys
from contextlib import contextmanager

import jax
import numpy as np
import optax

import sysdpo_jax as sj
from tests.runs.killed_online import PROMPTS, SYSTEM


def worth(run):
    """Nothing but the run's own values."""
    return float(run["z"] == run["x"] % 3) + run["y"] / 100


@contextmanager
def silent(start, steps):
    yield lambda done, text: None


def main(directory: str, number: int, port: str, count: int, process: int) -> None:
    if count > 1:
        sj.initialize(f"127.0.0.1:{port}", count, process, heartbeat_timeout_seconds=20)
    optimizer = sj.make_optimizer({name: sj.ComponentOptimizer(optax.adam(0.1)) for name in "yz"})
    mesh = sj.make_mesh(data=count)
    trainer = sj.Trainer(SYSTEM, sj.DirectObjective(beta=0.5), optimizer, directory, mesh, progress=silent)
    rounds = sj.Rounds(number=number, samples=16, sample_batch=16, group=2, steps=10, batch_size=8, mix=0.2)
    first = SYSTEM.init(jax.random.key(0))
    result = sj.online(trainer, first, PROMPTS, worth, rounds, held_out=PROMPTS, held_out_samples=8)
    leaves = [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(sj.replicate_per_process(result.params))]
    print(json.dumps([result.step, result.rounds, leaves]))


if __name__ == "__main__":
    # tensorboardX takes seconds to load torch where that is installed, and does without.
    sys.modules["torch"] = None
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
