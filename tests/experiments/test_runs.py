"""Rollouts, scores and pairs as commands: what they write, what they go on from, and what they refuse."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import sysdpo_jax as sj
from experiments import make_pairs, rollout, score
from experiments.own.runs_file import read_lines, run_lines, with_images
from tests.components.test_conversations import TOOL, USER, model
from tests.data.test_preference_files import PAINTER

TEXTS = ("a red ball", "the small cube", "green", "on the left", "large")


def kind(question):
    if len(question) >= 20:
        raise sj.RecordError(f"{question!r} has no kind")
    return len(question)


SYSTEM = sj.CompoundSystem(
    ("question",),
    (
        sj.Node("kind", sj.Tool(kind), ("question",)),
        sj.Node("route", sj.Categorical(5, (20,)), ("kind",)),
        sj.Node("text", sj.Tool(TEXTS.__getitem__), ("route",)),
        sj.Node("image", PAINTER, ("text",)),
    ),
)


def made():
    """What `--system` names here."""
    return SYSTEM, SYSTEM.init(jax.random.key(0))


def brightness(run):
    return float(np.mean(run["image"]))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\nfour\nfive\n")
    return tmp_path


def roll_out(folder, name="runs.jsonl", **changes):
    settings = {
        "system": f"{__name__}:made",
        "prompts": folder / "prompts.txt",
        "output": folder / name,
        "samples": 3,
        "chunk": 2,
    } | changes
    rollout.main([word for key, value in settings.items() for word in (f"--{key}", str(value))])
    return folder / name


def read_runs(path):
    """The runs of a file with their images."""
    return [with_images(run, path) for run in run_lines(path)]


def test_runs_hold_inputs_and_all_values(files):
    path = roll_out(files)
    rows = list(read_lines(path))
    assert [row["id"] for row in rows] == [f"{prompt}-{sample}" for prompt in range(5) for sample in range(3)]
    assert [row["inputs"]["question"] for row in rows[::3]] == ["one", "two", "three", "four", "five"]
    for row, run in zip(rows, read_runs(path), strict=True):
        outputs = row["outputs"]
        assert (outputs["kind"], outputs["text"]) == (len(row["inputs"]["question"]), TEXTS[outputs["route"]])
        assert (path.parent / outputs["image"]).is_file()
        assert run["outputs"]["image"].shape == (4, 6, 3)
    # Samples of a prompt differ, and so do those of two prompts.
    assert len({row["outputs"]["route"] for row in rows}) > 2


def test_a_stopped_rollout_is_completed_to_what_it_would_have_been(files):
    """Cut within a line and within a chunk: both files are the same, byte for byte, images too."""
    whole, cut = roll_out(files / ".", "whole.jsonl"), roll_out(files, "cut.jsonl")
    text = cut.read_bytes()
    lines = text.splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:8]) + lines[8][:17])
    pictures = sorted((files / "cut_images").iterdir())
    before = {path.name: path.read_bytes() for path in pictures}
    for path in pictures[6:]:
        path.unlink()
    assert roll_out(files, "cut.jsonl").read_bytes() == text
    assert {path.name: path.read_bytes() for path in (files / "cut_images").iterdir()} == before
    assert whole.read_text().replace("whole_images", "cut_images").encode() == text


def test_processes_share_the_chunks_and_make_the_runs_of_one(files, monkeypatch):
    one = roll_out(files, "one.jsonl")
    wanted = {row["id"]: row["outputs"]["route"] for row in read_lines(one)}
    found = {}
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        roll_out(files, "two.jsonl")
        rows = list(read_lines(files / f"two-0000{index + 1}-of-00002.jsonl"))
        assert 0 < len(rows) < len(wanted)
        found |= {row["id"]: row["outputs"]["route"] for row in rows}
    assert found == wanted


def failure(capsys, function, *arguments):
    """The line that a command ends with."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_runs_of_another_configuration_are_not_mixed(files, capsys):
    roll_out(files)
    said = failure(capsys, lambda: roll_out(files, seed=1))
    assert "runs.jsonl was made with another seed (see " in said
    (files / "other.jsonl").write_text("")
    assert "nothing says how it was made" in failure(capsys, lambda: roll_out(files, "other.jsonl"))


def test_prompts_that_were_edited_are_others(files, capsys):
    """By what the file holds: the same prompts elsewhere are the same."""
    text = roll_out(files).read_bytes()
    moved = shutil.copytree(files, files.with_name(f"{files.name}_moved"))
    assert roll_out(moved, prompts=shutil.move(moved / "prompts.txt", moved / "again.txt")).read_bytes() == text
    (files / "prompts.txt").write_text("one\ntwo\nthree\nfour\nsix\n")
    assert "another prompts" in failure(capsys, lambda: roll_out(files))
    assert (files / "runs.jsonl").read_bytes() == text


def test_prompts_that_a_component_refuses_are_named_and_may_be_mended(files, capsys):
    """Nothing was made, so that nothing holds the file to the first prompts."""
    (files / "prompts.txt").write_text("one\ntwo\nthe longest question of all\n")
    said = failure(capsys, lambda: roll_out(files, chunk=3))
    assert "prompts.txt, prompt 3, sample 1: node 'kind': the tool" in said
    assert "test_runs:kind refuses question='the longest question of all': 'the longest question of all' has" in said
    assert [path.name for path in files.iterdir()] == ["prompts.txt"]
    (files / "prompts.txt").write_text("one\ntwo\n")
    assert len(list(read_lines(roll_out(files, chunk=3)))) == 6


def test_fields_of_prompts_that_nothing_reads_are_refused(files, capsys):
    rows = [{"question": text, "id": text, "source": "web", "system": ""} for text in ("one", "two")]
    path = files / "prompts.jsonl"

    def written(**more):
        path.write_text("".join(f"{json.dumps(row | more)}\n" for row in rows))
        return path

    said = failure(capsys, lambda: roll_out(files, prompts=written(answer="1")))
    assert f"{path}, prompt 1: the field 'answer' is not read: " in said
    assert [path.name for path in files.iterdir() if path.suffix == ".jsonl"] == ["prompts.jsonl"]
    assert len(list(read_lines(roll_out(files, prompts=path, ignore="answer")))) == 6
    assert len(list(read_lines(roll_out(files, "again.jsonl", prompts=written())))) == 6
    path.write_text('{"question": "one", "question": "two"}\n')
    assert "prompts.jsonl, line 1: the field 'question' stands twice" in failure(
        capsys, lambda: roll_out(files, "more.jsonl", prompts=path)
    )


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
    assert message in failure(capsys, make_pairs.main, [str(flag) for flag in flags])


def talker():
    """A system whose answer reads a conversation."""
    system = sj.CompoundSystem(("question",), (sj.Node("answer", model(temperature=1.5), ("question",)),))
    return system, system.init(jax.random.key(0))


def test_conversations_go_from_prompts_to_preferences_with_their_tools(files):
    value = {"messages": [USER], "tools": [TOOL], "chat_template_kwargs": {"terse": True}}
    (files / "prompts.jsonl").write_text(json.dumps({"question": value}) + "\n")
    prompts = files / "prompts.jsonl"
    runs = roll_out(files, prompts=prompts, system=f"{__name__}:talker", samples=2, chunk=1)
    rows = list(run_lines(runs))
    assert [row["inputs"] for row in rows] == [{"question": value}] * 2
    (files / "scores.jsonl").write_text("".join(f'{{"id": "0-{n}", "score": {n}}}\n' for n in range(2)))
    make_pairs.main(
        ["--runs", str(runs), "--scores", str(files / "scores.jsonl"), "--output", str(files / "pairs.jsonl")]
    )
    system, _ = talker()
    [record] = records = sj.load_preferences(files / "pairs.jsonl", system)
    assert record.inputs == {"question": value}
    features = sj.prepare_pairs(system, records[:]).chosen["answer"]
    tokenizer = system.nodes[0].component.tokenizer
    wanted = tokenizer.apply_chat_template([USER], tools=[TOOL], tokenize=False, add_generation_prompt=True, terse=True)
    assert tokenizer.decode(features["tokens"][0][: features["prompt_lengths"][0]]) == wanted


def test_prompts_are_cut_at_the_ends_of_lines_alone(files):
    (files / "prompts.txt").write_bytes("\ufeffone\u2028more\r\n\r\ntwo".encode())
    assert {row["inputs"]["question"] for row in read_lines(roll_out(files))} == {"one\u2028more", "two"}


def test_prompts_that_are_no_text(files, capsys):
    (files / "prompts.txt").write_bytes(b"caf\xe9")
    assert "prompts.txt is not UTF-8 text" in failure(capsys, lambda: roll_out(files))


def scored(folder, *flags):
    score.main(["--runs", str(folder / "runs.jsonl"), "--output", str(folder / "scores.jsonl"), *flags])
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
    score.main([*both, *flags])
    assert {row["id"]: row["score"] for row in read_lines(files / "scores.jsonl")} == {
        run["id"]: brightness(run["outputs"]) for run in everything
    }
    output = files / "pairs" / "preferences.jsonl"
    scores = ["--scores", str(files / "scores.jsonl"), "--output", str(output)]
    make_pairs.main(["--runs", *map(str, shards), *scores])
    assert len(sj.load_preferences(output, SYSTEM)) == 5
    said = failure(capsys, make_pairs.main, ["--runs", str(shards[0]), *scores])
    assert "the score of '2-0' is of no run in --runs" in said
    twice = ["--runs", str(shards[0]), str(shards[0]), "--output", str(files / "new.jsonl"), *flags]
    assert "the run '0-0' is there twice" in failure(capsys, score.main, twice)


def test_scores_of_other_runs_or_another_scorer_are_not_mixed(files, capsys):
    roll_out(files)
    scored(files, "--scorer", f"{__name__}:brightness")
    before = (files / "scores.jsonl").read_bytes()
    assert "another scorer" in failure(capsys, scored, files, "--scorer", f"{__name__}:stumbling")
    for path in files.glob("runs.jsonl*"):
        path.unlink()
    roll_out(files, seed=1)
    assert "another runs" in failure(capsys, scored, files, "--scorer", f"{__name__}:brightness")
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
    score.main(["--runs", str(files / "runs.jsonl"), "--output", str(files / "scores.jsonl"), *flags])
    lines = list(read_lines(files / "scores.jsonl"))
    failed = [line["id"] for line in lines if "error" in line]
    assert failed == [line["id"] for line in read_lines(files / "runs.jsonl") if line["inputs"]["question"] == "one"]
    assert 0 < len(failed) < len(lines)
    made = ["--runs", str(files / "runs.jsonl"), "--scores", str(files / "scores.jsonl"), "--ties", "keep"]
    capsys.readouterr()
    make_pairs.main([*made, "--output", str(files / "pairs.jsonl")])
    assert f"{len(failed)} runs have no score" in capsys.readouterr().out
    assert all(line["inputs"]["question"] != "one" for line in read_lines(files / "pairs.jsonl"))
    # Given again the command asks for these alone, and what it then finds counts.
    monkeypatch.setattr(f"{__name__}.lame", lambda run: 2.0)
    score.main(["--runs", str(files / "runs.jsonl"), "--output", str(files / "scores.jsonl"), *flags])
    again = list(read_lines(files / "scores.jsonl"))[len(lines) :]
    assert [(line["id"], line["score"]) for line in again] == [(name, 2.0) for name in failed]
    make_pairs.main([*made, "--output", str(files / "pairs.jsonl")])
    assert "no score" not in capsys.readouterr().out


def test_a_scorer_that_fails_on_every_run_is_no_accident(files, capsys, monkeypatch):
    roll_out(files)
    monkeypatch.setattr(f"{__name__}.lame", lambda run: None)
    flags = ["--runs", str(files / "runs.jsonl"), "--output", str(files / "scores.jsonl"), "--on-error", "skip"]
    said = failure(capsys, score.main, [*flags, "--scorer", f"{__name__}:lame"])
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
    make_pairs.main(
        ["--runs", str(folder / runs), "--scores", str(folder / "scores.jsonl"), "--output", str(output), *flags]
    )
    return output


def test_pairs_are_preferences_that_load(files, capsys):
    runs = read_runs(roll_out(files))
    scored(files, "--scorer", f"{__name__}:brightness")
    path = paired(files)
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 5 preferences of 5 prompts, 0 of which have none"
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


def test_ties_are_pairs_where_they_are_kept(files, capsys):
    roll_out(files)
    rows = [{"id": f"{prompt}-{sample}", "score": prompt * (sample > 1)} for prompt in range(5) for sample in range(3)]
    (files / "scores.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert len(sj.load_preferences(paired(files))) == 4
    path = paired(files, "--ties", "keep")
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{path}: 5 preferences (1 ties) of 5 prompts, 0 of which have none"
    )
    tied = sj.load_preferences(path, SYSTEM)[0]
    assert [Path(side["image"]).name for side in (tied.chosen, tied.rejected)] == ["0-0-image.png", "0-2-image.png"]
    said = failure(capsys, paired, files, "--ties", "keep", "--min-margin", "1")
    assert "min_margin 1 drops the ties" in said
