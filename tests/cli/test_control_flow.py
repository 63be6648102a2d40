"""A run with a switch and a loop from its YAML file: training, its report, rollouts, pairs; and what is refused."""

import itertools
import json

import pytest
import yaml

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.runs.files import read_config
from sysdpo_jax.runs.system import build_system


def state(x, turns):
    return (x + len(turns)) % 2


def finished(turn):
    return turn["action"] == 0


def total(turns):
    return min(sum(turn["action"] for turn in turns), 2)


HERE = __name__
TABLE = {"factory": "sysdpo_jax:Categorical", "mode": "full"}
NODES = {
    "route": {"component": "router", "parents": ["x"]},
    "turns": {
        "turns": 3,
        "until": f"{HERE}:finished",
        "body": {
            "state": {"tool": f"{HERE}:state", "parents": ["x", "turns"]},
            "action": {"component": "agent", "parents": ["state"]},
        },
    },
    "sum": {"tool": f"{HERE}:total", "parents": ["turns"]},
    "short": {"component": "writer", "parents": ["x"]},
    "answer": {"switch": "route", "branches": {0: "short", 1: "sum"}},
}
CONFIG = {
    "system": {
        "inputs": ["x"],
        "nodes": NODES,
        "components": {
            "router": {**TABLE, "settings": {"num_values": 2, "parent_sizes": [2]}},
            "agent": {**TABLE, "settings": {"num_values": 3, "parent_sizes": [2]}},
            "writer": {**TABLE, "settings": {"num_values": 3, "parent_sizes": [2]}},
        },
    },
    "schedule": {"steps": 4, "batch_size": 4, "warmup": 1, "learning_rate": 0.1},
    "checkpoint_every": 4,
    "log_every": 1,
}


def rows():
    """Preferences of every two of some runs on the same input."""
    for x in range(2):
        runs = [{"route": 0, "short": 1, "turns": None}]
        runs += [{"route": 1, "turns": [{"action": a} for a in own]} for own in ([0], [2, 0], [1, 2, 2])]
        for chosen, rejected in itertools.combinations(runs, 2):
            yield {"inputs": {"x": x}, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def path(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows()))
    (tmp_path / "prompts.jsonl").write_text('{"x": 0}\n{"x": 1}\n')
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, "data": {"source": "pairs.jsonl"}, "directory": "run"}, sort_keys=False))
    return path


def test_a_run_from_a_file(path, capsys):
    folder = path.parent
    dispatch(["train", str(path), "--dry-run"])
    said = capsys.readouterr().out
    assert 'answer{"answer: Switch"}' in said
    assert "loss at step 0: 0.693147" in said
    dispatch(["train", str(path)])
    # It goes on from its folder, whose configuration is JSON.
    dispatch(["train", str(path), "--schedule.steps", "4"])
    assert "each turn of turns" in (folder / "run" / "report.html").read_text()
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"rewards/margins/action", "rewards/margins/short", "rewards/margins/route"} <= metrics[0].keys()
    runs = folder / "runs.jsonl"
    words = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(runs), "--samples", "8"]
    dispatch(["rollout", "--system", str(folder / "run"), *words])
    made = [json.loads(line)["outputs"] for line in runs.read_text().splitlines()]
    assert {frozenset(run) for run in made} == {
        frozenset({"route", "short", "answer"}),
        frozenset({"route", "turns", "sum", "answer"}),
    }
    assert all(run["answer"] == run["short" if run["route"] == 0 else "sum"] for run in made)


def with_node(path, name, **changes):
    config = yaml.safe_load(path.read_text())
    config["system"]["nodes"][name] |= changes
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("answer", {"parents": ["x"]}, "system.nodes.answer is a switch, which has no parents: leave that out"),
        ("answer", {"branches": None}, "system.nodes.answer.branches must be given"),
        ("answer", {"branches": ["short"]}, "system.nodes.answer.branches is .*give a mapping"),
        (
            "answer",
            {"tool": "m:f"},
            "system.nodes.answer: give either a component, a tool, a remote model, a switch or a body",
        ),
        ("answer", {"branches": {0: "short", 1: "summ"}}, "unknown parent 'summ': did you mean 'sum'"),
        ("short", {"branches": {0: "x"}}, "system.nodes.short.branches is of a switch or a loop alone"),
        ("turns", {"turns": None}, "system.nodes.turns.turns must be given"),
        ("turns", {"plate": 2}, "system.nodes.turns is a loop, which has no plate"),
        ("turns", {"until": f"{HERE}:finish"}, "system.nodes.turns.until: .* has no 'finish'"),
        ("turns", {"body": {"action": {"component": "agnt", "parents": ["x"]}}}, "system.nodes.turns.body.action.component 'agnt'"),  # noqa: E501
        ("turns", {"body": {"inner": {"body": {}}}}, "system.nodes.turns.body.inner.body is no field"),
    ],
)  # fmt: skip
def test_what_is_no_switch_or_loop_is_refused(path, name, changes, message):
    with pytest.raises((ConfigError, sj.GraphError), match=message):
        build_system(read_config(with_node(path, name, **changes)), sj.make_mesh())


@pytest.mark.parametrize("place", ["system.nodes.answer", "system.nodes.turns.body.pick"])
def test_cases_that_yaml_reads_as_booleans_are_refused_where_a_model_chooses(path, place):
    config = yaml.safe_load(path.read_text())
    nodes = config["system"]["nodes"]
    branches = yaml.safe_load("{yes: state, no: action}" if "body" in place else "{yes: short, no: sum}")
    where = nodes["turns"]["body"] if "body" in place else nodes
    where[place.rpartition(".")[2]] = {"switch": "action" if "body" in place else "route", "branches": branches}
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=f"{place}.branches has a boolean, which the model of .*: quote it"):
        build_system(read_config(path), sj.make_mesh())


@pytest.mark.parametrize("chooser", ["x", "flag"])
def test_booleans_of_inputs_and_tools_choose(path, chooser):
    config = yaml.safe_load(path.read_text())
    nodes = config["system"]["nodes"]
    nodes["flag"] = {"tool": "builtins:bool", "parents": ["x"]}
    nodes["answer"] = {"switch": chooser, "branches": {True: "short", False: "sum"}}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    system, _ = build_system(read_config(path), sj.make_mesh())
    assert system.node("answer").component == sj.Switch((True, False))


def test_a_loop_of_a_file_is_that_of_python(path):
    system, _ = build_system(read_config(path), sj.make_mesh())
    by_hand = sj.CompoundSystem(
        ("x",),
        (
            sj.Node("route", sj.Categorical(2, (2,)), ("x",), params="router"),
            sj.Loop(
                "turns",
                (
                    sj.Node("state", sj.Tool(state), ("x", "turns")),
                    sj.Node("action", sj.Categorical(3, (2,)), ("state",), params="agent"),
                ),
                turns=3,
                until=finished,
            ),
            sj.Node("sum", sj.Tool(total), ("turns",)),
            sj.Node("short", sj.Categorical(3, (2,)), ("x",), params="writer"),
            sj.Node("answer", sj.Switch((0, 1)), ("route", "short", "sum")),
        ),
    )
    assert system == by_hand
