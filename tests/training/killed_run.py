"""A small training script for the kill tests: `python -m tests.training.killed_run KIND DIRECTORY STEPS PAUSE`.

KIND: "direct", or "sampling" whose intermediates the policy draws every other step. PAUSE: seconds that each batch
takes to load. It resumes by itself and prints the step of each batch that it is asked for.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    DirectObjective,
    Gaussian,
    Node,
    PairBatch,
    PreferenceRecord,
    SamplingObjective,
    SearchedBatches,
    epoch_batches,
)
from sysdpo_jax.data.intermediates import IntermediateSearch
from sysdpo_jax.training import FROZEN, ComponentOptimizer, Trainer, create_state, make_optimizer

# Wide enough that its checkpoint, of 1.3 MB, takes a while to write.
WIDE = CompoundSystem(("x",), (Node("a", Gaussian(256, 256), ("x",)), Node("b", Gaussian(1, 256), ("a",))))
TABLES = CompoundSystem(("x",), (Node("y", Categorical(9, (4,)), ("x",)), Node("z", Categorical(3, (9,)), ("y",))))


def direct(paused):
    rng = np.random.default_rng(0)

    def side():
        return WIDE.prepare([{k: rng.normal(size=n) for k, n in (("x", 256), ("a", 256), ("b", 1))} for _ in range(40)])

    optimizer = make_optimizer({"a": ComponentOptimizer(optax.adam(1e-2)), "b": FROZEN}, ema_decay=0.9)
    return WIDE, DirectObjective(), optimizer, paused(epoch_batches(PairBatch(side(), side()), 8, seed=1))


def sampling(paused):
    records = [PreferenceRecord({"x": i % 4}, {"z": i % 3}, {"z": (i + 1) % 3}) for i in range(10)]
    optimizer = make_optimizer({name: ComponentOptimizer(optax.adam(0.1)) for name in "yz"})
    batch = IntermediateSearch.batch
    IntermediateSearch.batch = lambda self, step, params: paused(lambda at: batch(self, at, params))(step)
    return TABLES, SamplingObjective(1.0), optimizer, SearchedBatches(TABLES, records, 3, 1, 4, every=2)


def main(kind: str, directory: Path, steps: int, pause: float) -> None:
    def paused(batch_at):
        def slow(step):
            time.sleep(pause)
            print(step, flush=True)
            return batch_at(step)

        return slow

    system, objective, optimizer, batches = {"direct": direct, "sampling": sampling}[kind](paused)
    trainer = Trainer(system, objective, optimizer, directory, checkpoint_every=1, log_every=1)
    state = create_state(system, system.init(jax.random.key(0)), optimizer)
    state = trainer.fit(state, batches, steps, jax.random.key(1))
    leaves = jax.tree.leaves((state.step, state.params, state.opt_state, state.ema))
    np.savez(directory / "final.npz", *(np.asarray(x) for x in leaves))


if __name__ == "__main__":
    # tensorboardX takes seconds to load torch where that is installed, and does without.
    sys.modules["torch"] = None
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
