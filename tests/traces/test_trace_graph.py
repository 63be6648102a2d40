"""The graph that traces show."""

import json
import random

import pytest

from sysdpo_jax.traces.files import read_spans
from sysdpo_jax.traces.graph import RECORDED, STRIPPED, names_of, propose
from sysdpo_jax.traces.loops import with_loops
from sysdpo_jax.traces.trees import Ledger, of_one_shape, trees_of
from tests.traces.spans import four, llm, root, row, write


def proposal(rows, path, recorded=frozenset()):
    ledger = Ledger()
    trees = of_one_shape(trees_of(read_spans(write(path / "t.jsonl", rows), "openinference"), ledger), ledger)
    return trees, propose(trees, recorded)


def shape(made):
    return {node.name: node.parents for node in made.nodes}


def test_fields_that_a_program_parsed_are_tools_between_models(tmp_path):
    """As DSPy's predictors give the part of an answer that stands between two marks."""
    rows = []
    for trace, question, draft in (("1", "red ball", "it is round"), ("2", "green cube", "it has sides")):
        said = f"[[ draft ]] {draft} [[ completed ]]"
        rows += [
            root(trace, question),
            row(trace, "p", "root", "CHAIN", "Predict(Draft)", 1, output__value=json.dumps({"draft": draft})),
            llm(trace, "d", "p", "LM", 1, f"Q: {question}", said),
            row(trace, "q", "root", "CHAIN", "Predict(Answer)", 2),
            llm(trace, "a", "q", "LM", 2, f"Q: {question} D: {draft}", "end"),
        ]
    _, made = proposal(rows, tmp_path)
    assert shape(made) == {
        "draft": ("question",),
        "draft_of_draft": ("draft",),
        "answer": ("question", "draft_of_draft"),
    }
    field = made.nodes[1]
    assert (field.tool, field.values) == (RECORDED, ("it is round", "it has sides"))


def test_space_that_the_program_took_away_is_a_tool_that_can_be_called(tmp_path):
    rows = four()
    for each in rows:
        if each["name"] == "draft":
            each["attributes"]["llm.output_messages.0.message.content"] += " \n"
    _, made = proposal(rows, tmp_path)
    assert shape(made)["answer"] == ("question", "draft_stripped")
    assert made.nodes[1].tool == STRIPPED


def test_what_tells_runs_apart_and_how_the_program_was_set_are_no_inputs(tmp_path):
    rows = four()
    for number, each in enumerate(rows):
        if each["name"] == "ask":
            given = json.loads(each["attributes"]["input.value"])
            each["attributes"]["input.value"] = json.dumps({**given, "session": f"s-{number}", "top_k": 4})
    _, made = proposal(rows, tmp_path)
    assert [*made.inputs] == ["question"]


def test_a_tool_reads_what_its_input_holds(tmp_path):
    rows = []
    for trace, question, query in (("1", "red ball", "find balls"), ("2", "green cube", "find cubes")):
        rows += [
            root(trace, question),
            llm(trace, "q", "root", "query", 1, f"search for {question}", query),
            row(
                trace, "s", "root", "TOOL", "search", 2,
                input__value=json.dumps({"query": query}), output__value=f"found {query[5:]}",
            ),
            llm(trace, "a", "root", "answer", 3, f"{question}: found {query[5:]}", "end"),
        ]  # fmt: skip
    _, made = proposal(rows, tmp_path)
    assert shape(made) == {"query": ("question",), "search": ("query",), "answer": ("question", "search")}


def test_equal_names_are_numbered_and_longer_paths_name_what_they_hold(tmp_path):
    rows = []
    for trace, question in (("1", "red ball"), ("2", "green cube")):
        rows += [
            root(trace, question),
            llm(trace, "a", "root", "ChatCompletion", 1, f"a {question}", f"one {trace}"),
            llm(trace, "b", "root", "ChatCompletion", 2, f"b {question}", f"two {trace}"),
        ]
    trees, _ = proposal(rows, tmp_path)
    assert [*names_of(trees).values()] == ["chat_completion", "chat_completion_2"]


@pytest.mark.parametrize("reverse", [False, True])
def test_a_proposal_does_not_depend_on_the_order_of_traces(tmp_path, reverse):
    _, made = proposal(four()[::-1] if reverse else four(), tmp_path)
    assert shape(made) == {"draft": ("question",), "answer": ("question", "draft")}


def test_a_name_with_a_number_of_its_own_is_another_span(tmp_path):
    rows = []
    for trace, question in (("1", "red ball"), ("2", "green cube")):
        rows += [root(trace, question)]
        rows += [
            llm(trace, f"{place}", "root", name, place, f"{place} {question}", f"said {place} {trace}")
            for place, name in enumerate(("x", "x", "x#2", "x", "x#2"), 1)
        ]
    trees, made = proposal(rows, tmp_path)
    assert [role[-1] for role in trees[0].nodes] == ["x", "x#3", "x#2", "x#4", "x#2#2"]
    assert [node.values[0] for node in made.nodes] == [f"said {place} 1" for place in range(1, 6)]
    assert len(shape(made)) == 5


def test_nodes_that_are_made_up_have_names_of_their_own(tmp_path):
    """A span is called as the node of another one's recorded prompt would be, and a field as a span."""
    rows = []
    for trace, question in (("1", "red ball"), ("2", "green cube")):
        rows += [
            root(trace, question),
            llm(trace, "d", "root", "draft", 1, f"{question} at {trace}", f"round {trace} \n"),
            llm(trace, "p", "root", "draft_prompt", 2, f"about {question}: round {trace}", f"one {trace}"),
            llm(trace, "s", "root", "draft_stripped", 3, f"of {question}", f"two {trace}"),
        ]
    _, made = proposal(rows, tmp_path)
    assert [*shape(made)] == ["draft_prompt_2", "draft", "draft_stripped_of_draft", "draft_prompt", "draft_stripped"]


def test_a_place_that_is_a_model_in_one_trace_and_a_tool_in_another_is_no_node(tmp_path):
    other = [root("other", "red ball"), llm("other", "d", "root", "draft", 1, "a red ball", "small")]
    other.append(row("other", "a", "root", "TOOL", "answer", 2, output__value="looked up"))
    ledger = Ledger()
    spans = read_spans(write(tmp_path / "t.jsonl", [*four(), *other]), "openinference")
    assert len(of_one_shape(trees_of(spans, ledger), ledger)) == 4
    assert "has ask / answer and lacks ask / answer, a model" in ledger.fate(("other", "a"))


def test_no_span_is_lost(tmp_path):
    """Traces of chance: every span is a node of a used trace, or something is said of it."""
    draw = random.Random(0)
    for _ in range(200):
        rows = []
        for trace in range(draw.randint(1, 4)):
            for number in range(draw.randint(1, 9)):
                parent = draw.choice([None, "lost", *(f"{n}" for n in range(9) if n != number)])
                kind = draw.choice(["LLM", "LLM", "TOOL", "RETRIEVER", "AGENT", "CHAIN", "ODD", ""])
                about, start = (f"{trace}", f"{number}", parent), draw.randint(0, 9)
                name, said = draw.choice(["x", "x#2", "y"]), draw.choice(["b", None])
                if kind == "LLM":
                    one = llm(*about, name, start, draw.choice(["a", ""]), said)
                else:
                    one = row(*about, kind, name, start, output__value=said)
                if draw.random() < 0.1:
                    one["status"] = {"status_code": "ERROR"}
                rows += [one] * (1 + (draw.random() < 0.1))
        ledger = Ledger()
        spans = read_spans(write(tmp_path / "t.jsonl", rows), "openinference")
        trees = of_one_shape(with_loops(trees_of(spans, ledger)), ledger)
        kept = {(tree.trace, span.id) for tree in trees for span in tree.values}
        assert kept.isdisjoint(ledger.fates)
        assert kept | set(ledger.fates) == set(ledger.spans) == {(span.trace, span.id) for span in spans}
    with pytest.raises(LookupError, match="that was lost"):
        ledger.fates.clear() or ledger.fate(next(iter(ledger.spans)))
