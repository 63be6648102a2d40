"""Counts of operations against closed forms written out here."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from sysdpo_jax import (
    FROZEN,
    LORA_PARAMS,
    ComponentOptimizer,
    CompoundSystem,
    LanguageModel,
    LoRA,
    Node,
    PairBatch,
    SampledBatch,
    add_lora,
    make_mesh,
    make_optimizer,
)
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.training.state import abstract_state
from sysdpo_jax.training.throughput import FlopsError, count_flops, forward_flops, plain_attention, step_flops
from tests.components.stubs import IdTokenizer

ROWS, PROMPT, NEW = 3, 4, 6
LENGTH = PROMPT + NEW
CONFIG = DecoderConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MODEL = LanguageModel(Decoder(CONFIG), IdTokenizer(), PROMPT, NEW)
DRAFT_AND_FINAL = CompoundSystem(
    ("x",), (Node("draft", MODEL, ("x",)), Node("final", MODEL, ("draft",), params="other", plate=2))
)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def features(*leading):
    whole = jax.ShapeDtypeStruct(leading, jnp.int32)
    return {
        "tokens": shape(*leading, LENGTH, dtype=jnp.int32),
        "prompt_lengths": whole,
        "lengths": whole,
        "completion": shape(*leading, NEW, dtype=jnp.bool_),
        "truncated": shape(*leading),
        "retokenized": shape(*leading),
    }


def layers_flops(rows, length):
    """2 for each weight and token, and two products of every head with a [length, length] matrix of scores."""
    c = CONFIG
    heads, groups = c.num_attention_heads * c.head_width, c.num_key_value_heads * c.head_width
    weights = c.hidden_size * (2 * heads + 2 * groups) + 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * rows * (2 * length * weights + 2 * 2 * length**2 * heads)


def head_flops(tokens):
    return 2 * tokens * CONFIG.hidden_size * CONFIG.vocab_size


def params_of(system):
    return jax.eval_shape(system.init, jax.random.key(0))


def test_a_product_counts_two_for_each_pair_whatever_its_batch():
    assert count_flops(lambda a, b: a @ b, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert (
        count_flops(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), shape(4, 3, 5), shape(4, 7, 5)) == 4 * 2 * 3 * 5 * 7
    )
    # Element by element is nothing.
    assert count_flops(lambda a: jnp.tanh(a) * a, shape(3, 5)) == 0


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 1), (1, 2)])
def test_a_convolution_counts_its_window_for_each_output(groups, stride):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    sizes = shape(2, 8, 8, 4), shape(3, 3, 4 // groups, 6)
    outputs = 2 * (8 // stride) ** 2 * 6
    forward = 2 * outputs * 9 * 4 // groups
    assert count_flops(convolve, *sizes) == forward
    # The gradient of the weights sums over the outputs of an image instead of over the window: as much again.
    gradient = jax.grad(lambda kernel, x: convolve(x, kernel).sum())
    assert count_flops(gradient, *sizes[::-1]) == 2 * forward


def test_bodies_count_as_often_as_they_run():
    one = 2 * 4 * 4 * 4

    def layers(x, ws):
        return jax.lax.scan(lambda y, w: (jax.checkpoint(jax.jit(lambda z: jnp.sin(z @ w)))(y), None), x, ws)[0]

    assert count_flops(layers, shape(4, 4), shape(5, 4, 4)) == 5 * one
    # Forward, forward again for the checkpoint, and two products backward.
    both = jax.grad(lambda x, ws: layers(x, ws).sum(), argnums=(0, 1))
    assert count_flops(both, shape(4, 4), shape(5, 4, 4)) == 5 * 4 * one
    branches = lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)  # noqa: E731
    assert count_flops(branches, shape(4, 4)) == 2 * one


def test_a_custom_derivative_counts_the_function_once():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert count_flops(square, shape(4, 4)) == 2 * 64
    assert count_flops(jax.grad(lambda x: square(x).sum()), shape(4, 4)) == 3 * 2 * 64


def test_a_body_for_each_device_counts_on_all_of_them():
    mesh = jax.sharding.AbstractMesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(("data", "fsdp"))
    spread = jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=spec, out_specs=spec)
    # Each of 8 devices multiplies its own 2 rows with themselves.
    assert count_flops(spread, shape(16, 3)) == 8 * 2 * 2 * 2 * 3


def test_what_cannot_be_counted_is_refused():
    endless = lambda x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ y, x)  # noqa: E731
    with pytest.raises(FlopsError, match="while"):
        count_flops(endless, shape(4, 4))
    # A loop without products is welcome.
    assert count_flops(lambda x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y + 1, x), shape(4)) == 0

    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    with pytest.raises(FlopsError, match=r"pallas_call.*attention='plain'"):
        count_flops(pl.pallas_call(kernel, out_shape=shape(4, 4)), shape(4, 4))


def test_a_decoder_counts_two_for_each_weight_and_token():
    decoder, tokens = Decoder(CONFIG), shape(ROWS, LENGTH, dtype=jnp.int32)
    params = jax.eval_shape(decoder.init, jax.random.key(0), tokens)
    forward = layers_flops(ROWS, LENGTH) + head_flops(ROWS * LENGTH)
    assert count_flops(decoder.apply, params, tokens) == forward
    # The backward pass takes two products for each: what `step_flops` supposes.
    gradient = jax.grad(lambda p, t: decoder.apply(p, t).sum())
    assert count_flops(gradient, params, tokens) == 3 * forward


def test_a_node_counts_its_plate_and_a_fused_kernel_as_plain_attention():
    params = params_of(DRAFT_AND_FINAL)
    given = {"draft": features(ROWS), "final": features(ROWS, 2)}
    counted = forward_flops(DRAFT_AND_FINAL, params, given)
    tokens = (counted["draft"] - layers_flops(ROWS, LENGTH)) / head_flops(ROWS)
    assert NEW <= tokens < LENGTH
    assert counted["final"] == 2 * counted["draft"]
    flash = replace(MODEL, decoder=Decoder(replace(CONFIG, attention="flash")))
    assert plain_attention(flash).decoder.config.attention == "plain"
    system = CompoundSystem(("x",), (Node("draft", flash, ("x",)),))
    assert forward_flops(system, params_of(system), {"draft": features(ROWS)}) == {"draft": counted["draft"]}


def step(optimizers, batch, add=lambda params: params, precomputed=()):
    params = add(params_of(DRAFT_AND_FINAL))
    optimizer = make_optimizer(optimizers)
    state = abstract_state(DRAFT_AND_FINAL, params, optimizer, make_mesh(), precomputed=precomputed)
    return step_flops(DRAFT_AND_FINAL, state, batch)


def test_a_step_counts_policy_and_reference_on_both_sides():
    side = {"draft": features(ROWS), "final": features(ROWS, 2)}
    forward = forward_flops(DRAFT_AND_FINAL, params_of(DRAFT_AND_FINAL), side)
    full, batch = ComponentOptimizer(optax.sgd(0.1)), PairBatch(side, side)
    assert step({"draft": full, "other": full}, batch) == {name: 2 * 4 * number for name, number in forward.items()}
    assert step({"draft": FROZEN, "other": full}, batch) == {"draft": 0, "final": 2 * 4 * forward["final"]}
    known = PairBatch(side, side, {"draft": (shape(ROWS), shape(ROWS))})
    assert step({"draft": full, "other": full}, known, precomputed=["draft"])["draft"] == 2 * 3 * forward["draft"]


def test_lora_needs_no_gradients_of_the_other_weights():
    side, rank = {"draft": features(ROWS), "final": features(ROWS, 2)}, 2
    plain = forward_flops(DRAFT_AND_FINAL, params_of(DRAFT_AND_FINAL), side)

    def add(params):
        grow = lambda tree: add_lora(tree, LoRA(rank, 4.0, "mlp"), jax.random.key(0))  # noqa: E731
        return params | {"draft": jax.eval_shape(grow, params["draft"])}

    lora = ComponentOptimizer(optax.sgd(0.1), trainable=LORA_PARAMS)
    counted = step({"draft": lora, "other": FROZEN}, PairBatch(side, side), add)["draft"]
    # Two thin products at each of the three layers of the feed-forward.
    widths = 3 * (CONFIG.hidden_size + CONFIG.intermediate_size)
    thin = CONFIG.num_hidden_layers * ROWS * LENGTH * 2 * rank * widths
    # Policy: forward with the factors, backward through both, and the factors' own gradients; reference: forward.
    assert counted == 2 * (2 * (plain["draft"] + thin) + thin + plain["draft"] + thin)


def test_intermediates_are_evaluated_once_and_outputs_with_each_of_them():
    intermediates, outputs = {"draft": features(ROWS, 5)}, {"final": features(ROWS, 5, 2)}
    batch = SampledBatch(intermediates, PairBatch(outputs, outputs), shape(ROWS, 5, dtype=bool), shape(ROWS))
    one = forward_flops(
        DRAFT_AND_FINAL, params_of(DRAFT_AND_FINAL), {"draft": features(5 * ROWS), "final": features(5 * ROWS, 2)}
    )
    full = ComponentOptimizer(optax.sgd(0.1))
    assert step({"draft": full, "other": full}, batch) == {"draft": 4 * one["draft"], "final": 2 * 4 * one["final"]}
    # Frozen, it weighs the intermediates all the same.
    assert step({"draft": FROZEN, "other": full}, batch)["draft"] == one["draft"]


def test_another_batch_is_refused():
    with pytest.raises(TypeError, match="not a dict"):
        step({"draft": FROZEN, "other": ComponentOptimizer(optax.sgd(0.1))}, {})
