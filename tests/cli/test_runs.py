"""Rollouts as a command: what it writes, what it goes on from, and what it refuses."""

import json
import shutil

import jax
import pytest

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.runs.runs_file import read_lines, run_lines, with_images
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
    dispatch(["rollout", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))])
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
    assert "runs.jsonl is of another run (seed was 0, now 1): name another output" in said
    (files / "other.jsonl").write_text("")
    assert "nothing says how it was made" in failure(capsys, lambda: roll_out(files, "other.jsonl"))


def test_prompts_that_were_edited_are_others(files, capsys):
    """By what the file holds: the same prompts elsewhere are the same."""
    text = roll_out(files).read_bytes()
    moved = shutil.copytree(files, files.with_name(f"{files.name}_moved"))
    assert roll_out(moved, prompts=shutil.move(moved / "prompts.txt", moved / "again.txt")).read_bytes() == text
    (files / "prompts.txt").write_text("one\ntwo\nthree\nfour\nsix\n")
    assert "of another run (prompts was" in failure(capsys, lambda: roll_out(files))
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
    dispatch(
        ["pairs", "--runs", str(runs), "--scores", str(files / "scores.jsonl"), "--output", str(files / "pairs.jsonl")]
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
