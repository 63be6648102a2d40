"""Switches: what runs in which rows, in samples, log-probabilities, batches and files."""

import itertools
import json
import time
from collections import deque
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    DirectObjective,
    Gaussian,
    GraphError,
    Node,
    PreferenceRecord,
    RecordError,
    SamplingObjective,
    SearchedBatches,
    Switch,
    Tool,
    Trainer,
    create_state,
    draw_intermediates,
    epoch_batches,
    load_preferences,
    log_ratio,
    make_mesh,
    make_optimizer,
    make_pairs,
    make_train_step,
    precompute_reference,
    preference_dataset,
    prepare_pairs,
    rollout,
    sampled_batch,
)
from sysdpo_jax.components.routed import LEVELS, Routed, of_part, room_for
from sysdpo_jax.training import ComponentOptimizer
from sysdpo_jax.training.throughput import count_flops, count_units

KEY = jax.random.key(0)


def negated(value):
    return 1 - value


TWO, THREE = Categorical(2, (2,)), Categorical(3, (2,))


def router(first=TWO, second=THREE):
    """x -> route; route 0 -> short, route 1 -> draft -> flipped (a tool) -> long."""
    return CompoundSystem(
        ("x",),
        (
            Node("answer", Switch((0, 1)), ("route", "short", "long")),
            Node("long", second, ("flipped",)),
            Node("flipped", Tool(negated), ("draft",)),
            Node("draft", Categorical(2, (2,)), ("x",)),
            Node("short", first, ("x",)),
            Node("route", Categorical(2, (2,)), ("x",)),
        ),
    )


ROUTER = router()


def every_run():
    for x in range(2):
        for short in range(2):
            yield {"x": x, "route": 0, "short": short}
        for draft, long in itertools.product(range(2), range(3)):
            yield {"x": x, "route": 1, "draft": draft, "long": long}


RUNS = list(every_run())


def by_hand(params, run):
    """log p of a run from the tables, in float64."""
    tables = {name: np.asarray(jax.nn.log_softmax(tree["logits"]), np.float64) for name, tree in params.items()}
    terms = {"route": tables["route"][run["x"], run["route"]], "short": 0.0, "draft": 0.0, "long": 0.0}
    if run["route"] == 0:
        return terms | {"short": tables["short"][run["x"], run["short"]]}
    drafted = tables["draft"][run["x"], run["draft"]], tables["long"][1 - run["draft"], run["long"]]
    return terms | dict(zip(("draft", "long"), drafted, strict=True))


def names(system):
    return [node.name for node in system.nodes]


def test_what_only_branches_read_comes_behind_what_chooses_and_runs_where_it_is_chosen():
    assert names(ROUTER).index("route") < min(map(names(ROUTER).index, ("short", "draft")))
    assert ROUTER.flow.conditional == {"short", "draft", "flipped", "long"}
    # What a branch shares with what always runs, always runs; so does what the choice follows from.
    shared = CompoundSystem(
        ("x",),
        (
            Node("draft", Categorical(2, (2,)), ("x",)),
            Node("route", Categorical(2, (2,)), ("draft",)),
            Node("read", Tool(negated), ("long",)),
            Node("long", Categorical(2, (2,)), ("draft",)),
            Node("answer", Switch((0, 1)), ("route", "draft", "long")),
        ),
    )
    assert shared.flow.conditional == set()


def last_of(*values):
    return values[-1]


def test_long_ways_are_built_and_decided_at_once():
    """Each of 40 tools reads all earlier ones, and the last one is a branch, or chooses: 2 ** 39 ways lead to it."""
    start = time.perf_counter()
    links = tuple(Node(f"n{i}", Tool(last_of), ("x", *(f"n{j}" for j in range(i)))) for i in range(40))
    ends = (Node("left", TWO, ("x",)), Node("right", TWO, ("x",)))
    behind = CompoundSystem(("x",), (*links, *ends, Node("answer", Switch((0, 1)), ("x", "left", "n39"))))
    assert behind.flow.conditional == {node.name for node in (*links, *ends)} - {"right"}
    assert [behind.flow.runs("n0", {"x": x}) for x in range(2)] == [False, True]
    choosing = CompoundSystem(("x",), (*links, *ends, Node("answer", Switch((0, 1)), ("n39", "left", "right"))))
    assert choosing.flow.conditional == {"left", "right"}
    assert choosing.flow.depends["left"] == ("x", "n39")
    assert time.perf_counter() - start < 1


def test_switches_nest():
    """The inner one, and what chooses in it, run where the outer one chooses it."""
    system = CompoundSystem(
        ("x", "kind"),
        (
            Node("inner", Switch(("a", "b")), ("which", "one", "two")),
            Node("which", Tool("ab".__getitem__), ("pick",)),
            Node("pick", Categorical(2, (2,)), ("x",)),
            Node("one", Categorical(2, (2,)), ("x",)),
            Node("two", Categorical(2, (2,)), ("x",)),
            Node("other", Categorical(2, (2,)), ("x",)),
            Node("outer", Switch((True, False)), ("kind", "inner", "other")),
        ),
    )
    assert system.flow.conditional == {"inner", "which", "pick", "one", "two", "other"}
    runs = system.sample(system.init(KEY), [{"x": 0, "kind": row % 2 == 0} for row in range(16)], KEY)
    for row, run in enumerate(runs):
        if row % 2:
            assert run.keys() == {"x", "kind", "other", "outer"}
            assert run["outer"] == run["other"]
        else:
            inner = {"a": "one", "b": "two"}[run["which"]]
            assert run.keys() == {"x", "kind", "pick", "which", inner, "inner", "outer"}
            assert run["outer"] == run["inner"] == run[inner]
    assert len({run["which"] for run in runs[::2]}) == 2


def test_log_prob_is_that_of_what_ran():
    """Every run by enumeration; each x's probabilities sum to 1. float32, so 1e-6."""
    params = ROUTER.init(KEY)
    terms = jax.jit(ROUTER.log_prob)(params, ROUTER.prepare(RUNS), KEY)
    expected = [by_hand(params, run) for run in RUNS]
    for name in ("route", "short", "draft", "long"):
        np.testing.assert_allclose(terms[name], [own[name] for own in expected], atol=1e-6)
    whole = np.exp(sum(terms.values()))
    np.testing.assert_allclose([whole[:8].sum(), whole[8:].sum()], 1.0, atol=1e-6)


def in_room(features, name, room):
    return features | {name: replace(features[name], room=room)}


@pytest.mark.parametrize("room", [12, 13, 16])
def test_room_changes_neither_values_nor_gradients(room):
    """12 of 16 runs are long ones. Against the gradient of the tables' own formula, to rounding."""
    params, features = ROUTER.init(KEY), ROUTER.prepare(RUNS)
    weights = np.random.default_rng(0).normal(size=len(RUNS)).astype(np.float32)

    @jax.jit
    def through(params, features):
        return jnp.sum(weights * ROUTER.log_prob(params, features, KEY)["long"])

    def direct(table):
        log_probs = jax.nn.log_softmax(table)
        return sum(w * log_probs[1 - r["draft"], r["long"]] for w, r in zip(weights, RUNS, strict=True) if "long" in r)

    value, grad = jax.value_and_grad(through)(params, in_room(features, "long", room))
    expected, own = jax.value_and_grad(direct)(params["long"]["logits"])
    np.testing.assert_allclose(value, expected, atol=1e-5)
    np.testing.assert_allclose(grad["long"]["logits"], own, atol=1e-5)


def test_runs_without_room_are_not_dropped_in_silence():
    features = in_room(ROUTER.prepare(RUNS), "long", 11)
    assert np.isnan(ROUTER.log_prob(ROUTER.init(KEY), features, KEY)["long"]).all()


@dataclass(frozen=True)
class Watched(Categorical):
    """Keeps the parents of the rows that it is asked for."""

    seen: deque = None

    __hash__ = object.__hash__

    def sample(self, params, parents, key):
        self.seen.append(list(parents["x"]))
        return super().sample(params, parents, key)


def test_only_the_rows_of_a_branch_are_sampled():
    """A row's draw does not depend on which other rows there are: those that a resumed rollout has are not made."""
    watched = Watched(2, (2,), deque())
    system = router(first=watched)
    params, inputs = system.init(KEY), [{"x": row % 2} for row in range(64)]
    runs = system.sample(params, inputs, KEY)
    assert list(watched.seen) == [[run["x"] for run in runs if run["route"] == 0]]
    assert 0 < len(watched.seen[0]) < 64
    for run in runs:
        branch = {"short"} if run["route"] == 0 else {"draft", "flipped", "long"}
        assert run.keys() == {"x", "route", "answer", *branch}
        assert run["answer"] == run["short" if run["route"] == 0 else "long"]
    some = [None if row % 3 else values for row, values in enumerate(inputs)]
    again = system.attempt(params, some, KEY)
    assert again == [None if row % 3 else runs[row] for row in range(64)]
    # As often as the tables say: five standard errors of a share of 64 are 0.31.
    share = np.mean([run["route"] for run in runs])
    table = np.asarray(jax.nn.softmax(params["route"]["logits"]))
    assert abs(share - table[:, 1].mean()) < 0.31


def test_tools_of_a_branch_are_called_for_its_rows_alone():
    called = []

    def tool(value):
        called.append(value)
        return value

    switch = Node("a", Switch(("use", "leave")), ("x", "t", "x"))
    system = CompoundSystem(("x",), (Node("t", Tool(tool), ("x",)), switch, Node("b", Tool(repr), ("a",))))
    runs = system.sample({}, [{"x": "use"}, {"x": "leave"}, {"x": "use"}], KEY)
    assert called == ["use", "use"]
    assert [run["a"] for run in runs] == ["use", "leave", "use"]
    assert [sorted(run) for run in runs] == [["a", "b", "t", "x"], ["a", "b", "x"], ["a", "b", "t", "x"]]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"x": 0, "route": 7}, "record 1: node 'answer': the value of 'route', 7 is none of the cases 0, 1"),
        ({"x": 0, "route": True, "short": 0}, "True is none of the cases 0, 1"),
        ({"x": 0, "route": 0}, "record 1 lacks a value for the node 'short'"),
        ({"x": 0, "route": 1, "short": 0, "draft": 0, "long": 0}, "record 1: node 'short' has a value, but what"),
    ],
)
def test_a_record_that_is_no_run_is_refused(record, message):
    with pytest.raises(RecordError, match=message):
        ROUTER.prepare([RUNS[0], record])


def test_none_is_no_value_where_a_node_did_not_run():
    whole = [{"short": None, "draft": None, "long": None, **run} for run in RUNS]
    jax.tree.map(np.testing.assert_array_equal, ROUTER.prepare(whole), ROUTER.prepare(RUNS))


def test_a_sampled_value_that_is_no_case_is_a_failure_of_its_row():
    switch = Node("b", Switch((0, 1)), ("x", "a", "x"))
    system = CompoundSystem(("x",), (Node("a", Tool(str), ("x",)), switch, Node("c", Tool(repr), ("b",))))
    runs = system.attempt({}, [{"x": 0}, {"x": 5}, {"x": 1}], KEY)
    assert [isinstance(run, dict) for run in runs] == [True, False, True]
    with pytest.raises(RecordError, match="row 1: node 'b': the value of 'x', 5 is none of the cases 0, 1"):
        system.sample({}, [{"x": 0}, {"x": 5}, {"x": 1}], KEY)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ((Node("a", Switch((0, 1)), ("x", "x")),), "'a' has 2 parents and its switch 2 cases"),
        ((Node("a", Switch((0,)), ("x", "x"), plate=2),), "'a' is a Switch with a plate"),
        ((Node("a", Switch((0, 1)), ("b", "x", "x")), Node("b", Tool(repr), ("a",))), "cycle"),
    ],
)
def test_a_bad_switch_is_refused(nodes, message):
    with pytest.raises(GraphError, match=message):
        CompoundSystem(("x",), nodes)


@pytest.mark.parametrize("cases", [(), (1, 1)])
def test_cases_are_told_apart(cases):
    with pytest.raises(ValueError, match="each of them once"):
        Switch(cases)


def preferences(rows, seed=0):
    """Records whose two sides often take different branches."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        x = int(rng.integers(2))
        own = [run for run in RUNS if run["x"] == x]
        sides = ({k: v for k, v in own[rng.integers(len(own))].items() if k != "x"} for _ in range(2))
        made.append(PreferenceRecord({"x": x}, *sides))
    return made


RECORDS = preferences(48)
OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.sgd(0.1)) for name in ROUTER.param_keys})


def loss_by_hand(params, reference, records, beta=0.1):
    def ratio(x, side):
        run = {"x": x, **side}
        return sum(by_hand(params, run).values()) - sum(by_hand(reference, run).values())

    margins = [ratio(r.inputs["x"], r.chosen) - ratio(r.inputs["x"], r.rejected) for r in records]
    return np.mean(np.log1p(np.exp(-beta * np.array(margins))))


def test_the_loss_is_that_of_whole_runs():
    params, reference = ROUTER.init(KEY), ROUTER.init(jax.random.key(1))
    batch = prepare_pairs(ROUTER, RECORDS)
    loss, aux = DirectObjective()(ROUTER, params, reference, batch, KEY)
    np.testing.assert_allclose(loss, loss_by_hand(params, reference, RECORDS), atol=1e-6)
    terms = sum(aux.metrics[f"rewards/margins/{name}"] for name in ROUTER.param_keys)
    np.testing.assert_allclose(terms, aux.metrics["rewards/margins"], atol=1e-6)
    # How far a node has gone is told of the rows in which it ran.
    sides = [{"x": r.inputs["x"], **side} for r in RECORDS for side in (r.chosen, r.rejected)]
    moved = [by_hand(params, run)["long"] - by_hand(reference, run)["long"] for run in sides if run["route"] == 1]
    np.testing.assert_allclose(aux.metrics["drift/kl/long"], np.mean(np.square(moved)) / 2, rtol=1e-5)
    ratios = log_ratio(ROUTER, params, reference, batch.chosen, KEY)
    assert not np.asarray(ratios["answer"]).any()


def test_batches_have_room_for_the_runs_that_they_hold():
    dataset = preference_dataset(ROUTER, RECORDS, 16, seed=3)
    arrays = epoch_batches(prepare_pairs(ROUTER, RECORDS), 16, seed=3)
    params, reference = ROUTER.init(KEY), ROUTER.init(jax.random.key(1))
    rooms = set()
    for step in range(3):
        for batch in (dataset[step], arrays(step)):
            routed = batch.chosen["short"]
            number = int(routed.ran.sum() + batch.rejected["short"].ran.sum())
            assert routed.room == batch.rejected["short"].room == room_for(number, 32)
            assert number <= routed.room < number + 32 // LEVELS
            rooms.add(routed.room)
            dense = batch._replace(chosen=without_room(batch.chosen), rejected=without_room(batch.rejected))
            values = [DirectObjective()(ROUTER, params, reference, b, KEY)[0] for b in (batch, dense)]
            np.testing.assert_allclose(*values, atol=1e-6)
    assert max(rooms) < 32


def test_the_parts_of_a_batch_have_room_for_their_own_runs():
    """Of the whole batch, of all shards: a part has every fourth row, 8 places of both sides. By counting."""
    dataset = preference_dataset(ROUTER, RECORDS, 16, seed=3, accumulate=4)
    half = preference_dataset(ROUTER, RECORDS, 16, seed=3, shard=(1, 2), accumulate=4)
    arrays = epoch_batches(prepare_pairs(ROUTER, RECORDS), 16, seed=3, accumulate=4)
    for step in range(3):
        for batch in (dataset[step], arrays(step)):
            own = {name: batch.chosen[name].ran + 0 + batch.rejected[name].ran for name in ("short", "draft", "long")}
            for name, runs in own.items():
                most = max(int(runs[part::4].sum()) for part in range(4))
                assert batch.chosen[name].room == batch.rejected[name].room == 4 * max(1, most)
                assert of_part(batch, 4).chosen[name].room == max(1, most) < 8
                # A step with other parts takes no part of it for another.
                assert of_part(batch, 2).chosen[name].room == batch.chosen[name].room >= runs.sum()
        assert half[step].chosen["long"].room == dataset[step].chosen["long"].room
    with pytest.raises(ValueError, match="16 rows cannot be cut into 3 equal parts"):
        preference_dataset(ROUTER, RECORDS, 16, seed=3, accumulate=3)
    with pytest.raises(ValueError, match="16 rows cannot be cut into 0 equal parts"):
        epoch_batches(prepare_pairs(ROUTER, RECORDS), 16, seed=3, accumulate=0)


def test_batches_take_about_as_many_rows_each_way():
    """So that few programs are compiled: each set of rows with the same runs differs by one between batches."""
    dataset = preference_dataset(ROUTER, RECORDS, 16, seed=3)
    batches = [dataset[step] for step in range(36)]
    for name in ("short", "long"):
        runs = [int(b.chosen[name].ran.sum() + b.rejected[name].ran.sum()) for b in batches]
        assert max(runs) - min(runs) <= 4
    rooms = {tuple(b.chosen[name].room for name in ("short", "draft", "long")) for b in batches}
    assert len(rooms) <= 4


def test_shards_of_a_batch_have_the_room_of_the_whole_batch():
    whole = preference_dataset(ROUTER, RECORDS, 16, seed=3)[1]
    parts = [preference_dataset(ROUTER, RECORDS, 16, seed=3, shard=(index, 2))[1] for index in range(2)]
    assert {part.chosen["long"].room for part in parts} == {whole.chosen["long"].room}
    joined = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    jax.tree.map(np.testing.assert_array_equal, joined, whole)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_that_of_the_tables(accumulate):
    """Against the gradient by finite differences of the loss by hand, 1e-3 of its largest entry."""
    mesh = make_mesh()
    batch = preference_dataset(ROUTER, RECORDS, 16, seed=3, accumulate=accumulate)[0]
    start = ROUTER.init(KEY)
    state = create_state(ROUTER, start, OPTIMIZER, mesh)
    step = make_train_step(ROUTER, DirectObjective(), OPTIMIZER, mesh, accumulate)
    state, metrics = step(state, batch, KEY)
    assert bool(metrics["finite"])
    rows = preference_dataset(ROUTER, RECORDS, 16, seed=3).plan.at(0)[0]
    picked = [RECORDS[row] for row in rows]
    for name, tree in start.items():
        table, found = np.asarray(tree["logits"], np.float64), np.zeros_like(tree["logits"])
        for place in np.ndindex(*table.shape):
            sides = []
            for sign in (1, -1):
                moved = table.copy()
                moved[place] += sign * 1e-2
                sides.append(loss_by_hand({**start, name: {"logits": jnp.asarray(moved)}}, start, picked))
            found[place] = (sides[0] - sides[1]) / 2e-2
        got = (table - np.asarray(state.params[name]["logits"])) / 0.1
        np.testing.assert_allclose(got, found, atol=1e-4)


def test_a_branch_that_no_record_takes_costs_nothing_and_learns_nothing():
    records = [PreferenceRecord({"x": 0}, {"route": 0, "short": 0}, {"route": 0, "short": 1})] * 4
    batch = preference_dataset(ROUTER, records, 4, seed=0)[0]
    assert batch.chosen["long"].features is None
    assert prepare_pairs(ROUTER, records).chosen["long"].features is None
    state = create_state(ROUTER, ROUTER.init(KEY), OPTIMIZER)
    before = jax.device_get(state.params)
    state, metrics = make_train_step(ROUTER, DirectObjective(), OPTIMIZER)(state, batch, KEY)
    assert bool(metrics["finite"])
    np.testing.assert_array_equal(state.params["long"]["logits"], before["long"]["logits"])
    assert (np.asarray(state.params["short"]["logits"]) != before["short"]["logits"]).any()


def test_a_batch_in_which_a_branch_never_runs_has_the_shapes_of_the_others():
    taken = PreferenceRecord({"x": 0}, {"route": 1, "draft": 0, "long": 0}, {"route": 1, "draft": 0, "long": 1})
    other = PreferenceRecord({"x": 0}, {"route": 0, "short": 0}, {"route": 0, "short": 1})
    dataset = preference_dataset(ROUTER, [taken] + [other] * 7, 2, seed=0)
    batches = [dataset[step] for step in range(4)]
    counts = [int(batch.chosen["long"].ran.sum()) for batch in batches]
    assert sorted(counts) == [0, 0, 0, 1]
    assert {batch.chosen["long"].room for batch in batches} == {1, 2}
    shapes = {tuple(map(np.shape, jax.tree.leaves(batch))) for batch in batches}
    assert len(shapes) == 1


WIDTH, ROWS = 64, 32


def two_models(accumulate=1):
    """A system that sends each row to one of two linear models, and a batch half of whose rows go to each."""
    system = CompoundSystem(
        ("route", "x"),
        (
            Node("one", Gaussian(WIDTH, WIDTH), ("x",)),
            Node("two", Gaussian(WIDTH, WIDTH), ("x",)),
            Node("answer", Switch((0, 1)), ("route", "one", "two")),
        ),
    )
    rng = np.random.default_rng(0)

    def side(route):
        return {("one", "two")[route]: rng.normal(size=WIDTH)}

    routes = [row % 2 for row in range(ROWS)]
    records = [PreferenceRecord({"route": r, "x": rng.normal(size=WIDTH)}, side(r), side(r)) for r in routes]
    return system, preference_dataset(system, records, ROWS, seed=0, accumulate=accumulate)[0]


def without_room(side):
    return {name: replace(f, room=None) if isinstance(f, Routed) else f for name, f in side.items()}


def test_half_of_a_batch_to_each_of_two_models_costs_half_of_both():
    """By the compiler's own count and by ours: masking would compute every row in both."""
    system, batch = two_models()
    params = system.init(KEY)
    assert batch.chosen["one"].room == batch.chosen["two"].room == ROWS
    features = jax.tree.map(lambda *x: np.concatenate(x), batch.chosen, batch.rejected)
    masked = without_room(features)

    def loss(params, features):
        return sum(jnp.sum(term) for term in system.log_prob(params, features, KEY).values())

    def compiled(features):
        return jax.jit(jax.grad(loss)).lower(params, features).compile().cost_analysis()["flops"]

    ours = [count_flops(loss, params, which) for which in (features, masked)]
    assert ours[0] == ours[1] / 2 == 2 * (2 * ROWS) * WIDTH**2
    assert 0.45 < compiled(features) / compiled(masked) < 0.6
    # So do the parts of a batch; the compiler counts the body of their loop once.
    optimizer = make_optimizer({name: ComponentOptimizer(optax.sgd(0.1)) for name in system.param_keys})
    step = make_train_step(system, DirectObjective(), optimizer, make_mesh(), accumulate=2)
    state = create_state(system, params, optimizer)
    whole = batch._replace(chosen=without_room(batch.chosen), rejected=without_room(batch.rejected))
    costs = [
        step.lower(state, which, KEY).compile().cost_analysis()["flops"] for which in (two_models(2)[1], batch, whole)
    ]
    assert costs[0] < 0.6 * costs[1]
    assert costs[1] == costs[2]
    assert count_units(system, batch)["pairs_per_second"] == ROWS


def test_rollouts_make_pairs_that_train(tmp_path):
    """What a rollout gives goes through pairs, JSON and the prepared store, and comes to the same features."""
    params = ROUTER.init(KEY)
    runs = rollout(ROUTER, params, [{"x": 0}, {"x": 1}], KEY, samples=6)
    records = make_pairs(ROUTER, runs, np.arange(12.0), 6, pairs="all")
    assert {frozenset(r.chosen) for r in records} == {
        frozenset({"route", "short", "answer"}),
        frozenset({"route", "draft", "flipped", "long", "answer"}),
    }
    whole = dict.fromkeys(("short", "draft", "flipped", "long"))
    rows = [{"inputs": r.inputs, "chosen": whole | r.chosen, "rejected": whole | r.rejected} for r in records]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = load_preferences(path, ROUTER, cache=tmp_path / "cache")
    assert len(read) == len(records)
    loaded, own = (preference_dataset(ROUTER, source, 8, seed=0)[0] for source in (read, records))
    jax.tree.map(np.testing.assert_array_equal, loaded, own)


def test_references_are_computed_before_of_what_ran():
    params, pairs = ROUTER.init(KEY), prepare_pairs(ROUTER, RECORDS)
    known = precompute_reference(ROUTER, params, pairs, ["long", "short"])
    expected = ROUTER.log_prob(params, pairs.chosen, KEY)
    for name in ("long", "short"):
        np.testing.assert_allclose(known.reference[name][0], expected[name], atol=1e-6)


def test_routes_are_searched_for():
    """Every set of intermediates is found, and p(z | x) is the sum over the routes to z by enumeration; 1e-5."""
    first = Categorical(3, (2,))
    system = router(first=first)
    params, reference = system.init(KEY), system.init(jax.random.key(1))
    sets = draw_intermediates(system, params, [{"x": 0}, {"x": 1}], 8, KEY)
    expected = [{"route": 0}, {"route": 1, "draft": 0}, {"route": 1, "draft": 1}]
    assert all(sorted(own, key=str) == sorted(expected, key=str) for own in sets)
    # Both sides of a pair may have been made by different branches.
    records = [PreferenceRecord({"x": x}, {"short": 0}, {"long": 2}) for x in range(2)]
    batch = sampled_batch(system, records, sets, 3)
    loss, _ = SamplingObjective(0.5)(system, params, reference, batch, KEY)

    def log_p(params, x, z):
        t = {name: np.asarray(jax.nn.softmax(tree["logits"]), np.float64) for name, tree in params.items()}
        by_draft = sum(t["draft"][x, d] * t["long"][1 - d, z] for d in range(2))
        return np.log(t["route"][x, 0] * t["short"][x, z] + t["route"][x, 1] * by_draft)

    ratios = [[log_p(params, x, z) - log_p(reference, x, z) for z in (0, 2)] for x in range(2)]
    by_hand = np.mean([np.log1p(np.exp(-0.5 * (chosen - rejected))) for chosen, rejected in ratios])
    np.testing.assert_allclose(loss, by_hand, atol=1e-5)


def test_the_search_trains_a_router(tmp_path):
    records = [PreferenceRecord({"x": row % 2}, {"short": 0}, {"long": row % 3}) for row in range(8)]
    system = router(first=Categorical(3, (2,)))
    batches = SearchedBatches(system, records, 4, seed=0, num_intermediates=3)
    trainer = Trainer(system, SamplingObjective(), OPTIMIZER, tmp_path, log_every=1)
    state = trainer.fit(create_state(system, system.init(KEY), OPTIMIZER), batches, 2, KEY)
    assert int(state.step) == 2


def test_the_diagram_says_which_branch_is_whose():
    text = ROUTER.describe()
    assert 'answer{"answer: Switch"}' in text
    assert 'short -- "0" --> answer' in text or 'short -- "0" -->' in text
    assert "route --> answer" in text
