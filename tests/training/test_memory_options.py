"""What saves memory changes no result: parts of a batch, precisions of weights and moments, a freed reference."""

import gc
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sysdpo_jax import CompoundSystem, DirectObjective, LanguageModel, Node, epoch_batches
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.parallel.sharding import ShardingError
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    OptimizerError,
    abstract_state,
    create_state,
    make_mesh,
    make_optimizer,
    make_train_step,
    precompute_reference,
)
from sysdpo_jax.trees import by_path
from tests.components.stubs import word_tokenizer
from tests.objectives.mixtures import DECODER, KEY, start
from tests.training.systems import CHAIN, pairs

OBJECTIVE = DirectObjective(0.3)


def sgd(system, **options):
    return make_optimizer({key: ComponentOptimizer(optax.sgd(1.0), None, **options) for key in system.param_keys})


def one_step(system, params, reference, batch, optimizer, accumulate=1):
    state = with_reference(create_state(system, params, optimizer), reference)
    return make_train_step(system, OBJECTIVE, optimizer, accumulate=accumulate)(state, batch, KEY)


def with_reference(state, reference):
    placed = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), reference, state.reference)
    return state._replace(reference=placed)


@pytest.mark.parametrize(
    "name", ["language model, diffusion", pytest.param("two kinds of picture", marks=pytest.mark.slow)]
)
def test_parts_of_a_batch_give_the_update_of_the_whole(name):
    """The sides of every row are coupled over the nodes, and a diffusion node draws noise: both stay as they are.

    1e-6 of each component's gradient norm: the same float32 numbers, added in another order. The pictures' weight is
    small, because with margins of thousands of nats a rounding error of the margin is an error of every gradient.
    """
    system, params, reference, batch = start(name)
    light = [node if node.name == "text" or node.deterministic else replace(node, weight=1e-5) for node in system.nodes]
    system = CompoundSystem(system.inputs, tuple(light))
    # Its state is the last gradient.
    optimizer = make_optimizer({key: ComponentOptimizer(optax.trace(0.0), None) for key in system.param_keys})
    whole, metrics = one_step(system, params, reference, batch, optimizer)
    cut, cut_metrics = one_step(system, params, reference, batch, optimizer, 4)
    for key in system.param_keys:
        expected, got = (
            np.concatenate([np.ravel(x) for x in jax.tree.leaves(s.opt_state.inner_states[key])]) for s in (whole, cut)
        )
        assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected), key
        assert len(got) == sum(x.size for x in jax.tree.leaves(params[key]))
    assert metrics.keys() == cut_metrics.keys()
    for metric, value in metrics.items():
        np.testing.assert_allclose(cut_metrics[metric], value, rtol=2e-5, atol=1e-5, err_msg=metric)


def test_a_batch_that_does_not_divide_is_refused():
    system, params, reference, batch = start("language model")
    with pytest.raises(ShardingError, match="4 rows cannot be cut into 3 equal parts"):
        one_step(system, params, reference, batch, sgd(system), 3)
    with pytest.raises(ValueError, match="accumulate must be at least 1 part, got 0"):
        make_train_step(system, OBJECTIVE, sgd(system), accumulate=0)


def test_master_weights_add_up_what_bfloat16_would_round_away():
    """Updates of 1e-4 on parameters near 1, where bfloat16 has steps of 2^-8: lost or, with float32 copies, kept."""
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    gradients = {"w": jnp.ones(4, jnp.bfloat16)}
    results = {}
    for master in (False, True):
        optimizer = make_optimizer({"a": ComponentOptimizer(optax.sgd(1e-4), None, master_weights=master)})
        leaves, state = {"a": params}, optimizer.transformation.init({"a": params})
        for _ in range(200):
            updates, state = optimizer.transformation.update({"a": gradients}, state, leaves)
            leaves = optax.apply_updates(leaves, updates)
        assert leaves["a"]["w"].dtype == jnp.bfloat16
        results[master] = np.asarray(leaves["a"]["w"], np.float32)
    np.testing.assert_array_equal(results[False], 1.0)
    np.testing.assert_array_equal(results[True], np.float32(jnp.bfloat16(1 - 200 * 1e-4)))


def test_a_narrow_state_is_rounded_between_updates_and_nothing_else():
    """Adam in NumPy float64 with its moments rounded to bfloat16 after each of three updates; 5e-6 for float32."""
    rate, optimizer = 0.1, make_optimizer({"a": ComponentOptimizer(optax.adam(0.1), None, state_dtype="bfloat16")})
    value, moments = np.array([1.0, -2.0, 3.0]), np.zeros((2, 3))
    leaves = {"a": {"w": jnp.asarray(value, jnp.float32)}}
    state = optimizer.transformation.init(leaves)
    for count, gradient in enumerate(np.random.default_rng(0).normal(size=(3, 3)), start=1):
        assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype("bfloat16")}
        given = {"a": {"w": jnp.asarray(gradient, jnp.float32)}}
        updates, state = optimizer.transformation.update(given, state, leaves)
        leaves = optax.apply_updates(leaves, updates)
        fresh = np.stack([0.9 * moments[0] + 0.1 * gradient, 0.999 * moments[1] + 0.001 * gradient**2])
        first, second = fresh[0] / (1 - 0.9**count), fresh[1] / (1 - 0.999**count)
        value = value - rate * first / (np.sqrt(second) + 1e-8)
        moments = np.asarray(jnp.asarray(fresh, jnp.bfloat16), np.float64)
        np.testing.assert_allclose(leaves["a"]["w"], value, rtol=5e-6)


def test_a_state_dtype_that_is_no_floating_point_type_is_refused():
    with pytest.raises(OptimizerError, match="state_dtype 'int8' is no floating-point type"):
        ComponentOptimizer(optax.sgd(1.0), state_dtype="int8")


def model_system(**changes):
    model = LanguageModel(Decoder(DecoderConfig(**vars(DECODER) | changes)), word_tokenizer(), 4, 6)
    return CompoundSystem(("x",), (Node("text", model, ("x",), params="lm"),))


def test_a_bfloat16_reference_of_a_bfloat16_model_has_no_margin_at_first():
    """The policy's float32 weights are rounded where they are used, so both compute with the same numbers."""
    _, _, _, batch = start("language model")
    system = model_system(dtype="bfloat16")
    params, optimizer = system.init(jax.random.key(3)), sgd(system)
    state = create_state(system, params, optimizer, reference_dtype="bfloat16")
    kinds = {path.rpartition("/")[2]: str(leaf.dtype) for path, leaf in by_path(state.reference).items()}
    assert kinds == {"kernel": "bfloat16", "embedding": "bfloat16", "weight": "float32"}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    _, metrics = make_train_step(system, OBJECTIVE, optimizer)(state, lm_only(batch), KEY)
    assert float(metrics["rewards/margins"]) == 0.0


def lm_only(batch):
    return type(batch)({"text": batch.chosen["text"]}, {"text": batch.rejected["text"]})


@pytest.mark.slow
def test_a_precomputed_reference_gives_the_same_step_without_its_weights(tmp_path):
    """Metrics to 1e-5, the rounding of log-probabilities near 30 nats; the bytes of the reference are gone."""
    system, params, _, batch = start("language model")
    optimizer, mesh = sgd(system), make_mesh()
    again = precompute_reference(system, params, batch, ["text"], tmp_path, batch_size=3)
    assert len(list(tmp_path.glob("text-*.npz"))) == 1
    policy = jax.tree.map(lambda x: x * 1.1, params)
    step = make_train_step(system, OBJECTIVE, optimizer, mesh)
    expected, metrics = step(with_reference(create_state(system, policy, optimizer), params), batch, KEY)
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    del params, expected
    before = live_bytes()
    state = create_state(system, policy, optimizer, precomputed=["text"])
    assert state.reference == {"text": None}
    del policy
    # The policy's own copy takes the place of the tree it was made from.
    assert live_bytes() - before <= 0.1 * size
    _, without = step(state, again, KEY)
    shared = metrics.keys() & without.keys()
    assert metrics.keys() - shared == {f"{name}/text/reference" for name in ("tokens", "truncated", "retokenized")}
    for name in shared:
        np.testing.assert_allclose(without[name], metrics[name], rtol=2e-5, atol=1e-5, err_msg=name)


def live_bytes():
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_precomputed_values_are_read_again_for_the_same_data_and_weights_only(tmp_path):
    system, params, other, batch = start("language model")
    first = precompute_reference(system, params, batch, ["text"], tmp_path)
    [path] = tmp_path.glob("*.npz")
    path.touch()
    stamp = path.stat().st_mtime_ns
    again = precompute_reference(system, params, batch, ["text"], tmp_path)
    np.testing.assert_array_equal(again.reference["text"], first.reference["text"])
    assert path.stat().st_mtime_ns == stamp
    precompute_reference(system, other, batch, ["text"], tmp_path)
    changed = batch._replace(chosen=batch.rejected)
    precompute_reference(system, params, changed, ["text"], tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == 3


def test_precomputing_refuses_noise_and_strangers():
    system, params, _, batch = start("language model, diffusion")
    with pytest.raises(ValueError, match="node 'image' draws noise"):
        precompute_reference(system, params, batch, ["text", "image"])
    with pytest.raises(ValueError, match="no node has the params key 'lm'; there are text, image"):
        precompute_reference(system, params, batch, ["lm"])
    with pytest.raises(ValueError, match=r"precomputed names \['captions'\]"):
        create_state(system, params, sgd(system), precomputed=["captions"])


def test_a_freed_reference_without_precomputed_values_is_an_error():
    system, params, _, batch = start("language model")
    state = create_state(system, params, sgd(system), precomputed=["text"])
    with pytest.raises(ValueError, match="the reference of 'text' was freed"):
        make_train_step(system, OBJECTIVE, sgd(system))(state, batch, KEY)


@pytest.mark.parametrize(
    "options", [{}, {"master_weights": True, "state_dtype": "bfloat16"}], ids=["plain", "master weights"]
)
def test_the_abstract_state_is_the_shape_of_the_real_one(options):
    system, params, _, _ = start("language model, diffusion")
    optimizer = make_optimizer(
        {"text": ComponentOptimizer(optax.adam(1e-3), **options), "image": ComponentOptimizer(optax.sgd(1e-3))}, 0.9
    )
    settings = {"reference_dtype": "bfloat16", "precomputed": ["text"]}
    real = create_state(system, params, optimizer, **settings)
    shapes = jax.eval_shape(system.init, KEY)
    planned = abstract_state(system, shapes, optimizer, make_mesh(), **settings)
    assert jax.tree.structure(real) == jax.tree.structure(planned)
    for path, leaf in by_path(planned).items():
        made = by_path(real)[path]
        assert (made.shape, made.dtype, made.sharding) == (leaf.shape, leaf.dtype, leaf.sharding), path


@pytest.mark.parametrize("master", [False, True])
def test_the_step_writes_the_new_state_over_the_old(master):
    """Bytes that the compiler lets outputs share with arguments, of all bytes of the new state."""
    adam = ComponentOptimizer(optax.adamw(1e-3), master_weights=master)
    optimizer = make_optimizer({"a": adam, "b": adam, "c": FROZEN}, ema_decay=0.9)
    state = create_state(CHAIN, CHAIN.init(KEY), optimizer)
    lowered = make_train_step(CHAIN, OBJECTIVE, optimizer, accumulate=2).lower(
        state, epoch_batches(pairs(8), 4, seed=0)(0), KEY
    )
    memory = lowered.compile().memory_analysis()
    kept = (state.step, {k: state.params[k] for k in "ab"}, state.opt_state, {k: state.ema[k] for k in "ab"})
    assert memory.alias_size_in_bytes >= 0.999 * sum(x.nbytes for x in jax.tree.leaves(kept))
