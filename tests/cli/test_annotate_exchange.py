"""Pairs of runs as tasks of Label Studio and Argilla, and what people answered there as preferences."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.runs.runs_file import read_lines
from tests.cli.test_annotate import rows, say, serving, write
from tests.cli.test_runs import failure

LABELS = ("left", "right", "tie", "skip")


def label_studio(tasks, said):
    """What Label Studio exports as JSON after these answers: made by hand after its pages on tasks and on Pairwise."""

    def result(answer):
        if answer == "tie":
            value = {"value": {"choices": ["tie"]}, "from_name": "equal", "to_name": "left", "type": "choices"}
        else:
            value = {"value": {"selected": answer}, "from_name": "better", "to_name": "left", "type": "pairwise"}
        return value | {"id": "Dx_aB91ISN", "origin": "manual"}

    exported = []
    for number, (task, answers) in enumerate(zip(tasks, said, strict=True), 1):
        annotations = [
            {
                "id": 10 * number + person,
                "completed_by": person,
                "result": [] if answer == "skip" else [result(answer)],
                "was_cancelled": answer == "skip",
                "ground_truth": False,
                "created_at": "2026-03-09T22:16:08.728353Z",
                "lead_time": 4.288,
                "task": number,
            }
            for person, answer in enumerate(answers)
        ]
        exported.append({"id": number, "annotations": annotations, "predictions": [], "project": 8} | task)
    return exported


def argilla(tasks, said, question="better"):
    """What Argilla's `dataset.records.to_json` writes, made by hand after `Record.to_dict`."""
    return [
        {
            "id": task["id"],
            "fields": task["fields"],
            "metadata": {},
            "suggestions": {},
            "responses": {
                question: [{"value": value, "user_id": f"b53{person}"} for person, value in enumerate(answers)],
                "remark": [{"value": "I am not sure", "user_id": "b530"} for _ in answers[:1]],
            },
            "vectors": {},
            "_server_id": "d757be49",
        }
        for task, answers in zip(tasks, said, strict=True)
    ]


def exported(folder, tool, *paths):
    dispatch(["annotate", *map(str, paths), "--export", tool, "--output", str(folder / "tasks.json")])
    return json.loads((folder / "tasks.json").read_text())


def imported(folder, rows, *paths):
    (folder / "export.json").write_text(json.dumps(rows))
    flags = ["--answers", str(folder / "export.json"), "--output", str(folder / "imported.jsonl")]
    dispatch(["annotate", *map(str, paths), *flags])
    return list(read_lines(folder / "imported.jsonl"))


@pytest.mark.parametrize(("tool", "answered"), [("label_studio", label_studio), ("argilla", argilla)])
def test_answers_of_other_tools_are_those_of_the_page(tmp_path, tool, answered, capsys):
    """The same answers to the same pairs make the same records, byte for byte, and the same figures."""
    paths = [write(tmp_path / f"{name}.jsonl", name, 4, 1, 30 * place) for place, name in enumerate(("old", "new"), 1)]
    with serving(tmp_path / "page.jsonl", *paths) as server:
        for answer in LABELS:
            say(server, answer)
    tasks = exported(tmp_path, tool, *paths)
    assert len(tasks) == 4
    text = (tmp_path / "tasks.json").read_text()
    assert "data:image/png;base64," in text
    # Texts of the runs alone say old and new here.
    assert not any(word in text for word in ("old.jsonl", "new.jsonl", "_images", "<script>"))
    said = [[answer] for answer in LABELS]
    assert imported(tmp_path, answered(tasks, said), *paths) == rows(tmp_path / "page.jsonl")
    assert "2 preferences, 1 ties, 1 skipped" in capsys.readouterr().out
    # Whoever gives the files in the other order gets the same preferences.
    assert imported(tmp_path, answered(tasks, said), *paths[::-1]) == rows(tmp_path / "page.jsonl")
    # Of two people each counts, and they need not agree; pairs that nobody answered make nothing.
    several = imported(tmp_path, answered(tasks, [["left", "right"], [], [], []]), *paths)
    assert len(several) == 2
    assert (several[0]["chosen"], several[0]["rejected"]) == (several[1]["rejected"], several[1]["chosen"])


def test_the_labelling_interface_of_the_page_shows_what_tasks_hold(tmp_path):
    """Tried in Label Studio 1.23: of HTML it takes pictures out, and a click inside of a frame chooses nothing."""
    text = (Path(__file__).parents[2] / "docs" / "annotate.md").read_text()
    interface = ElementTree.fromstring(re.search(r"```xml\n(.*?)```", text, re.DOTALL)[1])
    paths = [write(tmp_path / f"{name}.jsonl", name, 2, 1, 30 * place) for place, name in enumerate(("old", "new"), 1)]
    tasks = exported(tmp_path, "label_studio", *paths)
    texts, pictures = interface.findall(".//HyperText"), interface.findall(".//Repeater")
    named = {tag.get("value").removeprefix("$") for tag in texts} | {
        tag.get("on").removeprefix("$") for tag in pictures
    }
    for task in tasks:
        assert set(task["data"]) == {"pair"} | named
        for part in ("inputs", "left", "right"):
            assert "<img" not in task["data"][part]
            assert [picture["url"][:22] for picture in task["data"][f"{part}_pictures"]] == [
                "data:image/png;base64," for _ in range(task["data"][part].count("below)"))
            ]
        assert task["data"]["left_pictures"]
    assert {tag.get("inline") for tag in texts} == {"true"}
    [pairwise] = interface.findall("Pairwise")
    assert set(pairwise.get("toName").split(",")) <= {tag.get("name") for tag in texts}


def test_a_person_counts_once_for_a_pair_however_often_its_task_is_there(tmp_path, capsys):
    """Tasks that were imported twice, files of two exports, and people who thought again: the last answer holds."""
    path = write(tmp_path / "runs.jsonl", "said")
    tasks = exported(tmp_path, "label_studio", path)
    once = label_studio(tasks, [["left", "right"], ["tie"], [], []])
    wanted = imported(tmp_path, once, path)
    assert len(wanted) == 2
    capsys.readouterr()
    assert imported(tmp_path, once + once, path) == wanted
    assert "3 answers to pairs that the same person answered again" in capsys.readouterr().out
    # A second task of the pair, with annotations of its own, one of another person: it comes first, and is later.
    again = label_studio(tasks, [["right", "skip", "left"], [], [], []])[:1]
    first, _, third = again[0]["annotations"]
    later = {"created_at": "2026-03-10T22:16:08.728353Z"}
    again[0] |= {"id": 99, "annotations": [each | later | {"id": each["id"] + 500} for each in (first, third)]}
    made = imported(tmp_path, again + once, path)
    # The first person is of another mind now, so that both agree, and the third one is not.
    assert [each["chosen"] for each in made] == [wanted[1]["chosen"], wanted[0]["chosen"], wanted[1]["chosen"]]
    # Without names an annotation is known by its id; what has none is counted as often as it is in one export.
    for each in once[0]["annotations"]:
        del each["completed_by"]
    assert imported(tmp_path, once + once, path) == wanted
    for each in once[0]["annotations"]:
        del each["id"]
    assert imported(tmp_path, once + once, path) == wanted


def test_people_whom_argilla_does_not_name_are_several(tmp_path):
    path = write(tmp_path / "runs.jsonl", "said")
    tasks = exported(tmp_path, "argilla", path)
    named = argilla(tasks, [["left", "right", "left"], ["tie", "left"], [], []])
    wanted = imported(tmp_path, named, path)
    assert len(wanted) == 4
    for record in named:
        for responses in record["responses"].values():
            for response in responses:
                response["user_id"] = None
    assert imported(tmp_path, named, path) == wanted
    assert imported(tmp_path, named + named, path) == wanted


def test_rankings_and_ratings_of_argilla_are_read(tmp_path):
    path = write(tmp_path / "runs.jsonl", "said")
    tasks = exported(tmp_path, "argilla", path)
    wanted = imported(tmp_path, argilla(tasks, [["left"], ["right"], ["tie"], []]), path)
    ranks = [[{"value": "right", "rank": b}, {"value": "left", "rank": a}] for a, b in ((1, 2), (2, 1), (1, 1))]
    assert imported(tmp_path, argilla(tasks, [*([each] for each in ranks), []], "order"), path) == wanted
    rated = argilla(tasks, [[5], [1], [3], []], "left")
    for record, rating in zip(rated, (2, 4, 3, None), strict=True):
        record["responses"]["right"] = [{"value": rating, "user_id": "b530"}] if rating else []
    assert imported(tmp_path, rated, path) == wanted


def test_exports_that_say_something_else_are_refused(tmp_path, capsys):
    path = write(tmp_path / "runs.jsonl", "said")
    tasks, notes = exported(tmp_path, "label_studio", path), exported(tmp_path, "argilla", path)
    answers = [["left"], ["right"], [], []]
    other = label_studio(tasks, answers)
    other[1]["data"] = other[1]["data"] | {"pair": "another"}
    both = argilla(notes, answers)
    both[0]["responses"]["again"] = [{"value": "right", "user_id": "b530"}]
    broken = label_studio(tasks, answers)
    del broken[0]["annotations"][0]["result"]
    for found, message in (
        (other, "task 2: its pair is none of these runs: give the files of runs"),
        (both, "task 1: an answer says 'left' and 'right': it must be one of left, right, tie, skip"),
        (argilla(notes, [[["left", "right"]], [], [], []]), "task 1: the ranking 'better' has no ranks"),
        (argilla(notes, [["good"], [], [], []]), "task 1: an answer says nothing of left, right or tie"),
        (label_studio(tasks, [["middle"], [], [], []]), "task 1: an answer says 'middle': it must be one of"),
        (broken, "task 1 is not of the form that the tool writes (KeyError('result'))"),
        ([{"id": 1, "pair": "x", "better": "left"}], "choose JSON, not JSON-MIN"),
        ([], "is no export of Label Studio"),
    ):
        assert message in failure(capsys, imported, tmp_path, found, path), message
    (tmp_path / "half.json").write_text("[{")
    flags = ["annotate", str(path), "--output", str(tmp_path / "new.jsonl"), "--answers", str(tmp_path / "half.json")]
    assert "half.json is no JSON" in failure(capsys, dispatch, flags)
    assert "give one of them" in failure(capsys, dispatch, [*flags, "--export", "argilla"])
    assert not (tmp_path / "new.jsonl").exists()
