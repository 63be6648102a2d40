"""One of the processes of a run of SysDPO-Sampling: `python sampled_run.py DIRECTORY STEPS PROCESSES PORT ID`.

Language models whose drafts are searched for anew every second step. In several processes it also compares parameters
on this one's devices with those on the mesh. Prints that as JSON. Has scorers for another run, too.
"""

import json
import sys
from contextlib import contextmanager

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from sysdpo_jax import (
    BeamSearch,
    ComponentOptimizer,
    CompoundSystem,
    LanguageModel,
    Node,
    PreferenceRecord,
    SamplingObjective,
    SearchedBatches,
    Trainer,
    batch_shard,
    create_state,
    initialize,
    make_mesh,
    make_optimizer,
    replicate_per_process,
    tree_shardings,
)
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer
from tests.distributed.two_processes import device_mesh

CONFIG = DecoderConfig(len(SPECIAL) + len(WORDS), 32, 64, 1, 4, 4, max_position_embeddings=12)
SYSTEM = CompoundSystem(
    ("x",),
    (
        Node("draft", LanguageModel(Decoder(CONFIG), word_tokenizer(), 4, 3, search=BeamSearch()), ("x",)),
        Node("answer", LanguageModel(Decoder(CONFIG), word_tokenizer(), 4, 3), ("draft",)),
    ),
)
OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.adam(1e-2)) for name in ("draft", "answer")})
RECORDS = [
    PreferenceRecord({"x": f"{WORDS[i % len(WORDS)]} {WORDS[-1 - i % 3]}"}, {"answer": "red ball"}, {"answer": "the"})
    for i in range(20)
]
BATCH = 8


@contextmanager
def silent(start, steps):
    yield lambda done, text: None


def compared(params) -> dict[str, dict[str, object]]:
    """By mesh: whether the numbers are the same, and the parts that this process holds of an array."""
    shapes = {"fsdp": (1, 4, 1), "data": (4, 1, 1), "pairs": (2, 2, 1), "tensor": (1, 2, 2), "all tensor": (1, 1, 4)}
    meshes = {name: make_mesh(*shape) for name, shape in shapes.items()}
    # Devices 0 and 1 are of process 0; here they take every second part.
    meshes["by turns"] = device_mesh((0, 2, 1, 3), (1, 4, 1))
    found: dict[str, dict[str, object]] = {}
    for name, mesh in meshes.items():
        placed = jax.tree.map(placed_on, params, tree_shardings(mesh, params))
        own = replicate_per_process(placed)
        pairs = list(zip(jax.tree.leaves(own), jax.tree.leaves(placed), strict=True))
        kernel = own["draft"]["embed_tokens"]["embedding"]
        found[name] = {
            "same": all(np.array_equal(x, multihost_utils.process_allgather(y, tiled=True)) for x, y in pairs),
            "own": all(x.sharding.device_set <= set(jax.local_devices()) for x, _ in pairs),
            "part": list(kernel.addressable_shards[0].data.shape),
            "again": replicate_per_process(own) is own,
        }
    return found


def red(run):
    """A score: the share of red among the answer's words."""
    words = run["answer"].split()
    return words.count("red") / max(len(words), 1)


def red_on_process_0(run):
    return red(run) if jax.process_index() == 0 else "no score"


def placed_on(leaf, sharding):
    return jax.make_array_from_callback(leaf.shape, sharding, lambda part: np.asarray(leaf)[part])


def main(directory: str, steps: int, processes: int, port: str, process: int) -> None:
    if processes > 1:
        initialize(f"127.0.0.1:{port}", processes, process, heartbeat_timeout_seconds=20)
    mesh = make_mesh(fsdp=4)
    params = SYSTEM.init(jax.random.key(0))
    batches = SearchedBatches(SYSTEM, RECORDS, BATCH, 3, num_intermediates=3, every=2, shard=batch_shard(mesh))
    trainer = Trainer(SYSTEM, SamplingObjective(0.5), OPTIMIZER, directory, mesh, checkpoint_every=3, progress=silent)
    trainer.fit(create_state(SYSTEM, params, OPTIMIZER, mesh), batches, steps, jax.random.key(1))
    print(json.dumps(compared(params) if processes > 1 else {}))


if __name__ == "__main__":
    folder, total, number, port, own = sys.argv[1:]
    main(folder, int(total), int(number), port, int(own))
