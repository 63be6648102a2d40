"""A small training script for the kill test: `python killed_run.py DIRECTORY STEPS PAUSE`, resuming by itself.

PAUSE: seconds that each batch takes to load. Prints the step of each batch it is asked for.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

from sysdpo_jax import DirectObjective, epoch_batches
from sysdpo_jax.training import FROZEN, ComponentOptimizer, Trainer, create_state, make_optimizer
from tests.training.systems import CHAIN, pairs


def main(directory: Path, steps: int, pause: float) -> None:
    batches = epoch_batches(pairs(40), 8, seed=1)

    def batch_at(step):
        time.sleep(pause)
        print(step, flush=True)
        return batches(step)

    optimizer = make_optimizer(
        {"a": ComponentOptimizer(optax.adam(1e-2)), "b": ComponentOptimizer(optax.adamw(1e-3)), "c": FROZEN},
        ema_decay=0.9,
    )
    trainer = Trainer(CHAIN, DirectObjective(), optimizer, directory, checkpoint_every=3)
    state = create_state(CHAIN, CHAIN.init(jax.random.key(0)), optimizer)
    state = trainer.fit(state, batch_at, steps, jax.random.key(1))
    leaves = jax.tree.leaves((state.step, state.params, state.opt_state, state.ema))
    np.savez(directory / "final.npz", *(np.asarray(x) for x in leaves))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
