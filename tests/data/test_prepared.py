"""Preferences prepared on disk: what is done once, what makes it anew, what is left out, and the batches' losses."""

import importlib
import linecache
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

import sysdpo_jax.components.images
from sysdpo_jax import (
    DirectObjective,
    Node,
    Ranked,
    RecordError,
    TextEncoder,
    Trainer,
    create_state,
    load_preferences,
    make_optimizer,
    preference_dataset,
)
from sysdpo_jax.data import preferences
from sysdpo_jax.data.formats import READERS
from sysdpo_jax.data.preferences import WHOLE, _Pass
from sysdpo_jax.manifest import digest
from sysdpo_jax.training import ComponentOptimizer
from tests.components.painters import VAE, CountingCodec, encoded_since
from tests.components.stubs import Embedding, word_tokenizer
from tests.data.prepared_systems import (
    TEMPLATE,
    picture_file,
    picture_row,
    pictures,
    text_file,
    text_row,
    texts,
    tokenizer,
    weighted,
    writer,
    written,
)

KEY = jax.random.key(0)
MAKERS = {"texts": (texts, text_file), "pictures": (pictures, picture_file)}
# What each kind of system asks for.
ASKED = {"texts": {"tokenizer", "template"}, "pictures": {"tokenizer", "images", "texts encoded", "pictures encoded"}}


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def alike(left, right):
    """The same records with the same features, row by row."""
    assert len(left) == len(right) > 0
    for row in range(len(left)):
        assert left[row] == right[row]
        features, others = (made.rows.features(int(made.chosen[row])) for made in (left, right))
        assert jax.tree.structure(features) == jax.tree.structure(others)
        same(features, others)
    assert left.rows.axes == right.rows.axes
    same(left.rows.sizes[left.chosen], right.rows.sizes[right.chosen])
    assert left.counts == right.counts


def folders(cache):
    return {path.name for path in cache.iterdir() if path.is_dir()}


@pytest.fixture
def calls(monkeypatch):
    """How often each was called since this was asked last."""
    made = Counter()

    def counted(target, name, kind):
        original = getattr(target, name)

        def counting(*args, **settings):
            made[kind] += 1
            return original(*args, **settings)

        monkeypatch.setattr(target, name, counting)

    counted(PreTrainedTokenizerFast, "__call__", "tokenizer")
    counted(PreTrainedTokenizerFast, "apply_chat_template", "template")
    counted(sysdpo_jax.components.images.Image, "open", "images")
    encoded_since()

    def since():
        captions, images = encoded_since()
        found = {**made, "texts encoded": len(captions), "pictures encoded": len(images)}
        made.clear()
        return {name for name, number in found.items() if number}

    return since


@pytest.mark.parametrize("kind", MAKERS)
def test_a_second_epoch_and_a_restart_call_nothing(kind, tmp_path, calls):
    """Neither tokenizers, their templates, Pillow nor the frozen encoders; through the trainer too."""
    make, write = MAKERS[kind]
    path, system = write(tmp_path, 10), make()
    params = system.init(KEY)
    load = partial(load_preferences, path, params=params, cache=tmp_path / "cache")
    calls()
    first = preference_dataset(system, load(system), 4, seed=0, shapes=2)
    assert calls() == ASKED[kind]
    epochs = 2 * first.plan.per_epoch
    whole = [first[step] for step in range(epochs)]
    assert calls() == set()
    # Another process has tokenizers of its own.
    again = make()
    calls()
    second = preference_dataset(again, load(again), 4, seed=0, shapes=2)
    same([second[step] for step in range(epochs)], whole)
    assert calls() == set()
    optimizer = make_optimizer({name: ComponentOptimizer(optax.sgd(1e-3)) for name in again.param_keys})
    trainer = Trainer(again, DirectObjective(), optimizer, tmp_path / "run")
    state = trainer.fit(create_state(again, params, optimizer), second, epochs, KEY)
    assert int(state.step) == epochs
    assert calls() == set()


def test_records_in_memory_are_encoded_once_by_the_trainer(tmp_path, calls):
    system = pictures()
    params, rows = system.init(KEY), load_preferences(picture_file(tmp_path, 8), system)
    dataset = preference_dataset(system, list(rows), 4, seed=0)
    with pytest.raises(ValueError, match=r"frozen parts that have still to encode: give load_preferences their params"):
        dataset[0]
    optimizer = make_optimizer({"image": ComponentOptimizer(optax.sgd(1e-3))})
    calls()
    for steps in (2, 5):
        trainer = Trainer(system, DirectObjective(), optimizer, tmp_path / "run")
        trainer.fit(create_state(system, params, optimizer), dataset, steps, KEY)
        assert calls() == (ASKED["pictures"] if steps == 2 else set())
    given = load_preferences(tmp_path / "pictures.jsonl", system, params=params)
    same(dataset[3], preference_dataset(system, given, 4, seed=0)[3])


def other_reader(row, system):
    return READERS["records"](row, system)


def at_least(margin):
    def reader(row, system):
        return [record for record in READERS["records"](row, system) if margin < 3]

    return reader


def other_prompt(drafts):
    return [{"role": "user", "content": drafts[0]}]


def one_token_more():
    made = tokenizer()
    made.add_tokens(["zoo"])
    return made


def padded_with(token):
    made = word_tokenizer()
    made.pad_token = token
    return pictures(text=TextEncoder(Embedding(), made, 5))


CHANGES = {
    "reader": lambda: {"reader": other_reader},
    "reader of another kind": lambda: {"reader": Ranked("all")},
    "token": lambda: {"system": texts(tokenizer=one_token_more())},
    "template": lambda: {"system": texts(tokenizer=tokenizer(TEMPLATE.replace("the assistant", "a assistant")))},
    "new tokens": lambda: {"system": texts(max_new_tokens=25)},
    "truncation": lambda: {"system": texts(truncation="keep_end")},
    "prompt": lambda: {
        "system": replace(
            texts(), nodes=(texts().node("drafts"), Node("answer", writer(prompt=other_prompt), ("drafts",)))
        )
    },
    "on_error": lambda: {"on_error": "skip"},
    "ignore": lambda: {"ignore": ("score",)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_setting_makes_another_folder(change, tmp_path):
    path, settings = text_file(tmp_path, 2), {"system": texts(), "cache": tmp_path / "cache"}
    load_preferences(path, **settings)
    [before] = folders(tmp_path / "cache")
    # A reader may take no row of these.
    try:
        load_preferences(path, **(settings | CHANGES[change]()))
    except RecordError:
        assert change == "reader of another kind"
    assert len(folders(tmp_path / "cache") - {before}) == 1


def test_another_record_makes_another_folder_and_the_same_again_does_not(tmp_path):
    load = partial(load_preferences, system=texts(), cache=tmp_path / "cache")
    path = text_file(tmp_path, 3)
    first = load(path)
    written(path, [text_row(row) for row in (0, 1, 5)])
    assert load(path) != first
    assert len(folders(tmp_path / "cache")) == 2
    text_file(tmp_path, 3)
    alike(load(path), first)
    assert len(folders(tmp_path / "cache")) == 2


PARTS = {
    "number of the autoencoder": ("codec", True),
    "number of the text encoder": ("text", True),
    "number of the denoiser": ("denoiser", False),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_frozen_weight_makes_another_folder_and_a_trained_one_does_not(part, tmp_path):
    name, new = PARTS[part]
    system, path = pictures(), picture_file(tmp_path, 2)
    params = system.init(KEY)
    load_preferences(path, system, params=params, cache=tmp_path / "cache")
    leaves, structure = jax.tree.flatten(params["image"][name])
    leaves[-1] = leaves[-1].reshape(-1).at[-1].add(1e-3).reshape(leaves[-1].shape)
    other = {"image": params["image"] | {name: jax.tree.unflatten(structure, leaves)}}
    load_preferences(path, system, params=other, cache=tmp_path / "cache")
    assert len(folders(tmp_path / "cache")) == 1 + new
    # The same numbers from a file of weights.
    load_preferences(path, system, params=jax.tree.map(np.asarray, other), cache=tmp_path / "cache")
    assert len(folders(tmp_path / "cache")) == 1 + new


def used(system):
    """The system, whose tokenizers were called with padding and truncation."""
    for node in system.nodes:
        node.component.tokenizer(["a", "a red ball"], padding="max_length", truncation=True, max_length=7)
    return system


@pytest.mark.parametrize(
    ("other", "new"),
    {
        "the same": (texts, False),
        "a node's weight": (lambda: weighted(texts(), 3.0), False),
        "a tokenizer after a call": (lambda: used(texts()), False),
        "image size": (lambda: pictures(codec=CountingCodec(VAE, ((6, 4),), 2)), True),
        "pad token": (lambda: padded_with("<unk>"), True),
        "length of captions": (lambda: pictures(text=TextEncoder(Embedding(), word_tokenizer(), 6)), True),
    }.values(),
)
def test_what_features_depend_on(other, new):
    system = other()
    base = texts() if "question" in system.inputs else pictures(text=TextEncoder(Embedding(), word_tokenizer(), 5))
    about = [digest(preferences._about_system(made, None)) for made in (base, system)]
    assert (about[0] != about[1]) == new


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    {
        "the same": (at_least(1), at_least(1), True),
        "what is around": (at_least(1), at_least(2), False),
        "arguments": (partial(at_least, 1), partial(at_least, 2), False),
        "defaults": (lambda row, system, n=1: [], lambda row, system, n=2: [], False),
        "fields": (Ranked("all"), Ranked("all", min_margin=0.5), False),
        "sets": (frozenset({1, 2}), frozenset({1, 3}), False),
        "bytes": (b"a", b"b", False),
        "numbers and texts": (1, "1", False),
    }.values(),
)
def test_digests_tell_apart(first, second, equal):
    assert (digest(first) == digest(second)) == equal


def test_the_same_function_with_another_body(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    body = "from sysdpo_jax.data.formats import READERS\ndef read(row, system):\n    return {}\n"
    found = []
    for made in ("READERS['records'](row, system)", "READERS['records'](row, system)[:1]"):
        (tmp_path / "my_readers.py").write_text(body.format(made))
        sys.modules.pop("my_readers", None)
        importlib.invalidate_caches()
        linecache.clearcache()
        read = importlib.import_module("my_readers").read
        load_preferences(text_file(tmp_path, 2), texts(), read, cache=tmp_path / "cache")
        found.append(folders(tmp_path / "cache"))
    assert [len(names) for names in found] == [1, 2]
    sys.modules.pop("my_readers")


def forbidden(*args):
    raise AssertionError(f"called with {args}")


def test_an_untouched_source_is_neither_hashed_nor_read(tmp_path, monkeypatch):
    path = text_file(tmp_path, 3)
    load = partial(load_preferences, path, texts(), cache=tmp_path / "cache")
    first = load()
    monkeypatch.setattr(preferences, "read_rows", forbidden)
    # Written anew with the same content it is hashed, and no more.
    text_file(tmp_path, 3)
    alike(load(), first)
    monkeypatch.setattr(preferences, "source_digest", forbidden)
    alike(load(), first)


@pytest.fixture
def prepared(monkeypatch):
    """The numbers of records that were prepared together, of parts of 3 rows."""
    sizes, original = [], preferences.prepare_records
    monkeypatch.setattr(preferences, "PART", 3)

    def counting(system, params, records):
        sizes.append(len(records))
        return original(system, params, records)

    monkeypatch.setattr(preferences, "prepare_records", counting)
    return sizes


def test_an_image_that_is_replaced_makes_its_part_anew(tmp_path, prepared):
    path, system = picture_file(tmp_path, 8), pictures()
    load = partial(load_preferences, path, system, params=system.init(KEY), cache=tmp_path / "cache")
    first = load()
    latents = [first.rows.features(row)["chosen"]["image"]["latents"].copy() for row in range(8)]
    assert prepared == [3, 3, 2]
    Image.new("RGB", (6, 4), (200, 10, 30)).save(tmp_path / "4-chosen.png")
    again = load()
    assert prepared == [3, 3, 2, 3]
    assert len(folders(tmp_path / "cache")) == 1
    differs = [
        not np.array_equal(again.rows.features(row)["chosen"]["image"]["latents"], latents[row]) for row in range(8)
    ]
    assert differs == [row == 4 for row in range(8)]


def test_equal_files_in_two_folders_have_pictures_of_their_own(tmp_path, monkeypatch):
    """Paths of pictures begin at the file, from wherever it is named."""
    system, made = pictures(), []
    params = system.init(KEY)
    for name, shift in (("one", 0), ("two", 3)):
        (tmp_path / name).mkdir()
        rows = [picture_row(row + shift, tmp_path / name) for row in range(2)]
        for row in range(2):
            for side in ("chosen", "rejected"):
                (tmp_path / name / f"{row + shift}-{side}.png").rename(tmp_path / name / f"x{row}-{side}.png")
                rows[row][side] = {"image": f"x{row}-{side}.png"}
            rows[row]["inputs"] = {"caption": "a ball"}
        path = written(tmp_path / name / "p.jsonl", rows)
        made.append(load_preferences(path, system, params=params, cache=tmp_path / "cache"))
    one, two = (preferred.rows.features(0)["chosen"]["image"]["latents"] for preferred in made)
    assert np.abs(one - two).max() > 1e-3
    assert len(folders(tmp_path / "cache")) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preferences, "read_rows", forbidden)
    for folder, source in (
        (tmp_path, "one/p.jsonl"),
        (tmp_path / "two", "../one/p.jsonl"),
        (tmp_path / "one", "p.jsonl"),
    ):
        monkeypatch.chdir(folder)
        again = load_preferences(source, system, params=params, cache=tmp_path / "cache")
        assert again[0].chosen["image"] == str(tmp_path / "one" / "x0-chosen.png")


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_a_killed_pass_is_gone_on_with_by_another_process(kind, tmp_path):
    """Killed in the middle of its second part, of three: the first is there, and nothing of it is prepared again."""
    make, write = MAKERS[kind]
    path, system = write(tmp_path, 8), make()

    def run(*args):
        command = [sys.executable, "-m", "tests.data.prepared_run", kind, tmp_path, *args]
        return subprocess.run([*map(str, command)], cwd=Path(__file__).parents[2], capture_output=True, text=True)

    assert run(4).returncode == -signal.SIGKILL
    folder = tmp_path / "cache" / folders(tmp_path / "cache").pop()
    assert sorted(part.name for part in folder.glob("*.index.npz")) == ["part-00000.index.npz"]
    second = run()
    assert second.stdout.splitlines() == ["[2, 1, 2]"], second.stderr[-2000:]
    assert list(folder.glob("*.partial")) == []
    load = partial(load_preferences, path, system, params=system.init(KEY))
    alike(load(cache=tmp_path / "cache"), load())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, GeneratorExit])
def test_a_pass_that_is_broken_off_is_gone_on_with(kind, error, tmp_path, prepared):
    make, write = MAKERS[kind]
    path, system = write(tmp_path, 8), make()
    params = system.init(KEY)
    load = partial(load_preferences, path, system, params=params)
    whole = load(cache=tmp_path / "other")
    prepared.clear()

    def stopping(rows):
        if rows > 5:
            raise error

    with pytest.raises(error):
        load(cache=tmp_path / "cache", progress=stopping)
    assert prepared == [3, 3]
    assert not list((tmp_path / "cache").glob(f"*/{WHOLE}"))
    again = load(cache=tmp_path / "cache")
    assert prepared == [3, 3, 3, 2]
    alike(again, whole)


def a_pass(path, system, params, skip=False):
    return _Pass(path, "train", READERS["records"], (), system, params, skip, lambda rows: None)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("number", [2, 3])
def test_parts_by_process_are_those_of_one_process(kind, number, tmp_path, prepared):
    make, write = MAKERS[kind]
    path, system = write(tmp_path, 8), make()
    params = system.init(KEY)
    made = []
    for count in (1, number):
        folder = tmp_path / str(count)
        folder.mkdir()
        # Whichever is the first to be done.
        for index in reversed(range(count)):
            prepared.clear()
            a_pass(path, system, params).write(folder, index, count)
            assert prepared == [3, 3, 2][index::count]
        made.append(a_pass(path, system, params).open(folder, "", system))
    alike(*made)
    names = [sorted(file.name for file in (tmp_path / str(count)).iterdir()) for count in (1, number)]
    assert names[0] == names[1]


def mixed_rows(held):
    """Rows of texts that hold their drafts, or not."""
    rows = [text_row(row) for row in range(len(held))]
    for row, whole in zip(rows, held, strict=True):
        for side in () if whole else ("chosen", "rejected"):
            del row[side]["drafts"]
    return rows


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("held", ["10000111", "01111000", "11100000", "00011111"])
def test_records_of_two_kinds_are_those_of_the_first_one_whoever_makes_the_parts(held, count, tmp_path, prepared):
    """Parts may begin with either kind, or hold one of them alone."""
    whole = [letter == "1" for letter in held]
    path, system = written(tmp_path / "p.jsonl", mixed_rows(whole)), texts()
    for index in range(count):
        a_pass(path, system, {}, skip=True).write(tmp_path, index, count)
    kept = a_pass(path, system, {}, skip=True).open(tmp_path, "", system)
    wanted = [row for row, own in enumerate(whole) if own == whole[0]]
    assert [record.inputs["question"] for record in kept] == [text_row(row)["inputs"]["question"] for row in wanted]
    counts = kept.counts
    assert (counts.read, counts.kept, counts.skipped) == (8, len(wanted), 8 - len(wanted))
    [(reason, number)] = counts.reasons.items()
    assert number == counts.skipped
    assert f"chosen {'lacks' if whole[0] else 'has'} the intermediate values drafts" in reason
    assert kept.held == whole[0]
    if whole[0] and len(wanted) >= 2:
        own = load_preferences(written(tmp_path / "q.jsonl", [text_row(row) for row in wanted]), system)
        same(*(preference_dataset(system, made, 2, seed=0)[1] for made in (kept, own)))
    with pytest.raises(RecordError, match=r"p\.jsonl, row \d: chosen (lacks|has) the intermediate values drafts"):
        load_preferences(path, system)
