"""One of two processes of a run that is evaluated: `python evaluated_run.py DIRECTORY PORT ID`.

Each measures other figures, process 1 ones that would never end the training. Run again, it goes on from a checkpoint.
Prints the evaluated steps, the step at the end and the best checkpoint's.
"""

import json
import sys
from contextlib import contextmanager

import jax
import optax

from sysdpo_jax import DirectObjective
from sysdpo_jax.parallel import distributed
from sysdpo_jax.training import FROZEN, ComponentOptimizer, Evaluation, Trainer, create_state, make_mesh, make_optimizer
from tests.training.systems import CHAIN, pairs

FIGURES = {0: 0.1, 2: 0.7, 3: 0.6, 4: 0.3, 6: 0.9}
RULE = ("eval/score", "max", 2)


@contextmanager
def silent(start, steps):
    yield lambda done, text: None


def main(directory: str, port: str, process: int) -> None:
    distributed.initialize(f"127.0.0.1:{port}", 2, process, heartbeat_timeout_seconds=20)
    optimizer = make_optimizer({"a": ComponentOptimizer(optax.adam(1e-2)), "b": FROZEN, "c": FROZEN})
    mesh, seen = make_mesh(data=2), []

    def measure(step, params):
        seen.append(step)
        return {"score": FIGURES[step] if process == 0 else float(step), "of process": float(process)}

    trainer = Trainer(
        CHAIN, DirectObjective(), optimizer, directory, mesh, checkpoint_every=5, keep=1, best=("eval/score", "max"),
        evaluation=Evaluation(measure, 2, RULE), progress=silent,
    )  # fmt: skip
    state = create_state(CHAIN, CHAIN.init(jax.random.key(0)), optimizer, mesh)
    key = jax.random.key(1)
    with trainer.checkpoints(state, pairs, key) as checkpoints:
        resumed = checkpoints.latest is not None
    # The first time it ends on an odd step, where nothing but the end is evaluated.
    final = trainer.fit(state, lambda step: pairs(4, seed=2 * step + process), 12 if resumed else 3, key)
    with trainer.checkpoints(final, pairs, key) as checkpoints:
        print(json.dumps([seen, int(final.step), checkpoints.best]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
