"""The graph: its errors, its order, plates, shared parameters, and that equal systems do not recompile."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax import Categorical, CompoundSystem, Gaussian, GraphError, Node, RecordError, Tool

KEY = jax.random.key(0)


def double(values):
    return [2 * value for value in values]


def test_nodes_are_sorted_parents_first():
    system = CompoundSystem(
        inputs=("x",),
        nodes=(
            Node("c", Categorical(2, (2, 2)), ("a", "b")),
            Node("b", Categorical(2, (2,)), ("a",)),
            Node("a", Categorical(2, (2,)), ("x",)),
        ),
    )
    assert [node.name for node in system.nodes] == ["a", "b", "c"]


TABLE = Categorical(2, (2,))
READS = Node("r", TABLE, ("x",))
PLATES = Node("a", TABLE, ("x",), plate=2), Node("b", TABLE, ("a",), plate=3)


@pytest.mark.parametrize(
    ("inputs", "nodes", "message"),
    [
        (("x",), (Node("a", TABLE, ("b",)), Node("b", TABLE, ("a",)), READS), "cycle: (a -> b -> a|b -> a -> b)"),
        (("x",), (Node("a", TABLE, ("a",)), READS), "cycle: a -> a"),
        (("x",), (Node("a", TABLE, ("nowhere",)), READS), "'a' has an unknown parent 'nowhere'"),
        (("ask",), (Node("a", TABLE, "ask"),), r"are the text 'ask': write \('ask',\)"),
        (("x",), (Node("a", TABLE, ("x",)), Node("a", TABLE, ("x",))), "'a' is used twice"),
        (("x",), (Node("x", TABLE),), "'x' is used twice"),
        (("x", "unread"), (Node("a", TABLE, ("x",)),), "no node reads the input 'unread'"),
        (("x",), PLATES, "'b' is a plate of 3.*'a' is one of 2"),
        (("x",), (Node("a", TABLE, ("x",), plate=0),), "'a' has plate=0"),
    ],
)  # fmt: skip
def test_a_bad_graph_names_the_node(inputs, nodes, message):
    with pytest.raises(GraphError, match=message):
        CompoundSystem(inputs=inputs, nodes=nodes)


def chain(weight=1.0):
    return CompoundSystem(
        inputs=("x",),
        nodes=(
            Node("y", Categorical(3, (2,)), ("x",)),
            Node("z", Categorical(2, (3,)), ("y",), weight=weight),
        ),
    )


def test_a_record_without_a_value_names_row_and_node():
    with pytest.raises(RecordError, match="record 1 lacks a value for the node 'z'"):
        chain().prepare([{"x": 0, "y": 1, "z": 1}, {"x": 0, "y": 1}])
    with pytest.raises(RecordError, match="record 0 lacks a value for the input 'x'"):
        chain().prepare([{"y": 1, "z": 1}])
    with pytest.raises(RecordError, match=r"node 'y': .* is 7 in row 0, outside 0\.\.2"):
        chain().prepare([{"x": 0, "y": 7, "z": 1}])


def test_log_prob_sums_to_one_over_every_run():
    """Enumeration: sum over all (y, z) of exp(sum of node log-probabilities) is 1 for each x; float32, so 1e-6."""
    system = chain()
    params = system.init(KEY)
    for x in range(2):
        runs = [{"x": x, "y": y, "z": z} for y, z in itertools.product(range(3), range(2))]
        total = sum(system.log_prob(params, system.prepare(runs), KEY).values())
        np.testing.assert_allclose(np.exp(total).sum(), 1.0, atol=1e-6)


def test_log_prob_is_the_product_of_the_tables():
    system = chain()
    params = system.init(KEY)
    y_table = np.exp(np.asarray(params["y"]["logits"], np.float64))
    z_table = np.exp(np.asarray(params["z"]["logits"], np.float64))
    expected = np.log(y_table[1, 2] / y_table[1].sum() * z_table[2, 0] / z_table[2].sum())
    got = system.log_prob(params, system.prepare([{"x": 1, "y": 2, "z": 0}]), KEY)
    np.testing.assert_allclose(sum(got.values())[0], expected, atol=1e-6)


def test_a_plate_sums_over_copies_and_maps_plated_parents():
    """Each copy of `b` reads its own copy of `a`; `c` reads all of them. Expected values from the closed form."""
    system = CompoundSystem(
        inputs=("x",),
        nodes=(
            Node("a", Categorical(3, (2,)), ("x",), plate=2),
            Node("b", Categorical(4, (3, 2)), ("a", "x"), plate=2),
            Node("c", Gaussian(1, 2), ("a",)),
        ),
    )
    params = system.init(KEY)
    record = {"x": 1, "a": [2, 0], "b": [3, 1], "c": 0.5}
    got = system.log_prob(params, system.prepare([record]), KEY)
    a, b = (np.asarray(jax.nn.log_softmax(params[name]["logits"])) for name in "ab")
    np.testing.assert_allclose(got["a"][0], a[1, 2] + a[1, 0], atol=1e-6)
    np.testing.assert_allclose(got["b"][0], b[2, 1, 3] + b[0, 1, 1], atol=1e-6)
    mean = np.array([2.0, 0.0]) @ np.asarray(params["c"]["kernel"])
    np.testing.assert_allclose(got["c"][0], -0.5 * ((0.5 - mean[0]) ** 2 + np.log(2 * np.pi)), atol=1e-5)
    with pytest.raises(RecordError, match="record 0: node 'a' is a plate of 2, got 3 values"):
        system.prepare([{**record, "a": [1, 1, 1]}])


def test_tools_fan_out_into_plates_and_contribute_zero():
    system = CompoundSystem(
        inputs=("x",),
        nodes=(
            Node("pair", Tool(double), ("x",), plate=2),
            Node("value", Gaussian(1, 1), ("pair",), plate=2),
            Node("largest", Tool(max), ("value",)),
        ),
    )
    params = system.init(KEY)
    assert set(params) == {"value"}
    [record] = system.sample(params, [{"x": (1.0, 3.0)}], KEY)
    assert record["pair"] == [2.0, 6.0]
    assert record["largest"] == max(record["value"])
    without_tools = {"x": record["x"], "value": record["value"]}
    terms = system.log_prob(params, system.prepare([without_tools]), KEY)
    assert float(terms["pair"][0]) == 0.0
    assert float(terms["largest"][0]) == 0.0


def test_nodes_that_share_a_key_share_one_tree():
    shared = CompoundSystem(
        inputs=("x",),
        nodes=(
            Node("first", Categorical(2, (2,)), ("x",), params="table"),
            Node("second", Categorical(2, (2,)), ("first",), params="table"),
        ),
    )
    params = shared.init(KEY)
    assert set(params) == {"table"}
    grads = jax.grad(
        lambda p: sum(shared.log_prob(p, shared.prepare([{"x": 0, "first": 1, "second": 0}]), KEY).values()).sum()
    )(params)
    assert (np.abs(grads["table"]["logits"]).sum(axis=1) > 0).all(), "both rows were used, one by each node"
    clash = CompoundSystem(
        inputs=("x",),
        nodes=(
            Node("first", Categorical(2, (2,)), ("x",), params="table"),
            Node("second", Categorical(3, (2,)), ("first",), params="table"),
        ),
    )
    with pytest.raises(GraphError, match="'second' shares the parameters 'table'"):
        clash.init(KEY)


def test_an_equal_system_does_not_recompile():
    @jax.jit
    def inner(params, features):
        return sum(chain().log_prob(params, features, KEY).values())

    @chex.assert_max_traces(1)
    def traced(system, params, features):
        return sum(system.log_prob(params, features, KEY).values())

    chex.clear_trace_counter()
    step = jax.jit(traced, static_argnums=0)
    system = chain()
    params, features = system.init(KEY), system.prepare([{"x": 0, "y": 1, "z": 1}])
    for _ in range(3):
        rebuilt = chain()
        assert hash(rebuilt) == hash(system)
        np.testing.assert_allclose(step(rebuilt, params, features), inner(params, features))
    assert chain(weight=2.0) != system


def test_missing_parameters_are_named():
    params = chain().init(KEY)
    with pytest.raises(ValueError, match=r"missing \['z'\], unknown \['w'\]"):
        chain().log_prob({"y": params["y"], "w": {}}, chain().prepare([{"x": 0, "y": 0, "z": 0}]), KEY)


def test_noise_depends_on_the_node_and_not_on_its_neighbours():
    """Sampling y is the same whether or not another node is added to the system."""
    alone = CompoundSystem(inputs=("x",), nodes=(Node("y", Categorical(3, (2,)), ("x",)),))
    params = chain().init(KEY)
    inputs = [{"x": 0}] * 16
    both = chain().sample(params, inputs, KEY)
    only = alone.sample({"y": params["y"]}, inputs, KEY)
    assert [r["y"] for r in both] == [r["y"] for r in only]
    assert jnp.unique(jnp.array([r["y"] for r in only])).size > 1


def test_describe_is_mermaid_with_every_edge():
    text = chain().describe()
    assert text.startswith("graph LR")
    assert "x --> y" in text
    assert "y --> z" in text
