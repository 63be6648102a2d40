"""The second experiment's smoke run, as its user starts it, and the world, faults and figures of its small size."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import llm_collaboration
from experiments.collaboration.report import RESULTS
from experiments.collaboration.run import METHODS, SHARED_METHODS, SeedRun
from experiments.collaboration.small import WORDS, Question, SmallTask, World, right_answer
from experiments.common.models import FitConfig
from experiments.common.phases import Phases, load_params, overlay
from sysdpo_jax.io import read_arrays
from sysdpo_jax.report import markdown_table
from sysdpo_jax.training.progress import Board

DOCS = Path(__file__).parents[2] / "docs" / "llm_collaboration"
PRESET = llm_collaboration.PRESETS["smoke"]
SMOKE = PRESET.run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    llm_collaboration.main(["--preset", "smoke", "--folder", str(folder)])
    return folder


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_the_smoke_run_improves_the_system(folder):
    """Seed and machine fix the numbers; both models must beat the start and each alone by two standard errors."""
    results = results_of(folder)
    assert tuple(results["methods"]) == METHODS
    assert all(row["n"] == 512 and row["questions"] == 128 for row in results["methods"].values())
    for other in ("prompted", "first_only", "second_only"):
        gain = results["differences"][f"sysdpo_sampling - {other}"]["accuracy"]
        assert gain["value"] > 2 * gain["standard_error"], other
    assert results["methods"]["sysdpo_direct"]["accuracy"] > results["methods"]["prompted"]["accuracy"] + 0.1


@pytest.mark.slow
def test_figures_are_those_of_the_answers_on_disk(folder):
    """Accuracy of one method, and its error over question means, from the stored texts."""
    row = results_of(folder)["methods"]["sysdpo_sampling"]
    stored = read_arrays(folder / "seed-0" / "evaluate_sysdpo_sampling.npz")
    right, columns = [], ("facts", "names", "operation", "answer")
    for facts, names, operation, answer in zip(*(stored[n] for n in columns), strict=True):
        values = {fact[:3]: int(fact[4:]) for fact in str(facts).split()}
        first, second = (values[name] for name in str(names).split())
        wanted = {"plus": first + second, "minus": first - second, "larger": max(first, second)}[str(operation)]
        right.append(answer == str(wanted))
    by_question = np.reshape(right, (128, 4)).mean(1)
    np.testing.assert_allclose(row["accuracy"], by_question.mean())
    np.testing.assert_allclose(row["accuracy_se"], by_question.std(ddof=1) / np.sqrt(128))


@pytest.mark.slow
def test_only_what_is_trained_is_stored_and_the_other_model_stays(folder):
    before = {name: load_params(folder / "seed-0" / f"pretrain_{name}.safetensors") for name in ("drafter", "refiner")}
    for method, trained in (("first_only", "drafter"), ("answer_recorded", "refiner")):
        stored = load_params(folder / "seed-0" / f"{method}.safetensors")
        assert list(stored) == [trained]
        whole = overlay(before, stored)
        same = jax.tree.map(lambda a, b: bool((a == b).all()), before, whole)
        assert not all(jax.tree.leaves(same[trained]))
        assert all(jax.tree.leaves({k: v for k, v in same.items() if k != trained}))


@pytest.mark.slow
def test_report_and_table_are_written(folder):
    page = (folder / "report.html").read_text()
    assert all(method in page for method in METHODS)
    first = SMOKE.task.questions("test", 0)[0]
    assert first["facts"] in page
    assert len((folder / "table.md").read_text().splitlines()) == len(METHODS) + 2


@pytest.mark.slow
def test_a_phase_whose_output_exists_is_not_repeated(folder):
    """Without one output exactly it is made again, to the same numbers."""
    before = results_of(folder)
    removed = folder / "seed-0" / "evaluate_sysdpo_sampling.npz"
    kept = {path: path.stat().st_mtime_ns for path in (folder / "seed-0").iterdir() if path.suffix != ".json"}
    removed.unlink()
    llm_collaboration.main(["--preset", "smoke", "--folder", str(folder)])
    assert results_of(folder)["methods"] == before["methods"]
    assert {path for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp} == {removed}


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(folder):
    with pytest.raises(SystemExit, match=r"is of another run \(.* was .*, now .*\): choose another --folder"):
        llm_collaboration.main(["--preset", "smoke", "--folder", str(folder), "--run.task.align.beta", "0.1"])


@pytest.mark.slow
def test_one_set_of_weights_serves_both_nodes(tmp_path):
    """Barely trained: that every phase runs, and that what is stored is one tree."""
    task = replace(
        SMOKE.task,
        pretraining=FitConfig(steps=80, learning_rate=5e-3, batch_size=64, examples=2048),
        test_questions=16,
        align=replace(SMOKE.task.align, steps=2, batch_size=8),
    )
    with Board() as board:
        figures = SeedRun(replace(PRESET, run=replace(SMOKE, task=task, shared=True)), 0, tmp_path, board).run()
    assert tuple(figures) == SHARED_METHODS
    assert list(load_params(tmp_path / "sysdpo_sampling.safetensors")) == ["shared"]
    assert tuple(RESULTS.summarise({0: figures})["differences"]) == (
        "sysdpo_sampling - prompted",
        "sysdpo_sampling - sysdpo_direct",
        "sysdpo_sampling - best_of_n",
    )


@pytest.mark.slow
def test_too_few_pairs_are_refused_with_the_remedy(tmp_path):
    align = replace(SMOKE.task.align, batch_size=4096)
    task = replace(SMOKE.task, pretraining=FitConfig(60, 5e-3, 64, 512), train_questions=8, align=align)
    with Board() as board, pytest.raises(ValueError, match=r"do not fill a batch of 4096: raise task\.align\.samples"):
        SeedRun(replace(PRESET, run=replace(SMOKE, task=task)), 0, tmp_path, board).run()


def test_questions_of_the_splits_are_distinct_and_pretraining_sees_no_held_out_one():
    task = SmallTask(pretraining=FitConfig(steps=1, learning_rate=1.0, examples=500))
    for seed in (0, 1):
        texts = {
            split: [" ".join(q.values()) for q in task.questions(split, seed)]
            for split in ("train", "validation", "test")
        }
        assert {split: len(rows) for split, rows in texts.items()} == {"train": 512, "validation": 256, "test": 512}
        assert len({text for rows in texts.values() for text in rows}) == 512 + 256 + 512
    # A world with few questions, where chance would draw the held-out ones again.
    small = replace(
        task, world=World(("ana", "bob"), 2, 2), train_questions=10, validation_questions=6, test_questions=6
    )
    held_out = {" ".join(q.values()) for split in ("validation", "test") for q in small.questions(split, 0)}
    model = small.system(False).node("draft").component
    features = small._drafts(0)
    prompts = {
        model.tokenizer.decode(row[:length])
        for row, length in zip(features["tokens"], features["prompt_lengths"], strict=True)
    }
    assert prompts
    assert not prompts & held_out


def test_answers_by_hand():
    question = Question((("ana", 3), ("bob", 7), ("cyd", 0)), ("cyd", "bob"), "minus")
    assert question.inputs == {"facts": "ana=3 bob=7 cyd=0", "names": "cyd bob", "operation": "minus"}
    for operation, answer in (("minus", -7), ("plus", 7), ("larger", 7)):
        assert right_answer(replace(question, operation=operation).inputs) == answer
    task = SmallTask()
    assert task.score(question.inputs | {"draft": "nonsense", "answer": "-7"}) == 1.0
    assert task.score(question.inputs | {"draft": "0 7", "answer": "7"}) == 0.0
    assert task.score(question.inputs | {"draft": "0 7", "answer": ""}) == 0.0


def test_the_faults_are_in_the_training_data():
    """Shares of 4000 draws within 4 standard errors of what the settings say."""
    world, rng, number = World(), np.random.default_rng(0), 4000
    faults = world.faults

    def check(hits, share):
        assert abs(np.mean(hits) - share) < 4 * np.sqrt(share * (1 - share) / len(hits))

    facts = (("ana", 1), ("bob", 2), ("cyd", 3), ("dan", 4))
    for asked, confused in (("ana", faults.confused), ("bob", faults.slips)):
        drafts = [world.draft(Question(facts, (asked, "dan"), "plus"), rng).split() for _ in range(number)]
        check([draft[0] in WORDS for draft in drafts], faults.spelled)
        values = [[WORDS.index(word) if word in WORDS else int(word) for word in draft] for draft in drafts]
        own = dict(facts)[asked]
        check([own not in pair for pair in values], confused)
        check([own + 1 in pair for pair in values], confused)
        check([pair[0] == 4 for pair in values], faults.reversed_drafts)
    misread = faults.misread
    minus = [world.reply("minus", "7 5", rng) for _ in range(number)]
    assert set(minus) == {"2", "-2"}
    check([answer == "-2" for answer in minus], faults.reversed_answers)
    plus = [world.reply("plus", "7 5", rng) for _ in range(number)]
    assert set(plus) == {"12", "13"}
    check([answer == "13" for answer in plus], faults.one_off)
    assert {world.reply("larger", "7 5", rng) for _ in range(100)} == {"7"}
    # A misread draft gives any of the 29 numbers from -9 to 19.
    check([world.reply("larger", "seven five", rng) == "7" for _ in range(number)], 1 - misread + misread / 29)


def test_a_world_with_too_few_questions_is_refused():
    with pytest.raises(ValueError, match="30 questions are more than half"):
        World(("ana", "bob"), 2, 2).split({"train": 30}, 0)
    with pytest.raises(ValueError, match=r"facts 1 must lie in 2\.\.6"):
        World(facts=1)


def test_stored_leaves_of_other_code_are_refused():
    with pytest.raises(ValueError, match="the stored parameters renamed are not among the model's"):
        overlay({"m": {"w": 1}}, {"m": {"renamed": 2}})


def test_phases_of_two_runs_do_not_share_times(tmp_path):
    with Board() as board:
        phases = Phases(tmp_path / "a", "a", board)
        made = phases.params("x", 1, lambda report: {"m": {"w": np.ones(2, np.float32)}})
        again = phases.params("x", 1, lambda report: pytest.fail("made twice"))
        assert Phases(tmp_path / "b", "b", board).seconds == {}
    np.testing.assert_array_equal(made["m"]["w"], again["m"]["w"])
    assert list(phases.seconds) == ["x"]


def test_differences_are_paired_and_clustered_by_seed_and_question():
    """Three questions, two seeds, by hand: the standard error of the mean of six cluster means."""
    rng = np.random.default_rng(0)
    questions = np.repeat(np.arange(3), 4)

    def columns():
        right = rng.integers(0, 2, 12).astype(np.float64)
        return {"question": questions, "right": right, "score": right / 2 + 0.25}

    figures = {seed: {method: columns() for method in METHODS} for seed in (0, 1)}
    made = RESULTS.summarise(figures)["differences"]["sysdpo_sampling - separate"]
    gaps = [figures[seed]["sysdpo_sampling"]["right"] - figures[seed]["separate"]["right"] for seed in (0, 1)]
    clusters = np.array(gaps).reshape(6, 4).mean(1)
    np.testing.assert_allclose(made["accuracy"]["value"], clusters.mean())
    np.testing.assert_allclose(made["accuracy"]["standard_error"], clusters.std(ddof=1) / np.sqrt(6))
    np.testing.assert_allclose(made["score"]["value"], clusters.mean() / 2)
    assert made["accuracy"]["n"] == 24


def test_the_committed_run_with_real_weights_is_the_one_on_the_page():
    results = json.loads((DOCS / "smollm2" / "results.json").read_text())
    assert markdown_table(RESULTS.table(results)) in (DOCS / "README.md").read_text()
    assert results["evaluated_on"] == "test"
    for other in ("prompted", "first_only", "second_only"):
        gain = results["differences"][f"sysdpo_sampling - {other}"]["accuracy"]
        assert gain["value"] > 2 * gain["standard_error"], other


def test_the_committed_run_shows_what_the_page_claims():
    results = json.loads((DOCS / "results.json").read_text())
    assert markdown_table(RESULTS.table(results)) in (DOCS / "README.md").read_text()
    assert results["evaluated_on"] == "test"
    assert results["methods"]["sysdpo_sampling"]["questions"] >= 512
    for other in ("prompted", "first_only", "second_only", "separate_sampling"):
        gain = results["differences"][f"sysdpo_sampling - {other}"]["accuracy"]
        assert gain["value"] > 2 * gain["standard_error"], other
