"""What only tables and folders bring (nested images, places without a value), formats between two, caches, and files
that are left."""

import datetime
import io
import json
import os

import datasets
import numpy as np
import pytest
from PIL import Image

from sysdpo_jax import PreferenceRecord, RecordError, load_preferences, save_preferences
from tests.data.test_preference_files import BOTH, GOOD, PICTURE, SAID, TEXT, USER, lines, png

ROW = {"inputs": {"x": 0}, "chosen": {"y": 1}, "rejected": {"y": 2}}


def encoded(grey):
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (grey, grey, grey)).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_within_the_records_of_a_table_stay_bytes(tmp_path):
    side = {"image": datasets.Image()}
    features = datasets.Features({"inputs": {"caption": datasets.Value("string")}, "chosen": side, "rejected": side})
    one, other = encoded(10), encoded(90)
    sides = {name: {"image": {"bytes": data, "path": None}} for name, data in (("chosen", one), ("rejected", other))}
    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list([{"inputs": {"caption": "a"}, **sides}], features=features).to_parquet(str(path))
    [record] = load_preferences(path, PICTURE)
    assert record == PreferenceRecord({"caption": "a"}, {"image": one}, {"image": other})


def test_a_name_without_a_value_in_a_table_is_missing_and_a_date_is_text(tmp_path):
    said = [USER, {"role": "assistant", "content": "b", "name": "n"}]
    rows = [
        {"inputs": {"x": said, "day": datetime.date(2026, 1, 2)}, "chosen": {"y": 1}, "rejected": {"y": 2}},
        {"inputs": {"x": said[:1]}, "chosen": {"y": 3}, "rejected": {"z": 2.5}},
    ]
    path = tmp_path / "pairs.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    first, second = load_preferences(path)
    assert first == PreferenceRecord({"x": said, "day": "2026-01-02"}, {"y": 1}, {"y": 2})
    assert second == PreferenceRecord({"x": said[:1]}, {"y": 3}, {"z": 2.5})
    assert type(first.chosen["y"]) is int


def test_paths_of_images_begin_at_the_folder_of_a_data_set(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    png(tmp_path / "set" / "good.png")
    lines(tmp_path / "set" / "train.jsonl", GOOD, GOOD)
    monkeypatch.chdir("/")
    loaded = load_preferences(tmp_path / "set", BOTH)
    assert [record.rejected["image"] for record in loaded] == [str(tmp_path / "set" / "good.png")] * 2
    with pytest.raises(RecordError, match=r"set cannot be read as a data set \(Bad split: test\."):
        load_preferences(tmp_path / "set", BOTH, split="test")


@pytest.mark.parametrize(
    ("row", "expected"),
    {
        # As UltraFeedback is published: the text of the prompt is the first turn of both sides too.
        "text beside whole conversations": (
            {"prompt": "a red", "chosen": [USER, SAID[0]], "rejected": [USER, SAID[1]]},
            ([USER], [SAID[0]], [SAID[1]]),
        ),
        "text beside answers": (
            {"prompt": "a red", "chosen": [SAID[0]], "rejected": [SAID[1]]},
            ([USER], [SAID[0]], [SAID[1]]),
        ),
        "text beside a system's turn": (
            {"prompt": "a red", "chosen": [{"role": "system", "content": "a"}, SAID[0]],
             "rejected": [{"role": "system", "content": "a"}, SAID[1]]},
            ([{"role": "system", "content": "a"}, USER], [SAID[0]], [SAID[1]]),
        ),
        "lines": (
            {"chosen": "a red cube\nthe\nball", "rejected": "a red cube\nthe\nbig"},
            ("a red cube\nthe\n", "ball", "big"),
        ),
        "one goes on where the other ends": (
            {"chosen": "a red", "rejected": "a red ball"},
            ("a", " red", " red ball"),
        ),
    }.values(),
)  # fmt: skip
def test_prompts_between_the_formats(tmp_path, row, expected):
    prompt, chosen, rejected = expected
    [record] = load_preferences(lines(tmp_path / "pairs.jsonl", row), TEXT, "trl")
    assert record == PreferenceRecord({"question": prompt}, {"answer": chosen}, {"answer": rejected})


@pytest.mark.parametrize(
    ("row", "message"),
    {
        "half a character": (
            json.dumps({**ROW, "inputs": {"x": "\ud83d"}}),
            r"holds \ud83d, half a character: write the text anew, or drop the row",
        ),
        "nesting": ("[" * 100_000, "not valid JSON (maximum recursion depth exceeded"),
        "id": ({**ROW, "id": ["a"]}, "the field 'id' is list: give a text or a whole number, or leave it out"),
    }.values(),
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, row, message):
    path = lines(tmp_path / "pairs.jsonl", ROW, row, {**ROW, "inputs": {"x": "\U0001f600"}})
    with pytest.raises(RecordError) as error:
        load_preferences(path)
    assert str(error.value).startswith(f"{path}, row 2: {message}")
    assert [record.inputs["x"] for record in load_preferences(path, on_error="skip")] == [0, "\U0001f600"]


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    png(tmp_path / "good.png", size=(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(RecordError, match=r"row 1: chosen, node 'image': image: '.*good.png' cannot be read"):
        load_preferences(lines(tmp_path / "pairs.jsonl", GOOD), BOTH)


def test_of_what_fails_nothing_is_left(tmp_path):
    path = lines(tmp_path / "pairs.jsonl", ROW, "{")
    with pytest.raises(RecordError):
        load_preferences(path)
    # The second record has no place in a table with the first, nor the third one in JSON.
    records = [PreferenceRecord({"x": 0}, {"y": value}, {"y": 0}) for value in (1, "b", object())]
    with pytest.raises(ValueError, match="Could not convert 'b'"):
        save_preferences(tmp_path / "saved.parquet", records[:2])
    with pytest.raises(TypeError, match="object is not JSON"):
        save_preferences(tmp_path / "saved.jsonl", records)
    assert os.listdir(tmp_path) == ["pairs.jsonl"]


def test_pictures_in_lists_are_saved_and_read_back(tmp_path):
    pixels = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    sides = [{"images": [pixels, 255 - pixels]}, {"images": [pixels // 2, pixels]}]
    for suffix in ("jsonl", "parquet"):
        save_preferences(tmp_path / f"pairs.{suffix}", [PreferenceRecord({"x": [1, 2]}, *sides)])
        [read] = load_preferences(tmp_path / f"pairs.{suffix}")
        assert read.inputs == {"x": [1, 2]}
        for side, wanted in zip((read.chosen, read.rejected), sides, strict=True):
            for value, image in zip(side["images"], wanted["images"], strict=True):
                file = tmp_path / value if suffix == "jsonl" else io.BytesIO(value)
                np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
