"""The commands around training: preferences prepared before it, the report written again after it, a step compiled."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sysdpo_jax.cli.main import dispatch
from tests.cli.test_ending import configured
from tests.cli.test_runs import failure


def test_preferences_are_prepared_without_a_run(tmp_path, capsys):
    flags = [*configured(tmp_path, scorer=None), "--prepared-cache", str(tmp_path / "cache")]
    dispatch(["prepare", *flags])
    said = capsys.readouterr().out
    assert f"{tmp_path / 'pairs.jsonl'}: 100 rows, 100 preferences" in said
    assert "shapes of batches" in said
    parts = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.suffix == ".arrow"}
    assert not (tmp_path / "run" / "config.yaml").exists()
    dispatch(["train", *flags, "--dry-run"])
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    (tmp_path / "pairs.jsonl").unlink()
    assert "pairs.jsonl does not exist" in failure(capsys, dispatch, ["prepare", *flags])


def test_a_report_is_written_again_from_its_folder_alone(tmp_path, capsys):
    dispatch(["train", *configured(tmp_path, prompts=4)])
    folder = tmp_path / "run"
    page, results = (folder / "report.html").read_text(), (folder / "results.json").read_text()
    (folder / "report.html").unlink()
    (tmp_path / "pairs.jsonl").unlink()
    dispatch(["report", "--directory", str(folder)])
    assert capsys.readouterr().out.splitlines()[-1] == str(folder / "report.html")
    assert (folder / "report.html").read_text() == page
    assert (folder / "results.json").read_text() == results
    assert json.loads(results)["made_by"]["command"] == f"sysdpo train {tmp_path / 'run.yaml'}"
    said = failure(capsys, dispatch, ["report", "--directory", str(tmp_path)])
    assert "is no folder of a run (config.yaml is missing)" in said


def test_a_step_is_compiled_for_topologies_that_exist(tmp_path, capsys):
    command = ["compile", *configured(tmp_path, scorer=None), "--topology", "v5x:2x2"]
    assert "unknown topology 'v5x:2x2': give a generation" in failure(capsys, dispatch, command)


@pytest.mark.slow
def test_the_step_of_a_configuration_compiles_for_four_chips(tmp_path):
    """libtpu is loaded in a process of its own."""
    pytest.importorskip("libtpu")
    [path] = configured(tmp_path, scorer=None)
    command = [sys.executable, "-m", "sysdpo_jax", "compile", path, "--topology", "v5e:2x2"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    account = json.loads(done.stdout)
    assert account["fits"]
    assert account["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert 0 < account["memory_per_chip_gib"]["peak"] < 1
