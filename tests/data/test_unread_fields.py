"""Fields of rows: every reader uses what changes the result, or refuses it by name."""

import json

import datasets
import numpy as np
import pytest

from sysdpo_jax import (
    Categorical,
    Gaussian,
    PreferenceRecord,
    RecordError,
    load_preferences,
    prepare_pairs,
    save_preferences,
)
from sysdpo_jax.data.files import _plain
from sysdpo_jax.data.formats import is_empty
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.graph import CompoundSystem, Node
from tests.components.test_conversations import TOOL, model
from tests.components.test_conversations import USER as ASKED
from tests.data.test_preference_files import PICTURE, TEXT, lines, png

TALK = CompoundSystem(("question",), (Node("answer", model(), ("question",)),))
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("Two.", "Blue.")]
CHAT = {"prompt": [ASKED], "chosen": ANSWERS[0], "rejected": ANSWERS[1]}
ROWS = {
    "records": {"inputs": {"question": "a red"}, "chosen": {"answer": "ball"}, "rejected": {"answer": "cube"}},
    "trl": {"prompt": "a red", "chosen": "ball", "rejected": "cube"},
    "ranked": {"inputs": "a red", "outputs": ["ball", "cube"], "scores": [1, 0]},
    "ranked_all": {"inputs": "a red", "outputs": ["ball", "cube"], "scores": [1, 0]},
}
FIELDS = {
    "system": "Talk like a pirate.", "weight": 2.0, "margin": 0, "images": ["a.png"], "question": "What is tea?",
    "instruction": "Say it.", "turns": [1], "anything": {"at": {"all": False}},
}  # fmt: skip


def refusal(path, system, reader, **settings):
    with pytest.raises(RecordError) as error:
        load_preferences(path, system, reader, **settings)
    return str(error.value)


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("reader", ROWS)
def test_a_field_that_is_not_read_is_refused_by_name(tmp_path, reader, name):
    row = ROWS[reader]
    path = lines(tmp_path / "pairs.jsonl", row, {**row, name: FIELDS[name]})
    said = refusal(path, TEXT, reader)
    assert said.startswith(f"{path}, row 2: the field {name!r} is not read: ")
    assert said.endswith("where it does not matter, name it in `ignore` (data.ignore of a run, --ignore of rollout)")
    assert len(load_preferences(path, TEXT, reader, ignore=(name,))) == 2
    assert len(load_preferences(path, TEXT, reader, on_error="skip")) == 1


def test_pick_a_pic_reads_its_labels_and_knows_its_own_fields(tmp_path):
    sides = {"jpg_0": png(tmp_path / "a.png"), "jpg_1": png(tmp_path / "b.png", 9)}
    row = {
        "are_different": True, "best_image_uid": "b", "caption": "a ball", "created_at": "2023", "has_label": True,
        "image_0_uid": "a", "image_0_url": "http", "image_1_uid": "b", "image_1_url": "http", "label_0": 0.0,
        "label_1": 1.0, "model_0": "x", "model_1": "y", "ranking_id": 3, "user_id": 4, "num_example_per_prompt": 1,
        "__index_level_0__": 7, **sides,
    }  # fmt: skip
    path = tmp_path / "pick.parquet"

    def written(*rows):
        datasets.Dataset.from_list(list(rows)).to_parquet(str(path))
        return path

    # Without a label both numbers are 0, which is no preference for the second picture.
    unlabelled = row | {"has_label": False, "label_1": 0.0}
    loaded = load_preferences(written(row, unlabelled), PICTURE, "pick_a_pic")
    assert [record.chosen["image"] for record in loaded] == [sides["jpg_1"]]
    assert loaded.counts.ties == 1
    assert "'label_0' 0.0 and 'label_1' 0.0 do not add up to 1" in refusal(
        written(row | {"label_1": 0.0}), PICTURE, "pick_a_pic"
    )
    assert "the field 'weight' is not read" in refusal(written(row | {"weight": 1.0}), PICTURE, "pick_a_pic")


@pytest.mark.parametrize(
    "extra",
    [
        {"prompt_id": "8f", "messages": CHAT["chosen"], "score_chosen": 8.0, "score_rejected": 2.5},
        {"source": "web", "chosen-rating": 5, "chosen-model": "a", "rejected-rating": 1, "rejected-model": "b"},
        {"id": "7", "dataset": "x", "chosen_score": 5.0, "rejected_score": 4, "__index_level_0__": 3},
        {"system": "", "images": None, "tools": [], "weight": float("nan"), "question": " ", "metadata": {"a": [None]}},
    ],
)
def test_fields_of_published_data_sets_that_change_nothing(tmp_path, extra):
    path = lines(tmp_path / "pairs.jsonl", {**CHAT, **extra})
    assert list(load_preferences(path, TALK, "trl")) == [
        PreferenceRecord({"question": [ASKED]}, {"answer": ANSWERS[0]}, {"answer": ANSWERS[1]})
    ]


def test_a_field_that_repeats_what_is_read_changes_nothing_and_another_one_does(tmp_path):
    row = ROWS["trl"] | {"question": ROWS["trl"]["prompt"]}
    assert len(load_preferences(lines(tmp_path / "same.jsonl", row), TEXT, "trl")) == 1
    other = lines(tmp_path / "other.jsonl", {**CHAT, "messages": ANSWERS[0] * 2})
    assert "the field 'messages' is not read" in refusal(other, TALK, "trl")


def test_the_prompt_is_not_guessed_where_another_field_may_hold_it(tmp_path):
    row = {"question": "What is tea?", "chosen": "It is a drink.", "rejected": "It is a stone."}
    assert "the field 'question' is not read" in refusal(lines(tmp_path / "a.jsonl", row), TEXT, "trl")
    near = {"promt": "a red", "chosen": "a ball", "rejected": "a cube"}
    assert "'promt' is not read: did you mean 'prompt'?" in refusal(lines(tmp_path / "b.jsonl", near), TEXT, "trl")


def own(row, system):
    return [PreferenceRecord({"question": row["q"]}, {"answer": row["good"]}, {"answer": row["bad"]})]


def test_a_reader_of_ones_own_gets_the_whole_row_but_what_is_ignored(tmp_path):
    seen = []
    row = {"q": "a red", "good": "ball", "bad": "cube", "weight": 3, "id": "x"}

    def reader(values, system):
        seen.append(dict(values))
        return own(values, system)

    path = lines(tmp_path / "pairs.jsonl", row, row | {"id": "y"})
    assert len(load_preferences(path, TEXT, reader, ignore=["weight"])) == 2
    assert load_preferences(path, TEXT, f"{__name__}:own") == load_preferences(path, TEXT, own)
    with pytest.raises(ConfigError, match=r"reader: .* has no 'onw': did you mean 'own'"):
        load_preferences(path, TEXT, f"{__name__}:onw")
    assert seen[0] == {name: value for name, value in row.items() if name != "weight"}
    # What is ignored is not an id either.
    assert len(load_preferences(lines(path, row, row), TEXT, own, ignore=("id",))) == 2
    with pytest.raises(ValueError, match="ignore 'id' is one text: give the names of fields in a tuple"):
        load_preferences(path, TEXT, own, ignore="id")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("whole", [False, True])
def test_tools_and_arguments_of_trl_rows_reach_the_template(tmp_path, suffix, whole):
    """With a prompt or with whole conversations; in tables tools are JSON, as TRL recommends."""
    row = CHAT
    if whole:
        row = {side: [ASKED, *CHAT[side]] for side in ("chosen", "rejected")}
    row = {**row, "tools": json.dumps([TOOL]), "chat_template_kwargs": {"terse": True}}
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        lines(path, row)
    else:
        datasets.Dataset.from_list([row]).to_parquet(str(path))
    [record] = loaded = load_preferences(path, TALK, "trl")
    extras = {"tools": [TOOL], "chat_template_kwargs": {"terse": True}}
    assert record.inputs == {"question": {"messages": [ASKED], **extras}}
    features = prepare_pairs(TALK, loaded[:]).chosen["answer"]
    tokenizer = TALK.nodes[0].component.tokenizer
    wanted = tokenizer.apply_chat_template(
        [ASKED], tools=[TOOL], tokenize=False, add_generation_prompt=True, terse=True
    )
    assert tokenizer.decode(features["tokens"][0][: features["prompt_lengths"][0]]) == wanted
    # They go through files of records unchanged.
    for form in ("jsonl", "parquet"):
        save_preferences(tmp_path / f"saved.{form}", loaded)
    assert load_preferences(tmp_path / "saved.jsonl", TALK) == loaded
    again = prepare_pairs(TALK, load_preferences(tmp_path / "saved.parquet", TALK)[:]).chosen["answer"]
    assert again["prompt_lengths"] == features["prompt_lengths"]


@pytest.mark.parametrize(
    ("row", "message"),
    {
        "texts": (ROWS["trl"] | {"tools": [TOOL]}, "the field 'tools' is for a chat template: give prompt and"),
        "tools": (CHAT | {"tools": "price"}, "the field 'tools' is a text that is not JSON"),
        "arguments": (CHAT | {"chat_template_kwargs": [1]}, "the field 'chat_template_kwargs' must be an object"),
        "ours": (CHAT | {"chat_template_kwargs": {"tokenize": True}}, "'tokenize', which is set for it"),
        "unknown": (CHAT | {"chat_template_kwargs": {"brief": 1}}, "the argument 'brief', which the tokenizer's chat"),
        "a picture": (
            CHAT | {"prompt": [{"role": "user", "content": [{"type": "image"}]}]},
            "the field 'prompt', message 0, part 0 is of the type 'image'",
        ),
    }.values(),
)  # fmt: skip
def test_what_a_template_cannot_be_given_is_refused_with_its_row(tmp_path, row, message):
    path = lines(tmp_path / "pairs.jsonl", CHAT, row)
    said = refusal(path, TALK, "trl")
    assert said.startswith(f"{path}, row 2: ")
    assert message in said


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_text_parts_in_files(tmp_path, suffix):
    """Of records and of TRL's rows; a table has a place for what other parts hold."""

    def part(text):
        return [{"type": "text", "text": text, "image": None}]

    row = {
        "prompt": [{"role": "user", "content": part("price?")}],
        "chosen": [{"role": "assistant", "content": part("Two.")}],
        "rejected": [{"role": "assistant", "content": part("Blue.")}],
    }
    sides = {side: {"answer": row[side]} for side in ("chosen", "rejected")}
    record = {"inputs": {"question": row["prompt"]}, **sides}
    plain = prepare_pairs(TALK, load_preferences(lines(tmp_path / "plain.jsonl", CHAT), TALK, "trl")[:])
    for reader, values in (("trl", row), ("records", record)):
        path = tmp_path / f"{reader}.{suffix}"
        if suffix == "jsonl":
            lines(path, values)
        else:
            datasets.Dataset.from_list([values]).to_parquet(str(path))
        parts = prepare_pairs(TALK, load_preferences(path, TALK, reader)[:])
        for side in ("chosen", "rejected"):
            got, wanted = getattr(parts, side)["answer"], getattr(plain, side)["answer"]
            np.testing.assert_array_equal(got["tokens"], wanted["tokens"])


@pytest.mark.parametrize(
    ("row", "message"),
    {
        "twice": ('{"prompt": "a", "chosen": "b", "rejected": "c", "prompt": "d"}', "the field 'prompt' stands twice"),
        "twice within": ('{"inputs": {"x": 1, "x": 2}, "chosen": {}, "rejected": {}}', "the field 'x' stands twice"),
        "digits": (f'{{"prompt": {"9" * 5000}}}', "not valid JSON (Exceeds the limit"),
        "a mark": ('\ufeff{"prompt": "a"}', "not valid JSON (Unexpected UTF-8 BOM"),
    }.values(),
)  # fmt: skip
def test_json_that_would_lose_something_is_refused(tmp_path, row, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{json.dumps(ROWS['trl'])}\n{row}\n", encoding="utf-8")
    assert refusal(path, TEXT, "trl").startswith(f"{path}, row 2: {message}")
    assert len(load_preferences(path, TEXT, "trl", on_error="skip")) == 1


def test_values_of_tables_are_plain():
    assert _plain({"a": np.float32(0.5), "b": np.arange(2), "c": (1, None), "d": None}) == {
        "a": 0.5, "b": [0, 1], "c": [1, None]
    }  # fmt: skip
    assert [is_empty(value) for value in (None, " ", [], {"a": [None]}, float("nan"))] == [True] * 5
    assert [is_empty(value) for value in (0, False, 0.0, "a", [0], {"a": False})] == [False] * 6


ODD = (
    *(None, True, -1, 10**30, float("nan"), "x", [], ["a"], [1, "a"]),
    *({"a": 1}, {"messages": []}, [{"role": 3}], [None]),
)


def said_of(path, system):
    """What a file is refused with, "" for one that is used."""
    try:
        prepare_pairs(system, load_preferences(path, system)[:])
    except RecordError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_values_of_any_kind_are_used_or_refused_with_their_row(tmp_path, value):
    """No other exception leaves `load_preferences`."""
    number = CompoundSystem(("x",), (Node("y", Gaussian(1, 1), ("x",)),))
    table = CompoundSystem(("x",), (Node("y", Categorical(2, (2,)), ("x",)),))
    talk = CompoundSystem(("x",), (Node("y", model(), ("x",)),))
    for system, fine in ((number, 1.0), (table, 1), (talk, "a")):
        for inputs, chosen in (({"x": value}, {"y": fine}), ({"x": fine}, {"y": value})):
            row = {"inputs": inputs, "chosen": chosen, "rejected": {"y": fine}}
            path = lines(tmp_path / "pairs.jsonl", row)
            said = said_of(path, system)
            assert not said or said.startswith(f"{path}, row 1: ")
            assert "\n" not in said
