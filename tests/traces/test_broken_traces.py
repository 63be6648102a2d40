"""Files and traces that are not as they should be."""

import json

import pytest

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.traces.files import READERS, read_spans
from sysdpo_jax.traces.trees import Ledger, of_one_shape, trees_of
from tests.traces.spans import chain, four, llm, root, write


def trees(rows, path, kind="openinference"):
    ledger = Ledger()
    made = of_one_shape(trees_of(read_spans(write(path / "t.jsonl", rows), kind), ledger), ledger)
    return made, ledger


def refusals(ledger):
    return {fate for fate in ledger.fates.values() if fate.startswith("refused")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(four()[0])[:-30], "it may be cut|not valid JSON"),
        ("\n".join(json.dumps(each) for each in four())[:-30], "line 12: not valid JSON"),
        ("[1, 2]", "row 1 is int and no object"),
        ("", "no JSON|holds no span"),
        ("[]", "holds no span"),
        ('{"name": "x"}', "cannot be read as openinference: it lacks a trace_id"),
        ('{"name": "x", "context": {"trace_id": "1", "span_id": "2"}, "events": 3}', "malformed for openinference"),
        ('{"name": "x", "context": {"trace_id": "1", "span_id": "2"}, "attributes": 3}', "its attributes are int"),
    ],
)
def test_files_that_cannot_be_read_are_named_with_their_row(tmp_path, text, message):
    for name in ("t.json", "t.jsonl"):
        (tmp_path / name).write_text(text)
        if name == "t.jsonl" and text.startswith("["):
            continue
        with pytest.raises(ConfigError, match=message) as error:
            read_spans(tmp_path / name, "openinference")
        assert name in str(error.value)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    for name in ("t.json", "t.jsonl"):
        (tmp_path / name).write_bytes(b'{"name": "\xff"}\n')
        with pytest.raises(ConfigError, match="is not UTF-8"):
            read_spans(tmp_path / name, "openinference")


@pytest.mark.parametrize("kind", READERS)
def test_another_format_is_told(tmp_path, kind):
    write(tmp_path / "t.jsonl", [{"something": "else"}])
    with pytest.raises(ConfigError, match=f"cannot be read as {kind}: .*; is it another --format"):
        read_spans(tmp_path / "t.jsonl", kind)


def test_a_folder_is_read_as_a_whole_and_must_hold_traces(tmp_path):
    with pytest.raises(ConfigError, match="holds no file of traces"):
        read_spans(tmp_path, "openinference")
    rows = four()
    write(tmp_path / "a.jsonl", rows[:5])
    (tmp_path / "b.json").write_text(json.dumps(rows[5:]))
    assert len(read_spans(tmp_path, "openinference")) == len(rows)
    with pytest.raises(ConfigError, match="does not exist"):
        read_spans(tmp_path / "none", "openinference")


def test_the_order_of_spans_does_not_matter(tmp_path):
    first, _ = trees(four(), tmp_path)
    second, _ = trees(four()[::-1], tmp_path)
    assert sorted(tree.trace for tree in first) == sorted(tree.trace for tree in second)
    assert first[0].nodes == second[0].nodes == (("ask", "draft"), ("ask", "answer"))


def test_a_trace_whose_spans_lie_in_each_other_is_refused(tmp_path):
    rows = chain("loop", "red", "a", "b", 1.0)
    rows[0]["parent_id"] = "a"
    made, ledger = trees([*four(), *rows], tmp_path)
    assert "loop" not in [tree.trace for tree in made]
    assert any("lies within itself" in why for why in refusals(ledger))


def test_two_spans_with_one_id_are_refused_and_copies_are_read_once(tmp_path):
    made, ledger = trees([*four(), *four()], tmp_path)
    assert len(made) == 4
    assert ledger.notes["spans that were there twice, and read once"] == 12
    rows = chain("twice", "red", "a", "b", 1.0)
    made, ledger = trees([*four(), *rows, rows[2] | {"name": "other"}], tmp_path)
    assert "twice" not in [tree.trace for tree in made]
    assert any("two different spans with the id a" in why for why in refusals(ledger))


def test_a_parent_that_is_not_there_begins_a_trace(tmp_path):
    rows = [each for each in four() if each["context"]["span_id"] != "root"]
    made, ledger = trees(rows, tmp_path)
    assert made[0].nodes == (("draft",), ("answer",))
    assert ledger.notes["spans whose parent is not there, which begin a trace"] == 8


def test_a_request_that_failed_is_refused_as_a_whole(tmp_path):
    rows = chain("failed", "red", "a", "b", 1.0)
    rows[0]["status"] = {"status_code": "StatusCode.ERROR", "description": "out of quota"}
    made, ledger = trees([*four(), *rows], tmp_path)
    assert len(made) == 4
    assert "refused: it lies in a span that failed" in refusals(ledger)


def test_huge_values_are_read(tmp_path):
    text = "red ball " * 200_000
    rows = [root("huge", text, 1.0), llm("huge", "l", "root", "draft", 1, f"a {text}", "the")]
    made, _ = trees(rows, tmp_path)
    assert made[0].spans["ask", "draft"].prompt[0]["content"] == f"a {text}"


def test_pictures_are_refused(tmp_path):
    content = {"contents.0.message_content.type": "image", "contents.0.message_content.image.image.url": "x"}
    rows = [root("t", "red", 1.0), llm("t", "l", "root", "see", 1, [{"role": "user", **content}], "a")]
    _, ledger = trees(rows, tmp_path)
    assert any("a part of the type 'image'" in why for why in refusals(ledger))
