"""Preference files: formats that exist, what is checked, what is said of a bad row, and random access."""

import gc
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    Diffusion,
    LanguageModel,
    Node,
    PixelCodec,
    PreferenceRecord,
    Ranked,
    RecordError,
    TextEncoder,
    load_preferences,
    preference_dataset,
    save_preferences,
)
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.stubs import SPECIAL, WORDS, Affine, Embedding, word_tokenizer

SIZES = {"vocab_size": len(SPECIAL) + len(WORDS), "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
WRITER = LanguageModel(
    Decoder(DecoderConfig(**SIZES, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=20)),
    word_tokenizer(chat=True),
    max_prompt_length=16,
    max_new_tokens=4,
)
PAINTER = Diffusion(denoiser=Affine(), text=TextEncoder(Embedding(), word_tokenizer(), 5), codec=PixelCodec((4, 6, 3)))
TEXT = CompoundSystem(("question",), (Node("answer", WRITER, ("question",)),))
PICTURE = CompoundSystem(("caption",), (Node("image", PAINTER, ("caption",)),))
BOTH = CompoundSystem(("request",), (Node("caption", WRITER, ("request",)), Node("image", PAINTER, ("caption",))))
ROUTED = CompoundSystem(
    ("x",), (Node("y", Categorical(3, (4,)), ("x",)), Node("z", Categorical(3, (3,)), ("y",), plate=None))
)


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def png(path, grey=100, size=(6, 4)):
    Image.new("RGB", size, (grey, grey, 0)).save(path)
    return path.read_bytes()


USER = {"role": "user", "content": "a red"}
SAID = [{"role": "assistant", "content": word} for word in ("ball", "cube")]


@pytest.mark.parametrize(
    ("row", "expected"),
    {
        "strings": (
            {"prompt": "a red", "chosen": "ball", "rejected": "cube", "score_chosen": 3.5},
            ("a red", "ball", "cube"),
        ),
        "strings without a prompt": ({"chosen": "a red ball", "rejected": "a red cube"}, ("a red", " ball", " cube")),
        # The completions begin alike, but a word is not cut.
        "words alike": ({"chosen": "a red black", "rejected": "a red blue"}, ("a red", " black", " blue")),
        "messages": (
            {"prompt": [USER], "chosen": [SAID[0]], "rejected": [SAID[1]]},
            ([USER], [SAID[0]], [SAID[1]]),
        ),
        "messages without a prompt": (
            {"chosen": [USER, SAID[0]], "rejected": [USER, SAID[1]]},
            ([USER], [SAID[0]], [SAID[1]]),
        ),
    }.values(),
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_formats_of_trl(tmp_path, row, expected, suffix):
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        lines(path, row)
    else:
        datasets.Dataset.from_list([row]).to_parquet(str(path))
    prompt, chosen, rejected = expected
    [record] = load_preferences(path, TEXT, "trl")
    assert record == PreferenceRecord({"question": prompt}, {"answer": chosen}, {"answer": rejected})


def test_pick_a_pic_and_its_ties(tmp_path):
    good, bad = png(tmp_path / "good.png"), png(tmp_path / "bad.png", 10)
    row = {"caption": "a ball", "jpg_0": good, "jpg_1": bad, "label_0": 1.0}
    rows = [row, row | {"label_0": 0.0}, row | {"label_0": 0.5}]
    path = tmp_path / "pick.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    first, second = loaded = load_preferences(path, PICTURE, "pick_a_pic")
    assert first == PreferenceRecord({"caption": "a ball"}, {"image": good}, {"image": bad})
    assert second == PreferenceRecord({"caption": "a ball"}, {"image": bad}, {"image": good})
    assert (loaded.counts.read, loaded.counts.kept, loaded.counts.ties) == (3, 2, 1)
    assert loaded.summary() == f"{path}: 3 rows, 2 preferences, 1 without a preference"


def test_ranked_lists(tmp_path):
    row = {"inputs": "a red", "outputs": ["ball", "cube", "small", "on"], "scores": [1, 3, 1, 2.5]}
    path = lines(tmp_path / "ranked.jsonl", row)

    def sides(reader):
        return [(r.chosen["answer"], r.rejected["answer"]) for r in load_preferences(path, TEXT, reader)]

    assert sides("ranked") == [("cube", "ball")]
    every = {("cube", "on"), ("cube", "ball"), ("cube", "small"), ("on", "ball"), ("on", "small")}
    assert set(sides("ranked_all")) == every
    assert set(sides(Ranked("all", min_margin=1.5))) == every - {("cube", "on")}
    named = {"inputs": {"question": "a red"}, "outputs": [{"answer": "ball"}, {"answer": "cube"}], "scores": [0, 1]}
    lines(path, named)
    assert sides("ranked") == [("cube", "ball")]


def side(caption="a ball", image="good.png"):
    return {"caption": caption, "image": image}


def test_paths_of_images_begin_at_the_file(tmp_path, monkeypatch):
    png(tmp_path / "good.png")
    row = {"inputs": {"request": "a red"}, "chosen": side(), "rejected": side("cube")}
    path = lines(tmp_path / "pairs.jsonl", row)
    monkeypatch.chdir("/")
    [record] = load_preferences(path, BOTH)
    assert record.chosen["image"] == str(tmp_path / "good.png")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_saved_is_read_back(tmp_path, suffix):
    pixels = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    first, second = {"caption": "ball", "image": pixels}, {"caption": "a", "image": 255 - pixels}
    save_preferences(tmp_path / f"pairs.{suffix}", [PreferenceRecord({"request": "a red"}, first, second)])
    [read] = load_preferences(tmp_path / f"pairs.{suffix}", BOTH)
    assert (read.inputs, read.chosen["caption"], read.rejected["caption"]) == ({"request": "a red"}, "ball", "a")
    for name, wanted in (("chosen", pixels), ("rejected", 255 - pixels)):
        latents = PAINTER.codec.prepare([getattr(read, name)["image"]]).features["latents"]
        np.testing.assert_array_equal(np.rint(255 * PAINTER.codec.decode({}, latents)[0]), wanted)


GOOD = {"inputs": {"request": "a red"}, "chosen": side(), "rejected": side("cube")}


def changed(**parts):
    return {name: {**value, **parts.get(name, {})} for name, value in GOOD.items()}


@pytest.mark.parametrize(
    ("row", "message"),
    {
        "json": ("{", "not valid JSON (Expecting property name"),
        "schema": ({"inputs": {}}, "the field 'chosen' must be an object of named values"),
        "unknown": (
            changed(chosen={"captoin": "a"}),
            "chosen, field 'captoin' is no name of the system: did you mean 'caption'",
        ),
        "input": ({**GOOD, "inputs": {}}, "inputs lacks the field 'request': add it"),
        "empty input": (changed(inputs={"request": " "}), "inputs, field 'request' is empty: write a text"),
        "output": ({**GOOD, "rejected": {"caption": "a"}}, "rejected lacks the field 'image': add it"),
        "type": (changed(chosen={"caption": 3}), "chosen, node 'caption': the completion must be a string"),
        "long": (
            changed(chosen={"caption": "a red ball on the left"}),
            "chosen, node 'caption': the completion has 7 tokens, outside 1..4: raise max_new_tokens, set truncation",
        ),
        "no image": (changed(chosen={"image": "no.png"}), "there is no file"),
        "broken image": (changed(rejected={"image": "broken.png"}), "cannot be read"),
        "number": (
            changed(chosen={"image": 3}),
            "chosen, node 'image': image is int of shape ()",
        ),
    }.values(),
)
def test_a_bad_row_is_named_or_skipped(tmp_path, row, message):
    png(tmp_path / "good.png")
    (tmp_path / "broken.png").write_bytes(png(tmp_path / "whole.png")[:40])
    path = lines(tmp_path / "pairs.jsonl", GOOD, row, GOOD)
    with pytest.raises(RecordError) as error:
        load_preferences(path, BOTH)
    assert str(error.value).startswith(f"{path}, row 2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    kept = load_preferences(path, BOTH, on_error="skip")
    assert (len(kept), kept.counts.read, kept.counts.skipped) == (2, 3, 1)
    assert kept.counts.errors == [str(error.value)]


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (
            "trl",
            {"prompt": 3, "chosen": "a", "rejected": "b"},
            "the field 'prompt' must be a string or a list of messages",
        ),
        ("trl", {"prompt": "a", "chosen": " ", "rejected": "b"}, "the field 'chosen' is empty: write a text"),
        ("trl", {"chosen": "a", "rejected": "b"}, "chosen and rejected have no start in common"),
        ("pick_a_pic", {"caption": "a", "jpg_0": "x", "label_0": 1}, "the field 'jpg_1' is missing"),
        ("pick_a_pic", {"caption": "a", "jpg_0": "x", "jpg_1": "y", "label_0": 2}, "the field 'label_0' is 2"),
        (
            "ranked",
            '{"inputs": "a", "outputs": ["b", "c"], "scores": [1, NaN]}',
            "the field 'scores' has nan at place 1",
        ),
        ("ranked", {"inputs": "a", "outputs": ["b", "c"], "scores": [1]}, "must be lists of one length"),
    ],
)
def test_a_row_that_a_reader_cannot_take(tmp_path, reader, row, message):
    system = PICTURE if reader == "pick_a_pic" else TEXT
    with pytest.raises(RecordError) as error:
        load_preferences(lines(tmp_path / "pairs.jsonl", row), system, reader)
    assert message in str(error.value)


def test_the_first_error_is_that_of_the_first_bad_row(tmp_path):
    """A row that cannot be read stands behind one that cannot be prepared, and is found earlier."""
    rows = [{"prompt": "a red", "chosen": "ball", "rejected": "cube"} for _ in range(3)]
    path = lines(tmp_path / "pairs.jsonl", rows[0], {**rows[1], "prompt": "a red " * 9}, "{", rows[2])
    with pytest.raises(RecordError, match=r"pairs\.jsonl, row 2: chosen, node 'answer': the prompt has 18 tokens"):
        load_preferences(path, TEXT, "trl")
    counts = load_preferences(path, TEXT, "trl", on_error="skip").counts
    assert [error.split(": ")[0].rpartition(", ")[2] for error in counts.errors] == ["row 2", "row 3"]


@pytest.mark.parametrize("settings", [{"reader": "tlr"}, {"ignore": "id"}])
def test_settings_that_there_are_not(tmp_path, settings):
    path = lines(tmp_path / "pairs.jsonl", {"prompt": "a red", "chosen": "ball", "rejected": "cube"})
    with pytest.raises(ValueError, match=next(iter(settings))):
        load_preferences(path, TEXT, **({"reader": "trl"} | settings))


def test_ids_are_unique(tmp_path):
    row = {"inputs": {"x": 0}, "chosen": {"y": 0, "z": 1}, "rejected": {"y": 1, "z": 1}}
    path = lines(tmp_path / "pairs.jsonl", row | {"id": "a"}, row, row | {"id": "a"})
    with pytest.raises(RecordError, match="row 3: the id 'a' is that of row 1 too"):
        load_preferences(path, ROUTED)


def test_readers_without_names_need_one_input_and_one_final_value(tmp_path):
    two = CompoundSystem(("x", "w"), (Node("y", Categorical(3, (4, 2)), ("x", "w")),))
    path = lines(tmp_path / "pairs.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(ValueError, match="one input and one final value, not x, w and y"):
        load_preferences(path, two, "trl")
    with pytest.raises(ValueError, match="pass the system"):
        load_preferences(path, reader="trl")
    with pytest.raises(ValueError, match="unknown reader 'tlr': did you mean 'trl'"):
        load_preferences(path, reader="tlr")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.jsonl does not exist"):
        load_preferences(tmp_path / "no.jsonl")
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(RecordError, match=r"pairs\.csv: only .* files are read: convert it"):
        load_preferences(tmp_path / "pairs.csv")
    (tmp_path / "latin.jsonl").write_bytes('{"inputs": "é"}'.encode("latin-1"))
    with pytest.raises(RecordError, match=r"latin\.jsonl is not UTF-8 text"):
        load_preferences(tmp_path / "latin.jsonl")
    whole = tmp_path / "whole.parquet"
    datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 50).to_parquet(str(whole))
    (tmp_path / "cut.parquet").write_bytes(whole.read_bytes()[:-100])
    with pytest.raises(RecordError, match=r"cut\.parquet cannot be read"):
        load_preferences(tmp_path / "cut.parquet", TEXT, "trl")


def test_records_are_found_by_number_and_the_file_ends_with_them(tmp_path):
    rows = [{"inputs": {"x": i % 4}, "chosen": {"y": i % 3, "z": 0}, "rejected": {"y": 1, "z": 2}} for i in range(200)]
    loaded = load_preferences(lines(tmp_path / "pairs.jsonl", *rows), ROUTED)
    assert loaded[137] == PreferenceRecord(**rows[137])
    assert loaded[-1] == loaded[199]
    assert loaded[5:7] == [PreferenceRecord(**row) for row in rows[5:7]]
    with pytest.raises(IndexError):
        loaded[200]
    folder = loaded.rows._paths[0].parent
    halves = [preference_dataset(ROUTED, loaded, 8, seed=0, shard=(index, 2))[0] for index in range(2)]
    whole = preference_dataset(ROUTED, loaded, 8, seed=0)[0]
    np.testing.assert_array_equal(np.concatenate([half.chosen["y"] for half in halves]), whole.chosen["y"])
    assert folder.exists()
    del loaded
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a red", "ball"), None),
        (("a red " * 9, "ball"), "row 2: chosen, node 'draft': the prompt has 18 tokens, outside 1..16"),
        (("a red", "ball " * 5), "row 2: chosen, node 'answer': the completion has 6 tokens, outside 1..4"),
    ],
)
def test_texts_without_room_are_found_where_the_drafts_are_searched_for(tmp_path, row, message):
    drafts = CompoundSystem(
        ("question",),
        (Node("draft", WRITER, ("question",)), Node("second", WRITER, ("draft",)), Node("answer", WRITER, ("second",))),
    )
    rows = [{"prompt": question, "chosen": answer, "rejected": "cube"} for question, answer in (("a red", "ball"), row)]
    path = lines(tmp_path / "pairs.jsonl", *rows)
    if message is None:
        assert len(load_preferences(path, drafts, "trl")) == 2
        return
    with pytest.raises(RecordError, match=message):
        load_preferences(path, drafts, "trl")
