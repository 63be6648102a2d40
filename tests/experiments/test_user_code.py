"""Whatever code that a user gives raises, the command ends with code 1 and a line that names the code and its place."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest

import sysdpo_jax as sj
from experiments import make_pairs, rollout, score, train
from experiments.own.config import ConfigError, NodeConfig, read_config
from experiments.own.exporting import write_component
from experiments.own.importing import import_object
from experiments.own.runs_file import read_lines
from experiments.own.system import _component
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.graph import GraphError
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.models.decoder_config import DecoderConfig
from sysdpo_jax.pretrained import CheckpointError
from sysdpo_jax.training.checkpoints import Checkpoints
from sysdpo_jax.training.evaluation import Evaluation, EvaluationError, Evaluator
from tests.components.stubs import word_tokenizer
from tests.data.test_preference_files import SIZES

KEY = jax.random.key(0)
DECODER = Decoder(DecoderConfig(**SIZES, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=20))
# An evaluation without a best figure grades no checkpoint.
UNUSED = object.__new__(Checkpoints)
RAISED = (ValueError, ConnectionError, SystemExit, StopIteration, KeyError)

# What the module of a user does when it is called, and when it is imported; the tests set both.
MODULE = """
import builtins, os

def fails(*values, **settings):
    raise getattr(builtins, os.environ["RAISED"])(os.environ.get("CODE", "0"))

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
data: {{source: {folder}/pairs.jsonl}}
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
        "calls": "",
    } | changes
    (place / name).write_text(CONFIG.format(folder=place, **settings))
    return place / name


def roll_out(place, system, *flags, output="runs.jsonl"):
    rollout.main(
        ["--system", str(system), "--prompts", str(place / "prompts.txt"), "--output", str(place / output),
         "--samples", "2", "--chunk", "3", *flags]
    )  # fmt: skip
    return place / output


def run_files(place):
    rows = [{"id": f"{i}-0", "inputs": {"q": "a"}, "outputs": {"kind": 1, "answer": i}} for i in range(3)]
    (place / "made.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place / "made.jsonl"


def scored(place, scorer):
    score.main(["--runs", str(run_files(place)), "--scorer", scorer, "--output", str(place / "scores.jsonl")])


# What is called, and what the line names beside the exception.
COMMANDS = {
    "the tool of a rollout": (
        lambda place: roll_out(place, configured(place, tool="users_own:fails")),
        "prompts.txt, prompt 1, sample 1: node 'kind': the tool users_own:fails for q='a' failed",
    ),
    "the tool of preferences": (
        lambda place: train.main(["--config", str(configured(place, tool="users_own:fails"))]),
        "pairs.jsonl, row 1: chosen: node 'kind': the tool users_own:fails for q='bb' failed",
    ),
    "the scorer": (
        lambda place: scored(place, "users_own:fails"),
        "the scorer users_own:fails on run 0-0 failed",
    ),
    "the scorer of an evaluation": (
        lambda place: train.main(["--config", str(configured(place, scorer="users_own:fails"))]),
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
    # Neither scored nor paired.
    score.main(["--runs", str(path), "--scorer", "users_own:score", "--output", str(place / "scores.jsonl")])
    assert ids(place / "scores.jsonl", "score") == ids(path)
    pairs = ["--runs", str(path), "--scores", str(place / "scores.jsonl"), "--output", str(place / "new.jsonl")]
    make_pairs.main([*pairs, "--ties", "keep"])
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
    train.main(["--config", str(configured(place, calls=", on_error: skip"))])
    rows = list(read_lines(place / "run" / "evaluation" / "runs-00000002.jsonl"))
    assert [row["id"] for row in rows] == [f"{prompt}-0" for prompt in range(5)]
    assert ["error" in row for row in rows] == [False] * 4 + [True]
    figures = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["eval/runs"], row["eval/unscored"]) for row in figures if "eval/runs" in row] == [(4, 1)] * 3
    assert (place / "run" / "report.html").exists()


def test_how_a_tool_is_called_may_change_when_training_goes_on(place):
    train.main(["--config", str(configured(place))])
    train.main(["--config", str(configured(place, calls=", retries: 3, timeout: 5.0"))])
    noted = read_config(place / "run" / "config.yaml", train.TrainConfig)
    assert (noted.system.nodes["kind"].retries, noted.system.nodes["kind"].timeout) == (3, 5.0)


def test_a_component_has_no_calls():
    node = NodeConfig(parents=("q",), component="head", retries=2, on_error="skip")
    with pytest.raises(ConfigError, match=r"system\.nodes\.answer is no tool, which alone has retries, on_error"):
        _component("answer", node, {"head": (sj.Categorical(2), {})})


@dataclass(frozen=True)
class Own(sj.Component):
    """A component of a user's own that fails in one of its parts."""

    fails: str
    raised: type

    def _may_fail(self, part):
        if part == self.fails:
            raise self.raised("0")

    def init(self, key):
        self._may_fail("init")
        return {}

    def prepare(self, values, parents):
        self._may_fail("prepare")
        return np.zeros((len(values), 1), np.float32)

    def log_prob(self, params, features, key):
        self._may_fail("log_prob")
        return features[:, 0]

    def sample(self, params, parents, key):
        self._may_fail("sample")
        return [0] * len(parents["x"])

    def candidates(self, params, parents, number, key):
        self._may_fail("candidates")
        return [[0] for _ in parents["x"]]

    def save(self, path: Path, params):
        self._may_fail("save")


def through(component):
    system = sj.CompoundSystem(("x",), (sj.Node("y", component, ("x",)), sj.Node("z", sj.Categorical(2, (1,)), ("y",))))
    params = {"y": {}, "z": {"logits": np.zeros((1, 2))}}
    return system, params


PARTS = {
    "init": (lambda own: through(own)[0].init(KEY), GraphError),
    "prepare": (lambda own: through(own)[0].prepare([{"x": 0, "y": 0, "z": 0}]), sj.RecordError),
    "log_prob": (
        lambda own: through(own)[0].log_prob(through(own)[1], {"y": np.zeros((1, 1)), "z": np.zeros((1, 2), int)}, KEY),
        GraphError,
    ),
    "sample": (lambda own: sj.rollout(*through(own), [{"x": 0}], KEY), sj.RecordError),
    "candidates": (lambda own: sj.draw_intermediates(*through(own), [{"x": 0}], 2, KEY), sj.RecordError),
}


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("part", PARTS)
def test_a_component_of_ones_own_is_named_with_its_node(part, raised, caplog):
    call, failure = PARTS[part]
    with pytest.raises(failure, match=rf"node 'y': .*test_user_code:Own\.{part} failed"):
        call(Own(part, raised))
    assert "Traceback" in caplog.text


@pytest.mark.parametrize("raised", RAISED)
def test_what_saves_a_component_is_named(tmp_path, raised):
    with pytest.raises(CheckpointError, match=r"test_user_code:Own\.save failed"):
        write_component(tmp_path / "out", Own("save", raised), {}, False, None)


@pytest.mark.parametrize("raised", RAISED)
def test_a_prompt_function_and_a_chat_template_are_named_with_their_row(raised):
    def prompt(text):
        raise raised("0")

    model = sj.LanguageModel(DECODER, word_tokenizer(chat=True), 16, 4, prompt=prompt)
    with pytest.raises(sj.RecordError, match=r"the prompt function .*:test_a_prompt.*prompt in row 0 failed"):
        model.prepare(["a"], {"x": ["a"]})
    tokenizer = word_tokenizer(chat=True)
    tokenizer.apply_chat_template = lambda *args, **settings: prompt("")
    model = sj.LanguageModel(DECODER, tokenizer, 16, 4)
    with pytest.raises(sj.RecordError, match="the chat template for the messages in row 1 failed"):
        model.prepare(["a", "a"], {"x": ["a", [{"role": "user", "content": "a"}]]})


def test_a_prompt_function_is_called_once_for_copies_of_a_row():
    """As those are that fill a batch up."""
    asked = []
    model = sj.LanguageModel(DECODER, word_tokenizer(), 16, 4, prompt=lambda text: asked.append(text) or text)
    text, other = "a red ball", "the cube"
    model.prepare(["a"] * 4, {"x": [text, other, other, other]})
    assert asked == [text, other]


@pytest.mark.parametrize("raised", [*RAISED, None])
def test_a_reader_is_named_with_its_row(tmp_path, raised):
    def reader(row, system):
        if row["x"] == 1:
            if raised is None:
                return None
            raise raised("0")
        return [sj.PreferenceRecord({"x": 0}, {"y": 0}, {"y": 1})]

    path = tmp_path / "rows.jsonl"
    path.write_text('{"x": 0}\n{"x": 1}\n{"x": 2}\n')
    said = "returned value=None: return a list of PreferenceRecord" if raised is None else "failed"
    with pytest.raises(sj.RecordError, match=rf"rows\.jsonl, row 2: the reader .*reader {said}"):
        sj.load_preferences(path, reader=reader)
    assert len(sj.load_preferences(path, reader=reader, on_error="skip")) == 2


@pytest.mark.parametrize("raised", RAISED)
def test_a_source_of_records_is_named_with_its_number(raised):
    class Source:
        def __len__(self):
            return 2

        def __getitem__(self, row):
            raise raised("0")

    system = sj.CompoundSystem(("x",), (sj.Node("y", sj.Categorical(2, (2,)), ("x",)),))
    with pytest.raises(sj.RecordError, match=r"Source\.__getitem__, for the record \d, failed"):
        sj.preference_dataset(system, Source(), 2, seed=0)[0]


@pytest.mark.parametrize("raised", RAISED)
def test_what_an_evaluation_measures_is_named_with_its_step(raised):
    def measure(step, params):
        raise raised("0")

    evaluator = Evaluator(Evaluation(measure, 1), None, None, 4)
    with pytest.raises(EvaluationError, match=r"the evaluation at step 2, .*measure, failed .* the state is saved"):
        evaluator.ends(2, {}, UNUSED, lambda: None)


def test_a_tool_error_inside_an_evaluation_keeps_its_words():
    def measure(step, params):
        raise ToolError("node 'kind': the tool failed")

    with pytest.raises(ToolError, match=r"^node 'kind': the tool failed$"):
        Evaluator(Evaluation(measure, 1), None, None, 4).ends(2, {}, UNUSED, lambda: None)
