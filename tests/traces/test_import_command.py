"""From traces to a dry run in two commands."""

import json
from pathlib import Path

import pytest
import yaml

from sysdpo_jax.cli import import_traces
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.runs.files import read_config
from sysdpo_jax.runs.system import _prompt
from sysdpo_jax.traces.files import read_spans
from sysdpo_jax.traces.graph import propose
from sysdpo_jax.traces.spans import VALUES
from sysdpo_jax.traces.tools import messages
from sysdpo_jax.traces.trees import Ledger, of_one_shape, trees_of
from sysdpo_jax.user_code import built
from sysdpo_jax.values import from_json
from tests.traces.spans import chain, four, llm, root, row, write

DATA = Path(__file__).parent / "data"
# file, format, what models are called there, the nodes, spans of values, pairs, the score.
RECORDED = [
    ("openai.spans.jsonl", "openinference", "smollm2", ["search", "draft", "answer"], 36, 4),
    ("dspy.otlp.jsonl", "otlp", "smollm2", ["retrieve", "draft", "answer"], 24, 4),
    ("dspy.jsonl", "dspy", "openai/smollm2", ["passages", "draft", "answer"], 24, 4),
    ("langsmith.jsonl", "langsmith", "small", ["vector_store_retriever", "write", "shorten"], 12, 2),
    ("langfuse.json", "langfuse", "small", ["plan", "search", "reply"], 12, 2),
]


def imported(traces, kind, *flags, folder="proposal"):
    dispatch(["import", str(traces), "--format", kind, "--output", folder, *flags])
    return Path(folder)


def system(folder):
    return yaml.safe_load((folder / "system.yaml").read_text())["system"]


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("file", "kind", "model", "nodes", "spans", "pairs"), RECORDED, ids=[row[0] for row in RECORDED]
)
def test_two_commands_lead_from_recorded_traces_to_a_dry_run(
    place, small, capsys, file, kind, model, nodes, spans, pairs
):
    folder = imported(DATA / file, kind, "--model", f"{model}={small}")
    said = capsys.readouterr().out
    assert f"{spans} spans of models, retrievers and tools: {spans} mapped, 0 refused by name" in said
    made = system(folder)
    assert [name for name, node in made["nodes"].items() if not name.endswith(("_prompt", "_stripped"))] == nodes
    # Every prompt is a template of the request and of earlier values.
    assert not any(name.endswith("_prompt") for name in made["nodes"])
    assert len(lines(folder / "preferences.jsonl")) == pairs
    dispatch(["train", str(folder / "system.yaml"), "--dry-run", "--schedule.batch_size", "2"])
    assert "loss at step 0: 0.69" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "kind"), [("langgraph.spans.jsonl", "openinference"), ("langgraph.runs.jsonl", "langsmith")]
)
def test_a_langgraph_program_with_scores_in_a_file(place, small, capsys, file, kind):
    """Its two models are roles on one base, by the names of the graph's nodes; ids may stand with 0x or without."""
    scores = DATA / "langgraph.scores.jsonl"
    if kind == "langsmith":
        traces = dict.fromkeys(line["trace_id"] for line in lines(DATA / file))
        rows = [{"trace_id": trace, "score": place} for place, trace in enumerate(traces)]
        scores = write(Path("scores.jsonl"), rows)
    folder = imported(DATA / file, kind, "--model", f"small={small}", "--scores", str(scores))
    said = capsys.readouterr().out
    assert "12 spans of models, retrievers and tools: 12 mapped, 0 refused by name" in said
    # The server counted 5 tokens of each answer, which is not what this tokenizer makes of them.
    assert "unchecked" not in said
    made = system(folder)
    assert [*made["nodes"]] == ["passages", "write", "finish"]
    assert made["components"]["finish"]["base"] == "write"
    assert "checkpoint" not in made["components"]["finish"]
    dispatch(["train", str(folder / "system.yaml"), "--dry-run", "--schedule.batch_size", "2"])
    assert "loss at step 0: 0.69" in capsys.readouterr().out


def test_pairs_of_equal_answers_are_counted(place, small, capsys):
    """A pair by score whose trained values are the same on both sides has next to nothing to learn from."""
    rows = [each for n, last in enumerate("ab") for each in chain(f"t{n}", "red ball", "a ball", last, float(n))]
    file = write(Path("traces.jsonl"), rows)
    imported(file, "openinference", "--model", f"draft={small}")
    assert "in 1 of them both runs have the same answers of all models that are trained" in capsys.readouterr().out
    imported(file, "openinference", "--model", f"answer={small}", folder="other")
    assert "same answers" not in capsys.readouterr().out


def test_calls_that_differ_in_their_ids_are_alike():
    def pair(chosen, rejected):
        call = {"type": "function", "function": {"name": "on", "arguments": {"id": 3}}}
        one, other = ([{"role": "assistant", "tool_calls": [{"id": own, **call}]}] for own in (chosen, rejected))
        return {"chosen": {"a": one, "b": "x"}, "rejected": {"a": other, "b": "y"}}

    assert import_traces._alike(pair("c1", "c2"), ["a"])
    assert not import_traces._alike(pair("c1", "c1"), ["a", "b"])


def test_what_messages_of_the_root_say_is_the_request(place):
    """As LangGraph's agents are given it: [["user", "..."]]."""
    rows = []
    for n, text in enumerate(("red ball", "green cube")):
        given = {"input.value": json.dumps({"messages": [["user", text]]})}
        rows += [root(f"t{n}", "", float(n), **given), llm(f"t{n}", "a", "root", "answer", 1, f"the {text}", "on")]
    spans = write(Path("traces.jsonl"), rows)
    trees = of_one_shape(trees_of(read_spans(spans, "openinference"), Ledger()), Ledger())
    assert [*propose(trees, frozenset()).inputs] == ["request"]


def test_a_frozen_model_is_a_role_on_a_trained_one_and_no_base(place, small):
    found = {}
    for frozen in ("write", "shorten"):
        flags = ("--model", f"small={small}", "--frozen", frozen)
        folder = imported(DATA / "langsmith.jsonl", "langsmith", *flags, folder=frozen)
        found[frozen] = system(folder)["components"]
    assert (found["shorten"]["shorten"]["base"], found["shorten"]["shorten"]["mode"]) == ("write", "frozen")
    assert [found["write"][name]["checkpoint"] for name in ("write", "shorten")] == [str(small)] * 2


def test_prompts_of_the_proposal_are_those_that_were_recorded(place, small, capsys):
    """The system's own prompts, made of its records, beside the messages in the trace."""
    for file, kind, model, _, _, _ in RECORDED:
        folder = imported(DATA / file, kind, "--model", f"{model}={small}", folder=kind)
        config = read_config(folder / "system.yaml").system
        asked = {}
        for span in read_spans(DATA / file, kind):
            if span.kind == "LLM":
                asked.setdefault(span.trace, []).append(span.prompt)
        for run in lines(folder / "runs.jsonl"):
            values = from_json({**run["inputs"], **run["outputs"]})
            made = []
            for node in config.nodes.values():
                if node.component is None:
                    continue
                setting = built(config.components[node.component].settings, "settings").get("prompt")
                prompt = setting or _prompt("node", node, None)
                made.append(prompt(*(values[name] for name in node.parents)))
            assert made == asked[run["id"]]


def test_ids_of_the_trace_are_the_values_tokens(place, small, capsys):
    """Of the small tokenizer: a red <eos> is 4, 5, 2; of a prompt "the user on ..." the ids are those of its words."""
    response = {"choices": [{"message": {"content": "a red"}, "token_ids": [4, 5, 2], "finish_reason": "stop"}]}
    rows = four()
    # the <unk> on the red ball on small <eos> large the <unk> on, as the chat template writes it.
    asked = {"prompt_token_ids": [12, 3, 11, 12, 5, 7, 11, 9, 2, 10, 12, 3, 11]}
    rows += chain("asked", "red ball", "small", "a red", 0.95, **{"output.value": json.dumps(response | asked)})
    rows += chain("ids", "red ball", "small", "a red", 0.9, **{"output.value": json.dumps(response)})
    rows += chain("other", "red ball", "small", "a green", 0.8, **{"output.value": json.dumps(response)})
    rows += chain("counted", "red ball", "small", "a green", 0.7, **{"llm.token_count.completion": 3})
    rows += chain("drifted", "red ball", "small", "a green", 0.6, **{"llm.token_count.completion": 7})
    folder = imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}")
    values = {run["id"]: run["outputs"]["answer"] for run in lines(folder / "runs.jsonl")}
    assert values["ids"]["tokens"] == [4, 5, 2]
    assert from_json(values["ids"]) == "a red"
    assert values["other"] == "a green"
    report = (folder / "report.txt").read_text()
    [said] = [line for line in report.splitlines() if line.startswith("tokens of answer")]
    assert "1 prompts with the tokens that were recorded" in said
    assert "2 answers with the ids of the trace; 1 answers whose ids say another text" in said
    assert "1 answers without ids, of as many tokens as recorded; 1 answers without ids that drifted" in said


def test_models_are_trained_frozen_or_known_by_their_records(place, small):
    traces = write(place / "t.jsonl", four())
    folder = imported(traces, "openinference", "--model", f"answer={small}")
    made = system(folder)
    assert made["nodes"]["draft"] == {"tool": "sysdpo_jax.traces.tools:recorded", "parents": ["question"]}
    assert [*made["components"]] == ["answer"]
    flags = ["--model", f"small={small}", "--frozen", "draft", "--train", "answer"]
    made = system(imported(traces, "openinference", *flags, folder="two"))
    assert {name: each["mode"] for name, each in made["components"].items()} == {"draft": "frozen", "answer": "lora"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), r"nothing is trained: say which models are, of draft \(recorded as small\), answer"),
        (("--model", "drat=x"), "no span of a model: did you mean 'draft'"),
        (("--model", "draft"), "write NAME=CHECKPOINT"),
        (("--train", "draft", "--tool", "draft"), "given to --train and to --tool: give it once"),
        (("--model", "draft=no/such/folder"), "no/such/folder"),
        (("--model", "MODEL", "--score", "helpful"), "did you mean|none of the traces' scores"),
    ],
)
def test_flags_that_do_not_fit_are_told(place, small, flags, message):
    flags = [f"draft={small}" if word == "MODEL" else word for word in flags]
    config = {"model": (), "train": (), "tool": (), "score": ""}
    for flag, word in zip(flags[::2], flags[1::2], strict=True):
        name = flag.removeprefix("--")
        config[name] = word if name == "score" else (word,)
    traces = write(place / "t.jsonl", four())
    with pytest.raises(ConfigError, match=message):
        import_traces.run(import_traces.Config(traces, "openinference", place / "out", **config))


def test_a_person_is_asked_for_the_models(place, small, monkeypatch):
    asked = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or ("" if len(asked) == 1 else str(small)))
    folder = imported(write(place / "t.jsonl", four()), "openinference")
    assert len(asked) == 2
    assert "draft (recorded as small)" in asked[0]
    assert [*system(folder)["components"]] == ["answer"]


def test_scores_come_from_a_file_by_trace_or_span(place, small):
    rows = four()
    names = sorted({each["context"]["trace_id"] for each in rows})
    write(place / "scores.jsonl", [{"trace_id": name, "label": "thumbs_up"} for name in names[::2]])
    with (place / "scores.jsonl").open("a") as file:
        file.writelines(f"{json.dumps({'trace_id': name, 'result': {'score': 0}})}\n" for name in names[1::2])
    folder = imported(
        write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}", "--scores", "scores.jsonl"
    )
    assert {line["id"]: line["score"] for line in lines(folder / "scores.jsonl")} == {
        name: float(place % 2 == 0) for place, name in enumerate(names)
    }
    write(place / "bad.jsonl", [{"trace_id": "nobody", "score": 1}])
    flags = {"model": (f"small={small}",), "scores": place / "bad.jsonl"}
    with pytest.raises(ConfigError, match=r"bad\.jsonl, row 1 names no trace or span"):
        import_traces.run(import_traces.Config(place / "t.jsonl", "openinference", place / "x", **flags))


def test_prompts_of_several_messages_are_written_as_they_were(place, small):
    """A constant system's message is the node's own; others are a function's."""
    rows = four()
    for each in rows:
        if each["attributes"]["openinference.span.kind"] == "LLM":
            [said] = [
                value for key, value in each["attributes"].items() if key.endswith("input_messages.0.message.content")
            ]
            first, last = ("so", "as {x}") if each["name"] == "draft" else (said, "again")
            each["attributes"] |= {
                "llm.input_messages.0.message.role": "system",
                "llm.input_messages.0.message.content": f"be {first} {{brief}}",
                "llm.input_messages.1.message.role": "user",
                "llm.input_messages.1.message.content": f"{said} {last}",
            }
    made = system(imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}"))
    assert made["nodes"]["draft"]["system"] == "be so {brief}"
    assert made["nodes"]["draft"]["prompt"] == "a {question} as {{x}}"
    assert "prompt" not in made["components"]["draft"]["settings"]
    prompt = built(made["components"]["answer"]["settings"], "settings")["prompt"]
    assert prompt("red ball", "large") == [
        {"role": "system", "content": "be the red ball on large {brief}"},
        {"role": "user", "content": "the red ball on large again"},
    ]
    with pytest.raises(RecordError, match="'draft' is no text"):
        prompt("red ball", [])
    with pytest.raises(ValueError, match="the user's message names 'drat', which is no parent: did you mean 'draft'"):
        messages(("draft",), ("user: {drat}",))
    with pytest.raises(ValueError, match="has no role"):
        messages(("draft",), ("{draft}",))


def test_scores_in_words_are_refused_by_name(place, small):
    rows = four()
    rows += chain("words", "red ball", "a", "the", "rather good")
    traces, flags = write(place / "t.jsonl", rows), {"model": (f"small={small}",)}
    folder = imported(traces, "openinference", "--model", f"small={small}")
    assert "scores 'quality' refused, no number or thumb ('rather good'): 1" in (folder / "report.txt").read_text()
    assert "error" in {line["id"]: line for line in lines(folder / "scores.jsonl")}["words"]
    with pytest.raises(ConfigError, match="'quality' says 'rather good'; give --scores FILE"):
        import_traces.run(
            import_traces.Config(write(place / "u.jsonl", rows[-3:]), "openinference", place / "o", **flags)
        )
    write(place / "bad.jsonl", [{"trace_id": "words", "score": "good?"}])
    with pytest.raises(ConfigError, match=r"row 1 has the score 'good\?': give a number"):
        import_traces.run(
            import_traces.Config(traces, "openinference", place / "o", **flags, scores=place / "bad.jsonl")
        )


def test_runs_without_a_score_stay_and_pairs_need_two_that_differ(place, small, capsys):
    rows = [*four(), *chain("lone", "red", "a", "the", None)]
    folder = imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}")
    assert "error" in {line["id"]: line for line in lines(folder / "scores.jsonl")}["lone"]
    rows = [*chain("one", "red ball", "a", "large", 1.0), *chain("two", "green cube", "a", "left", 0.0)]
    traces = write(place / "u.jsonl", rows)
    flags = {"model": (f"small={small}",)}
    with pytest.raises(ConfigError, match="no two runs of a prompt differ"):
        import_traces.run(import_traces.Config(traces, "openinference", place / "unpaired", **flags))
    # What thumbs said is there for `sysdpo pairs` with further runs.
    assert [line["score"] for line in lines(place / "unpaired/scores.jsonl")] == [1.0, 0.0]


def test_a_proposal_that_somebody_edited_is_kept(place, small):
    traces = write(place / "t.jsonl", four())
    flags = ("--model", f"small={small}")
    folder = imported(traces, "openinference", *flags)
    imported(traces, "openinference", *flags)
    (folder / "system.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="says something else"):
        import_traces.run(import_traces.Config(traces, "openinference", folder, model=(f"small={small}",)))
    assert (folder / "system.yaml").read_text() == "mine"


def test_what_no_template_makes_is_kept_as_a_recorded_prompt(place, small, capsys):
    rows = four()
    for number, each in enumerate(rows):
        if each["name"] == "answer":
            each["attributes"]["llm.input_messages.0.message.content"] += f" as of {number}"
    folder = imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}")
    made = system(folder)
    assert made["nodes"]["answer"] == {"component": "answer", "parents": ["answer_prompt"]}
    assert made["nodes"]["answer_prompt"]["parents"] == ["question", "draft"]
    assert "none makes all" in capsys.readouterr().out
    dispatch(["train", str(folder / "system.yaml"), "--dry-run", "--schedule.batch_size", "2"])
    assert "loss at step 0: 0.69" in capsys.readouterr().out


def test_a_single_call_is_a_system_whose_request_is_its_prompt(place, small):
    rows = [
        llm(
            f"t{number}", "l", None, "ChatCompletion", 1, "a red ball", answer, **{"annotations.0.annotation.name": "n"}
        )
        | {}
        for number, answer in enumerate(("large", "small"))
    ]
    for number, each in enumerate(rows):
        each["attributes"]["annotations.0.annotation.score"] = number
    folder = imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}")
    made = system(folder)
    assert made["inputs"] == ["request"]
    [preference] = lines(folder / "preferences.jsonl")
    assert preference["inputs"] == {"request": [{"role": "user", "content": "a red ball"}]}
    assert preference["chosen"] == {"chat_completion": "small"}


def test_every_span_of_a_value_is_mapped_or_refused_by_name(place, small):
    """Loops, failures, calls of tools, pictures, wrappers: none is lost."""
    rows = four()
    base = "red ball 0"
    rows += [
        row(base, "e", "root", "EMBEDDING", "embed", 3),
        row(base, "x", "root", "MAGIC", "strange", 3),
        llm(base, "f", "root", "retry", 3, "a", "b") | {"status": {"status_code": "ERROR", "description": "no room"}},
        row(
            base, "c", "root", "LLM", "calls", 4,
            **{
                "llm.input_messages.0.message.role": "user",
                "llm.input_messages.0.message.content": "a",
                "llm.output_messages.0.message.tool_calls.0.tool_call.function.arguments": "{}",
            },
        ),
        *chain("loop", "red ball", "a", "the", 0.5),
        llm("loop", "a2", "root", "answer", 5, "more", "text"),
        root("outer", "red ball", 0.2),
        llm("outer", "w", "root", "draft", 1, "a red ball", "left"),
        llm("outer", "i", "w", "http", 1, "a red ball", "left"),
        llm("outer", "a", "root", "answer", 2, "the red ball on left", "on"),
    ]  # fmt: skip
    folder = imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}")
    report = (folder / "report.txt").read_text()
    for said in (
        "LLM retry: 1 spans, refused: it failed (no room)",
        "LLM calls: 1 spans, refused: it has a call of a tool without a name",
        "EMBEDDING embed: 1 spans, structure: a span of the kind EMBEDDING",
        "MAGIC strange: 1 spans, structure: a span of an unknown kind (MAGIC)",
        "LLM answer: 1 spans, refused: its trace has another shape",
        "LLM draft: 1 spans, the same call as the span http in it",
    ):
        assert said in report
    values = [each for each in rows if each["attributes"]["openinference.span.kind"] in VALUES]
    told = [line for line in report.splitlines() if line.split()[0] in VALUES and " spans, " in line]
    assert sum(int(line.split(": ")[1].split()[0]) for line in told) == len(values)
