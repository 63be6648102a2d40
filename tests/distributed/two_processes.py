"""One of the processes of a training run: `python two_processes.py DIRECTORY STEPS PAUSE [PORT ID [BAD]]`.

Without PORT and ID the run has this process alone, on all its devices, or on the first one where it finds that the run
is complete. PAUSE: seconds that a record takes to read. BAD: process ID has no batch from that step on.
Writes rows-<ID>.json, the numbers of the records that it read; at the end final-<ID>.npz, all arrays of the state.
"""

import json
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from sysdpo_jax import CompoundSystem, Diffusion, DirectObjective, LanguageModel, Node, PixelCodec, TextEncoder
from sysdpo_jax.data import PreferenceRecord, preference_dataset
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.parallel import distributed
from sysdpo_jax.parallel.sharding import AXES, place_batch
from sysdpo_jax.training import (
    ComponentOptimizer,
    ShardingError,
    Trainer,
    batch_shard,
    create_state,
    make_mesh,
    make_optimizer,
)
from tests.components.stubs import WORDS, Affine, Embedding, word_tokenizer

PROCESSES, HEARTBEAT, ROWS, BATCH, SEED = 2, 10, 48, 16, 4
CONFIG = DecoderConfig(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=16,
)
SYSTEM = CompoundSystem(
    ("request",),
    (
        Node("caption", LanguageModel(Decoder(CONFIG), word_tokenizer(), 4, 5), ("request",), params="lm"),
        Node(
            "image",
            Diffusion(Affine(), TextEncoder(Embedding(), word_tokenizer(), 5), PixelCodec((4, 6, 3)), num_steps=8),
            ("caption",),
            params="image",
            weight=0.1,
        ),
    ),
)
OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.adam(1e-3)) for name in ("lm", "image")}, ema_decay=0.9)


class Source:
    """Records made when asked for; it keeps the numbers it was asked for."""

    def __init__(self, pause: float):
        self.pause, self.rows = pause, []

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        time.sleep(self.pause)
        self.rows.append(row)
        rng = np.random.default_rng(row)
        text = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 5)))  # noqa: E731
        side = lambda: {"caption": text(), "image": rng.uniform(size=(4, 6, 3)).astype(np.float32)}  # noqa: E731
        chosen, rejected = side(), side()
        return PreferenceRecord({"request": text()}, chosen, rejected)


def failing(dataset, bad: int):
    """The dataset's batches, the last of them before step `bad`."""

    def batch_at(step):
        if step >= bad:
            raise OSError(f"the disk of step {step} is away")
        return dataset[step]

    return batch_at


@contextmanager
def steps_on_stdout(start, total):
    yield lambda done, text: print(done, flush=True)


def main(directory: Path, steps: int, pause: float, port: str | None, process: int, bad: int | None) -> None:
    alone = port is None
    if not alone:
        distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process, heartbeat_timeout_seconds=HEARTBEAT)
    restoring = alone and (directory / "checkpoints" / str(steps)).exists()
    # Every parameter and moment is cut over the devices of both processes.
    mesh = make_mesh() if restoring else make_mesh(fsdp=8)
    state = create_state(SYSTEM, SYSTEM.init(jax.random.key(0)), OPTIMIZER, mesh)
    source = Source(pause)
    dataset = preference_dataset(SYSTEM, source, BATCH, SEED, shard=batch_shard(mesh))
    trainer = Trainer(
        SYSTEM, DirectObjective(), OPTIMIZER, directory, mesh, checkpoint_every=3, progress=steps_on_stdout
    )
    batches = dataset if bad is None else failing(dataset, bad)
    state = trainer.fit(state, batches, steps, jax.random.key(1))
    (directory / f"rows-{process}.json").write_text(json.dumps(source.rows))
    if not alone:
        (directory / f"placing-{process}.json").write_text(json.dumps(placing()))
        (directory / f"moved-{process}.json").write_text(json.dumps(moves(state.params)))
    leaves = jax.tree.leaves((state.step, state.params, state.opt_state, state.ema))
    name = "restored" if restoring else f"final-{process}"
    np.savez(directory / f"{name}.npz", *(multihost_utils.process_allgather(leaf, tiled=True) for leaf in leaves))


def moves(params) -> bool:
    """Whether parameters that lie in parts on both processes are the same where each has them whole."""
    whole = create_state(SYSTEM, params, OPTIMIZER, make_mesh(data=8)).params
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True)
    return all(
        np.array_equal(np.asarray(new), multihost_utils.process_allgather(old, tiled=True)) for new, old in pairs
    )


def placing() -> dict[str, object]:
    """How batches fall on this process's devices, by mesh: its shard, what `place_batch` makes of it, or the error."""
    shapes = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8), "pairs": (2, 2, 2), "copies": (1, 2, 4)}
    meshes = {name: make_mesh(*shape) for name, shape in shapes.items()}
    # Devices 0 ... 3 are of process 0; here they take every second part of the batch.
    meshes["by turns"] = device_mesh((0, 4, 1, 5, 2, 6, 3, 7), (8, 1, 1))
    meshes["torn"] = device_mesh((0, 4, 1, 2, 3, 5, 6, 7), (4, 1, 2))
    meshes["one process"] = device_mesh((0, 1, 2, 3), (4, 1, 1))
    found: dict[str, object] = {}
    for name, mesh in meshes.items():
        try:
            index, count = batch_shard(mesh)
        except ShardingError as error:
            found[name] = str(error)
            continue
        if len(mesh.devices.flat) < 8:  # the other process would not join the gathering
            found[name] = [index, count]
            continue
        block = np.arange(16).reshape(count, -1)[index]
        placed = place_batch(mesh, {"x": np.stack([block, block], axis=1)})["x"]
        found[name] = [index, count, multihost_utils.process_allgather(placed, tiled=True)[:, 1].tolist()]
    for name, shape in (("whole", (15, 2)), ("torn rows", (3, 2))):
        try:
            place_batch(meshes["data"], {"x": np.zeros(shape)})
        except ShardingError as error:
            found[name] = str(error)
    return found


def device_mesh(order, shape) -> Mesh:
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.array([devices[i] for i in order]).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


if __name__ == "__main__":
    place, total, wait, *others = sys.argv[1:]
    port, own, broken = [*others, None, None, None][:3]
    main(Path(place), int(total), float(wait), port, int(own or 0), None if broken is None else int(broken))
