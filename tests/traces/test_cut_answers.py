"""Answers that a server cut at their length: nothing tells a model to end there."""

import json

import pytest
import transformers

from sysdpo_jax.components.prompts import completion_ids, prompt_ids, tokenized
from sysdpo_jax.traces import dspy, langfuse, langsmith
from sysdpo_jax.traces.attributes import span_of
from sysdpo_jax.traces.files import read_spans
from sysdpo_jax.traces.spans import OtelSpan, Span, nested
from sysdpo_jax.traces.tokens import was_cut
from sysdpo_jax.values import SampledText, from_json
from tests.traces.spans import chain, four, write
from tests.traces.test_import_command import DATA, imported, lines

CHOICE = {"message": {"role": "assistant", "content": "a red"}, "finish_reason": "length"}
ASKED = [{"role": "user", "content": "what"}]


def otel(**attributes):
    return span_of(
        OtelSpan("t", "s", None, "chat", 1.0, 2.0, "", nested({k.replace("__", "."): v for k, v in attributes.items()}))
    )


def open_inference(**attributes):
    said = {"llm__input_messages__0__message__content": "what", "llm__output_messages__0__message__content": "a red"}
    return otel(openinference__span__kind="LLM", **said, **attributes)


def lang_smith(**outputs):
    row = {"id": "a", "run_type": "llm", "inputs": {"messages": ASKED}, "outputs": outputs}
    return next(langsmith.spans_of(row))


def lang_chain(**about):
    return [[{"text": "a red", "message": {"kwargs": {"content": "a red", "response_metadata": about}}}]]


def lang_fuse(output, **more):
    row = {"id": "o", "traceId": "t", "type": "GENERATION", "input": ASKED, "output": output, **more}
    return next(langfuse.spans_of(row))


def history(**more):
    return next(dspy.spans_of({"messages": ASKED, "outputs": ["a red"], **more}))


MESSAGE = json.dumps([{"role": "assistant", "parts": [{"type": "text", "content": "a"}], "finish_reason": "length"}])
GEN_AI = {
    "gen_ai__operation__name": "chat",
    "gen_ai__prompt__0__content": "what",
    "gen_ai__completion__0__content": "a",
}
SAID = {
    "openinference": lambda: open_inference(llm__finish_reason="length"),
    "its message": lambda: open_inference(llm__output_messages__0__message__finish_reason="length"),
    "its choice": lambda: open_inference(llm__choices__0__completion__finish_reason="length"),
    "its response": lambda: open_inference(output__value=json.dumps({"choices": [CHOICE]})),
    "OpenAI's responses": lambda: open_inference(
        output__value='{"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}'
    ),
    "otlp": lambda: otel(**GEN_AI, gen_ai__response__finish_reasons=["length"]),
    "otlp, as a text": lambda: otel(**GEN_AI, gen_ai__response__finish_reasons="max_tokens"),
    "otlp, a message": lambda: otel(gen_ai__operation__name="chat", gen_ai__output__messages=MESSAGE),
    "OpenLLMetry": lambda: otel(**GEN_AI, gen_ai__completion__0__finish_reason="MAX_TOKENS"),
    "dspy": lambda: history(response={"choices": [CHOICE]}),
    "dspy, in words": lambda: history(response="ModelResponse(id='1', choices=[Choices(finish_reason='length', ...)])"),
    "langsmith": lambda: lang_smith(choices=[CHOICE]),
    "LangChain's generation": lambda: lang_smith(
        generations=[[{"text": "a red", "generation_info": {"finish_reason": "length"}}]]
    ),
    "LangChain's message": lambda: lang_smith(generations=lang_chain(stop_reason="max_tokens")),
    "LangChain's enumeration": lambda: lang_smith(generations=lang_chain(finish_reason="FinishReason.MAX_TOKENS")),
    "langfuse": lambda: lang_fuse({"choices": [CHOICE]}),
    "langfuse's metadata": lambda: lang_fuse("a red", metadata={"finish_reason": "length"}),
    "its length": lambda: history(kwargs={"max_tokens": 2}, usage={"completion_tokens": 2}),
}


@pytest.mark.parametrize("made", SAID.values(), ids=SAID)
def test_every_format_says_that_an_answer_was_cut(made):
    assert was_cut(made())


def test_what_ended_is_not_cut():
    assert not was_cut(history(response={"choices": [CHOICE | {"finish_reason": "stop"}]}, usage={}))
    assert not was_cut(history(usage={"completion_tokens": 2}))
    assert not was_cut(history(kwargs={"max_tokens": 3}, usage={"completion_tokens": 2}))
    # The server knows better than the number of tokens, of which the end is one.
    about = {"kwargs": {"max_tokens": 2}, "usage": {"completion_tokens": 2}}
    assert not was_cut(history(response={"choices": [CHOICE | {"finish_reason": "stop"}]}, **about))
    recorded = [span for span in read_spans(DATA / "openai.spans.jsonl", "openinference") if span.kind == "LLM"]
    assert sum(map(was_cut, recorded)) == 4
    assert not was_cut(Span("t", "s", None, "LLM", "x"))


def test_an_answer_that_was_cut_gets_no_end(place, small, capsys):
    """With ids and without; what the tokenizer does not know would get one, so that its run is in no pair."""
    ids = {"choices": [CHOICE | {"token_ids": [4, 5]}]}
    rows = four()
    rows += chain("ids", "red ball", "small", "a red", 0.9, **{"output.value": json.dumps(ids)})
    rows += chain("cut", "red ball", "small", "a red", 0.8, **{"llm.finish_reason": "length"})
    rows += chain("other", "red ball", "small", "a green", 0.7, **{"output.value": json.dumps(ids)})
    rows += chain("ended", "red ball", "small", "a red", 0.6, **{"llm.finish_reason": "stop"})
    rows += chain("lost", "red ball", "small", "a blue", 0.5, **{"llm.finish_reason": "length"})
    rows += chain("none", "red ball", "small", "", 0.4, **{"llm.finish_reason": "length"})
    folder = imported(write(place / "t.jsonl", rows), "openinference", "--model", f"small={small}", "--pairs", "all")
    values = {run["id"]: from_json(run["outputs"]["answer"]) for run in lines(folder / "runs.jsonl")}
    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    [prompt] = tokenized(tokenizer, [prompt_ids(tokenizer, [{"role": "user", "content": "the red"}], 0)])

    def trained(name):
        [made] = tokenized(tokenizer, [completion_ids(tokenizer, prompt, values[name], [2], 16, 0)])
        return made.ids, made.retokenized

    # Of the small tokenizer: 2 is its <eos>, a 4, red 5, green 6.
    assert trained("ids") == trained("cut") == ([4, 5], False)
    assert trained("other") == ([4, 6], False)
    assert trained("ended") == ([4, 5, 2], False)
    assert [isinstance(values[name], SampledText) for name in ("cut", "ended", "lost", "none")] == [1, 0, 0, 0]
    report = (folder / "report.txt").read_text()
    [said] = [line for line in report.splitlines() if line.startswith("tokens of answer")]
    assert "3 answers that were cut at their length, and get no end" in said
    assert "2 answers that were cut, whose tokens do not say their text: their runs are in no pair" in said
    scores = {line["id"]: line for line in lines(folder / "scores.jsonl")}
    assert all("an answer in it was cut" in scores[name]["error"] for name in ("lost", "none"))
    chosen = [line["chosen"]["answer"] for line in lines(folder / "preferences.jsonl")]
    assert {"text": "a red", "tokens": [4, 5], "end": "cut"} in [
        {name: each[name] for name in ("text", "tokens", "end")} for each in chosen if isinstance(each, dict)
    ]
    assert "a blue" not in json.dumps(lines(folder / "preferences.jsonl"))
