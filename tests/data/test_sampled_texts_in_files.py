"""Texts that models made keep their tokens in every file of values, and other texts stay texts."""

import copy
import json
import pickle

import pytest

from sysdpo_jax import CompoundSystem, LanguageModel, Node, PreferenceRecord, Tool, load_preferences, save_preferences
from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.tool_values import ToolValues
from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.data.prepared import with_kept_values
from sysdpo_jax.io import write_json_lines
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.row_files import RowFile, write_row_file
from sysdpo_jax.runs.runs_file import as_row, lacks_images, moved, read_prompts, run_lines, with_images
from sysdpo_jax.values import SampledText, content, distinct, from_json, to_json
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer
from tests.data.prepared_systems import writer

MADE = SampledText("a red", (4, 5, 2), "end", "f" * 32)
CUT = SampledText("a red", (4, 5), "cut", "f" * 32)


def remembered(value):
    """Everything of a value, for comparisons: sampled texts are equal to their texts."""
    if isinstance(value, list):
        return [remembered(item) for item in value]
    if isinstance(value, dict):
        return {name: remembered(item) for name, item in value.items()}
    return (str(value), value.tokens, value.end, value.tokenizer) if isinstance(value, SampledText) else value


def system():
    model = LanguageModel(Decoder(DecoderConfig(len(SPECIAL) + len(WORDS), 8, 8, 1, 1, 1)), word_tokenizer(), 8, 4)
    drafts = Node("drafts", model, ("x",), plate=2)
    return CompoundSystem(("x",), (drafts, Node("answer", model, ("x",))))


def test_a_sampled_text_is_its_text_and_what_is_made_of_it_is_plain():
    assert MADE == "a red" == CUT
    assert len({MADE, CUT, "a red"}) == 1
    assert content(MADE) == content("a red")
    assert remembered(distinct([CUT, MADE, "a red"])) == [remembered(CUT)]
    for plain in (MADE.upper(), MADE[:1], MADE + "", f"{MADE}", str(MADE), MADE.strip()):
        assert type(plain) is str
    for same in (copy.copy(MADE), copy.deepcopy([MADE])[0], pickle.loads(pickle.dumps(MADE))):
        assert remembered(same) == remembered(MADE)


def test_json_holds_all_of_it_wherever_it_stands():
    value = {"a": [MADE, "a red", [CUT]], "b": {"c": MADE}, "d": 1.5, "e": None}
    again = from_json(json.loads(json.dumps(to_json(value))))
    assert remembered(again) == remembered(value)
    assert to_json(MADE) == {"text": "a red", "tokens": [4, 5, 2], "end": "end", "tokenizer": "f" * 32}


@pytest.mark.parametrize(
    "change",
    [{"text": 3}, {"tokens": "4"}, {"tokens": [4.0]}, {"tokens": [True]}, {"tokens": [-1]}, {"end": "soon"}, {"a": 1}],
)
def test_an_object_of_another_kind_stays_an_object(change):
    value = to_json(MADE) | change
    assert from_json(value) == value
    assert not isinstance(from_json(value), str)


RECORDS = [
    PreferenceRecord({"x": "a"}, {"drafts": [MADE, CUT], "answer": MADE}, {"drafts": ["ball", MADE], "answer": "a"}),
    PreferenceRecord({"x": "red"}, {"drafts": ["a", "red"], "answer": "a red"}, {"drafts": ["a", "a"], "answer": CUT}),
]


def parts(record):
    return remembered([dict(record.inputs), dict(record.chosen), dict(record.rejected)])


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_preferences_of_sampled_and_written_texts(name, tmp_path):
    """In a table too, whose columns have one type each."""
    save_preferences(tmp_path / name, RECORDS)
    kept = load_preferences(tmp_path / name, system())
    assert [parts(record) for record in kept] == [parts(record) for record in RECORDS]
    # Plain texts are plain where they can be.
    if name == "p.jsonl":
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert rows[1]["chosen"] == RECORDS[1].chosen


def test_files_of_rows(tmp_path):
    row = {"x": b"a", "drafts": [MADE, b"b"], "answer": {"said": CUT}}
    write_row_file(tmp_path / "r", [row])
    assert remembered(RowFile(tmp_path / "r")[0]) == remembered(row)


def test_files_of_runs(tmp_path):
    """What a model wrote is no path of an image, even where it reads like one."""
    node, path = system(), tmp_path / "runs.jsonl"
    like_a_path = SampledText("runs_images/a.png", (4,), "cut", "f")
    run = {"x": "a", "drafts": [MADE, like_a_path], "answer": CUT}
    write_json_lines(path, [as_row(node, run, "0-0", ImageFiles(path))])
    [line] = run_lines(path)
    assert not lacks_images(line, path)
    assert remembered(with_images(line, path)["outputs"]) == remembered({"drafts": run["drafts"], "answer": CUT})
    assert moved(line["outputs"], path, tmp_path / "other" / "pairs.jsonl") == line["outputs"]
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"x": to_json(MADE)}) + "\n")
    assert remembered(read_prompts(tmp_path / "prompts.jsonl", node)) == [{"x": remembered(MADE)}]


def passed_on(text):
    return text


def test_what_tools_gave(tmp_path):
    values = ToolValues(tmp_path / "values.jsonl")
    tool = CompoundSystem(("x",), (Node("t", Tool(passed_on), ("x",)),))
    kept = with_kept_values(tool, values).node("t").component.function
    assert remembered(kept(MADE)) == remembered(MADE)
    # The same text is the same question, and its answer is the first.
    assert remembered(ToolValues(tmp_path / "values.jsonl")[kept._key(("a red",))]) == remembered(MADE)


OWN = {"text": "a", "tokens": [4], "end": "cut", "tokenizer": "f"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    {
        "tokens": ({"tokens": "x"}, "the tokens of a sampled text are a list of whole numbers from 0 on"),
        "a negative token": ({"tokens": [-1]}, "the tokens of a sampled text are a list of whole numbers from 0 on"),
        "end": ({"end": "stopped"}, "the end of a sampled text is one of end, stop, cut"),
        "tokenizer": ({"tokenizer": 3}, "the text and the tokenizer of a sampled text are texts"),
        "another field": ({"score": 1}, "a sampled text has the fields text, tokens, end, tokenizer and no other"),
    }.values(),
)
def test_what_is_wrong_with_a_sampled_text_is_said_with_its_row_and_node(wrong, said, tmp_path):
    row = {"inputs": {"x": "a"}, "chosen": {"y": OWN | wrong}, "rejected": {"y": "a"}}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(RecordError, match=rf"row 1: chosen, node 'y': the completion .* an object \({said}"):
        load_preferences(tmp_path / "p.jsonl", CompoundSystem(("x",), (Node("y", writer(), ("x",)),)))


def test_a_message_without_a_role_is_named(tmp_path):
    row = {"inputs": {"x": [{"role": "user", "content": "a"}, {"rolle": "user"}]}, "chosen": {"y": "a"}}
    (tmp_path / "p.jsonl").write_text(json.dumps(row | {"rejected": {"y": "a"}}) + "\n")
    with pytest.raises(RecordError, match=r"row 1: chosen, node 'y': the prompt .*; message 1 has 'rolle'\)"):
        load_preferences(tmp_path / "p.jsonl", CompoundSystem(("x",), (Node("y", writer(), ("x",)),)))


@pytest.mark.parametrize("values", [("a", 3), (["a"], [3]), ({"a": 1}, "x"), (2**70, 1), (True, 1.5)], ids=str)
def test_a_table_names_the_column_that_mixes_kinds(values, tmp_path):
    records = [PreferenceRecord({"x": "a"}, {"y": value}, {"y": "b"}) for value in values]
    with pytest.raises(ValueError, match=r"the values of chosen, field 'y', are of several kinds .*: write a \.jsonl"):
        save_preferences(tmp_path / "p.parquet", records)
    assert list(tmp_path.iterdir()) == []
