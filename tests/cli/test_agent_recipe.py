"""The recipe of docs/programs/agent.md: its tool, its questions, and what the system asks."""

import json
import re
import textwrap
from pathlib import Path

import pytest
import transformers

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.recipes.agent import EXAMPLES, answer, conversation, finished, look_up, looked_up, right
from sysdpo_jax.runs.files import RECIPES, read_config, recipes
from sysdpo_jax.runs.system import build_system
from sysdpo_jax.training import read_metrics
from tests.pretrained.checkpoints import write_decoder

HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
QUESTION = "Which element has the symbol Pd?"
QUERY = "SELECT name FROM elements WHERE symbol = 'Pd'"
PAGE = (Path(__file__).parents[2] / "docs/programs/agent.md").read_text()
RIGHT = [{"action": QUERY, "seen": "Result: palladium"}, {"action": "It is palladium.", "seen": ""}]
WRONG = [{"action": "It is gold.", "seen": ""}]


@pytest.mark.parametrize(
    ("text", "seen"),
    {
        "a row": (f"I ask: {QUERY}\nand wait", "Result: palladium"),
        "several": ("SELECT symbol, mass FROM elements WHERE number < 3", "Result: H, 1.01; He, 4.0"),
        "at most three": ("SELECT number FROM elements", "Result: 1; 2; 3"),
        "none": ("SELECT name FROM elements WHERE name = 'tin foil'", "Result: nothing found"),
        "no query": ("It is palladium.", ""),
        "no such column": ("SELECT weight FROM elements", "Result: error: no such column: weight"),
        "a long value": ("SELECT printf('%1000d', 1)", f"Result: {' ' * 40}"),
        "more than reading": ("SELECT load_extension('x')", "Result: error: not authorized"),
    }.values(),
)
def test_the_database_answers_a_query_and_says_what_is_wrong(text, seen):
    assert look_up(text) == seen


def test_a_query_that_does_not_end_is_given_up_and_a_second_statement_refused():
    assert look_up("SELECT 1; DROP TABLE elements").startswith("Result: error: ")
    assert (
        look_up(f"SELECT count(*) FROM {', '.join(f'elements e{i}' for i in range(9))}") == "Result: error: interrupted"
    )


def test_an_answer_is_right_where_it_ends_the_run():
    ended = RIGHT[0] | {"action": "palladium: SELECT name FROM elements"}
    scores = [right({"question": QUESTION, "agent": turns}) for turns in (RIGHT, WRONG, [ended])]
    assert scores == [1, 0, 0]
    assert [looked_up({"agent": turns}) for turns in (RIGHT, WRONG)] == [1, 0]
    assert [finished(turn) for turn in RIGHT] == [False, True]
    with pytest.raises(ValueError, match="no answer to 'Who is it"):
        answer("Who is it?")


def test_every_question_has_an_answer_and_held_out_ones_are_of_other_elements():
    texts = {name: (RECIPES / f"agent_{name}.txt").read_text().splitlines() for name in ("questions", "held_out")}
    assert {name: len(set(lines)) for name, lines in texts.items()} == {"questions": 48, "held_out": 24}
    names = {}
    for name, lines in texts.items():
        assert all(answer(line) for line in lines)
        keys = [re.search(r"(\w+)\?$", line)[1] for line in lines]
        by = ["number" if key.isdigit() else "symbol" if len(key) < 3 else "name" for key in keys]
        found = [
            look_up(f"SELECT name FROM elements WHERE {column} = '{key}'") for column, key in zip(by, keys, strict=True)
        ]
        names[name] = {each.removeprefix("Result: ") for each in found}
    assert not names["questions"] & names["held_out"]
    assert not (names["questions"] | names["held_out"]) & {"gold", "lithium"}
    assert [look_up(text) for role, text in EXAMPLES if text.startswith("SELECT")] == [EXAMPLES[2][1], EXAMPLES[6][1]]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The recipe with a small model that says anything."""
    write_decoder(tmp_path / "small", "llama", num_hidden_layers=1, max_position_embeddings=1024)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "small")
    text = recipes()["agent"].read_text().replace(HUB, str(tmp_path / "small"))
    (tmp_path / "agent.yaml").write_text(text.replace("steps: 16", "steps: 1").replace("warmup: 2", "warmup: 0"))
    monkeypatch.chdir(tmp_path)
    return "agent.yaml"


def test_turns_that_were_recorded_are_one_row(recipe, capsys):
    rows = [{"inputs": {"question": QUESTION}, "chosen": {"agent": RIGHT}, "rejected": {"agent": WRONG}}] * 4
    Path("pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    emptied = ("online.prompts", "evaluation.prompts", "evaluation.scorer")
    own = ["train", recipe, "--data.source", "pairs.jsonl", *(word for name in emptied for word in (f"--{name}", ""))]
    dispatch([*own, "--dry-run"])
    assert "loss at step 0: 0.69" in capsys.readouterr().out
    dispatch(own)
    [row] = [row for row in read_metrics(Path("runs/agent/metrics.jsonl")) if "loss" in row]
    assert row["turns/action/policy"] == 1.5
    assert row["retokenized/action/policy"] == 0


def test_the_system_asks_what_the_program_asks(recipe):
    code, names = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], {}
    exec(compile(code, "docs/programs/agent.md", "exec"), names)
    asked, said = [], iter(turn["action"] for turn in RIGHT)

    def say(messages):
        asked.append(list(messages))
        return next(said)

    assert names["ask"](QUESTION, say) == "It is palladium."
    system, _ = build_system(read_config(recipe), sj.make_mesh())
    prompt = system.node("action").component.prompt
    assert [prompt(conversation(QUESTION), RIGHT[:number]) for number in range(2)] == asked
    nodes = textwrap.indent(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1], 4 * " ")
    assert nodes in recipes()["agent"].read_text()
