"""What is written whole is there whole or not at all, whatever ends the process; the same for each of its users."""

import json
import os
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest

from experiments.common.phases import load_pairs, load_params, save_pairs, save_params
from sysdpo_jax import PreferenceRecord, io, load_preferences, save_preferences
from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.errors import ConfigError, DamagedFileError
from sysdpo_jax.io import locked_file, read_arrays, read_json, replacing, write_arrays, write_json, write_json_lines
from sysdpo_jax.manifest import check_same, differences
from sysdpo_jax.pretrained.checkpoint import new_folder
from sysdpo_jax.row_files import ROWS, RowFile, write_row_file
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.files import read_config, write_config
from sysdpo_jax.runs.runs_file import Outcomes
from sysdpo_jax.training.metrics import MetricsLog, read_metrics


def folder(path, text):
    with new_folder(path) as made:
        (made / "a.json").write_text(text)


def metrics(path, text):
    """A run that goes on cuts the rows that no checkpoint has."""
    if not path.exists():
        path.write_text(json.dumps({"step": 0, "loss": text}) + "\n")
    else:
        path.write_text(path.read_text() + json.dumps({"step": 9, "loss": "cut"}) + "\n")
        with MetricsLog(path.parent, 5) as log:
            log.flush()


def pairs(path, text):
    save_pairs(path, [PreferenceRecord({"x": text}, {"y": np.ones(3)}, {"y": "b"})])


# The name of what is written, how a text is written into it, and how one reads that text.
USERS = {
    "JSON": ("a.json", write_json, read_json),
    "JSON Lines": ("a.jsonl", lambda path, text: write_json_lines(path, [text]), lambda p: json.loads(p.read_text())),
    "arrays": ("a.npz", lambda path, text: write_arrays(path, {"x": np.array(text)}), lambda p: read_arrays(p)["x"]),
    "rows": (f"a{ROWS}", lambda p, text: write_row_file(p.parent / "a", [text]), lambda p: RowFile(p.parent / "a")[0]),
    "image": (
        "a_images/one.png",
        lambda path, text: ImageFiles(path.parents[1] / "a.jsonl").beside("one", text.encode()),
        lambda path: path.read_bytes().decode(),
    ),
    "preferences": (
        "a.jsonl",
        lambda path, text: save_preferences(path, [PreferenceRecord({"x": text}, {"y": "a"}, {"y": "b"})]),
        lambda path: load_preferences(path)[0].inputs["x"],
    ),
    "table of preferences": (
        "a.parquet",
        lambda path, text: save_preferences(path, [PreferenceRecord({"x": text}, {"y": "a"}, {"y": "b"})]),
        lambda path: load_preferences(path)[0].inputs["x"],
    ),
    "configuration": (
        "config.yaml",
        lambda path, text: write_config(path, TrainConfig(directory=text)),
        lambda path: Path(read_config(path).directory).name,
    ),
    "metrics": ("metrics.jsonl", metrics, lambda path: read_metrics(path)[0]["loss"]),
    "parameters": (
        "a.safetensors",
        lambda path, text: save_params(path, {"x": np.frombuffer(text.encode(), np.uint8)}),
        lambda path: bytes(load_params(path)["x"]).decode(),
    ),
    "pairs": (f"a{ROWS}", pairs, lambda path: load_pairs(path)[0].inputs["x"]),
}


def killed(write, path, text):
    """Write in a process that is killed as soon as something is to be put on disk."""
    with warnings.catch_warnings():
        # JAX warns of forks; this one only writes a file.
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        signal.alarm(20)
        io._put_on_disk = lambda made: os.kill(os.getpid(), signal.SIGKILL)
        write(path, text)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("user", USERS)
def test_a_kill_leaves_what_was_there_and_the_next_writer_removes_the_rest(user, tmp_path):
    name, write, read = USERS[user]
    path = tmp_path / name
    write(path, "before")
    killed(write, path, "never")
    assert read(path) == "before"
    assert list(tmp_path.rglob("*.partial"))
    write(path, "before" if user == "metrics" else "after")
    assert read(path) == ("before" if user == "metrics" else "after")
    assert not list(tmp_path.rglob("*.partial"))


def test_a_kill_leaves_no_part_of_a_folder(tmp_path):
    path = tmp_path / "a"
    killed(folder, path, "never")
    assert [left.name for left in tmp_path.iterdir()] == ["a.partial"]

    def failing():
        with new_folder(path) as made:
            (made / "a.json").write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert list(tmp_path.iterdir()) == []
    folder(path, "after")
    assert [left.name for left in tmp_path.rglob("*")] == ["a", "a.json"]


def test_all_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Of a folder every file and the folder itself; then the folder in which the name is."""
    order, put, rename = [], io._put_on_disk, Path.replace
    monkeypatch.setattr(io, "_put_on_disk", lambda made: (order.append(made.name), put(made)))
    monkeypatch.setattr(Path, "replace", lambda made, path: (order.append("rename"), rename(made, path)))
    folder(tmp_path / "a", "x")
    assert order == ["a.partial", "a.json", "rename", tmp_path.name]
    order.clear()
    write_json(tmp_path / "b.json", 1)
    assert order == ["b.json.partial", "rename", tmp_path.name]


def test_what_fails_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "a.json", "before")

    def stopped():
        with replacing(tmp_path / "a.json") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert read_json(tmp_path / "a.json") == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("user", ["JSON", "arrays", "rows"])
@pytest.mark.parametrize("left", [0, 20])
def test_a_damaged_file_is_named_with_the_remedy(user, left, tmp_path):
    name, write, read = USERS[user]
    write(tmp_path / name, "a text that is long enough" * 9)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:left])
    with pytest.raises(DamagedFileError, match=rf"{name} is damaged or incomplete \(.+\): restore it"):
        read(tmp_path / name)


def test_lines_go_on_after_a_kill_and_others_are_refused(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    outcomes, lost = Outcomes(path, {"seed": "0"}), {"id": "3", "outputs": {"z": "runs_images/3.png"}}
    outcomes.add([{"id": "1"}, {"id": "2", "error": "no route"}])
    with path.open("a") as stopped:
        stopped.write('{"id": "3", "inp')
    again = Outcomes(path, {"seed": "0"})
    assert (list(again.made), list(again.failed)) == (["1"], ["2"])
    again.add([{"id": "2", "error": "no route"}, {"id": "2", "score": 0.5}, lost])
    assert (list(again.made), list(again.failed)) == (["1", "2", "3"], [])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "2", "2", "3"]
    # The image of the last one is not there.
    assert list(Outcomes(path, {"seed": "0"}).made) == ["1", "2"]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["1", "2", "2"]
    with pytest.raises(ConfigError, match=r"runs.jsonl is of another run \(seed was 0, now 1\): name another output"):
        Outcomes(path, {"seed": "1"})
    path.with_name("runs.jsonl.json").unlink()
    with pytest.raises(ConfigError, match="nothing says how it was made"):
        Outcomes(path, {"seed": "0"})


def test_what_stands_beside_a_run_without_its_image_stays(tmp_path):
    path, image = tmp_path / "runs.jsonl", tmp_path / "runs_images" / "1.png"
    image.parent.mkdir()
    image.write_bytes(b"")
    outcomes = Outcomes(path, {})
    outcomes.add(
        [{"id": "1", "outputs": {"z": "runs_images/1.png"}}, {"id": "2", "score": 0.5}, {"id": "1", "score": 0}]
    )
    # As an editor may leave it; an error of null is none.
    path.write_text(path.read_text().replace("\n", "\n\n", 1) + '{"id": "3", "score": 1, "error": null}\n')
    assert list(Outcomes(path, {}).made) == ["1", "2", "3"]
    assert Outcomes(path, {}, ids_only=True).made == {"1": {}, "2": {}, "3": {}}
    image.unlink()
    assert list(Outcomes(path, {}).made) == ["2", "3"]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["2", "3"]
    path.write_text('{"score": 1}\n')
    with pytest.raises(ConfigError, match=r"runs\.jsonl has a line without the field 'id'"):
        Outcomes(path, {})


def test_a_row_that_a_full_disk_took_a_part_of_is_not_there(tmp_path, monkeypatch):
    outcomes = Outcomes(tmp_path / "a.jsonl", {})
    outcomes.add([{"id": "1"}])
    before = (tmp_path / "a.jsonl").read_bytes()
    with (tmp_path / "a.jsonl").open("ab", buffering=0) as opened:

        class Full:
            """Takes three bytes, then no more."""

            fileno = opened.fileno

            def write(self, data, taken=[]):  # noqa: B006
                taken.append(1)
                if len(taken) > 1:
                    raise OSError(28, "No space left on device")
                return opened.write(data[:3])

        with pytest.raises(OSError, match="No space"):
            io.append_whole(Full(), b"another line\n")
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("noted", "wanted", "said"),
    {
        "nothing": ({"a": [1, (2,)], "b": None}, {"a": (1, [2]), "b": None}, []),
        "number": ({"a": 1, "b": 2}, {"a": 1, "b": 3}, ["b was 2, now 3"]),
        "a text and a number": ({"a": "1"}, {"a": 1}, ["a was '1', now 1"]),
        "below": ({"a": {"b": {"c": True}}}, {"a": {"b": {"c": False}}}, ["a.b.c was True, now False"]),
        "one that is new": ({}, {"a": None}, ["a was nothing, now None"]),
        "one that is gone": ({"a": {"b": 1}}, {}, ["a was {'b': 1}, now nothing"]),
        "a part for a value": ({"a": None}, {"a": {"b": 1}}, ["a was None, now {'b': 1}"]),
        "an empty text": ({"a": ""}, {"a": "x"}, ["a was '', now 'x'"]),
        "not a number": ({"a": float("nan")}, {"a": float("nan")}, []),
    }.values(),
)
def test_differences_are_named(noted, wanted, said):
    assert differences(noted, wanted) == said


def test_of_long_values_the_part_is_shown_that_differs(tmp_path):
    long = "a" * 500 + "{}" + "b" * 500
    [said] = differences({"x": long.format("old")}, {"x": long.format("new")})
    assert len(said) < 300
    assert "old" in said
    assert "new" in said
    many = [{f"n{number}": value for number in range(25)} for value in (0, 1)]
    with pytest.raises(KeyError, match=r"it is of another run \(n0 was 0, now 1; .*; and 20 more\): do this"):
        check_same("it", *many, "do this", KeyError)


def test_a_lock_can_be_waited_for(tmp_path):
    path, order = tmp_path / "a", []
    begun, leave = threading.Event(), threading.Event()

    def first():
        with locked_file(path, wait=True):
            begun.set()
            leave.wait()
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    begun.wait()
    threading.Timer(1.3, leave.set).start()
    with locked_file(path, wait=True):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]
    assert list(tmp_path.iterdir()) == []
