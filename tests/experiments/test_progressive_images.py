"""The main experiment's smoke run, as its user starts it: improvement, files, resumption, refusals."""

import dataclasses
import json
import time

import numpy as np
import pytest

from experiments import progressive_images
from experiments.progressive import judge
from experiments.progressive.report import RESULTS
from experiments.progressive.run import METHODS
from experiments.progressive.world import (
    ADVERBS,
    ATTRIBUTES,
    OBJECTS,
    Caption,
    Faults,
    Request,
    World,
    answers,
    join_captions,
    pictures,
    render,
)
from sysdpo_jax.io import read_arrays


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "smoke"
    progressive_images.main(["--preset", "smoke", "--folder", str(folder)])
    return folder


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_the_smoke_run_improves_the_system(folder):
    """Seed and machine fix the numbers; alignment must beat the start by two standard errors of the difference."""
    results = results_of(folder)
    assert tuple(results["methods"]) == METHODS
    assert all(row["n"] == 128 for row in results["methods"].values())
    gain = results["differences"]["sysdpo - before"]
    for figure in ("preference_score", "order_consistency"):
        assert gain[figure]["value"] > 2 * gain[figure]["standard_error"]
    assert results["methods"]["sysdpo"]["well_formed"] > 0.8


@pytest.mark.slow
def test_figures_are_those_of_the_pictures_on_disk(folder):
    """Score and order of one method from its stored pictures, by the definition (arXiv 2502.17721, section 5)."""
    results = results_of(folder)
    stored = read_arrays(folder / "seed-0" / "evaluate_sysdpo.npz")
    grades = []
    for text, images in zip(stored["request"], stored["images"].astype(np.float64), strict=True):
        _, name, _, direction, attribute = str(text).split()
        grades.append(judge.grades([Request(name, attribute, direction)], [{"images": images}])[0])
    first, middle, last = np.transpose(grades)
    score = (last - first) - np.abs((first + last) / 2 - middle)
    # Pictures are stored in float16.
    np.testing.assert_allclose(results["methods"]["sysdpo"]["preference_score"], score.mean(), atol=5e-3)
    in_order = ((first < middle) & (middle < last)).mean()
    np.testing.assert_allclose(results["methods"]["sysdpo"]["order_consistency"], in_order, atol=0.02)


@pytest.mark.slow
def test_report_table_and_picture_are_written(folder):
    page = (folder / "report.html").read_text()
    assert all(method in page for method in METHODS)
    assert "<svg" in page
    assert (folder / "sequences.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert len((folder / "table.md").read_text().splitlines()) >= len(METHODS) + 2


@pytest.mark.slow
def test_a_phase_whose_output_exists_is_not_repeated(folder):
    """Without two outputs exactly these are made again, to the same numbers."""
    before = results_of(folder)
    removed = {folder / "seed-0" / name for name in ("evaluate_sysdpo.npz", "results.json")}
    kept = {path: path.stat().st_mtime_ns for path in (folder / "seed-0").iterdir() if path.suffix != ".json"}
    for path in removed:
        path.unlink(missing_ok=True)
    began = time.monotonic()
    progressive_images.main(["--preset", "smoke", "--folder", str(folder)])
    assert time.monotonic() - began < 60
    after = results_of(folder)
    assert after["methods"] == before["methods"]
    changed = {path for path, stamp in kept.items() if path.stat().st_mtime_ns != stamp}
    assert changed == {folder / "seed-0" / "evaluate_sysdpo.npz"}


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused(folder):
    with pytest.raises(SystemExit, match=r"is of another run \(.* was .*, now .*\): choose another --folder"):
        progressive_images.main(["--preset", "smoke", "--folder", str(folder), "--run.align.beta", "0.5"])


def test_requests_of_the_three_splits_are_disjoint_and_cover_the_world():
    for seed in range(5):
        parts = World().split(seed)
        texts = [request.text for part in parts.values() for request in part]
        assert len(texts) == len(set(texts)) == len(OBJECTS) * len(ATTRIBUTES) * 2
        assert {name: len(part) for name, part in parts.items()} == {"test": 16, "validation": 8, "train": 40}


def test_the_language_model_is_trained_on_training_requests_alone():
    train = World().split(0)["train"]
    made, asked = answers(train, Faults(), 4000, seed=0)
    assert set(asked) == {request.text for request in train}
    # 0.6 in order, and one in six of the others by chance: within 5 standard errors.
    requests = {request.text: request for request in train}
    grades = np.array([judge.caption_grades(requests[t], answer) for t, answer in zip(asked, made, strict=True)])
    share = (np.diff(grades) > 0).all(axis=1).mean()
    expected = 0.6 + 0.4 / 6
    assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 4000)


def test_the_image_models_faults_are_in_its_pictures():
    """Two adverbs exchanged, the others drawn too close to the middle, with noise; everything measured on pixels."""
    faults = dataclasses.replace(Faults(), noise=0.0)
    images, captions = pictures(World(), faults, 3000, seed=0)
    values = {name: [] for name in ADVERBS}
    measured = judge.measure(images)
    for row, text in enumerate(captions):
        _, adverb, attribute, _ = text.split()
        values[adverb].append(measured[attribute][row])
    shown = np.array([np.mean(values[adverb]) for adverb in ADVERBS])
    # The scorers are calibrated on the mean over objects: 0.03 covers the spread between them.
    expected = 0.5 + 0.6 * (np.array([0, 3, 2, 1, 4, 5, 6]) / 6 - 0.5)
    np.testing.assert_allclose(shown, expected, atol=0.03)


def test_the_judge_never_reads_captions():
    values = {name: np.full(3, 0.5) for name in ATTRIBUTES} | {"bright": np.array([0.1, 0.5, 0.9])}
    pictures = render("ball", values)
    request = Request("ball", "bright", "more")
    for captions in (["nonsense"] * 3, ["a very bright ball"] * 3):
        grades = judge.grades([request], [{"images": pictures, "captions": captions}])[0]
        np.testing.assert_allclose(grades, [0.1, 0.5, 0.9], atol=0.08)
    turned = judge.grades([dataclasses.replace(request, direction="less")], [{"images": pictures}])[0]
    np.testing.assert_allclose(turned, -grades)


def test_differences_are_paired_and_clustered_by_seed_and_request():
    """Two requests, two seeds, by hand: the standard error of the mean of four cluster means."""
    rng = np.random.default_rng(0)

    def columns(scores):
        requests = np.repeat(["a", "b"], 5)
        names = ("order", "well_formed", "surprise")
        return {name: np.zeros(10) for name in names} | {
            "request": requests, "score": scores, "fidelity": np.array(0.1),
        }  # fmt: skip

    figures = {seed: {method: columns(rng.normal(size=10)) for method in METHODS} for seed in (0, 1)}
    made = RESULTS.summarise(figures)["differences"]["sysdpo - before"]["preference_score"]
    gaps = [figures[s]["sysdpo"]["score"] - figures[s]["before"]["score"] for s in (0, 1)]
    clusters = np.array(gaps).reshape(4, 5).mean(1)
    np.testing.assert_allclose(made["value"], clusters.mean())
    np.testing.assert_allclose(made["standard_error"], clusters.std(ddof=1) / 2)
    assert made["n"] == 20


def test_answers_are_scored_by_their_adverbs():
    request = Request("ball", "bright", "less")
    good = join_captions([Caption("a", adverb, "bright", "ball") for adverb in ("extremely", "fairly", "barely")])
    assert judge.answer_score(request, good) == pytest.approx(1.0)
    assert judge.answer_score(request, good.replace("ball", "box", 1)) == -3.0
