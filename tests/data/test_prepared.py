"""Preferences prepared on disk: what is done once, what makes it anew, what is left out, and the batches' losses."""

import importlib
import linecache
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import fields, replace
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
    CompoundSystem,
    DirectObjective,
    LanguageModel,
    Node,
    PreferenceRecord,
    Ranked,
    RecordError,
    TextEncoder,
    Trainer,
    create_state,
    load_preferences,
    make_optimizer,
    preference_dataset,
    prepare_pairs,
)
from sysdpo_jax.batch import encode_batch
from sysdpo_jax.components.base import as_rows
from sysdpo_jax.components.sampled_text import facts_of
from sysdpo_jax.data import files, preferences
from sysdpo_jax.data import prepared as stored
from sysdpo_jax.data.formats import READERS
from sysdpo_jax.data.preferences import WHOLE, _Pass
from sysdpo_jax.data.prepared import about_system
from sysdpo_jax.decoding.beam_search import BeamSearch
from sysdpo_jax.errors import DamagedFileError
from sysdpo_jax.keys import row_keys
from sysdpo_jax.manifest import digest
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.objectives.log_ratio import node_log_probs, repeated
from sysdpo_jax.training import ComponentOptimizer
from sysdpo_jax.values import SampledText, to_json
from tests.components.painters import VAE, CountingCodec, encoded_since, painter
from tests.components.stubs import Embedding, word_tokenizer
from tests.data.prepared_systems import (
    TEMPLATE,
    asked,
    illustrated,
    init,
    picture_file,
    picture_row,
    pictures,
    text_file,
    text_row,
    texts,
    tokenizer,
    weighted,
    words,
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
        features, others = (made.rows.features(int(made.usable[row])) for made in (left, right))
        assert jax.tree.structure(features) == jax.tree.structure(others)
        same(features, others)
    assert left.rows.axes == right.rows.axes
    same(left.rows.sizes[left.usable], right.rows.sizes[right.usable])
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
    params = init(system)
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
    params, rows = init(system), load_preferences(picture_file(tmp_path, 8), system)
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
    none = change == "reader of another kind"
    with pytest.raises(RecordError) if none else nullcontext():
        load_preferences(path, **(settings | CHANGES[change]()))
    # Of a reader that takes no row nothing is left.
    assert len(folders(tmp_path / "cache") - {before}) == 1 - none


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
    params = init(system)
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


def changed(system, change):
    return replace(system, nodes=tuple(replace(node, component=change(node.component)) for node in system.nodes))


def with_decoder(**settings):
    """The texts' models with other settings of their decoders."""
    return changed(texts(), lambda own: replace(own, decoder=Decoder(replace(own.decoder.config, **settings))))


def other_sampler():
    base = pictures(text=TextEncoder(Embedding(), word_tokenizer(), 5))
    return changed(base, lambda own: replace(own, num_steps=9, guidance_scale=2.0))


class Own(LanguageModel):
    """What its `prepare` reads is not known."""


def own_writers(temperature):
    def own(model):
        return Own(**{field.name: getattr(model, field.name) for field in fields(model)})

    return changed(texts(temperature=temperature), own)


def test_all_of_a_component_of_the_users_own_counts_unless_it_says_what_does(monkeypatch):
    def about(temperature):
        return digest(about_system(own_writers(temperature)))

    assert about(0.5) != about(0.6)
    monkeypatch.setattr(Own, "prepared_by", LanguageModel.prepared_by, raising=False)
    assert about(0.5) == about(0.6)


def test_another_temperature_reads_what_is_there(tmp_path, monkeypatch):
    path, cache = text_file(tmp_path, 8), tmp_path / "cache"
    first = load_preferences(path, texts(), cache=cache)
    monkeypatch.setattr(stored, "prepare_records", forbidden)
    warmer = texts(temperature=0.5)
    again = load_preferences(path, warmer, cache=cache)
    same(preference_dataset(warmer, again, 2, seed=0)[0], preference_dataset(texts(), first, 2, seed=0)[0])


@pytest.mark.parametrize("ending", [".rows.arrow", ".leaves.arrow", ".index.npz"])
def test_a_damaged_cache_is_named_with_the_remedy(ending, tmp_path):
    path, cache = text_file(tmp_path, 4), tmp_path / "cache"
    load_preferences(path, texts(), cache=cache)
    [folder] = folders(cache)
    [part] = (cache / folder).glob(f"*{ending}")
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(DamagedFileError) as caught:
        preference_dataset(texts(), load_preferences(path, texts(), cache=cache), 2, seed=0)[0]
    said = str(caught.value)
    assert said.startswith(f"{part} is damaged or incomplete (")
    assert said.endswith(f"remove the folder {cache / folder}, whose files are made anew")


@pytest.mark.parametrize(
    ("other", "new"),
    {
        "the same": (texts, False),
        "a node's weight": (lambda: weighted(texts(), 3.0), False),
        "a tokenizer after a call": (lambda: used(texts()), False),
        "temperature": (lambda: texts(temperature=0.5, top_p=0.9), False),
        "beam search": (lambda: texts(search=BeamSearch(length_penalty=2.0)), False),
        "recomputation": (lambda: with_decoder(remat="full"), False),
        "steps of the sampler": (other_sampler, False),
        "ends": (lambda: texts(stop_tokens=(5,)), True),
        "a smaller vocabulary": (lambda: with_decoder(vocab_size=200), True),
        "a model of the user's own": (lambda: own_writers(0.5), True),
        "image size": (lambda: pictures(codec=CountingCodec(VAE, ((6, 4),), 2)), True),
        "pad token": (lambda: padded_with("<unk>"), True),
        "length of captions": (lambda: pictures(text=TextEncoder(Embedding(), word_tokenizer(), 6)), True),
    }.values(),
)
def test_what_features_depend_on(other, new):
    system = other()
    base = texts() if "question" in system.inputs else pictures(text=TextEncoder(Embedding(), word_tokenizer(), 5))
    about = [digest(about_system(made)) for made in (base, system)]
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
    monkeypatch.setattr(files, "source_digest", forbidden)
    alike(load(), first)


@pytest.fixture
def prepared(monkeypatch):
    """The numbers of records that were prepared together, of parts of 3 rows."""
    sizes, original = [], stored.prepare_records
    for name in ("PART", "PART_WITH_IMAGES"):
        monkeypatch.setattr(preferences, name, 3)

    def counting(system, params, records):
        sizes.append(len(records))
        return original(system, params, records)

    monkeypatch.setattr(stored, "prepare_records", counting)
    return sizes


def test_an_image_that_is_replaced_makes_its_part_anew(tmp_path, prepared):
    path, system = picture_file(tmp_path, 8), pictures()
    load = partial(load_preferences, path, system, params=init(system), cache=tmp_path / "cache")
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
    params = init(system)
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
def test_a_killed_pass_is_gone_on_with_by_another_process(kind, tmp_path, prepared):
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
    load = partial(load_preferences, path, system, params=init(system))
    made = load(cache=tmp_path / "cache")
    assert prepared == []
    alike(made, load())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, GeneratorExit])
def test_a_pass_that_is_broken_off_is_gone_on_with(kind, error, tmp_path, prepared):
    make, write = MAKERS[kind]
    path, system = write(tmp_path, 8), make()
    params = init(system)
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
    params = init(system)
    made = []
    for count in (1, number):
        folder = tmp_path / str(count)
        folder.mkdir()
        # Whichever is the first to be done.
        for index in reversed(range(count)):
            prepared.clear()
            a_pass(path, system, params).write(folder, index, count)
            assert prepared == [3, 3, 2][index::count]
        made.append(a_pass(path, system, params).open(folder, "", system, ("", {})))
    alike(*made)
    names = [sorted(file.name for file in (tmp_path / str(count)).iterdir()) for count in (1, number)]
    assert names[0] == names[1]


def test_a_cache_that_is_not_shared_is_said(tmp_path, prepared):
    path, system = text_file(tmp_path, 8), texts()
    a_pass(path, system, {}).write(tmp_path, 1, 2)
    with pytest.raises(RecordError, match="lacks parts that another process made: give a cache that all processes"):
        a_pass(path, system, {}).open(tmp_path, "", system, ("", {}))
    a_pass(path, system, {}).write(tmp_path, 0, 2)
    assert len(a_pass(path, system, {}).open(tmp_path, "", system, ("", {}))) == 8


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
    kept = a_pass(path, system, {}, skip=True).open(tmp_path, "", system, ("", {}))
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


def illustrated_row(row, folder):
    """A row for `illustrated`, that can be used."""
    rng, made = np.random.default_rng(row), picture_row(row, folder)
    sides = {side: made[side] | {"caption": words(rng, 5)} for side in ("chosen", "rejected")}
    return {"inputs": {"question": words(rng, 20)}} | sides


def set_at(row, where, name, value):
    return row | {where: row[where] | {name: value}}


def without(row, name):
    return row | {side: {n: v for n, v in row[side].items() if n != name} for side in ("chosen", "rejected")}


def damaged(row, folder, number):
    (folder / f"damaged-{number}.png").write_bytes(b"\x89PNG and no more")
    return set_at(row, "rejected", "image", f"damaged-{number}.png")


# What can be wrong with a row, twice each with other words, and what is said of it.
WRONG = {
    "caption of too many tokens": (
        lambda row, folder, number: set_at(row, "chosen", "caption", "a red ball on the left" + " on" * (number % 5)),
        "chosen, node 'image': caption has # tokens, more than the # of the text encoder: shorten '...'",
    ),
    "no image": (
        lambda row, folder, number: set_at(row, "rejected", "image", f"no-{number}.png"),
        "rejected, node 'image': image: there is no file '...'",
    ),
    "damaged image": (damaged, "rejected, node 'image': image: '...' cannot be read"),
    "no room for the prompt": (
        lambda row, folder, number: set_at(row, "inputs", "question", "a red ball " * (20 + number)),
        "chosen, node 'caption': the prompt has # tokens, outside",
    ),
    "refused by the template": (
        lambda row, folder, number: set_at(row, "inputs", "question", [{"role": "tool", "content": "a" * number}]),
        "chosen, node 'caption': .*the chat template",
    ),
    "the prompt function": (
        lambda row, folder, number: set_at(row, "inputs", "question", "the left"),
        "chosen, node 'caption': the prompt function tests.data.prepared_systems:asked failed",
    ),
    "no intermediates": (lambda row, folder, number: without(row, "caption"), "chosen lacks the intermediate values"),
    "a missing field": (lambda row, folder, number: without(row, "image"), "chosen lacks the field 'image'"),
    "an unknown field": (
        lambda row, folder, number: set_at(row, "chosen", "picture", "x"),
        "chosen, field 'picture' is no name",
    ),
    "no value of the kind": (
        lambda row, folder, number: set_at(row, "chosen", "caption", number),
        "chosen, node 'caption'",
    ),
}


def test_skip_leaves_out_exactly_what_cannot_be_prepared_and_counts_why(tmp_path):
    rows, good, number = [], [], 0
    for place, change in enumerate([None, *WRONG, *WRONG, None, None]):
        made = illustrated_row(place, tmp_path)
        if change is None:
            good.append(place)
        else:
            number += 1
            made = WRONG[change][0](made, tmp_path, number)
        rows.append(made)
    path, system = written(tmp_path / "p.jsonl", rows), illustrated()
    params = init(system)
    kept = load_preferences(path, system, params=params, on_error="skip")
    assert [record.inputs["question"] for record in kept] == [rows[place]["inputs"]["question"] for place in good]
    assert (kept.counts.read, kept.counts.kept, kept.counts.skipped) == (len(rows), len(good), number)
    assert sum(kept.counts.reasons.values()) == number
    assert {reason: number for reason, number in kept.counts.reasons.items() if number != 2} == {}
    for name, (_, said) in WRONG.items():
        assert [reason for reason in kept.counts.reasons if re.match(said, reason)], (name, kept.counts.reasons)
    assert all(f"2 x {reason}" in kept.summary() for reason in kept.counts.reasons)
    # What is kept can be prepared, whole and one by one, and trained on; of what is not nothing can be.
    prepare_pairs(system, list(kept))
    for place, row in enumerate(rows):
        record = PreferenceRecord(**row)
        sides = [{n: str(tmp_path / v) if n == "image" else v for n, v in s.items()} for s in record.runs()]
        record = PreferenceRecord(record.inputs, *({n: v for n, v in s.items() if n != "question"} for s in sides))
        if place in good:
            prepare_pairs(system, [record])
        else:
            with pytest.raises(RecordError):
                load_preferences(written(tmp_path / "one.jsonl", [rows[good[0]], row]), system)
    optimizer = make_optimizer({name: ComponentOptimizer(optax.sgd(1e-3)) for name in system.param_keys})
    dataset = preference_dataset(system, kept, 2, seed=0)
    state = Trainer(system, DirectObjective(), optimizer, tmp_path / "run").fit(
        create_state(system, params, optimizer), dataset, 1, KEY
    )
    assert int(state.step) == 1


def plated():
    """Pictures of two drafts, whose times are spread over the plate; drafts have lengths of their own."""
    drafts = Node("drafts", writer(prompt=asked), ("question",), plate=2)
    image = Node("image", painter(strata=2, caption_dropout=0.5), ("drafts",), plate=2)
    return CompoundSystem(("question",), (drafts, image))


def plated_row(row, folder):
    rng, made = np.random.default_rng(row), [picture_row(2 * row + copy, folder) for copy in range(2)]

    def side(name):
        return {"drafts": [words(rng, 5) for _ in range(2)], "image": [copy[name]["image"] for copy in made]}

    question = words(rng, int(rng.choice([2, 20])))
    return {"inputs": {"question": question}, "chosen": side("chosen"), "rejected": side("rejected")}


@partial(jax.jit, static_argnums=0)
def ratios(system, params, reference, batch, keys):
    """The policy's log-probabilities and its log-ratios, {node: [rows, 2]}, and the losses [rows]."""
    terms = node_log_probs(system, params, reference, as_rows(batch.sides(), 2), repeated(keys, (2,)), {})
    policy = {name: term.policy.reshape(-1, 2) for name, term in terms.items()}
    ratio = sum(term.log_ratio.reshape(-1, 2) for term in terms.values())
    return policy, -jax.nn.log_sigmoid(0.1 * (ratio[:, 0] - ratio[:, 1]))


@pytest.mark.parametrize("kind", ["texts", "plated"])
def test_losses_of_batches_of_like_sizes_are_those_of_whole_rows(kind, tmp_path):
    """1e-6 of each row's, for every shape: float32 adds the same numbers, in rows of other lengths."""
    if kind == "texts":
        system, path = texts(), text_file(tmp_path, 24)
    else:
        system = plated()
        path = written(tmp_path / "p.jsonl", [plated_row(row, tmp_path) for row in range(12)])
    # Numbers that would be drawn without compiling are larger, and so is the rounding of their sums.
    compiled = jax.jit(CompoundSystem.init, static_argnums=0)
    params, reference = compiled(system, KEY), compiled(system, jax.random.key(1))
    reference |= {name: tree | system.frozen_params(params).get(name, {}) for name, tree in reference.items()}
    loaded = load_preferences(path, system, params=params)
    whole = encode_batch(system, params, prepare_pairs(system, list(loaded)))
    keys = row_keys(KEY, len(loaded))
    expected = ratios(system, params, reference, whole, keys)
    dataset, found = preference_dataset(system, loaded, 3, seed=0, shapes=4), set()
    for step in range(dataset.plan.per_epoch):
        (rows, sizes), batch = dataset.plan.at(step), dataset[step]
        found.add(sizes)
        made = ratios(system, params, reference, batch, keys[rows])
        own = jax.tree.map(lambda x, rows=rows: x[rows], expected)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), made, own)
    assert len(found) >= 2
    assert {shape for own in dataset.plan.shapes for shape in map(tuple, own.tolist())} >= found


def test_sampled_texts_keep_their_tokens_through_the_files(tmp_path):
    """Tokens that no tokenizer would make of the text, and no end where it was cut."""
    system = CompoundSystem(("question",), (Node("answer", writer(), ("question",)),))
    model = system.node("answer").component
    made = [SampledText("a red", (4, 5, 2), "end", facts_of(model.tokenizer).fingerprint),
            SampledText("a red", (4, 5), "cut", facts_of(model.tokenizer).fingerprint)]  # fmt: skip
    rows = [{"inputs": {"question": "a ball"}, "chosen": {"answer": to_json(made[0])},
             "rejected": {"answer": to_json(made[1])}}] * 2  # fmt: skip
    loaded = load_preferences(written(tmp_path / "p.jsonl", rows), system, cache=tmp_path / "cache")
    for side, text in zip(("chosen", "rejected"), made, strict=True):
        kept = getattr(loaded[1], side)["answer"]
        assert (kept, kept.tokens, kept.end) == (text, text.tokens, text.end)
        features = loaded.rows.features(1)[side]["answer"]
        assert features["tokens"][features["prompt_lengths"] : features["lengths"]].tolist() == list(text.tokens)
    batch = preference_dataset(system, loaded, 2, seed=0)[0]
    assert (batch.chosen["answer"]["lengths"] - batch.rejected["answer"]["lengths"]).tolist() == [1, 1]
    assert batch.rejected["answer"]["retokenized"].tolist() == [0, 0]


SIZES = ((4, 4), (4, 8), (8, 4))


def test_a_batch_of_pictures_has_one_size_and_all_sizes_come(tmp_path):
    """Wide, square and tall ones; of the tall ones there are too few for a batch."""
    system = pictures(codec=CountingCodec(VAE, SIZES, 2))
    params = init(system)
    shapes = [(5, 10)] * 6 + [(9, 9)] * 5 + [(12, 6)] * 2
    rows = [picture_row(row, tmp_path, shape) for row, shape in enumerate(shapes)]
    # Sides of two shapes get one size: wide and tall are square together.
    picture_row(90, tmp_path, (6, 12))
    picture_row(91, tmp_path, (12, 6))
    rows.append(rows[0] | {"chosen": {"image": "90-chosen.png"}, "rejected": {"image": "91-chosen.png"}})
    loaded = load_preferences(written(tmp_path / "p.jsonl", rows), system, params=params)
    assert len(loaded) == 14
    sizes = []
    for row in range(14):
        features = loaded.rows.features(row)
        chosen, rejected = (features[side]["image"]["latents"].shape for side in ("chosen", "rejected"))
        assert chosen == rejected
        sizes.append(chosen[:2])
    assert sizes == [(4, 8)] * 6 + [(4, 4)] * 5 + [(8, 4)] * 2 + [(4, 4)]
    dataset = preference_dataset(system, loaded, 3, seed=0)
    traced = jax.jit(lambda batch: jax.tree.map(lambda x: 2 * x, batch))
    epochs, found = 2 * dataset.plan.per_epoch, Counter()
    for step in range(epochs):
        batch = dataset[step]
        traced(batch)
        found[batch.chosen["image"]["latents"].shape] += 1
        assert batch.chosen["image"]["latents"].shape == batch.rejected["image"]["latents"].shape
    assert found == {(3, 4, 8, 2): 4, (3, 4, 4, 2): 4}
    assert traced._cache_size() == 2
    assert dataset.describe() == "shapes of batches: 2; 2 rows are of a kind that fills no batch"
    with pytest.raises(ValueError, match="no kind of rows fills one batch of 7"):
        preference_dataset(system, loaded, 7, seed=0)


def test_shapes_of_texts_are_those_that_are_said(tmp_path):
    system = texts()
    loaded = load_preferences(text_file(tmp_path, 40), system)
    for shapes in (1, 3, 8):
        dataset = preference_dataset(system, loaded, 4, seed=0, shapes=shapes)
        traced = jax.jit(lambda batch: jax.tree.map(jax.numpy.sum, batch))
        for step in range(3 * dataset.plan.per_epoch):
            traced(dataset[step])
        said = int(
            re.match(
                r"shapes of batches: (\d+) \(drafts completion, drafts prompt, drafts shared, answer",
                dataset.describe(),
            )[1]
        )
        assert traced._cache_size() <= said <= shapes
        assert dataset.plan.left_out == 0


@pytest.mark.parametrize("kind", MAKERS)
def test_batches_are_a_function_of_the_step_and_shards_are_blocks(kind, tmp_path):
    """Bit for bit, of a data set that is opened anew in the middle of an epoch."""
    make, write = MAKERS[kind]
    path, system = write(tmp_path, 14), make()
    load = partial(load_preferences, path, system, params=init(system), cache=tmp_path / "cache")
    whole = preference_dataset(system, load(), 4, seed=3)
    batches = [whole[step] for step in range(8)]
    again = preference_dataset(make(), load(), 4, seed=3)
    for step in (5, 4, 7, 2):
        same(again[step], batches[step])
    shards = [preference_dataset(system, load(), 4, seed=3, shard=(index, 2)) for index in range(2)]
    for step in range(8):
        same(jax.tree.map(lambda *parts: np.concatenate(parts), *(shard[step] for shard in shards)), batches[step])
    other = preference_dataset(system, load(), 4, seed=4)
    with pytest.raises(AssertionError):
        same([other[step] for step in range(3)], batches[:3])
