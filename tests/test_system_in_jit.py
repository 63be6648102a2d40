"""A system is static structure: a plain argument of jitted functions, compiled once however often it is built."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax import Categorical, CompoundSystem, DirectObjective, Gaussian, LanguageModel, Node, Tool
from sysdpo_jax.models.decoder import Decoder
from tests.components.stubs import word_tokenizer
from tests.objectives.mixtures import DECODER
from tests.training.systems import pairs

KEY = jax.random.key(0)


def chain(scale=1.0, weight=2.0):
    """The same structure as `tests.training.systems.CHAIN`, anew."""
    nodes = (
        Node("a", Gaussian(3, 2), ("x",)),
        Node("b", Gaussian(2, 3, scale), ("a",), weight=weight),
        Node("c", Gaussian(1, 2), ("b",)),
    )
    return CompoundSystem(("x",), nodes)


def loss_of(traces=1):
    """The jitted loss with the system as a plain argument, which may be traced so many times."""
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=traces)
    def loss(system, params, reference, batch):
        return DirectObjective()(system, params, reference, batch, KEY)[0]

    return loss


def test_an_equal_system_with_other_parameters_is_compiled_once():
    loss, losses = loss_of(), set()
    for seed in range(3):
        system = chain()
        params, reference = system.init(jax.random.key(seed)), system.init(jax.random.key(seed + 1))
        losses.add(float(loss(system, params, reference, pairs(4, seed))))
    assert loss._cache_size() == 1
    assert len(losses) == 3


@pytest.mark.parametrize("change", [{"scale": 2.0}, {"weight": 3.0}])
def test_another_structure_is_another_program(change):
    """It is traced anew, with its own values: what differs is not taken for what is the same."""
    loss, params, reference = loss_of(2), chain().init(KEY), chain().init(jax.random.key(1))
    one, other = (float(loss(system, params, reference, pairs(4))) for system in (chain(), chain(**change)))
    assert one != other
    assert loss._cache_size() == 2
    with pytest.raises(AssertionError, match="is traced > 2 times"):
        loss(chain(scale=5.0), params, reference, pairs(4))


def test_a_system_is_a_node_without_leaves():
    system = chain()
    assert jax.tree.leaves(system) == []
    assert jax.tree.leaves({"system": system, "x": 1.0}) == [1.0]
    assert jax.tree.structure((system, 0)) == jax.tree.structure((chain(), 0)) != jax.tree.structure((chain(5.0), 0))
    assert jax.tree.map(lambda x: x + 1, {"system": system, "x": 1.0}) == {"system": system, "x": 2.0}


def test_a_system_goes_through_transformations_in_a_tree_of_arguments():
    """Beside arrays in one argument, under grad and vmap, without static_argnums."""
    system, params = chain(), chain().init(KEY)
    features = pairs(4).chosen

    def total(given):
        return sum(value.sum() for value in given["system"].log_prob(given["params"], features, KEY).values())

    gradient = jax.jit(jax.grad(lambda p, s: total({"system": s, "params": p})))(params, system)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params)
    both = jax.jit(jax.vmap(total))({"system": system, "params": many})
    np.testing.assert_allclose(both[0], total({"system": system, "params": params}), rtol=1e-5)


def halve(text):
    return text.split()[0]


def test_models_built_twice_are_equal_structure():
    """A decoder with its tokenizer, a table and a tool: none compares by identity or holds arrays."""

    def built():
        model = LanguageModel(Decoder(DECODER), word_tokenizer(), 4, 6)
        nodes = (
            Node("text", model, ("x",)), Node("word", Tool(halve), ("text",)), Node("y", Categorical(2, (2,)), ("z",)),
        )  # fmt: skip
        return CompoundSystem(("x", "z"), nodes)

    assert built() == built()
    assert hash(built()) == hash(built())
    assert jax.tree.structure(built()) == jax.tree.structure(built())
