"""Trains a language model and a Gaussian on several meshes of 8 virtual devices and prints what happened as JSON.

Run by test_meshes.py in a process of its own, because the number of devices is fixed when JAX starts.
"""

import json
import sys
import tempfile

import jax
import numpy as np
import optax
from jax.sharding import PartitionSpec as P

from sysdpo_jax import CompoundSystem, DirectObjective, Gaussian, LanguageModel, Node, PairBatch, epoch_batches
from sysdpo_jax.batch import share
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.training import (
    ComponentOptimizer,
    Trainer,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
)
from tests.components.stubs import IdTokenizer

STEPS, ROWS, LENGTH, WIDTH = 20, 16, 12, 256
CONFIG = DecoderConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)


TOKENIZER = IdTokenizer()
SYSTEM = CompoundSystem(
    ("x",),
    (
        Node("text", LanguageModel(Decoder(CONFIG), TOKENIZER, 5, LENGTH - 5), ("x",), params="lm"),
        Node("value", Gaussian(WIDTH, WIDTH, 8.0), ("text",)),
    ),
)
RULES = (("lm/.*(q_proj|gate_proj|up_proj)/kernel", P(None, "fsdp", "tensor")), ("lm/embed_tokens", P("fsdp")))
MESHES = {
    "one": ({"data": 1}, ()),
    "fsdp": ({"fsdp": 8}, (("lm/embed_tokens", P("fsdp")), ("lm/layers/.*kernel", P(None, None, "fsdp")))),
    "mixed": ({"data": 2, "fsdp": 2, "tensor": 2}, RULES),
}
KEY = jax.random.key(0)
OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.adam(3e-4)) for name in ("lm", "value")}, ema_decay=0.9)


def preferences() -> PairBatch:
    """The sides have their prompts in common, which go through the model once."""
    rng = np.random.default_rng(0)
    prompts = rng.integers(2, 64, (4 * ROWS, 5)).astype(np.int32)

    def side():
        lengths = rng.integers(8, LENGTH + 1, 4 * ROWS).astype(np.int32)
        text = {
            "tokens": np.hstack([prompts, rng.integers(2, 64, (4 * ROWS, LENGTH - 5)).astype(np.int32)]),
            "prompt_lengths": np.full(4 * ROWS, 5, np.int32),
            "lengths": lengths,
            "truncated": np.zeros(4 * ROWS, np.float32),
            "retokenized": np.zeros(4 * ROWS, np.float32),
        }
        value = {name: rng.normal(size=(4 * ROWS, WIDTH)).astype(np.float32) for name in ("value", "parents")}
        text = SYSTEM.node("text").component.resize(text, {"prompt": 5, "completion": LENGTH - 5})
        return {"text": text, "value": value}

    batch = PairBatch(*share(SYSTEM, [side(), side()]))
    assert batch.chosen["text"]["shared"].all()
    return batch


def start(axes, rules, params):
    mesh = make_mesh(**axes)
    return mesh, create_state(SYSTEM, params, OPTIMIZER, mesh, rules)


def run(name, batch_at, params):
    """All the steps on one mesh in a plain loop."""
    mesh, state = start(*MESHES[name], params)
    step = make_train_step(SYSTEM, DirectObjective(), OPTIMIZER, mesh)
    before, held = placement(state), jax.tree.leaves((state.step, state.params, state.opt_state, state.ema))
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, batch_at(number), KEY)
        losses.append(float(metrics["loss"]))
    return {
        "losses": losses,
        "placement_kept": placement(state) == before,
        "donated": all(x.is_deleted() for x in held),
        "value_kernel": rows_on_a_device(state.params["value"]["kernel"]),
        "value_moment": rows_on_a_device(state.opt_state.inner_states["value"].inner_state[1][0].mu["value"]["kernel"]),
        "embedding": rows_on_a_device(state.params["lm"]["embed_tokens"]["embedding"]),
        "state": words(state),
    }


def resume(name, batch_at, params):
    """Half of the steps, then the others in a second run that restores the first one's checkpoint, sharded."""
    with tempfile.TemporaryDirectory() as directory:
        mesh, state = start(*MESHES[name], params)
        trainer = Trainer(SYSTEM, DirectObjective(), OPTIMIZER, directory, mesh)
        trainer.fit(state, batch_at, STEPS // 2, KEY)
        state = trainer.fit(start(*MESHES[name], params)[1], batch_at, STEPS, KEY)
    return words(state)


def words(state):
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]


def placement(state):
    return [x.sharding for x in jax.tree.leaves(state)]


def rows_on_a_device(array):
    return array.addressable_shards[0].data.shape[0]


def main() -> None:
    batch_at = epoch_batches(preferences(), ROWS, seed=0)
    params = jax.jit(SYSTEM.init)(jax.random.key(7))
    runs = {name: run(name, batch_at, params) for name in MESHES}
    states = {name: result.pop("state") for name, result in runs.items()}
    same = resume("fsdp", batch_at, params) == states["fsdp"]
    json.dump({"runs": runs, "resumed_bit_for_bit": same}, sys.stdout)


if __name__ == "__main__":
    main()
