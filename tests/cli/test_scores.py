"""Scores and pairs as commands: what they write, what they go on from, and what they refuse."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.runs.runs_file import read_lines
from tests.cli.test_runs import SYSTEM, failure, files, read_runs, roll_out

__all__ = ["files"]


def brightness(run):
    return float(np.mean(run["image"]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": "0-0", "score": 1, "weight": 2}, "the score of '0-0': the field 'weight' is not read: "),
        ({"score": 1}, "the score 1 has no 'id': name the run that it is of"),
        ({"id": "0-0", "score": True}, "the score of '0-0' is True: give a finite number"),
    ],
)
def test_scores_that_say_something_else_are_refused(files, capsys, line, message):
    roll_out(files)
    (files / "own.jsonl").write_text(json.dumps(line))
    flags = ["--runs", files / "runs.jsonl", "--scores", files / "own.jsonl", "--output", files / "pairs.jsonl"]
    assert message in failure(capsys, dispatch, ["pairs", *map(str, flags)])


def scored(folder, *flags):
    dispatch(["score", "--runs", str(folder / "runs.jsonl"), "--output", str(folder / "scores.jsonl"), *flags])
    return {row["id"]: row["score"] for row in read_lines(folder / "scores.jsonl")}


def test_scores_of_a_function(files):
    runs = read_runs(roll_out(files))
    found = scored(files, "--scorer", f"{__name__}:brightness")
    assert found == {run["id"]: brightness(run["outputs"]) for run in runs}


def test_runs_of_processes_are_scored_and_paired_together(files, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        roll_out(files)
    shards = [files / f"runs-0000{index}-of-00002.jsonl" for index in (1, 2)]
    everything = [run for path in shards for run in read_runs(path)]
    # Joined and renamed, the images are still found.
    (files / "joined.jsonl").write_bytes(b"".join(path.read_bytes() for path in shards))
    assert [run["outputs"]["image"].mean() for run in read_runs(files / "joined.jsonl")] == [
        run["outputs"]["image"].mean() for run in everything
    ]
    both = ["--runs", *map(str, shards), "--output", str(files / "scores.jsonl")]
    flags = ["--scorer", f"{__name__}:brightness"]
    dispatch(["score", *both, *flags])
    assert {row["id"]: row["score"] for row in read_lines(files / "scores.jsonl")} == {
        run["id"]: brightness(run["outputs"]) for run in everything
    }
    output = files / "pairs" / "preferences.jsonl"
    scores = ["--scores", str(files / "scores.jsonl"), "--output", str(output)]
    dispatch(["pairs", "--runs", *map(str, shards), *scores])
    assert len(sj.load_preferences(output, SYSTEM)) == 5
    said = failure(capsys, dispatch, ["pairs", "--runs", str(shards[0]), *scores])
    assert "the score of '2-0' is of no run in --runs" in said
    twice = ["--runs", str(shards[0]), str(shards[0]), "--output", str(files / "new.jsonl"), *flags]
    assert "the run '0-0' is there twice" in failure(capsys, dispatch, ["score", *twice])


def test_scores_of_other_runs_or_another_scorer_are_not_mixed(files, capsys):
    roll_out(files)
    scored(files, "--scorer", f"{__name__}:brightness")
    before = (files / "scores.jsonl").read_bytes()
    assert "is of another run (scorer was" in failure(capsys, scored, files, "--scorer", f"{__name__}:stumbling")
    for path in files.glob("runs.jsonl*"):
        path.unlink()
    roll_out(files, seed=1)
    assert "is of another run (runs was" in failure(capsys, scored, files, "--scorer", f"{__name__}:brightness")
    assert (files / "scores.jsonl").read_bytes() == before


def test_an_image_that_is_gone_is_named(files, capsys):
    roll_out(files)
    (files / "runs_images" / "0-1-image.png").unlink()
    said = failure(capsys, scored, files, "--scorer", f"{__name__}:brightness")
    assert "runs.jsonl, run 0-1: image: there is no file" in said
    assert [row["id"] for row in read_lines(files / "scores.jsonl")] == ["0-0"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"inputs": {}, "outputs": {}}', "runs.jsonl, run 1: the field 'id' must be a text"),
        ('{"id": "a", "inputs": {}}', "runs.jsonl, run 1: the field 'outputs' must be an object"),
        ('{"id": "a"', "runs.jsonl, line 1: not valid JSON"),
        ("", "there is no run in --runs"),
    ],
)
def test_files_that_hold_no_runs(files, capsys, line, message):
    (files / "runs.jsonl").write_text(line)
    assert message in failure(capsys, scored, files, "--scorer", f"{__name__}:brightness")
    assert not (files / "scores.jsonl").exists()


CALLS = []


def stumbling(run):
    CALLS.append(run["question"])
    if len(CALLS) == 4:
        raise OSError("the scorer's disk is full")
    return len(CALLS)


def test_scoring_goes_on_where_it_stopped(files, capsys):
    roll_out(files)
    flags = ("--scorer", f"{__name__}:stumbling")
    CALLS.clear()
    assert "the scorer's disk is full" in failure(capsys, scored, files, *flags)
    with (files / "scores.jsonl").open("a") as file:
        file.write('{"id": "1-0", "sc')
    found = scored(files, *flags)
    assert (len(found), len(CALLS)) == (15, 16)


def lame(run):
    """No score for a question of three letters."""
    return {"one": float("nan")}.get(run["question"], 1.0)


def test_runs_without_a_score_are_skipped_and_scored_again(files, capsys, monkeypatch):
    roll_out(files)
    flags = ("--scorer", f"{__name__}:lame", "--on-error", "skip")
    dispatch(["score", "--runs", str(files / "runs.jsonl"), "--output", str(files / "scores.jsonl"), *flags])
    lines = list(read_lines(files / "scores.jsonl"))
    failed = [line["id"] for line in lines if "error" in line]
    assert failed == [line["id"] for line in read_lines(files / "runs.jsonl") if line["inputs"]["question"] == "one"]
    assert 0 < len(failed) < len(lines)
    made = ["--runs", str(files / "runs.jsonl"), "--scores", str(files / "scores.jsonl"), "--ties", "keep"]
    capsys.readouterr()
    dispatch(["pairs", *made, "--output", str(files / "pairs.jsonl")])
    assert f"{len(failed)} runs have no score" in capsys.readouterr().out
    assert all(line["inputs"]["question"] != "one" for line in read_lines(files / "pairs.jsonl"))
    # Given again the command says what is new alone: of these runs nothing, and then that they fail otherwise.
    again = ["--runs", str(files / "runs.jsonl"), "--output", str(files / "scores.jsonl"), *flags]
    dispatch(["score", *again])
    assert list(read_lines(files / "scores.jsonl")) == lines
    monkeypatch.setattr(f"{__name__}.lame", lambda run: "high")
    for _ in range(2):
        dispatch(["score", *again])
        said = list(read_lines(files / "scores.jsonl"))[len(lines) :]
        assert [line["id"] for line in said] == failed
        assert all("is 'high', no number" in line["error"] for line in said)
    lines += said
    # Given again the command asks for these alone, and what it then finds counts.
    monkeypatch.setattr(f"{__name__}.lame", lambda run: 2.0)
    dispatch(["score", "--runs", str(files / "runs.jsonl"), "--output", str(files / "scores.jsonl"), *flags])
    again = list(read_lines(files / "scores.jsonl"))[len(lines) :]
    assert [(line["id"], line["score"]) for line in again] == [(name, 2.0) for name in failed]
    dispatch(["pairs", *made, "--output", str(files / "pairs.jsonl")])
    assert "no score" not in capsys.readouterr().out


def test_a_scorer_that_fails_on_every_run_is_no_accident(files, capsys, monkeypatch):
    roll_out(files)
    monkeypatch.setattr(f"{__name__}.lame", lambda run: None)
    flags = ["--runs", str(files / "runs.jsonl"), "--output", str(files / "scores.jsonl"), "--on-error", "skip"]
    said = failure(capsys, dispatch, ["score", *flags, "--scorer", f"{__name__}:lame"])
    assert "none of the first 15 runs has a score" in said


@pytest.mark.parametrize(
    ("value", "message"), [("nan", "the score of run 0-0 is nan"), ("'high'", "is 'high', no number")]
)
def test_a_score_that_is_none(files, capsys, monkeypatch, value, message):
    roll_out(files)
    monkeypatch.setattr(f"{__name__}.brightness", lambda run: eval(value, {"nan": float("nan")}))
    assert message in failure(capsys, scored, files, "--scorer", f"{__name__}:brightness")


def paired(folder, *flags, runs="runs.jsonl"):
    output = folder / "pairs" / "preferences.jsonl"
    dispatch(
        [
            "pairs",
            "--runs",
            str(folder / runs),
            "--scores",
            str(folder / "scores.jsonl"),
            "--output",
            str(output),
            *flags,
        ]
    )
    return output


def test_pairs_are_preferences_that_load(files, capsys):
    runs = read_runs(roll_out(files))
    scored(files, "--scorer", f"{__name__}:brightness")
    path = paired(files)
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 5 preferences of 5 prompts, 0 of them without a pair"
    records = sj.load_preferences(path, SYSTEM)
    for number, record in enumerate(records):
        group = sorted(runs[3 * number : 3 * number + 3], key=lambda run: brightness(run["outputs"]))
        assert record.inputs["question"] == group[0]["inputs"]["question"]
        for side, run in ((record.chosen, group[-1]), (record.rejected, group[0])):
            assert side["route"] == run["outputs"]["route"]
            assert Path(side["image"]).resolve().name == f"{run['id']}-image.png"
    paired(files, "--pairs", "all")
    assert len(sj.load_preferences(path, SYSTEM)) == 15


def test_pairs_need_a_score_for_every_run(files, capsys):
    roll_out(files)
    scored(files, "--scorer", f"{__name__}:brightness")
    lines = (files / "scores.jsonl").read_text().splitlines()
    (files / "scores.jsonl").write_text("\n".join(lines[:-1]))
    assert "the run '4-2' has no score: score these runs first" in failure(capsys, paired, files)
    (files / "scores.jsonl").write_text("\n".join([*lines, lines[0]]))
    assert "the run '0-0' has two scores" in failure(capsys, paired, files)
    (files / "scores.jsonl").write_text("\n".join([*lines[:-1], '{"id": "4-2", "score": NaN}']))
    assert "the score of '4-2' is nan" in failure(capsys, paired, files)
    (files / "scores.jsonl").write_text("\n".join(json.dumps(json.loads(line) | {"score": 1}) for line in lines))
    assert "no two runs of a prompt differ" in failure(capsys, paired, files)
    (files / "scores.jsonl").write_text((files / "runs.jsonl").read_text())
    assert "scores.jsonl holds runs, no scores: give the files of `sysdpo score`" in failure(capsys, paired, files)


def test_ties_are_pairs_where_they_are_kept(files, capsys):
    roll_out(files)
    rows = [{"id": f"{prompt}-{sample}", "score": prompt * (sample > 1)} for prompt in range(5) for sample in range(3)]
    (files / "scores.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert len(sj.load_preferences(paired(files))) == 4
    path = paired(files, "--ties", "keep")
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{path}: 5 preferences (1 ties) of 5 prompts, 0 of them without a pair"
    )
    tied = sj.load_preferences(path, SYSTEM)[0]
    assert [Path(side["image"]).name for side in (tied.chosen, tied.rejected)] == ["0-0-image.png", "0-2-image.png"]
    said = failure(capsys, paired, files, "--ties", "keep", "--min-margin", "1")
    assert "min_margin 1 drops the ties" in said
