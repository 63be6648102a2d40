"""The chunked head on meshes of 8 virtual devices: prints, as JSON, its errors and what its devices send each other.

Run by test_meshes.py in a process of its own, because the number of devices is fixed when JAX starts.
"""

import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sysdpo_jax.components import token_log_probs as chunked
from sysdpo_jax.parallel.hlo import Module
from sysdpo_jax.parallel.sharding import BATCH_SPEC, activation_rules, make_mesh

ROWS, LENGTH, WIDTH, VOCAB = 16, 24, 8, 64
MESHES = {"8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2), "1x4x2": (1, 4, 2), "1x1x8": (1, 1, 8)}


def total(values: dict[str, jax.Array], targets: jax.Array) -> jax.Array:
    """Another weight for each token, so that no two gradients are alike."""
    found = chunked.token_log_probs(
        lambda kernel, part: part @ kernel, values["kernel"], values["hidden"], targets, VOCAB
    )
    return jnp.sum(found * jnp.arange(found.size).reshape(found.shape)) / found.size


def by_hand(values: dict[str, np.ndarray], targets: np.ndarray) -> dict[str, np.ndarray]:
    """The gradient in float64, written out: of log softmax(z)[t], one hot of t minus softmax(z)."""
    hidden, kernel = (values[name].astype(np.float64) for name in ("hidden", "kernel"))
    logits = hidden @ kernel
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights = np.arange(targets.size).reshape(targets.shape) / targets.size
    of_logits = weights[..., None] * (np.eye(VOCAB)[targets] - softmax)
    return {"hidden": of_logits @ kernel.T, "kernel": np.einsum("bld,blv->dv", hidden, of_logits)}


def run(shape: tuple[int, int, int], values: dict[str, np.ndarray], targets: np.ndarray) -> dict[str, object]:
    mesh = make_mesh(*shape)
    rows = NamedSharding(mesh, BATCH_SPEC)
    places = {"hidden": rows, "kernel": NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))}

    def traced(*arguments: jax.Array) -> dict[str, jax.Array]:
        with activation_rules(mesh):
            return jax.grad(total)(*arguments)

    compiled = jax.jit(traced, in_shardings=(places, rows), out_shardings=places).lower(values, targets).compile()
    found = compiled(jax.device_put(values, places), jax.device_put(targets, rows))
    errors = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - b).max()), found, by_hand(values, targets))
    collectives = [tuple(each) for each in Module.parse(compiled.as_text()).collectives()]
    return {"errors": errors, "collectives": collectives}


def main() -> None:
    random = np.random.default_rng(0)
    values = {"hidden": random.normal(size=(ROWS, LENGTH, WIDTH)), "kernel": random.normal(size=(WIDTH, VOCAB))}
    values = {name: value.astype(np.float32) for name, value in values.items()}
    targets = random.integers(0, VOCAB, (ROWS, LENGTH))
    # Chunks of 4 tokens of a device's two rows on 8 x 1 x 1.
    with mock.patch.object(chunked, "MIN_CHUNK_BYTES", 4 * 2 * 4 * VOCAB):
        json.dump({name: run(shape, values, targets) for name, shape in MESHES.items()}, sys.stdout)


if __name__ == "__main__":
    main()
