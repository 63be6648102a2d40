"""Frozen parts on a mesh of several devices: encodes there and prints what happened as JSON, or trains.

Run by tests/training/test_frozen_parts.py in a process of its own, because the number of devices is fixed when JAX
starts; as `frozen_parts.py DIRECTORY PROCESSES PORT ID` by test_frozen_processes.py in several.
"""

import json
import sys

import jax
import numpy as np
import optax

from sysdpo_jax import (
    ComponentOptimizer,
    CompoundSystem,
    DirectObjective,
    FrozenText,
    LatentCodec,
    Node,
    PreferenceRecord,
    TextEncoder,
    Trainer,
    batch_shard,
    create_state,
    epoch_batches,
    initialize,
    make_mesh,
    make_optimizer,
    preference_dataset,
    prepare_pairs,
    tree_shardings,
)
from sysdpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.parallel.sharding import MIN_SHARDED_SIZE
from sysdpo_jax.training.ahead_of_time import device_bytes
from sysdpo_jax.trees import by_path
from tests.components.painters import painter
from tests.components.stubs import word_tokenizer

VAE = AutoencoderKL(AutoencoderConfig(block_out_channels=(32, 32), latent_channels=4, norm_num_groups=8))
CLIP = CLIPTextEncoder(
    CLIPTextConfig(
        vocab_size=14,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=8,
    )
)


def system_and_params():
    text = FrozenText(TextEncoder(CLIP, word_tokenizer(), 8))
    node = painter(text=text, codec=LatentCodec(VAE, ((8, 16),), 2), caption_dropout=0.1)
    system = CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    return system, jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes)


def train(directory):
    """Two steps from data that are held whole, and two from a dataset; every process gives its rows."""
    system, params = system_and_params()
    pictures = iter(np.random.default_rng(1).integers(0, 256, (16, 8, 16, 3), np.uint8))
    records = [
        PreferenceRecord({"caption": ("a ball", "cube")[row % 2]}, {"image": next(pictures)}, {"image": next(pictures)})
        for row in range(8)
    ]
    mesh = make_mesh(data=2, fsdp=2)
    shard = batch_shard(mesh)
    optimizer = make_optimizer({"image": ComponentOptimizer(optax.adam(1e-2))})
    sources = {
        "whole": epoch_batches(prepare_pairs(system, records), 4, seed=0, shard=shard),
        "dataset": preference_dataset(system, records, 4, seed=0, shard=shard),
    }
    for name, batches in sources.items():
        trainer = Trainer(system, DirectObjective(), optimizer, f"{directory}/{name}", mesh=mesh)
        trainer.fit(create_state(system, params, optimizer, mesh), batches, 2, jax.random.key(1))


def main():
    system, params = system_and_params()
    node, rng = system.node("image").component, np.random.default_rng(2)
    pictures = list(rng.integers(0, 256, (3, 8, 16, 3), np.uint8))
    raw = {"image": node.prepare(pictures, {"caption": ["a red ball", "cube", "a"]})}
    placed = jax.device_put(params, tree_shardings(make_mesh(data=1, fsdp=4, tensor=2), params))
    one = jax.device_put(params, jax.devices()[0])
    made, expected = system.encode(placed, raw), system.encode(one, raw)
    differences = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), made, expected)
    frozen = {path: leaf for path, leaf in by_path(placed["image"]).items() if not path.startswith("denoiser/")}
    large = {path: leaf for path, leaf in frozen.items() if leaf.size >= MIN_SHARDED_SIZE}
    cut = {path for path, leaf in large.items() if "fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec))}
    print(
        json.dumps(
            {
                "whole": sorted(set(large) - cut),
                "cut": len(cut),
                "difference": max(jax.tree.leaves(differences)),
                "bytes_of_one": device_bytes(one["image"]),
                "bytes_of_eight": device_bytes(placed["image"]),
            }
        )
    )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        folder, number, port, process = sys.argv[1:]
        if number != "1":
            initialize(f"127.0.0.1:{port}", int(number), int(process), heartbeat_timeout_seconds=10)
        train(folder)
