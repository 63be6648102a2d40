"""The system's transformation against optax by hand, its precisions, and what is never trained."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sysdpo_jax import CompoundSystem, DirectObjective, Gaussian, Node
from sysdpo_jax.training import (
    FROZEN,
    ComponentOptimizer,
    OptimizerError,
    create_state,
    make_optimizer,
    make_train_step,
)
from sysdpo_jax.trees import by_path
from tests.training.systems import CHAIN, pairs

KEY = jax.random.key(2)


def run(transformation, params, gradients):
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_every_component_is_trained_as_optax_would_train_its_tree_alone():
    """The same operations in the same order, so to the bit. Clips of one component do not see another's gradient."""
    params = {key: CHAIN.init(KEY)[key] for key in "ab"}
    rng = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params) for _ in range(3)]
    transforms = {"a": (optax.adamw(0.1), 0.5), "b": (optax.sgd(0.1, momentum=0.9), None)}
    optimizer = make_optimizer({key: ComponentOptimizer(*settings) for key, settings in transforms.items()})
    found, _ = run(optimizer.transformation, params, gradients)
    for key, (alone, limit) in transforms.items():
        whole = alone if limit is None else optax.chain(optax.clip_by_global_norm(limit), alone)
        expected, _ = run(whole, params[key], [each[key] for each in gradients])
        jax.tree.map(np.testing.assert_array_equal, found[key], expected)


def test_the_clip_is_computed_in_float32_whatever_the_gradients_are_in():
    """Norms of bfloat16 have 3 digits: a hundred equal leaves would add up to a norm 1% off or worse."""
    leaves = {f"w{n}": jnp.full(7, 0.1 + 0.003 * n, jnp.bfloat16) for n in range(100)}
    optimizer = make_optimizer({"a": ComponentOptimizer(optax.sgd(1.0), clip_norm=1e-2)})
    norm = np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in leaves.values()))
    np.testing.assert_allclose(optimizer.norms({"a": leaves})["a"], norm, rtol=1e-6)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), leaves)
    updates, _ = optimizer.transformation.update({"a": leaves}, optimizer.transformation.init({"a": zeros}))
    for name, leaf in leaves.items():
        expected = -np.asarray(leaf, np.float64) * 1e-2 / norm
        # Half a step of bfloat16, in which the clipped gradient is handed on.
        np.testing.assert_allclose(np.asarray(updates["a"][name], np.float64), expected, rtol=2**-8)
    assert optimizer.clipped(optimizer.norms({"a": leaves})) == {"a": 1}


def test_parameters_are_their_master_weights_rounded():
    """In a tree of both precisions; a leaf that has 32 bits is its master weight itself."""
    rng = np.random.default_rng(1)
    params = {"a": {"w": jnp.asarray(rng.normal(size=500), jnp.bfloat16), "scale": jnp.ones(500, jnp.float32)}}
    gradients = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=500), x.dtype), params) for _ in range(20)]
    optimizer = make_optimizer({"a": ComponentOptimizer(optax.adam(3e-3), master_weights=True)})
    found, state = jax.jit(lambda p, g: run(optimizer.transformation, p, g))(params, gradients)
    masters = state.inner_states["a"].inner_state.weights["a"]
    assert {leaf.dtype for leaf in jax.tree.leaves(masters)} == {jnp.dtype("float32")}
    for name, leaf in found["a"].items():
        assert leaf.dtype == params["a"][name].dtype
        np.testing.assert_array_equal(leaf, masters[name].astype(leaf.dtype))


@dataclass(frozen=True)
class WithCodec(Gaussian):
    """A Gaussian beside a part that only `encode` and `sample` would read, and one whose name begins alike."""

    @property
    def frozen(self):
        return ("codec",)

    def init(self, key):
        codec = {"kernel": jnp.ones(3), "deeper": {"bias": jnp.ones(2)}}
        return {**super().init(key), "codec": codec, "codec_of_its_own": jnp.ones(2)}


CODED = CompoundSystem(("x",), (Node("a", WithCodec(3, 2), ("x",)), *CHAIN.nodes[1:]))
DECAYED = ComponentOptimizer(optax.adamw(0.1, weight_decay=0.5))


def test_what_a_component_declares_frozen_is_not_trained_whatever_the_pattern():
    """With weight decay and every leaf asked for: not changed, averaged or remembered; shared with the reference."""
    optimizer = make_optimizer({"a": DECAYED, "b": DECAYED, "c": FROZEN}, ema_decay=0.9)
    params = CODED.init(KEY)
    before = jax.device_get(params["a"])
    state, step = create_state(CODED, params, optimizer), make_train_step(CODED, DirectObjective(), optimizer)
    frozen = {"codec/kernel", "codec/deeper/bias"}
    assert by_path(state.frozen["a"]).keys() == frozen
    assert not [path for path in by_path((state.opt_state, state.ema, state.reference)) if "codec/" in path]
    assert state.reference_params["a"]["codec"]["kernel"] is state.frozen["a"]["codec"]["kernel"]
    state, _ = step(state, pairs(8), KEY)
    for path, leaf in by_path(state.params["a"]).items():
        assert np.array_equal(leaf, by_path(before)[path]) == (path in frozen), path


def test_nodes_that_share_a_tree_keep_what_either_of_them_declares_frozen():
    plain = Node("b", Gaussian(3, 3), ("a",), params="a")
    system = CompoundSystem(("x",), (Node("a", WithCodec(3, 3), ("x",)), plain))
    tree = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3), "codec": {"kernel": jnp.ones(3)}}
    mask = make_optimizer({"a": DECAYED}).mask(system, {"a": tree})
    assert {path for path, trained in by_path(mask["a"]).items() if not trained} == {"codec/kernel"}


def test_a_pattern_of_frozen_parts_alone_is_refused_with_their_names():
    optimizer = make_optimizer({"a": ComponentOptimizer(optax.sgd(0.1), trainable="^codec/"), "b": FROZEN, "c": FROZEN})
    with pytest.raises(OptimizerError, match="'a' beside its frozen parts codec: fix the pattern"):
        create_state(CODED, CODED.init(KEY), optimizer)
