"""Online rounds for the kill test: `python -m tests.runs.killed_online DIRECTORY`. Prints a line for each score."""

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

import sysdpo_jax as sj

SYSTEM = sj.CompoundSystem(
    ("x",), (sj.Node("y", sj.Categorical(9, (4,)), ("x",)), sj.Node("z", sj.Categorical(3, (9,)), ("y",)))
)
PROMPTS = [{"x": x} for x in range(4)]


def slow(run):
    """A scorer that takes a moment, so that kills fall everywhere."""
    time.sleep(0.002)
    print("scored", flush=True)
    return float(run["z"] == run["x"] % 3) + run["y"] / 100


def main(folder: Path) -> None:
    optimizer = sj.make_optimizer({name: sj.ComponentOptimizer(optax.adam(0.1)) for name in "yz"})
    trainer = sj.Trainer(SYSTEM, sj.DirectObjective(beta=0.5), optimizer, folder, checkpoint_every=5)
    rounds = sj.Rounds(number=3, samples=16, sample_batch=16, group=2, steps=15, batch_size=8, mix=0.2)
    result = sj.online(
        trainer, SYSTEM.init(jax.random.key(0)), PROMPTS, slow, rounds, held_out=PROMPTS, held_out_samples=4
    )
    leaves = {str(number): np.asarray(leaf) for number, leaf in enumerate(jax.tree.leaves(result.params))}
    np.savez(folder / "final.npz", **leaves)
    (folder / "result.json").write_text(json.dumps([result.step, result.rounds, result.stopped]))


if __name__ == "__main__":
    # tensorboardX takes seconds to load torch where that is installed, and does without.
    sys.modules["torch"] = None
    main(Path(sys.argv[1]))
