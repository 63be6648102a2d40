"""What people compared in Label Studio and Argilla, texts and no runs, as preferences."""

import json
import re

import jax
import pytest

import sysdpo_jax as sj
from sysdpo_jax.data.files import read_rows
from sysdpo_jax.data.formats import READERS
from tests.components.test_conversations import model

SYSTEM = sj.CompoundSystem(("q",), (sj.Node("a", sj.Categorical(2, (2,)), ("q",)),))
# The names of https://labelstud.io/templates/generative-pairwise-human-preference.
TASK = {"prompt": "what?", "answer1": "this", "answer2": "that"}
# Those of `argilla.yaml` in the data set kursathalat/ranking_ds of the hub.
FIELDS = {"prompt": "what?", "response1": "this", "response2": "that"}
FIRST = sj.PreferenceRecord({"q": "what?"}, {"a": "this"}, {"a": "that"})
SECOND = sj.PreferenceRecord({"q": "what?"}, {"a": "that"}, {"a": "this"})


def task(*selected, data=TASK):
    """A task as Label Studio 1.23 exports it, with an annotation for each selection; None is a skipped one."""
    annotations = [
        {
            "id": number,
            "completed_by": 1,
            "result": [
                {
                    "value": {"selected": side},
                    "id": "J6txZIjRud",
                    "from_name": "better",
                    "to_name": "better",
                    "type": "pairwise",
                    "origin": "manual",
                }
                for side in [side]
                if side
            ],
            "was_cancelled": side is None,
            "ground_truth": False,
            "created_at": "2026-11-27T13:15:37.202686Z",
            "lead_time": 2.264,
            "prediction": {},
            "result_count": 1,
        }
        for number, side in enumerate(selected, 1)
    ]
    return {
        "id": 1,
        "annotations": annotations,
        "drafts": [],
        "predictions": [],
        "data": data,
        "meta": {},
        "project": 1,
    }


def record(*values, question="preference"):
    """A record as `to_json` of Argilla 2.8 writes it, with a response of another person for each value."""
    responses = {question: [{"value": value, "user_id": f"7d4c{n}"} for n, value in enumerate(values)]}
    rest = {"metadata": {}, "suggestions": {}, "vectors": {}, "status": "completed", "_server_id": None}
    return {"id": "p1", "fields": FIELDS, "responses": responses, **rest}


def row(*values, states=None):
    """The same in a row of `to_datasets`."""
    spelled = {
        "preference.responses": list(values),
        "preference.responses.users": [f"7d4c{n}" for n in range(len(values))],
        "preference.responses.status": states or ["submitted"] * len(values),
    }
    return {"id": "p1", "status": "completed", "_server_id": None, **FIELDS, **spelled}


def ranks(first, second):
    return [{"value": "response1", "rank": first}, {"value": "response2", "rank": second}]


RATED = {"response1": [{"value": 2, "user_id": "u"}], "response2": [{"value": 5, "user_id": "u"}]}


@pytest.mark.parametrize(
    ("reader", "values", "wanted"),
    [
        ("label_studio", task("left"), [FIRST]),
        ("label_studio", task("right", None, "left"), [SECOND, FIRST]),
        ("label_studio", task(), []),
        ("label_studio", task("left", data={"prompt": "what?", "text1": "this", "text2": "that"}), [FIRST]),
        ("argilla", record("response1", "right", "tie"), [FIRST, SECOND]),
        ("argilla", record(ranks(2, 1), ranks(1, 1)), [SECOND]),
        ("argilla", record() | {"responses": RATED}, [SECOND]),
        ("argilla", record() | {"responses": {}}, []),
        ("argilla", row("response2", "left", None, states=["submitted", "draft", "discarded"]), [SECOND]),
    ],
)
def test_each_answer_is_a_preference(tmp_path, reader, values, wanted):
    (tmp_path / "export.json").write_text(json.dumps([values]))
    [(number, read)] = read_rows(tmp_path / "export.json")
    assert number == 1
    assert READERS[reader](read, SYSTEM) == wanted


@pytest.mark.parametrize(
    ("reader", "left", "none", "right"),
    [
        ("label_studio", task("left"), task(None), task("right")),
        ("argilla", record("response1"), record("tie"), record("response2")),
    ],
)
def test_an_export_becomes_features(tmp_path, reader, left, none, right):
    """Through the same way as all preferences."""
    rows = [values | {"id": number} for number, values in enumerate((left, none, right))]
    (tmp_path / "export.json").write_text(json.dumps(rows))
    system = sj.CompoundSystem(("q",), (sj.Node("a", model(), ("q",)),))
    found = sj.load_preferences(tmp_path / "export.json", system, reader, params=system.init(jax.random.key(0)))
    assert list(found) == [FIRST, SECOND]
    assert found.counts.ties == 1
    assert found.fits(system)


@pytest.mark.parametrize(
    ("reader", "values", "message"),
    [
        ("label_studio", {"prompt": "what?", "better": "left"}, "export as JSON, not as JSON-MIN"),
        ("label_studio", task("left", data={"text1": "a", "text2": "b"}), "the field 'prompt' must be a text"),
        ("label_studio", task("left", data={"pair": "x", "left": "a"}), "is for its --answers"),
        ("label_studio", task("middle"), "an answer says 'middle'"),
        ("label_studio", task() | {"annotations": [{}]}, "not of the form that the tool writes (KeyError('result'))"),
        ("argilla", record(["response2", "response1"]), "has no ranks, which ties need"),
        ("argilla", record("good"), "an answer says nothing of left, right or tie"),
        ("argilla", FIELDS, "the row has no responses"),
        ("argilla", record("left") | {"fields": {"prompt": "a", "left": "b"}}, "is for its --answers"),
    ],
)
def test_exports_of_another_form_are_refused(reader, values, message):
    with pytest.raises(sj.RecordError, match=re.escape(message)):
        READERS[reader](values, SYSTEM)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "holds dict instead of a list"), ("[1]", "int instead of an object"), ("[{", "is not valid JSON")],
)
def test_files_of_json_that_hold_no_list_of_rows(tmp_path, text, message):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(sj.RecordError, match=message):
        sj.load_preferences(tmp_path / "rows.json")
