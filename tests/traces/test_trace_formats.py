"""What each format's reader makes of its rows."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from sysdpo_jax.traces import langfuse, langsmith
from sysdpo_jax.traces.attributes import span_of
from sysdpo_jax.traces.files import read_spans
from sysdpo_jax.traces.messages import NoText, answer_of, messages_of
from sysdpo_jax.traces.spans import OtelSpan, moment, nested, score_of
from tests.traces.spans import four

DATA = Path(__file__).parent / "data"


def test_the_same_spans_in_three_forms_are_the_same(tmp_path):
    """As the SDK prints them, as Phoenix's REST API gives them, and as rows of its data frames."""
    rows = four()
    pages = [
        {
            "data": [
                {
                    **{key: each[key] for key in ("name", "context", "parent_id", "start_time", "end_time")},
                    "span_kind": each["attributes"]["openinference.span.kind"],
                    "status_code": "OK",
                    "attributes": each["attributes"],
                }
                for each in rows
            ]
        }
    ]
    frames = [
        {
            "context.trace_id": each["context"]["trace_id"],
            "context.span_id": each["context"]["span_id"],
            "parent_id": each["parent_id"],
            "name": each["name"],
            "start_time": each["start_time"],
            "end_time": each["end_time"],
            "span_kind": each["attributes"]["openinference.span.kind"],
            **{
                f"attributes.{name}": value
                for name, value in each["attributes"].items()
                if "messages" not in name and "annotations" not in name
            },
            "attributes.llm.input_messages": [
                {
                    "message.role": "user",
                    "message.content": each["attributes"].get("llm.input_messages.0.message.content"),
                }
            ],
            "attributes.llm.output_messages": [
                {"message": {"content": each["attributes"].get("llm.output_messages.0.message.content")}}
            ],
            "attributes.annotations": nested(each["attributes"]).get("annotations"),
        }
        for each in rows
    ]
    made = []
    for name, value in (("sdk", rows), ("rest", pages), ("frame", frames)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
        made.append(read_spans(tmp_path / f"{name}.json", "openinference"))
    assert made[0] == made[1] == made[2]
    assert made[0][1].prompt == [{"role": "user", "content": "a red ball"}]
    assert made[0][0].scores[0].value == 1.0


def test_phoenixs_data_frames_in_parquet(tmp_path):
    """Columns are there in every row: what a span has not is null."""
    columns = ("context.trace_id", "context.span_id", "parent_id", "name", "span_kind", "start_time")
    names = (*columns, "attributes.input.value", "attributes.llm.input_messages", "attributes.llm.output_messages")
    message = [{"message.role": "user", "message.content": "a red ball"}]
    said = [{"message.role": "assistant", "message.content": "large"}]
    rows = [
        ("t", "r", None, "ask", "CHAIN", "2026-01-01T00:00:00Z", '{"question": "red ball"}', None, None),
        ("t", "l", "r", "draft", "LLM", "2026-01-01T00:00:01Z", None, message, said),
    ]
    table = pyarrow.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
    pyarrow.parquet.write_table(table, tmp_path / "spans.parquet")
    outer, inner = read_spans(tmp_path / "spans.parquet", "openinference")
    assert (outer.kind, outer.input) == ("CHAIN", {"question": "red ball"})
    assert (inner.prompt, inner.answer) == ([{"role": "user", "content": "a red ball"}], "large")


def test_otlp_is_what_the_sdk_prints():
    """The same run of the program in both forms: times differ in their precision alone."""
    spans = read_spans(DATA / "dspy.otlp.jsonl", "otlp")
    calls = [span for span in spans if span.kind == "LLM"]
    history = [json.loads(line)["history"] for line in (DATA / "dspy.jsonl").read_text().splitlines()]
    entries = [entry for call in history for entry in call]
    assert [span.prompt for span in calls] == [entry["messages"] for entry in entries]
    assert [span.answer for span in calls] == [entry["outputs"][0] for entry in entries]
    assert calls[0].settings["temperature"] == 0.8
    assert [span.documents is not None for span in spans if span.kind == "RETRIEVER"] == [True] * 8


def gen_ai(**attributes):
    named = nested({key.replace("__", "."): value for key, value in attributes.items()})
    return span_of(OtelSpan("t", "s", None, "chat small", 1.0, 2.0, "", named))


def test_open_telemetrys_own_conventions():
    said = json.dumps(
        [{"role": "assistant", "parts": [{"type": "text", "content": "a ball"}], "finish_reason": "stop"}]
    )
    asked = json.dumps([{"role": "user", "parts": [{"type": "text", "content": "what is red"}]}])
    span = gen_ai(
        gen_ai__operation__name="chat",
        gen_ai__request__model="small",
        gen_ai__request__temperature=0.5,
        gen_ai__system_instructions=json.dumps([{"type": "text", "content": "be short"}]),
        gen_ai__input__messages=asked,
        gen_ai__output__messages=said,
        gen_ai__usage__output_tokens=3,
    )
    assert span.kind == "LLM"
    assert span.prompt == [{"role": "system", "content": "be short"}, {"role": "user", "content": "what is red"}]
    assert (span.answer, span.counts, span.settings) == ("a ball", (None, 3), {"temperature": 0.5})
    older = gen_ai(
        llm__request__type="chat",
        gen_ai__request__model="small",
        gen_ai__prompt__0__role="user",
        gen_ai__prompt__0__content="what is red",
        gen_ai__completion__0__content="a ball",
        gen_ai__completion__0__role="assistant",
    )
    assert (older.prompt, older.answer) == ([{"role": "user", "content": "what is red"}], "a ball")
    tool = gen_ai(gen_ai__operation__name="execute_tool", gen_ai__tool__call__result="six sides")
    assert (tool.kind, tool.output) == ("TOOL", "six sides")
    assert gen_ai(traceloop__span__kind="workflow", traceloop__entity__input='{"q": 1}').input == {"q": 1}
    assert gen_ai(http__method="GET").kind == ""


def test_scores_of_events_are_read():
    event = ("gen_ai.evaluation.result", nested({"gen_ai.evaluation.name": "ok", "gen_ai.evaluation.score.value": 0.5}))
    raw = OtelSpan("t", "s", None, "chat", 1.0, 2.0, "", nested({"gen_ai.operation.name": "invoke_agent"}), [event])
    assert [(score.name, score.value) for score in span_of(raw).scores] == [("ok", 0.5)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a ball", "a ball"),
        (["a ball"], "a ball"),
        ({"choices": [{"message": {"role": "assistant", "content": "a ball"}}]}, "a ball"),
        ({"choices": [{"text": "a ball"}]}, "a ball"),
        ({"generations": [[{"text": "a ball"}]]}, "a ball"),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "ball"}]},
            "a ball",
        ),
        ({"output": {"content": "a ball"}}, "a ball"),
    ],
)
def test_answers_in_the_forms_of_programs(value, text):
    assert answer_of(value) == text


@pytest.mark.parametrize("value", [None, 3, ["a", "b"], {"role": "assistant", "tool_calls": [{}], "content": None}])
def test_what_is_no_answer_is_refused(value):
    with pytest.raises(NoText):
        answer_of(value)


def test_messages_in_the_forms_of_programs():
    plain = [{"role": "user", "content": "what"}]
    assert messages_of({"messages": [[{"type": "human", "content": "what"}]]}) == plain
    assert messages_of([["human", "what"]]) == plain
    assert messages_of('[{"role": "user", "content": "what"}]') == plain
    assert messages_of({"prompts": ["what"]}) == "what"


def test_times_of_every_precision():
    assert moment("2026-01-01T00:00:00Z") == moment(1767225600) == moment("1767225600000000000")
    assert moment(1767225600000) == 1767225600
    assert moment(None) == moment("yesterday") == 0.0


@pytest.mark.parametrize(
    ("number", "label", "value"),
    [
        (4, None, 4.0),
        ("4.5", None, 4.5),
        (" -1e-1 ", "bad", -0.1),
        (True, None, 1.0),
        ("False", None, 0.0),
        (None, "thumbs up", 1.0),
        (None, "👎", 0.0),
        ("n/a", "THUMBS_DOWN", 0.0),
        ("great", None, None),
        ("4 of 5", None, None),
        ("nan", None, None),
        (float("inf"), None, None),
        ([1], None, None),
    ],
)
def test_scores_are_numbers_texts_of_numbers_and_thumbs(number, label, value):
    [score] = score_of("quality", number, label)
    assert (score.value, bool(score.said)) == (value, value is None)


def test_what_says_nothing_is_no_score():
    assert score_of("quality", None) == score_of("quality", "", None) == []


def test_scores_and_counts_of_langfuses_observations():
    about = {"type": "GENERATION", "input": "what", "output": "a ball", "traceId": "t"}
    scores = [{"name": "own", "value": "3"}]
    rows = [
        {"usage": {"promptTokens": 3, "completionTokens": 2, "totalTokens": 5}, "scores": scores},
        {"usage": {"input": 3, "output": 2, "unit": "TOKENS"}},
        {"usageDetails": {"prompt_tokens": 3, "completion_tokens": 2}, "usage": {"input": 9}},
        {"promptTokens": 3, "completionTokens": 2, "usage": None},
    ]
    trace = {"id": "t", "observations": [about | row | {"id": str(n)} for n, row in enumerate(rows)]}
    trace["scores"] = [{"name": "of it", "value": 1, "observationId": "0"}, {"name": "all", "value": 0.5}]
    whole, *made = langfuse.spans_of(trace)
    assert [span.counts for span in made] == [(3, 2)] * 4
    assert [(score.name, score.value, score.whole) for score in whole.scores] == [("all", 0.5, True)]
    assert {score.name: score.value for score in made[0].scores} == {"own": 3.0, "of it": 1.0}
    [alone] = langfuse.spans_of(about | rows[0] | {"id": "alone"})
    assert [score.value for score in alone.scores] == [3.0]
    [letters] = langfuse.spans_of(about | {"id": "l", "usage": {"input": 3, "output": 2, "unit": "CHARACTERS"}})
    assert letters.counts == (None, None)


def test_langsmiths_feedback_in_words():
    row = {"id": "a", "run_type": "chain", "feedback_stats": {"ok": {"n": 2, "avg": None, "values": {"correct": 2}}}}
    row["feedback_stats"]["mixed"] = {"n": 2, "avg": None, "values": {"good": 1, "bad": 1}}
    [span] = langsmith.spans_of(row)
    assert [(score.name, score.value, score.said) for score in span.scores] == [
        ("ok", 1.0, ""),
        ("mixed", None, "good, bad"),
    ]
