"""Traces that tests make: rows as OpenTelemetry's SDK prints spans."""

import json


def row(trace, own, parent, kind, name, start, **attributes):
    """One span. Attributes have their dots as double underscores."""
    named = {key.replace("__", "."): value for key, value in attributes.items()}
    return {
        "name": name,
        "context": {"trace_id": trace, "span_id": own},
        "parent_id": parent,
        "start_time": f"2026-01-01T00:00:{start:02d}Z",
        "end_time": f"2026-01-01T00:00:{start:02d}.5Z",
        "status": {"status_code": "OK"},
        "attributes": {"openinference.span.kind": kind, **named},
    }


def llm(trace, own, parent, name, start, prompt, answer, **attributes):
    """A call of a model. prompt: of a user, or messages."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    given = {
        f"llm.input_messages.{place}.message.{key}": value
        for place, message in enumerate(messages)
        for key, value in message.items()
    }
    given |= {"llm.output_messages.0.message.role": "assistant", "llm.output_messages.0.message.content": answer}
    return row(trace, own, parent, "LLM", name, start, **{"llm.model_name": "small", **given, **attributes})


def root(trace, question, score=None, **attributes):
    """The span around a trace."""
    scored = {"annotations.0.annotation.name": "quality", "annotations.0.annotation.score": score}
    given = {"input.value": json.dumps({"question": question}), **(scored if score is not None else {}), **attributes}
    return row(trace, "root", None, "CHAIN", "ask", 0, **given)


def chain(trace, question, draft, answer, score, **attributes):
    """A draft, and an answer made of it; attributes are the answer's."""
    return [
        root(trace, question, score),
        llm(trace, "d", "root", "draft", 1, f"a {question}", draft),
        llm(trace, "a", "root", "answer", 2, f"the {question} on {draft}", answer, **attributes),
    ]


def four():
    """Two requests of two runs each."""
    texts = (("red ball", "large", "small"), ("green cube", "left", "on the left"))
    return [
        span
        for question, first, second in texts
        for place, answer in enumerate((first, second))
        for span in chain(f"{question} {place}", question, f"{answer} {question[:3]}", answer, 1.0 - place)
    ]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
    return path
