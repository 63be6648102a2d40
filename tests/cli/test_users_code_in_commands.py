"""Whatever code that a user gives raises, the command ends with code 1 and a line that names the code and its place."""

import json
import re
import sys
from asyncio import CancelledError

import pytest

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.runs.files import read_config
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.runs.system import _component
from sysdpo_jax.runs.system_config import NodeConfig
from sysdpo_jax.user_code import import_object

RAISED = (ValueError, ConnectionError, SystemExit, StopIteration, KeyError, CancelledError)

# What the module of a user does when it is called, and when it is imported; the tests set both.
MODULE = """
import builtins, os

def fails(*values, **settings):
    raise getattr(builtins, os.environ["RAISED"])("0")

def kind(q):
    if q in os.environ.get("FAILS", "").split(","):
        fails()
    with open(os.environ["CALLS"], "a") as file:
        file.write(q + "\\n")
    return len(q) % 2

def score(run):
    return float(run["answer"])

def nothing(*values, **settings):
    return None

def read(row, system):
    from sysdpo_jax import PreferenceRecord
    return [PreferenceRecord(row["inputs"], row["chosen"], row["rejected"])]
"""

CONFIG = """
directory: {folder}/run
system:
  inputs: [q]
  nodes:
    kind: {{tool: "{tool}", parents: [q]{calls}}}
    answer: {{component: head, parents: [kind]}}
  components:
    head: {{factory: "{factory}", mode: full, settings: {settings}}}
data: {{source: {folder}/pairs.jsonl, reader: "{reader}"}}
schedule: {{steps: 2, batch_size: 2, warmup: 1}}
evaluation: {{prompts: {folder}/prompts.txt, scorer: "{scorer}", every: 1}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a user's module, prompts and preferences."""
    (tmp_path / "users_own.py").write_text(MODULE)
    (tmp_path / "prompts.txt").write_text("a\nbb\nccc\ndddd\neeeee\n")
    pair = {"inputs": {"q": "bb"}, "chosen": {"answer": 1}, "rejected": {"answer": 0}}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 3)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "users_own", raising=False)
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.txt"))
    monkeypatch.setenv("RAISED", "ValueError")
    return tmp_path


def configured(place, name="own.yaml", **changes):
    settings = {
        "tool": "users_own:kind",
        "factory": "sysdpo_jax:Categorical",
        "settings": "{num_values: 3, parent_sizes: [2]}",
        "scorer": "users_own:score",
        "reader": "records",
        "calls": "",
    } | changes
    (place / name).write_text(CONFIG.format(folder=place, **settings))
    return place / name


def roll_out(place, system, *flags, output="runs.jsonl"):
    dispatch(
        ["rollout", "--system", str(system), "--prompts", str(place / "prompts.txt"), "--output", str(place / output),
         "--samples", "2", "--chunk", "3", *flags]
    )  # fmt: skip
    return place / output


def run_files(place):
    rows = [{"id": f"{i}-0", "inputs": {"q": "a"}, "outputs": {"kind": 1, "answer": i}} for i in range(3)]
    (place / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "made.jsonl"


def scored(place, scorer):
    dispatch(["score", "--runs", str(run_files(place)), "--scorer", scorer, "--output", str(place / "scores.jsonl")])


# What is called, and what the line names beside the exception.
COMMANDS = {
    "the tool of a rollout": (
        lambda place: roll_out(place, configured(place, tool="users_own:fails")),
        "prompts.txt, prompt 1, sample 1: node 'kind': the tool users_own:fails for q='a' failed",
    ),
    "the tool of preferences": (
        lambda place: dispatch(["train", str(configured(place, tool="users_own:fails"))]),
        "pairs.jsonl, row 1: chosen: node 'kind': the tool users_own:fails for q='bb' failed",
    ),
    "the reader": (
        lambda place: dispatch(["prepare", str(configured(place, reader="users_own:fails"))]),
        "pairs.jsonl, row 1: the reader users_own:fails failed",
    ),
    "the module of a reader": (
        lambda place: dispatch(["prepare", str(configured(place, reader="users_broken:read"))]),
        "data.reader: the module 'users_broken' cannot be imported: it failed",
    ),
    "the scorer": (
        lambda place: scored(place, "users_own:fails"),
        "the scorer users_own:fails on run 0-0 failed",
    ),
    "the scorer of an evaluation": (
        lambda place: dispatch(["train", str(configured(place, scorer="users_own:fails"))]),
        "the evaluation at step 0: the scorer users_own:fails on run 0-0 failed",
    ),
    "the factory": (
        lambda place: roll_out(place, configured(place, factory="users_own:fails")),
        "system.components.head.settings: users_own:fails",
    ),
    "what is called in settings": (
        lambda place: roll_out(place, configured(place, settings='{num_values: {call: "users_own:fails"}}')),
        "system.components.head.settings.num_values: users_own:fails",
    ),
    "the function of --system": (
        lambda place: roll_out(place, "users_own:fails"),
        "--system: users_own:fails failed",
    ),
    "the module of a tool": (
        lambda place: roll_out(place, configured(place, tool="users_broken:kind")),
        "system.nodes.kind.tool: the module 'users_broken' cannot be imported: it failed",
    ),
    "the module of a scorer": (
        lambda place: scored(place, "users_broken:kind"),
        "--scorer: the module 'users_broken' cannot be imported: it failed",
    ),
}


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("what", COMMANDS)
def test_the_command_ends_with_1_and_names_what_failed(place, capsys, caplog, monkeypatch, what, raised):
    command, message = COMMANDS[what]
    monkeypatch.setenv("RAISED", raised.__name__)
    (place / "users_broken.py").write_text(f"raise {raised.__name__}(0)\n")
    with pytest.raises(SystemExit) as stop:
        command(place)
    assert stop.value.code == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert ("sys.exit('0')" if raised is SystemExit else raised.__name__) in line.replace(
        "sys.exit(0)", "sys.exit('0')"
    )
    # A factory that refuses its settings with a ValueError has said all that there is.
    if not (raised is ValueError and "refuses its settings" in line):
        assert "Traceback" in caplog.text


def test_a_reader_is_named_as_tools_and_scorers_are(place, capsys):
    dispatch(["prepare", str(configured(place, reader="users_own:read"))])
    assert "3 rows, 3 preferences" in "".join(capsys.readouterr())


def test_a_module_that_is_not_there_needs_no_traceback(place, caplog):
    with pytest.raises(ConfigError, match=r"field: the module 'users_none' cannot be imported .No module named"):
        import_object("users_none:kind", "field")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factory": "users_own:nothing"}, "head.factory: users_own:nothing returned value=None: return a component"),
        ({"factory": "users_own:MODULE"}, "head.factory: users_own has no 'MODULE'"),
        ({"factory": "users_own:builtins"}, "head.factory: users_own:builtins is .* which cannot be called"),
        ({"factory": "users_own:score", "settings": "{run: {answer: 1}}"}, "users_own:score returned value=1.0"),
        ({"tool": "users_own:builtins"}, "system.nodes.kind.tool: users_own:builtins is .* cannot be called"),
    ],
)
def test_nonsense_of_a_factory_is_named_with_its_field(place, capsys, changes, message):
    with pytest.raises(SystemExit) as stop:
        roll_out(place, configured(place, **changes))
    assert stop.value.code == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_function_of_a_system_that_makes_none(place, capsys):
    with pytest.raises(SystemExit):
        roll_out(place, "users_own:nothing")
    assert "--system: users_own:nothing returned value=None: return (system, parameters)" in capsys.readouterr().err


def ids(path, field="outputs"):
    return [row["id"] for row in read_lines(path) if field in row]


def called(place):
    made = (place / "calls.txt").read_text().split() if (place / "calls.txt").exists() else []
    (place / "calls.txt").unlink(missing_ok=True)
    return made


def test_a_rollout_that_a_tool_stopped_goes_on_without_calling_it_again(place, monkeypatch, capsys):
    whole = roll_out(place, configured(place), output="whole.jsonl").read_bytes()
    assert called(place) == ["a", "a", "bb", "bb", "ccc", "ccc", "dddd", "dddd", "eeeee", "eeeee"]
    monkeypatch.setenv("RAISED", "ConnectionError")
    for fails, remaining in (("bb", "a a"), ("ccc", "bb bb"), ("eeeee", "ccc ccc dddd dddd")):
        monkeypatch.setenv("FAILS", fails)
        with pytest.raises(SystemExit):
            roll_out(place, configured(place))
        assert called(place) == remaining.split()
    monkeypatch.setenv("FAILS", "")
    # How a tool is called may change: it is no part of what was sampled from.
    system = configured(place, calls=", retries: 2, timeout: 60, on_error: skip, concurrency: 2")
    assert roll_out(place, system).read_bytes() == whole
    assert sorted(called(place)) == ["eeeee", "eeeee"]


def test_runs_that_a_tool_skips_are_lines_with_an_error_and_are_made_when_it_can(place, monkeypatch, capsys):
    whole = {row["id"]: row for row in read_lines(roll_out(place, configured(place), output="whole.jsonl"))}
    called(place)
    monkeypatch.setenv("FAILS", "bb,eeeee")
    system = configured(place, calls=", on_error: skip")
    path = roll_out(place, system)
    assert ids(path, "error") == ["1-0", "1-1", "4-0", "4-1"]
    assert {row["id"]: row for row in read_lines(path) if "outputs" in row} == {
        name: row for name, row in whole.items() if name[0] not in "14"
    }
    said = capsys.readouterr().err
    assert "runs.jsonl: 4 of 10 runs are left out (the first: " in said
    assert "prompt 2, sample 1: node 'kind': the tool users_own:kind for q='bb' failed (ValueError: 0)" in said
    called(place)
    # Tried again once a start, and noted once.
    before = path.read_bytes()
    roll_out(place, system)
    assert (path.read_bytes(), called(place)) == (before, [])
    assert "4 of 10 runs are left out" in capsys.readouterr().err
    # Another reason is another line, and the one that is told.
    monkeypatch.setenv("RAISED", "KeyError")
    for _ in range(2):
        roll_out(place, system)
        assert ids(path, "error") == ["1-0", "1-1", "4-0", "4-1"] * 2
        assert "failed (KeyError: '0')" in capsys.readouterr().err.split("the first: ")[1]
    monkeypatch.setenv("RAISED", "ValueError")
    # Neither scored nor paired.
    dispatch(["score", "--runs", str(path), "--scorer", "users_own:score", "--output", str(place / "scores.jsonl")])
    assert ids(place / "scores.jsonl", "score") == ids(path)
    pairs = ["--runs", str(path), "--scores", str(place / "scores.jsonl"), "--output", str(place / "new.jsonl")]
    dispatch(["pairs", *pairs, "--ties", "keep"])
    assert {line["inputs"]["q"] for line in read_lines(place / "new.jsonl")} == {"a", "ccc", "dddd"}
    monkeypatch.setenv("FAILS", "eeeee")
    roll_out(place, system)
    assert {row["id"]: row for row in read_lines(path) if "outputs" in row} == {
        name: row for name, row in whole.items() if name[0] != "4"
    }
    assert called(place) == ["bb", "bb"]
    assert "2 of 10 runs are left out" in capsys.readouterr().err


def test_an_evaluation_leaves_out_runs_that_a_tool_skips(place, monkeypatch):
    monkeypatch.setenv("FAILS", "eeeee")
    dispatch(["train", str(configured(place, calls=", on_error: skip"))])
    rows = list(read_lines(place / "run" / "evaluation" / "runs-00000002.jsonl"))
    assert [row["id"] for row in rows] == [f"{prompt}-0" for prompt in range(5)]
    assert ["error" in row for row in rows] == [False] * 4 + [True]
    figures = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["eval/runs"], row["eval/unscored"]) for row in figures if "eval/runs" in row] == [(4, 1)] * 3
    assert (place / "run" / "report.html").exists()


def test_training_that_a_tool_stopped_asks_it_for_the_rest_alone(place, monkeypatch, capsys):
    """Of the preferences, whose folder was not there before; then a later start asks for nothing."""
    questions = ["v", "w", "x", "y", "z"]
    rows = [{"inputs": {"q": q}, "chosen": {"answer": 1}, "rejected": {"answer": 0}} for q in questions]
    (place / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [str(configured(place)), "--evaluation.prompts", "", "--evaluation.scorer", ""]
    monkeypatch.setenv("FAILS", "y")
    with pytest.raises(SystemExit):
        dispatch(["train", *command])
    assert called(place) == ["v", "w", "x"]
    assert [path.name for path in (place / "run").iterdir()] == ["tool_values.jsonl"]
    monkeypatch.setenv("FAILS", "")
    dispatch(["train", *command])
    assert called(place) == ["y", "z"]
    dispatch(["train", *command, "--dry-run"])
    assert called(place) == []


def test_an_evaluation_with_too_few_scores_says_who_left_runs_out(place, monkeypatch, capsys):
    monkeypatch.setenv("FAILS", "a,ccc,dddd,eeeee")
    with pytest.raises(SystemExit):
        dispatch(["train", str(configured(place, calls=", on_error: skip"))])
    said = capsys.readouterr().err
    assert "the evaluation at step 0: only 1 of 5 runs have a score, and runs of two prompts are needed; " in said
    tools = "node 'kind': the tool users_own:kind for q='a' failed (ValueError: 0)"
    assert re.search(rf"a tool left 4 out \(the first: .*{re.escape(tools)}.*\): fix the tool, or evaluation", said)
    assert "fix the scorer" not in said


def test_how_a_tool_is_called_may_change_when_training_goes_on(place):
    dispatch(["train", str(configured(place))])
    dispatch(["train", str(configured(place, calls=", retries: 3, timeout: 5.0"))])
    noted = read_config(place / "run" / "config.yaml")
    assert (noted.system.nodes["kind"].retries, noted.system.nodes["kind"].timeout) == (3, 5.0)


def test_a_component_has_no_calls():
    node = NodeConfig(parents=("q",), component="head", retries=2, on_error="skip")
    with pytest.raises(ConfigError, match=r"system\.nodes\.answer is no tool, which alone has retries, on_error"):
        _component("system.nodes.answer", node, {"head": (sj.Categorical(2), {})})
