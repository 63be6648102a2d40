"""Roles: LoRA factors on the weights of one base, which compute what whole copies with the same factors compute."""

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import (
    FROZEN,
    LORA_PARAMS,
    ComponentOptimizer,
    CompoundSystem,
    DirectObjective,
    GraphError,
    LanguageModel,
    LoRA,
    Node,
    PairBatch,
    Trainer,
    create_state,
    describe_sharding,
    log_ratio,
    lora_factors,
    make_optimizer,
    make_train_step,
    precompute_reference,
)
from sysdpo_jax.models import Decoder, DecoderConfig
from sysdpo_jax.models.lora import LoRAError
from sysdpo_jax.training import CheckpointMismatchError, OptimizerError, step_flops
from sysdpo_jax.training.compiling import CANDIDATES, OF_SEVERAL
from sysdpo_jax.trees import by_path
from tests.components.drawn import drawn
from tests.components.stubs import WORDS, word_tokenizer

KEY = jax.random.key(0)
DECODER = DecoderConfig(14, 16, 24, 2, 4, 2, max_position_embeddings=24)
MODEL = LanguageModel(Decoder(DECODER), word_tokenizer(), 12, 4)
ROLES = ("plan", "write", "review")
LORAS = {"plan": LoRA(2, 4.0), "write": LoRA(3, 3.0, "mlp"), "review": LoRA(2, 1.0, "all_linear")}
LORA = ComponentOptimizer(optax.adam(1e-2), trainable=LORA_PARAMS)
OPTIMIZER = make_optimizer(dict.fromkeys(ROLES, LORA))
OBJECTIVE = DirectObjective(0.5)


def joined(*texts):
    return " ".join(texts)


def system(*bases, model=MODEL):
    """bases: of the three nodes in turn, by default plan's for the other two."""
    bases = bases or (None, "plan", "plan")
    joining = replace(model, prompt=joined)
    parents, components = (("x",), ("x", "plan"), ("plan", "write")), (model, joining, joining)
    rows = zip(ROLES, components, parents, bases, strict=True)
    return CompoundSystem(("x",), tuple(Node(n, c, p, base=b) for n, c, p, b in rows))


def weights(seed=0):
    return drawn(MODEL.init, seed)


def factors_of(base, role, seed=None):
    """The role's factors; seed: of a B that is not zero."""
    made = lora_factors(base, LORAS[role], jax.random.key(ROLES.index(role)))
    return made if seed is None else drawn_b(made, seed)


def drawn_b(tree, seed):
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        return jax.numpy.asarray(0.1 * rng.normal(size=x.shape), x.dtype) if "lora_b" in str(path[-1]) else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def on_one(seed=None):
    """The parameters of `system()`: the base has factors itself."""
    base = weights()
    own = {role: factors_of(base, role, None if seed is None else seed + i) for i, role in enumerate(ROLES)}
    whole = Node("n", MODEL, ("x",), params="own", base="base").tree({"base": base, "own": own["plan"]})
    return {**own, "plan": whole}


def copies(params):
    """What three models of their own hold, each array its own."""
    return {node.name: jax.tree.map(jax.numpy.copy, node.tree(params)) for node in system().nodes}


def records(rows=4, seed=0):
    rng = np.random.default_rng(seed)
    text = lambda: " ".join(rng.choice(WORDS, rng.integers(1, 4)))  # noqa: E731
    return [{name: text() for name in ("x", *ROLES)} for _ in range(rows)]


def pairs(seed=0):
    return PairBatch(*(system().prepare(records(seed=2 * seed + side)) for side in (0, 1)))


@pytest.fixture(scope="module")
def steps():
    """Two updates, of roles and of models of their own with the same factors; those of the reference are others."""
    made, same = [], lambda params: params
    for graph, form in ((system(), same), (system(None, None, None), copies)):
        state = create_state(graph, form(on_one(seed=3)), OPTIMIZER, reference=form(on_one()))
        step = make_train_step(graph, OBJECTIVE, OPTIMIZER)
        metrics = []
        for number in range(2):
            state, figures = step(state, pairs(number), KEY)
            metrics.append(jax.device_get(figures))
        made.append((state, metrics))
    return made


def test_roles_train_as_models_of_their_own_do(steps):
    """Figures, gradients' norms among them, to 1e-5 and factors after Adam's updates of 1e-2 to 1e-4, in float32."""
    (roles, figures), (apart, expected) = steps
    assert figures[0].keys() == expected[0].keys()
    for one, other in zip(figures, expected, strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert abs(float(figures[0]["rewards/margins"])) > 1e-3
    trained, wanted = by_path(roles.trained), by_path(apart.trained)
    assert trained.keys() == wanted.keys()
    for path, leaf in trained.items():
        assert path.endswith(("lora_a", "lora_b"))
        np.testing.assert_allclose(leaf, wanted[path], rtol=0, atol=1e-4, err_msg=path)


def test_roles_sample_and_weigh_as_models_of_their_own_do():
    params = on_one(seed=3)
    apart = copies(params)
    inputs = [{"x": "a red ball"}, {"x": "the cube"}]
    assert system().sample(params, inputs, KEY) == system(None, None, None).sample(apart, inputs, KEY)
    features = system().prepare(records())
    # Each role its own: with another's factors it is another number.
    swapped = {**params, "review": drawn_b(params["review"], 99)}
    found, expected = (graph.log_prob(tree, features, KEY) for graph, tree in (
        (system(), params), (system(None, None, None), apart)))  # fmt: skip
    for role in ROLES:
        np.testing.assert_array_equal(found[role], expected[role])
    assert np.abs(found["review"] - system().log_prob(swapped, features, KEY)["review"]).min() > 1e-3
    # The base's own factors are no part of the others.
    other_plan = {**params, "plan": drawn_b(params["plan"], 98)}
    changed = system().log_prob(other_plan, features, KEY)
    np.testing.assert_array_equal(found["write"], changed["write"])
    assert np.abs(found["plan"] - changed["plan"]).min() > 1e-3


def test_the_reference_is_the_base_where_factors_begin_at_zero():
    """A log-ratio of 0 to 1e-6 before an update; against another base it is what the two log-probabilities say."""
    params = on_one()
    ratios = log_ratio(system(), params, params, system().prepare(records()), KEY)
    assert max(np.abs(value).max() for value in ratios.values()) < 1e-6
    reference = {**params, "plan": weights(seed=1)}
    features = system().prepare(records())
    ratios = log_ratio(system(), params, reference, features, KEY)
    ours, theirs = (system().log_prob(tree, features, KEY) for tree in (params, reference))
    np.testing.assert_allclose(ratios["write"], ours["write"] - theirs["write"], rtol=0, atol=1e-5)


def unique_bytes(tree):
    return sum(leaf.nbytes for leaf in {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values())


def test_the_base_is_in_memory_once():
    """The live buffers of a state of three roles: those of one, and the factors, moments and reference of two more."""
    params, one = on_one(), CompoundSystem(("x",), (Node("plan", MODEL, ("x",)),))
    state = create_state(system(), params, OPTIMIZER)
    alone = create_state(one, {"plan": params["plan"]}, make_optimizer({"plan": LORA}))
    added = {path: leaf.nbytes for path, leaf in by_path(params).items() if not path.startswith("plan")}
    factors = sum(size for path, size in added.items() if not path.endswith("scale"))
    # Factors, their reference and two moments; the rest are scales, and the counters of optimisers.
    assert 0 <= unique_bytes(state) - unique_bytes(alone) - 4 * factors <= sum(added.values()) - factors + 64
    arrays = [id(leaf) for leaf in jax.tree.leaves(state)]
    assert len(set(arrays)) == len(arrays)
    # Whole trees are put together of the same arrays.
    whole = system().node("write").tree(state.params)
    embedding = whole["embed_tokens"]["embedding"]
    assert embedding is state.params["plan"]["embed_tokens"]["embedding"]
    report = {
        row.name: row for row in describe_sharding(make_train_step(system(), OBJECTIVE, OPTIMIZER), state).components
    }
    assert report["write"].params == sum(leaf.nbytes for leaf in jax.tree.leaves(params["write"]))
    assert sum(row.params for row in report.values()) == unique_bytes(params)


def test_three_roles_take_the_memory_of_one():
    """At most 1.15 times, with as many rows each, by the compiler's figures and by the live buffers of the states."""
    wide = replace(DECODER, hidden_size=256, intermediate_size=512, num_hidden_layers=8, remat="whole")
    model, batch = replace(MODEL, decoder=Decoder(wide)), pairs()
    base = drawn(model.init)
    params = {role: lora_factors(base, LoRA(2, 4.0), KEY) for role in ROLES} | {"base": base}

    def sizes(graph, names):
        own = {name: params[name] for name in (*names, "base")}
        optimizer = make_optimizer({**dict.fromkeys(names, LORA), "base": FROZEN})
        state, step = create_state(graph, own, optimizer), make_train_step(graph, OBJECTIVE, optimizer)
        given = PairBatch(*({name: side[name] for name in names} for side in batch[:2]))
        memory = step.lower(state, given, KEY).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes, unique_bytes(state)

    one = sizes(CompoundSystem(("x",), (Node("plan", model, ("x",), base="base"),)), ("plan",))
    three = sizes(system(*("base",) * 3, model=model), ROLES)
    assert three[0] <= 1.15 * one[0]
    assert three[1] <= 1.15 * one[1]
    assert three[1] > one[1] > unique_bytes(base)


def test_several_nodes_may_be_in_memory_one_at_a_time():
    """`remat: auto` tries it last, and not where there is one node."""
    graph, params = system(), on_one()
    state, step = create_state(graph, params, OPTIMIZER), make_train_step(graph, OBJECTIVE, OPTIMIZER)
    assert step.settings(state, pairs(), KEY) == OF_SEVERAL == (*CANDIDATES, "whole")
    one = CompoundSystem(("x",), (Node("plan", MODEL, ("x",)),))
    optimizer = make_optimizer({"plan": LORA})
    state, step = create_state(one, {"plan": params["plan"]}, optimizer), make_train_step(one, OBJECTIVE, optimizer)
    alone = PairBatch(*({"plan": side["plan"]} for side in pairs()[:2]))
    assert step.settings(state, alone, KEY) == CANDIDATES


def test_a_base_that_no_node_has_is_frozen_and_shared():
    graph = system(*("base",) * 3)
    assert set(graph.param_keys) == {"base", *ROLES}
    params = graph.init(KEY)
    assert [params[role] for role in ROLES] == [{}, {}, {}]
    params = {**params, **{role: factors_of(params["base"], role) for role in ROLES}}
    optimizer = make_optimizer({**dict.fromkeys(ROLES, LORA), "base": FROZEN})
    state = create_state(graph, params, optimizer)
    state, metrics = make_train_step(graph, OBJECTIVE, optimizer)(state, pairs(), KEY)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=0, atol=1e-6)
    assert bool(metrics["finite"])
    assert '"write: LanguageModel on base"' in graph.describe()


def test_a_run_resumes_bit_for_bit_and_its_checkpoints_hold_no_weights(tmp_path):
    trainer = Trainer(system(), OBJECTIVE, OPTIMIZER, tmp_path / "run")

    def fit(params, steps, trainer=trainer):
        return trainer.fit(create_state(system(), params, OPTIMIZER), pairs, steps, KEY)

    fit(on_one(), 1)
    resumed = fit(on_one(), 2)
    whole = fit(on_one(), 2, Trainer(system(), OBJECTIVE, OPTIMIZER, tmp_path / "whole"))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert all("lora" in path for path in by_path(resumed.mutable.trained))
    other = on_one()
    other["plan"]["norm"]["weight"] = other["plan"]["norm"]["weight"] + 1e-3
    with pytest.raises(CheckpointMismatchError, match=r"frozen\.plan/norm/weight"):
        fit(other, 3)


def test_the_reference_of_roles_can_be_computed_beforehand():
    """1e-5 between a forward pass alone and the step's."""
    params, batch = on_one(seed=3), pairs()
    known = precompute_reference(system(), params, batch, ROLES, batch_size=2)
    state = create_state(system(), params, OPTIMIZER, precomputed=ROLES)
    expected = create_state(system(), params, OPTIMIZER)
    step = make_train_step(system(), OBJECTIVE, OPTIMIZER)
    _, figures = step(state, known, KEY)
    _, wanted = step(expected, batch, KEY)
    np.testing.assert_allclose(figures["loss"], wanted["loss"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(figures["grad_norm/review"], wanted["grad_norm/review"], rtol=1e-4)


def test_a_roles_operations_are_those_of_its_model():
    params = on_one()
    found = step_flops(system(), create_state(system(), params, OPTIMIZER), pairs())
    apart = system(None, None, None)
    assert found == step_flops(apart, create_state(apart, copies(params), OPTIMIZER), pairs())


@pytest.mark.parametrize("remat", [None, "full", "whole"])
def test_recomputing_whole_models_changes_nothing(remat):
    """1e-6 of the loss and 1e-5 of the factors: float32, in another order."""
    model = replace(MODEL, decoder=Decoder(replace(DECODER, remat=remat)))
    graph, params = system(model=model), on_one(seed=3)
    state, figures = make_train_step(graph, OBJECTIVE, OPTIMIZER)(create_state(graph, params, OPTIMIZER), pairs(), KEY)
    plain, expected = make_train_step(system(), OBJECTIVE, OPTIMIZER)(
        create_state(system(), params, OPTIMIZER), pairs(), KEY
    )
    np.testing.assert_allclose(figures["loss"], expected["loss"], rtol=0, atol=1e-6)
    for path, leaf in by_path(state.trained).items():
        np.testing.assert_allclose(leaf, by_path(plain.trained)[path], rtol=0, atol=1e-5, err_msg=path)


def graph_of(*nodes):
    return CompoundSystem(("x",), tuple(Node(name, MODEL, ("x",), **fields) for name, fields in nodes))


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ([("a", {"base": "a"})], "the base 'a' of 'a' is a role itself"),
        ([("a", {}), ("b", {"base": "a"}), ("c", {"base": "b"})], "the base 'b' of 'c' is a role itself"),
        (
            [("a", {}), ("b", {"base": "a", "params": "p"}), ("c", {"params": "p"})],
            "'c' has the base None, another node with the parameters 'p' the base 'a'",
        ),
    ],
)
def test_bases_that_cannot_be_are_refused(nodes, said):
    with pytest.raises(GraphError) as error:
        graph_of(*nodes)
    assert said in str(error.value)


def test_what_does_not_fit_a_base_is_refused_by_name():
    params = on_one()
    with pytest.raises(ValueError, match=r"missing \['plan'\]"):
        graph_of(("b", {"base": "plan"})).check_params({"b": {}})
    full = make_optimizer({**dict.fromkeys(ROLES, LORA), "plan": ComponentOptimizer(optax.adam(1e-2))})
    with pytest.raises(OptimizerError, match="of 'plan', the base of 'write', would be trained, but roles share"):
        create_state(system(), params, full)
    with pytest.raises(OptimizerError, match="matches no parameter of 'review'"):
        create_state(system(), {**params, "review": {}}, OPTIMIZER)
    strange = {**params, "review": {"layers": {"mlp": {"fc1": params["review"]["layers"]["mlp"]["up_proj"]}}}}
    with pytest.raises(LoRAError, match="layers/mlp/fc1/lora_a is of a layer that the base does not have"):
        system().log_prob(strange, system().prepare(records()), KEY)
    with pytest.raises(LoRAError, match="LoRA target 'fc1' finds no dense layer"):
        lora_factors(params["plan"], LoRA(2, 4.0, "fc1"), KEY)
    wider = replace(MODEL, decoder=Decoder(replace(DECODER, hidden_size=32)))
    nodes = Node("a", MODEL, ("x",)), Node("b", wider, ("x",), base="a")
    with pytest.raises(GraphError, match="'b' shares the parameters 'a' with another node but its component needs"):
        CompoundSystem(("x",), nodes).init(KEY)
