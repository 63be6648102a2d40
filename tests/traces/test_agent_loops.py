"""Agents whose runs have different numbers of turns."""

import pytest

from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.traces.files import read_spans
from sysdpo_jax.traces.loops import with_loops
from sysdpo_jax.traces.tools import finished
from sysdpo_jax.traces.trees import Ledger, of_one_shape, trees_of
from tests.traces.spans import llm, root, row, write
from tests.traces.test_import_command import imported, lines, system

CUT = {"llm.finish_reason": "length"}


def agent(trace, question, said, score, end="done", steps=False):
    """A model that says words; each but the last has as many tools as its number. steps: each in a span of its own."""
    rows, asked = [root(trace, question, score)], [{"role": "user", "content": f"a {question}"}]
    for number, words in enumerate((*said, end), 1):
        parent = "root"
        if steps:
            parent = f"s{number}"
            rows.append(row(trace, parent, "root", "CHAIN", "step", 4 * number))
        rows.append(llm(trace, f"m{number}", parent, "decide", 4 * number, [*asked], words))
        seen = [f"{words} {place}" for place in range(len(words.split()) if number <= len(said) else 0)]
        for place, answer in enumerate(seen):
            name = ("look", "count")[place % 2]
            tool = (trace, f"t{number}{place}", parent, "TOOL", name, 4 * number + 1 + place)
            rows.append(row(*tool, input__value=words, output__value=answer))
        asked += [{"role": "assistant", "content": words}, *({"role": "user", "content": each} for each in seen)]
    return rows


def three(**how):
    return [
        *agent("1", "red ball", ("small", "a cube"), 1.0, "the red", **how),
        *agent("2", "red ball", ("large",), 0.0, "green", **how),
        *agent("3", "red ball", (), 0.5, "a ball", **how),
    ]


def trees(rows, path):
    ledger = Ledger()
    spans = read_spans(write(path / "t.jsonl", rows), "openinference")
    return of_one_shape(with_loops(trees_of(spans, ledger)), ledger), ledger


@pytest.mark.parametrize("steps", [False, True])
def test_an_agent_leads_to_a_loop_and_a_dry_run(place, small, capsys, steps):
    traces = write(place / "t.jsonl", three(steps=steps))
    folder = imported(traces, "openinference", "--model", f"small={small}", "--pairs", "all")
    said = capsys.readouterr().out
    assert "10 spans of models, retrievers and tools: 10 mapped, 0 refused by name" in said
    assert "tokens of decide: 6 answers without ids or a number of tokens, unchecked" in said
    loop = "step" if steps else "ask"
    recorded = "sysdpo_jax.traces.tools:recorded"
    assert system(folder)["nodes"] == {
        loop: {
            "turns": 3,
            "until": "sysdpo_jax.traces.tools:finished",
            "body": {
                "decide_prompt": {"tool": recorded, "parents": ["question", loop]},
                "decide": {"component": "decide", "parents": ["decide_prompt"]},
                "told": {"tool": recorded, "parents": ["decide"]},
            },
        }
    }
    runs = {run["id"]: run["outputs"][loop] for run in lines(folder / "runs.jsonl")}
    assert [turn["told"] for turn in runs["1"]] == ["small 0", ["a cube 0", "a cube 1"], ""]
    assert [turn["decide"] for turn in runs["2"]] == ["large", "green"]
    assert runs["2"][1]["decide_prompt"] == [
        {"role": "user", "content": "a red ball"},
        {"role": "assistant", "content": "large"},
        {"role": "user", "content": "large 0"},
    ]
    assert [*map(finished, runs["1"])] == [False, False, True]
    report = (folder / "report.txt").read_text()
    assert "TOOL look: 3 spans, mapped to the node told (recorded values)" in report
    dispatch(["train", str(folder / "system.yaml"), "--dry-run", "--schedule.batch_size", "2"])
    assert "loss at step 0: 0.69" in capsys.readouterr().out


def test_a_cut_answer_in_a_turn_leaves_its_run_out_of_pairs(place, small):
    """The word is none of the tokenizer's; the other turns and runs stay as they are."""
    rows = three()
    next(each for each in rows if each["context"]["span_id"] == "m2")["attributes"] |= CUT
    next(each for each in rows if each["context"] == {"trace_id": "2", "span_id": "m2"})["attributes"] |= CUT | {
        "llm.output_messages.0.message.content": "blue"
    }
    folder = imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}")
    scores = {line["id"]: line for line in lines(folder / "scores.jsonl")}
    assert ["error" in scores[name] for name in "123"] == [False, True, False]
    runs = {run["id"]: run["outputs"]["ask"] for run in lines(folder / "runs.jsonl")}
    assert (runs["1"][1]["decide"]["end"], runs["1"][2]["decide"]) == ("cut", "the red")


def test_a_model_that_is_recorded_needs_no_prompt(place, small):
    rows = three()
    for trace in "123":
        rows.append(llm(trace, "d", "root", "draft", 1, "a red ball", f"large {trace}"))
    traces = write(place / "t.jsonl", rows)
    made = system(imported(traces, "openinference", "--model", f"draft={small}"))["nodes"]
    assert [*made] == ["draft", "ask"]
    assert made["ask"]["body"]["decide"]["parents"] == ["question", "ask"]
    assert [*made["ask"]["body"]] == ["decide", "told"]


@pytest.mark.parametrize(
    "rows",
    [
        # The tool of a turn said nothing, by which a loop would end.
        [*agent("4", "red ball", ("",), 0.5), row("4", "e", "root", "TOOL", "look", 5, output__value="")],
        # It stopped behind a tool, and others had more turns.
        agent("4", "red ball", ("small",), 0.5)[:-1],
        # Another model speaks after it.
        [*agent("4", "red", (), 0), llm("4", "z", "root", "sum", 50, "all", "end")],
    ],
)
def test_turns_that_are_no_loop_are_refused_by_name(tmp_path, rows):
    made, ledger = trees([*three(), *rows], tmp_path)
    assert [tree.trace for tree in made] == ["1", "2", "3"]
    assert all(len(tree.turns) == 4 - int(tree.trace) for tree in made)
    refused = [key for key in ledger.spans if key[0] == "4" and key[1] != "root"]
    assert all("another shape" in ledger.fate(key) for key in refused)


def test_turns_of_one_number_stay_nodes_of_their_own(tmp_path):
    rows = [*agent("1", "red ball", ("small",), 1.0), *agent("2", "red ball", ("large",), 0.0)]
    made, _ = trees(rows, tmp_path)
    assert [role[-1] for role in made[0].nodes] == ["decide", "look", "decide#2"]
    assert not made[0].turns
