"""What a tool gave for preferences is asked for once, whatever ended the first reading."""

import functools
import json
import subprocess
import sys
import time
from datetime import date

import jax
import numpy as np
import pytest

from sysdpo_jax import Categorical, CompoundSystem, Node, RecordError, Tool, load_preferences
from sysdpo_jax.components.tool_values import ToolValues
from sysdpo_jax.data.prepared import with_kept_values

ROWS = 100


class Asked:
    """Gives 10 x, and fails once it has been asked for `end`."""

    def __init__(self, end=None, error=ConnectionError):
        self.calls, self.end, self.error = [], end, error

    def __call__(self, x):
        self.calls.append(x)
        if x == self.end:
            raise self.error("no route")
        return 10 * x


def other(x):
    return 5 * x


def system_of(function, name="document", **settings):
    nodes = (Node(name, Tool(function, **settings), ("x",)), Node("y", Categorical(2, (ROWS * 10,)), (name,)))
    return CompoundSystem(("x",), nodes)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"inputs": {"x": x}, "chosen": {"y": 0}, "rejected": {"y": 1}} for x in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kept(path):
    return {line["value"] for line in map(json.loads, path.read_text().splitlines())}


@pytest.mark.parametrize(
    ("error", "raised"),
    [(ConnectionError, RecordError), (KeyboardInterrupt, KeyboardInterrupt)],
    ids=["stop", "ctrl-c"],
)
@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_second_start_asks_for_the_rest_alone(source, tmp_path, error, raised, concurrency):
    """The end comes in the middle of what is checked together, and after what was checked and let go."""
    values, first, second = tmp_path / "below" / "values.jsonl", Asked(90, error), Asked()
    with pytest.raises(raised):
        load_preferences(source, system_of(first, concurrency=concurrency), tool_values=values)
    given = set[int]()
    for _ in range(100):
        given = {10 * x for x in first.calls} - {900}
        if kept(values) == given:
            break
        # Ctrl-C does not wait for the threads' calls, whose values are kept when they return.
        time.sleep(0.05)
    assert kept(values) == given >= {10 * x for x in range(87)}
    loaded = load_preferences(source, system_of(second, concurrency=concurrency), tool_values=values)
    assert sorted(second.calls) == sorted(set(range(ROWS)) - {value // 10 for value in given})
    assert list(loaded) == list(load_preferences(source, system_of(Asked())))
    third = Asked()
    assert load_preferences(source, system_of(third), tool_values=values) == loaded
    assert third.calls == []


def test_a_process_that_is_killed_leaves_what_came(source, tmp_path):
    code = (
        "import os, sys; from sysdpo_jax import load_preferences; from tests.data.test_tool_values import *\n"
        "class Killed(Asked):\n"
        "    def __call__(self, x): return os._exit(9) if x == 3 else super().__call__(x)\n"
        "Killed.__module__, Killed.__qualname__ = sys.argv[3], 'Asked'\n"
        "load_preferences(sys.argv[1], system_of(Killed()), tool_values=sys.argv[2])"
    )
    values, rest = tmp_path / "values.jsonl", Asked()
    assert subprocess.run([sys.executable, "-c", code, source, values, Asked.__module__], check=False).returncode == 9
    assert kept(values) == {0, 10, 20}
    load_preferences(source, system_of(rest), tool_values=values)
    assert rest.calls == list(range(3, ROWS))


def test_another_function_node_or_bound_argument_has_values_of_its_own(source, tmp_path):
    values = tmp_path / "values.jsonl"

    def first(function, name="document"):
        return load_preferences(source, system_of(function, name), tool_values=values)[2].chosen[name]

    assert first(Asked()) == 20
    assert first(other) == 10
    again = Asked()
    assert first(again, "passage") == 20
    assert len(again.calls) == ROWS
    assert first(functools.partial(len_of, 3)) == 3
    assert first(functools.partial(len_of, 4)) == 4


def len_of(number, x):
    return number


def values_of(path, function, *columns):
    """What the tool of a system gives for rows of its parents' values."""
    parents = tuple(f"p{place}" for place in range(len(columns)))
    system = with_kept_values(CompoundSystem(parents, (Node("t", Tool(function), parents),)), ToolValues(path))
    return system.tool_values(system.nodes[0], dict(zip(parents, columns, strict=True)))


GIVEN = [
    None,
    True,
    0.1 + 0.2,
    float("inf"),
    "half \ud83d of a pair, \u2028",
    [b"\x00\xff", {"a": [1, b""]}],
    {"b": {"c": 10**40}},
]


def test_values_are_given_back_as_they_were(tmp_path):
    path, calls = tmp_path / "values.jsonl", []

    def pick(place):
        calls.append(place)
        return GIVEN[place]

    places = list(range(len(GIVEN)))
    assert values_of(path, pick, places) == GIVEN
    again = values_of(path, pick, places)
    assert again == GIVEN
    assert list(map(type, again)) == list(map(type, GIVEN))
    assert calls == places


@pytest.mark.parametrize("value", [(1, 2), np.arange(3), {1: 2}, date(2024, 1, 1), np.float32(0.5)], ids=repr)
def test_values_that_json_would_change_are_not_kept(tmp_path, value):
    calls = []
    give = lambda x: calls.append(x) or value  # noqa: E731
    for _ in range(2):
        [made] = values_of(tmp_path / "values.jsonl", give, [1])
        assert made is value
    assert calls == [1, 1]
    assert not (tmp_path / "values.jsonl").exists()


def test_parents_are_told_apart_by_all_that_they_are(tmp_path):
    parents = [1, True, 1.0, "1", [1], {"1": 1}, [["1", 1]], None, b"1", np.ones(2, np.float32), np.ones(2, np.int32)]
    calls = []
    count = lambda x: calls.append(x) or len(calls)  # noqa: E731
    # One by one: nothing but the file says that they were asked for.
    made = [values_of(tmp_path / "values.jsonl", count, [parent])[0] for parent in parents]
    assert made == [values_of(tmp_path / "values.jsonl", count, [parent])[0] for parent in parents]
    assert len(set(made)) == len(calls) == len(parents)


def test_parents_that_another_process_would_name_differently_are_not_kept(tmp_path):
    calls, parent = [], [object()]
    count = lambda x: calls.append(x) or len(calls)  # noqa: E731
    system = CompoundSystem(("p",), (Node("t", Tool(count), ("p",)),))
    system = with_kept_values(system, ToolValues(tmp_path / "values.jsonl"))
    for _ in range(2):
        system.tool_values(system.nodes[0], {"p": [parent]})
    assert len(calls) == 2
    assert not (tmp_path / "values.jsonl").exists()


def test_what_a_kill_left_of_a_line_is_passed_over(tmp_path):
    path, asked = tmp_path / "values.jsonl", Asked()
    values_of(path, asked, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert values_of(path, asked, [1, 2, 3]) == [10, 20, 30]
    assert values_of(path, asked, [1, 2, 3]) == [10, 20, 30]
    assert asked.calls == [1, 2, 2, 3]


def test_a_file_of_something_else_is_refused(source, tmp_path):
    asked = Asked()
    with pytest.raises(ValueError, match=r"pairs\.jsonl, line 1 is no value of a tool: name another file"):
        load_preferences(source, system_of(asked), tool_values=source)
    assert asked.calls == []


def test_a_disk_that_takes_nothing_costs_no_value(source, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    asked = Asked()
    loaded = load_preferences(source, system_of(asked, retries=2), tool_values=tmp_path / "file" / "values.jsonl")
    assert [record.chosen["document"] for record in loaded] == [10 * x for x in range(ROWS)]
    assert len(asked.calls) == ROWS
    assert caplog.text.count("values of tools are not kept") == 1


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    path = tmp_path / "values.jsonl"
    values_of(path, Asked(), [1])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    asked, before = Asked(), path.read_bytes()
    assert values_of(path, asked, [1, 2]) == [10, 20]
    assert (asked.calls, path.read_bytes()) == ([2], before)
