"""One training step of a language model and an image model on meshes of 8 virtual devices, printed as JSON.

Run by test_splits.py in a process of its own, because the number of devices is fixed when JAX starts.
"""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sysdpo_jax import (
    CompoundSystem,
    Diffusion,
    DirectObjective,
    LanguageModel,
    Node,
    PixelCodec,
    PreferenceRecord,
    TextEncoder,
    Tool,
    prepare_pairs,
)
from sysdpo_jax.diffusion.schedules import NoiseSchedule
from sysdpo_jax.diffusion.weightings import Constant
from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig
from sysdpo_jax.parallel.sharding import place_batch, replicated
from sysdpo_jax.training import ComponentOptimizer, create_state, make_mesh, make_optimizer, make_train_step
from sysdpo_jax.training.ahead_of_time import device_bytes
from sysdpo_jax.training.step import PROCEED
from sysdpo_jax.trees import by_path, path_name
from tests.components.stubs import WORDS, word_tokenizer

ROWS, CAPTIONS = 8, 2
KEY = jax.random.key(0)
MESHES = {
    "one": {"data": 1},
    "8x1x1": {"data": 8},
    "1x8x1": {"fsdp": 8},
    "2x2x2": {"data": 2, "fsdp": 2, "tensor": 2},
    "1x1x8": {"tensor": 8},
}


def halves(answer):
    words = answer.split()
    return [" ".join(words[:3]), " ".join(words[3:])]


def build():
    """A request, an answer of two captions, an image of each; every cut width is a multiple of 8."""
    words = word_tokenizer()
    decoder = DecoderConfig(
        vocab_size=16,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=12,
        tie_word_embeddings=False,
    )
    text = CLIPTextConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=8,
        max_position_embeddings=4,
    )
    unet = UNetConfig(
        in_channels=12,
        out_channels=12,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    images = Diffusion(
        UNet2DCondition(unet),
        TextEncoder(CLIPTextEncoder(text), words, 4),
        PixelCodec((8, 8, 3), 2),
        schedule=NoiseSchedule(),
        weighting=Constant(2.0),  # minus the mean squared error: rounding stays small beside it
    )
    return CompoundSystem(
        ("request",),
        (
            Node("answer", LanguageModel(Decoder(decoder), words, 4, 8), ("request",), params="lm"),
            Node("captions", Tool(halves), ("answer",), plate=CAPTIONS),
            Node("images", images, ("captions",), params="unet", plate=CAPTIONS),
        ),
    )


def preferences(system):
    rng = np.random.default_rng(0)

    def run():
        pictures = [rng.random((8, 8, 3), np.float32) for _ in range(CAPTIONS)]
        return {"answer": " ".join(rng.choice(WORDS, 6)), "images": pictures}

    records = [PreferenceRecord({"request": " ".join(rng.choice(WORDS, 3))}, run(), run()) for _ in range(ROWS)]
    return prepare_pairs(system, records)


def remembering():
    """Plain gradient descent whose state is the last gradient, as the step's own program made it."""
    descent = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params: (jax.tree.map(lambda g: -0.1 * g, updates), updates),
    )
    return ComponentOptimizer(descent, clip_norm=None)


def parameters(system):
    """Random ones, the norms' around 1. Drawn by NumPy: nothing to compile."""
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if path_name(path).endswith("weight") else 0.0
        return (centre + 0.2 * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(system.init, KEY))


def gathered_shapes(compiled):
    """The shapes of the results of all all-gathers of a compiled program."""
    lines = [line for line in compiled.as_text().splitlines() if re.search(r" all-gather(-start)?\(", line)]
    results = [line.split(" all-gather")[0] for line in lines]
    return [
        [int(n) for n in shape.split(",") if n] for line in results for shape in re.findall(r"\w\d+\[([\d,]*)\]", line)
    ]


def run(axes, system, params, batch, gradients_of_one):
    mesh = make_mesh(**axes)
    optimizer = make_optimizer({"lm": remembering(), "unet": remembering()})
    state = create_state(system, params, optimizer, mesh)
    # Another reference than the parameters, or the loss is ln 2 whatever the models compute.
    other = jax.tree.map(lambda x: jax.device_put(0.9 * np.asarray(x), x.sharding), state.reference)
    state = state._replace(reference=other)
    step = make_train_step(system, DirectObjective(), optimizer, mesh)
    compiled = step.lower(state, batch, KEY).compile()
    replaced = (state.step, state.params, state.opt_state)
    before, held, own = [x.sharding for x in jax.tree.leaves(state)], jax.tree.leaves(replaced), device_bytes(replaced)
    stacks = state.params["lm"]["layers"]
    shapes = [list(x.shape) for x in jax.tree.leaves(stacks)]
    whole = jax.jit(lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))).lower(stacks).compile()
    # The program that was read is the one that runs: compiling it again takes as long as all the rest.
    given = (place_batch(mesh, batch), *jax.device_put((KEY, PROCEED), replicated(mesh)))
    arguments = device_bytes((state, given))
    mutable, metrics = compiled(state.mutable, state.fixed, *given)
    state = state.after(mutable)
    last = {key: masked.inner_state[key] for key, masked in state.opt_state.inner_states.items()}
    gradients = {name: np.asarray(leaf) for name, leaf in by_path(last).items()}
    gathered = gathered_shapes(compiled)
    result = {
        "loss": float(metrics["loss"]),
        "finite": bool(metrics["finite"]),
        "all_gathers": len(gathered),
        "whole_stacks": [shape for shape in gathered if shape in shapes],
        # What the line above would see of a program that gathers every stack.
        "deliberately": [shape for shape in gathered_shapes(whole) if shape in shapes],
        "placement_kept": [x.sharding for x in jax.tree.leaves(state)] == before,
        "donated": all(x.is_deleted() for x in held),
        "aliased_share": compiled.memory_analysis().alias_size_in_bytes / own,
        "argument_share": compiled.memory_analysis().argument_size_in_bytes / arguments,
        "specs": {name: str(leaf.sharding.spec) for name, leaf in by_path(state.params).items()},
    }
    reference = gradients_of_one or gradients
    result["gradient_errors"] = {name: relative(gradients, reference, name) for name in gradients}
    return result, gradients


def relative(gradients, reference, name):
    """||g - g1|| / ||g1|| of a leaf; one with hardly any gradient is measured against its component's."""
    component = name.split("/")[0]
    whole = np.sqrt(
        sum(np.sum(leaf.astype(np.float64) ** 2) for k, leaf in reference.items() if k.startswith(component))
    )
    error = np.linalg.norm((gradients[name] - reference[name]).astype(np.float64))
    return error / max(np.linalg.norm(reference[name].astype(np.float64)), 1e-3 * whole)


def main() -> None:
    system = build()
    batch, params = preferences(system), parameters(system)
    results, gradients = {}, None
    for name, axes in MESHES.items():
        results[name], made = run(axes, system, params, batch, gradients)
        gradients = made if gradients is None else gradients
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
