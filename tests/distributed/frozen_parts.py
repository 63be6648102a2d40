"""Places frozen parts on a mesh of 8 virtual devices, encodes there, and prints what happened as JSON.

Run by tests/training/test_frozen_parts.py in a process of its own, because the number of devices is fixed when JAX
starts.
"""

import json

import jax
import numpy as np

from sysdpo_jax import CompoundSystem, FrozenText, LatentCodec, Node, TextEncoder, make_mesh, tree_shardings
from sysdpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.training.describe import device_bytes
from sysdpo_jax.training.sharding import MIN_SHARDED_SIZE, by_path
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


def main():
    text = FrozenText(TextEncoder(CLIP, word_tokenizer(), 8))
    node = painter(text=text, codec=LatentCodec(VAE, ((8, 16),), 2), caption_dropout=0.1)
    system = CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    params = jax.tree.map(lambda x: (0.2 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
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
    main()
