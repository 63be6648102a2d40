"""Loops: turns of the same nodes, in samples, log-probabilities, batches and files."""

import itertools
import json
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
    GraphError,
    Loop,
    Node,
    PreferenceRecord,
    RecordError,
    SearchedBatches,
    Switch,
    Tool,
    create_state,
    load_preferences,
    make_mesh,
    make_optimizer,
    make_pairs,
    make_train_step,
    precompute_reference,
    preference_dataset,
    prepare_pairs,
    rollout,
)
from sysdpo_jax.components.routed import Routed
from sysdpo_jax.training import ComponentOptimizer

KEY = jax.random.key(0)
TURNS, ACTIONS = 3, 3


def state(x, turns):
    """0 or 1, of the input and what the tool said of the last action."""
    return (x + sum(turn["seen"] for turn in turns)) % 2


def observe(action):
    return 2 * action + 1


def finished(turn):
    return turn["action"] == 0


def agent(action=None, **settings):
    """Up to three turns: an action of three, of which 0 ends the run; then an answer that reads all of them."""
    table = Categorical(ACTIONS, (2,)) if action is None else action
    body = (
        Node("state", Tool(state), ("x", "turns")),
        Node("action", table, ("state",), params="agent"),
        Node("seen", Tool(observe), ("action",)),
    )
    loop = Loop("turns", body, **({"turns": TURNS, "until": finished} | settings))
    answer = Node("answer", Categorical(ACTIONS, (2,)), ("end",), params="agent")
    return CompoundSystem(("x",), (answer, Node("end", Tool(ending), ("turns",)), loop))


def ending(turns):
    return len(turns) % 2


AGENT = agent()


def every_run():
    """Every run, whose observations are left to the tools."""
    for x in range(2):
        for length in range(1, TURNS + 1):
            for actions in itertools.product(range(1, ACTIONS), repeat=length - 1):
                for last in [0] if length < TURNS else range(ACTIONS):
                    for answer in range(ACTIONS):
                        yield {"x": x, "turns": [{"action": a} for a in (*actions, last)], "answer": answer}


RUNS = list(every_run())


def by_hand(params, run):
    """log p of the actions and of the answer from the table, in float64."""
    table = np.asarray(jax.nn.log_softmax(params["agent"]["logits"]), np.float64)
    actions, total, seen = [turn["action"] for turn in run["turns"]], 0.0, 0
    for action in actions:
        total += table[(run["x"] + seen) % 2, action]
        seen += 2 * action + 1
    return {"action": total, "answer": table[len(actions) % 2, run["answer"]]}


def test_a_loop_is_written_out():
    assert [node.name for node in AGENT.nodes] == ["state", "action", "seen", "turns", "end", "answer"]
    assert [node.name for node in AGENT.recorded] == ["turns", "end", "answer"]
    assert AGENT.param_keys == ("agent",)
    assert [node.name for node in AGENT.intermediates] == ["turns"]
    assert [node.name for node in AGENT.outputs] == ["answer"]
    assert CompoundSystem(AGENT.inputs, AGENT.nodes) == AGENT == agent()
    text = AGENT.describe()
    assert 'subgraph turns_turns["turns: up to 3 turns"]' in text
    assert "turns -.-> state" in text


def test_log_prob_is_the_sum_over_turns():
    """Every run by enumeration; each x's probabilities sum to 1. float32, so 1e-5."""
    params = AGENT.init(KEY)
    features = AGENT.prepare(RUNS)
    assert features["action"].ran.shape == (len(RUNS), TURNS)
    np.testing.assert_array_equal(features["action"].ran.sum(1), [len(run["turns"]) for run in RUNS])
    terms = jax.jit(AGENT.log_prob)(params, features, KEY)
    expected = [by_hand(params, run) for run in RUNS]
    for name in ("action", "answer"):
        np.testing.assert_allclose(terms[name], [own[name] for own in expected], atol=1e-5)
    half = len(RUNS) // 2
    whole = np.exp(sum(terms.values()))
    np.testing.assert_allclose([whole[:half].sum(), whole[half:].sum()], 1.0, atol=1e-5)


def test_turns_are_those_of_the_graph_written_out_by_hand():
    """A loop that never ends early is a chain of nodes with one tree; the gradients are the same, to rounding."""
    looped = agent(until=None)
    runs = [run for run in RUNS if len(run["turns"]) == TURNS]
    nodes = []
    for turn in range(TURNS):
        earlier = tuple(f"seen{past}" for past in range(turn))
        nodes += [
            Node(f"state{turn}", Tool(state_of), ("x", *earlier)),
            Node(f"action{turn}", Categorical(ACTIONS, (2,)), (f"state{turn}",), params="agent"),
            Node(f"seen{turn}", Tool(observe), (f"action{turn}",)),
        ]
    chain = CompoundSystem(("x",), tuple(nodes))
    plain = [{"x": run["x"]} | {f"action{t}": turn["action"] for t, turn in enumerate(run["turns"])} for run in runs]
    params, weights = looped.init(KEY), jnp.asarray(np.random.default_rng(0).normal(size=len(runs)), jnp.float32)

    def total(params, system, features, names):
        terms = system.log_prob(params, features, KEY)
        return jnp.sum(weights * sum(terms[name] for name in names))

    own = jax.value_and_grad(total)(params, looped, looped.prepare(runs), ["action"])
    out = jax.value_and_grad(total)(params, chain, chain.prepare(plain), [f"action{t}" for t in range(TURNS)])
    np.testing.assert_allclose(own[0], out[0], rtol=1e-5)
    np.testing.assert_allclose(own[1]["agent"]["logits"], out[1]["agent"]["logits"], atol=1e-5)


def state_of(x, *seen):
    return (x + sum(seen)) % 2


@dataclass(frozen=True)
class Watched(Categorical):
    """Keeps how many rows it was asked for."""

    seen: deque = None

    __hash__ = object.__hash__

    def sample(self, params, parents, key):
        self.seen.append(len(parents["state"]))
        return super().sample(params, parents, key)


def test_turns_are_sampled_until_they_end_and_rows_that_ended_are_dropped():
    watched = Watched(ACTIONS, (2,), deque())
    system = agent(watched)
    params, inputs = system.init(KEY), [{"x": row % 2} for row in range(64)]
    runs = system.sample(params, inputs, KEY)
    lengths = [len(run["turns"]) for run in runs]
    assert set(lengths) == {1, 2, 3}
    assert list(watched.seen) == [sum(length > turn for length in lengths) for turn in range(TURNS)]
    for run in runs:
        ends = [finished(turn) for turn in run["turns"]]
        assert not any(ends[:-1])
        assert ends[-1] or len(ends) == TURNS
        for number, turn in enumerate(run["turns"]):
            assert turn["state"] == state(run["x"], run["turns"][:number])
            assert turn["seen"] == observe(turn["action"])
    # What a row draws depends on its number alone, whichever others are there.
    some = [values if row % 5 == 0 else None for row, values in enumerate(inputs)]
    assert system.attempt(params, some, KEY) == [run if row % 5 == 0 else None for row, run in enumerate(runs)]
    # As often as the tables say: five standard errors of a share of 64 are 0.31.
    table = np.asarray(jax.nn.softmax(params["agent"]["logits"]))
    assert abs(np.mean([length == 1 for length in lengths]) - table[:, 0].mean()) < 0.31


def test_tools_are_called_for_turns_that_are_there_alone():
    called = []

    def tool(action):
        called.append(action)
        return observe(action)

    body = (Node("action", Categorical(2), ("x", "turns")), Node("seen", Tool(tool), ("action",)))
    body = (replace(body[0], component=Tool(first_or_stop)), body[1])
    system = CompoundSystem(("x",), (Loop("turns", body, 4, finished),))
    runs = system.sample({}, [{"x": 2}, {"x": 0}, {"x": 1}], KEY)
    assert [[turn["action"] for turn in run["turns"]] for run in runs] == [[2, 1, 0], [0], [1, 0]]
    assert called == [2, 0, 1, 1, 0, 0]


def first_or_stop(x, turns):
    return x - len(turns)


def test_what_a_tool_refuses_in_a_turn_ends_its_row():
    def tool(x, turns):
        if x == 1 and len(turns) == 1:
            raise RecordError("not this one")
        return x

    system = CompoundSystem(("x",), (Loop("turns", (Node("a", Tool(tool), ("x", "turns")),), 2),))
    runs = system.attempt({}, [{"x": 0}, {"x": 1}], KEY)
    assert runs[0]["turns"] == [{"a": 0}, {"a": 0}]
    assert "turn 2 of 'turns': node 'a': the tool" in str(runs[1])
    with pytest.raises(RecordError, match="record 1: turn 2 of 'turns': node 'a'"):
        CompoundSystem(
            ("x",), (*system.nodes, Node("z", Categorical(2, (1,)), ("count",)), Node("count", Tool(len), ("turns",)))
        ).prepare([{"x": 0, "turns": [{}, {}], "z": 0}, {"x": 1, "turns": [{}, {}], "z": 0}])


def test_a_condition_that_fails_names_itself():
    system = CompoundSystem(("x",), (Loop("turns", (Node("a", Tool(repr), ("x",)),), 2, until=broken),))
    with pytest.raises(RecordError, match=r"row 0: .*the condition .*broken for a='0' failed \(KeyError: 'nothing'\)"):
        system.sample({}, [{"x": 0}], KEY)


def broken(turn):
    return turn["nothing"]


BODY = (Node("a", Categorical(2, (2,)), ("x",)),)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Loop("l", BODY, 0),), "turns 0 must be at least 1"),
        (lambda: (Loop("l", (), 2), *BODY), "the loop 'l' has no node"),
        (lambda: (Loop("l", (Loop("m", BODY, 2),), 2),), "loop 'l': its node 'm' is a loop"),
        (lambda: (Loop("l", BODY, 2), Node("b", Categorical(2, (2,)), ("a",))), "'b' reads 'a', .* read 'l'"),
        (lambda: (Loop("l", BODY, 2), Node("a", Categorical(2, (2,)), ("x",))), "'a' is used twice"),
        (lambda: (Loop("l", (Node("a", Tool(repr), ("b",)), Node("b", Tool(repr), ("a",))), 2), Node("c", Tool(repr), ("x",))), "cycle"),  # noqa: E501
        (lambda: (Loop("l", (Node("a", Tool(repr), ("nope",)),), 2),), "unknown parent 'nope'"),
    ],
)  # fmt: skip
def test_a_bad_loop_is_refused(make, message):
    with pytest.raises((GraphError, ValueError), match=message):
        CompoundSystem(("x",), make())


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "node 'turns' has 0 turns: a run has from 1 to 3"),
        ([{"action": 1}] * 4, "node 'turns' has 4 turns"),
        ({"action": 1}, "give the list of its turns"),
        ([{"actoin": 1}], "has 'actoin' in turn 1, which is none of its names: did you mean 'action'"),
        ([{"action": 1}, {"seen": 1}], "record 1, turn 2 of 'turns' lacks a value for the node 'action'"),
    ],
)
def test_a_record_with_other_turns_is_refused(turns, message):
    with pytest.raises(RecordError, match=message):
        AGENT.prepare([RUNS[0], {"x": 0, "turns": turns, "answer": 0}])


@pytest.mark.parametrize(
    ("actions", "until", "message"),
    [
        ([0, 1], finished, "has 2 turns, but the condition .*:finished ends it with turn 1: leave out what follows"),
        ([1, 0, 2], finished, "has 3 turns, but the condition .*:finished ends it with turn 2"),
        ([1, 2], finished, "stops at turn 2 of 3, but the condition .*:finished does not end it there: add the turns"),
        ([1, 2], None, "stops at turn 2 of 3, but it has no condition to end it: add the turns"),
        ([1, 0], broken, "turn 1 of 'turns': the condition .*:broken for .* failed"),
    ],
)
def test_turns_that_the_loop_cannot_make_are_refused(actions, until, message):
    run = {"x": 0, "turns": [{"action": action} for action in actions], "answer": 0}
    place = "" if until is broken else "record 0: node 'turns' "
    with pytest.raises(RecordError, match=place + message):
        agent(until=until).prepare([run])


def seen_enough(turn):
    return turn["seen"] == 5


def test_the_end_of_recorded_turns_is_decided_with_what_tools_give():
    """The condition reads a tool's value that the record lacks: 2 * action + 1."""
    system, run = agent(until=seen_enough), {"x": 0, "answer": 0}
    system.prepare([run | {"turns": [{"action": 1}, {"action": 2}]}, run | {"turns": [{"action": 1}] * 3}])
    with pytest.raises(RecordError, match=r"record 0: node 'turns' has 2 turns, but .*seen_enough ends it with turn 1"):
        system.prepare([run | {"turns": [{"action": 2}, {"action": 2}]}])


def preferences(rows, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(rows):
        x = int(rng.integers(2))
        length = int(rng.integers(1, TURNS + 1))
        own = [run for run in RUNS if run["x"] == x and len(run["turns"]) in (length, 1)]
        sides = ({k: v for k, v in own[rng.integers(len(own))].items() if k != "x"} for _ in range(2))
        made.append(PreferenceRecord({"x": x}, *sides))
    return made


RECORDS = preferences(48)
OPTIMIZER = make_optimizer({"agent": ComponentOptimizer(optax.sgd(0.1))})


def loss_by_hand(params, reference, records, beta=0.1):
    def ratio(x, side):
        run = {"x": x, **side}
        return sum(by_hand(params, run).values()) - sum(by_hand(reference, run).values())

    margins = [ratio(r.inputs["x"], r.chosen) - ratio(r.inputs["x"], r.rejected) for r in records]
    return np.mean(np.log1p(np.exp(-beta * np.array(margins))))


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_is_that_of_the_table(accumulate):
    """Against the gradient by finite differences of the loss by hand (float64); float32, so 1e-4."""
    mesh = make_mesh()
    dataset = preference_dataset(AGENT, RECORDS, 16, seed=3, accumulate=accumulate)
    batch, picked = dataset[0], [RECORDS[row] for row in dataset.plan.at(0)[0]]
    assert batch.chosen["action"].room < batch.chosen["action"].ran.size * 2
    start = AGENT.init(KEY)
    table, found = np.asarray(start["agent"]["logits"], np.float64), np.zeros((2, ACTIONS))
    train = create_state(AGENT, start, OPTIMIZER, mesh)
    train, metrics = make_train_step(AGENT, DirectObjective(), OPTIMIZER, mesh, accumulate)(train, batch, KEY)
    assert bool(metrics["finite"])
    for place in np.ndindex(*table.shape):
        sides = []
        for sign in (1, -1):
            moved = table.copy()
            moved[place] += sign * 1e-2
            sides.append(loss_by_hand({"agent": {"logits": jnp.asarray(moved)}}, start, picked))
        found[place] = (sides[0] - sides[1]) / 2e-2
    got = (table - np.asarray(train.params["agent"]["logits"])) / 0.1
    np.testing.assert_allclose(got, found, atol=1e-4)


def test_the_store_has_what_memory_has():
    dataset, whole = preference_dataset(AGENT, RECORDS, 16, seed=3), prepare_pairs(AGENT, RECORDS)
    for step in range(3):
        batch, rows = dataset[step], dataset.plan.at(step)[0]
        bare = jax.tree.map(lambda x: x, batch)
        for side in (bare.chosen, bare.rejected):
            side["action"] = replace(side["action"], room=None)
        jax.tree.map(np.testing.assert_array_equal, bare, jax.tree.map(lambda x, rows=rows: x[rows], whole))


def test_rollouts_make_pairs_that_train(tmp_path):
    params = AGENT.init(KEY)
    runs = rollout(AGENT, params, [{"x": 0}, {"x": 1}], KEY, samples=6)
    records = make_pairs(AGENT, runs, np.arange(12.0), 6, pairs="all")
    rows = [{"inputs": r.inputs, "chosen": r.chosen, "rejected": r.rejected} for r in records]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    read = load_preferences(path, AGENT, cache=tmp_path / "cache")
    loaded, own = (preference_dataset(AGENT, source, 8, seed=0)[0] for source in (read, records))
    jax.tree.map(np.testing.assert_array_equal, loaded, own)
    # What the tools of the turns gave is kept with the record.
    lacking = [{"inputs": r.inputs} | {s: {"turns": [{"action": t["action"]} for t in getattr(r, s)["turns"]], "answer": 0} for s in ("chosen", "rejected")} for r in records]  # noqa: E501  # fmt: skip
    path.write_text("".join(f"{json.dumps(row)}\n" for row in lacking))
    filled = load_preferences(path, AGENT, cache=tmp_path / "cache")
    assert filled[0].chosen["turns"] == records[0].chosen["turns"]


def test_references_are_computed_before():
    params, pairs = AGENT.init(KEY), prepare_pairs(AGENT, RECORDS)
    known = precompute_reference(AGENT, params, pairs, ["agent"])
    expected = AGENT.log_prob(params, pairs.rejected, KEY)
    np.testing.assert_allclose(known.reference["action"][1], expected["action"], atol=1e-6)


def test_turns_are_not_searched_for():
    with pytest.raises(GraphError, match="'turns' is a loop, whose turns are not searched for"):
        SearchedBatches(AGENT, RECORDS, 4, seed=0)


def test_a_switch_in_a_loop_and_a_loop_behind_a_switch():
    """Each turn uses one of two tools; and a run has turns only where the route says so."""
    body = (
        Node("choice", Categorical(2, (2,)), ("x",)),
        Node("left", Tool(observe), ("x",)),
        Node("right", Categorical(2, (2,)), ("x",)),
        Node("seen", Switch((0, 1)), ("choice", "left", "right")),
    )
    system = CompoundSystem(
        ("x",),
        (
            Node("route", Categorical(2, (2,)), ("x",)),
            Loop("turns", body, 2),
            Node("short", Categorical(2, (2,)), ("x",)),
            Node("answer", Switch((0, 1)), ("route", "short", "turns")),
        ),
    )
    params = system.init(KEY)
    runs = system.sample(params, [{"x": row % 2} for row in range(32)], KEY)
    kinds = set()
    for run in runs:
        assert run["answer"] == run["turns" if run["route"] else "short"]
        assert ("turns" in run, "short" in run) == (bool(run["route"]), not run["route"])
        for turn in run.get("turns", ()):
            branch = "right" if turn["choice"] else "left"
            assert turn.keys() == {"choice", branch, "seen"}
            assert turn["seen"] == turn[branch]
            kinds.add(branch)
    assert kinds == {"left", "right"}
    terms = system.log_prob(params, system.prepare(runs), KEY)
    tables = {name: np.asarray(jax.nn.log_softmax(tree["logits"])) for name, tree in params.items()}
    right = [sum(tables["right"][r["x"], t["right"]] for t in r.get("turns", ()) if t["choice"]) for r in runs]
    np.testing.assert_allclose(terms["right"], right, atol=1e-5)
    short = [0 if run["route"] else tables["short"][run["x"], run["short"]] for run in runs]
    np.testing.assert_allclose(terms["short"], short, atol=1e-5)


@dataclass(frozen=True)
class Joining(Categorical):
    """Joins every turn to the last one: its features are counts of what all turns of a run used of the table."""

    def prepare(self, values, parents):
        made = super().prepare(values, parents)
        counts = np.zeros((len(made), 2, self.num_values), np.float32)
        counts[np.arange(len(made)), made[:, 0], made[:, 1]] = 1
        return counts

    def join_turns(self, features, ran):
        last = ran & (np.cumsum(ran[:, ::-1], axis=1)[:, ::-1] == 1)
        summed = np.broadcast_to((features * ran[..., None, None]).sum(1, keepdims=True), features.shape)
        return summed, last

    def log_prob(self, params, features, key):
        return jnp.sum(features * jax.nn.log_softmax(params["logits"]), axis=(-1, -2))


def test_turns_that_are_joined_add_up_to_the_same():
    joining = agent(Joining(ACTIONS, (2,)))
    params, features = AGENT.init(KEY), joining.prepare(RUNS)
    assert isinstance(features["action"], Routed)
    assert (features["action"].ran.sum(1) == 1).all()
    terms = [system.log_prob(params, system.prepare(RUNS), KEY)["action"] for system in (joining, AGENT)]
    np.testing.assert_allclose(*terms, atol=1e-5)
