"""Two processes prepare a part of the preferences each, and see what one process sees."""

import json

import pytest

from tests.data.prepared_systems import picture_file
from tests.distributed.test_sampled_run import finished, started

# Starting several processes takes minutes where the machine is busy.
pytestmark = pytest.mark.slow
COMMAND = ["-m", "tests.distributed.prepared_parts"]


def test_each_process_makes_its_parts_and_both_see_all(tmp_path):
    """Parts of three rows: process 0 has the first and the last one, and a restart makes none."""
    picture_file(tmp_path, 8)
    [one] = [json.loads(said.splitlines()[-1]) for said in finished(1, [*COMMAND, tmp_path])]
    two = [json.loads(said.splitlines()[-1]) for said in finished(2, [*COMMAND, tmp_path])]
    assert one["prepared"] == [3, 3, 2]
    assert [process["prepared"] for process in two] == [[3, 2], [3]]
    for name in ("records", "features", "whole"):
        assert two[0][name] == two[1][name]
    assert two[0]["records"] == one["records"]
    for index, process in enumerate(two):
        assert process["own"] == [blocks[index] for blocks in process["blocks"]]
    again = [json.loads(said.splitlines()[-1]) for said in finished(2, [*COMMAND, tmp_path])]
    assert [process["prepared"] for process in again] == [[], []]
    assert [process["features"] for process in again] == [process["features"] for process in two]


def test_a_row_that_fails_in_one_process_ends_both(tmp_path):
    """The row is in a part of process 1, which names it; process 0 says who failed."""
    picture_file(tmp_path, 8)
    (tmp_path / "4-chosen.png").unlink()
    ended = started(2, [*COMMAND, tmp_path])
    assert all(code for code, _, _ in ended)
    assert "pictures.jsonl, row 5: chosen, node 'image': image: there is no file" in ended[1][2]
    assert "process 1 could not prepare its part of the preferences: see what it says" in ended[0][2]
