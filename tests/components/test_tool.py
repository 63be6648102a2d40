"""Deterministic nodes: called once a row or once a copy, and worth nothing in the log-ratio."""

import subprocess
import sys
import threading
import time
from asyncio import CancelledError
from dataclasses import replace

import jax
import numpy as np
import pytest

from sysdpo_jax import CompoundSystem, Gaussian, Node, RecordError, Tool
from sysdpo_jax.components.tool import NotCalledError, ToolError, raise_first

KEY = jax.random.key(0)


def halves(text):
    return text.split("|")


def shout(text):
    return text.upper()


def join(parts, tail):
    return "+".join(parts) + tail


SYSTEM = CompoundSystem(
    ("x", "tail"),
    (
        Node("parts", Tool(halves), ("x",), plate=2),
        Node("loud", Tool(shout), ("parts",), plate=2),
        Node("whole", Tool(join), ("loud", "tail")),
    ),
)


def test_a_tool_is_called_once_a_row_or_once_a_copy_with_its_parents_in_order():
    made = SYSTEM.sample({}, [{"x": "a|b", "tail": "!"}, {"x": "c|d", "tail": "?"}], KEY)
    assert [record["parts"] for record in made] == [["a", "b"], ["c", "d"]]
    assert [record["loud"] for record in made] == [["A", "B"], ["C", "D"]]
    assert [record["whole"] for record in made] == ["A+B!", "C+D?"]


def test_a_tool_has_no_parameters_and_log_probability_zero():
    records = SYSTEM.sample({}, [{"x": "a|b", "tail": "!"}], KEY)
    assert SYSTEM.init(KEY) == {}
    for value in SYSTEM.log_prob({}, SYSTEM.prepare(records), KEY).values():
        np.testing.assert_array_equal(value, [0.0])


def test_the_wrong_number_of_parts_names_the_node():
    with pytest.raises(RecordError, match="parts"):
        SYSTEM.sample({}, [{"x": "a|b|c", "tail": ""}], KEY)


class Paid:
    """A tool that counts its calls, and fails for some values; frozen systems hash it by identity."""

    def __init__(self, fails=(), error=ConnectionError, times=10**9):
        self.calls, self.fails, self.error, self.times = [], fails, error, times

    def __call__(self, value):
        self.calls.append(value)
        if value in self.fails and self.calls.count(value) <= self.times:
            raise self.error("no route")
        return 10 * value


def outcomes(tool, *values):
    return tool.outcomes({"x": values})


RAISED = (ValueError, ConnectionError, StopIteration, KeyError, SystemExit, CancelledError)


@pytest.mark.parametrize("raised", RAISED)
@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_whatever_a_tool_raises_names_node_function_row_and_values(raised, concurrency, timeout, caplog):
    system = CompoundSystem(("x",), (Node("paid", Tool(Paid([3], raised), concurrency, 0, timeout), ("x",)),))
    words = r"sys.exit\('no route'\)" if raised is SystemExit else f"{raised.__name__}: .?no route"
    expected = rf"^row 2: node 'paid': the tool .*test_tool:Paid for x=3 failed \({words}.?\): fix it, or give the tool"
    with pytest.raises(ToolError, match=expected):
        system.sample({}, [{"x": x} for x in (1, 2, 3)], KEY)
    assert "Traceback" in caplog.text
    with pytest.raises(ToolError, match=expected.replace("row 2", "record 1").replace("^", "")):
        raise_first(system.complete([{"x": 1, "paid": 10}, {"x": 3}], ["paid"]), "record")


def test_long_values_and_arrays_are_shortened():
    tool = Tool(Paid([None]))
    [error] = outcomes(replace(tool, function=lambda text: 1 / 0), "word " * 100)
    assert len(str(error)) < 300
    [error] = outcomes(replace(tool, function=lambda image: 1 / 0), np.zeros((64, 64, 3), np.float32))
    assert "for x=float32[64, 64, 3] failed (ZeroDivisionError" in str(error)


def test_a_failure_stops_what_has_not_begun():
    paid = Paid([2])
    found = outcomes(Tool(paid), 1, 2, 3, 4)
    assert paid.calls == [1, 2]
    assert [type(x) for x in found] == [int, ToolError, NotCalledError, NotCalledError]
    assert not found[1].skip


def test_calls_under_way_are_finished():
    """The second of two that run together fails while the first is still at work."""
    failed, slow = threading.Event(), []

    def tool(value):
        if value == 2:
            failed.set()
            raise ConnectionError("no route")
        failed.wait(5)
        time.sleep(0.05)
        slow.append(value)
        return value

    found = outcomes(Tool(tool, concurrency=2), *range(1, 9))
    assert found[0] == 1
    assert isinstance(found[1], ToolError)
    assert slow == [1]
    assert all(isinstance(x, NotCalledError) for x in found[2:])


def test_skip_goes_on():
    paid = Paid([2, 3])
    found = outcomes(Tool(paid, on_error="skip"), 1, 2, 3, 4)
    assert paid.calls == [1, 2, 3, 4]
    assert (found[0], found[3]) == (10, 40)
    assert found[1].skip
    assert not found[1].refused


def test_so_many_calls_run_at_a_time_and_results_keep_their_order():
    lock, running, most = threading.Lock(), [], []

    def tool(value):
        with lock:
            running.append(value)
            most.append(len(running))
        time.sleep(0.01 * (8 - value))
        with lock:
            running.remove(value)
        return value

    assert outcomes(Tool(tool, concurrency=4), *range(8)) == list(range(8))
    assert max(most) == 4
    assert outcomes(Tool(lambda value: threading.current_thread()), 1) == [threading.current_thread()]


def test_a_failed_call_is_tried_again_after_longer_and_longer_waits(monkeypatch, caplog):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    paid = Paid([1], times=3)
    with caplog.at_level("WARNING"):
        assert outcomes(Tool(paid, retries=3), 1, 2) == [10, 20]
    assert paid.calls == [1, 1, 1, 1, 2]
    # 1, 2 and 4 seconds, each with up to a second of jitter.
    assert [least <= wait <= least + 1 for least, wait in zip((1, 2, 4), slept, strict=True)] == [True] * 3
    assert caplog.text.count("failed (ConnectionError: no route); try") == 3
    assert "Traceback" not in caplog.text
    [error] = outcomes(Tool(Paid([1]), retries=2), 1)
    assert "failed (ConnectionError: no route)" in str(error)


@pytest.mark.parametrize("raised", [SystemExit, RecordError])
def test_what_cannot_pass_is_not_tried_again(raised):
    paid = Paid([1], raised)
    [error] = outcomes(Tool(paid, retries=3), 1)
    assert paid.calls == [1]
    assert error.refused == (raised is RecordError)
    assert ("refuses x=1: no route" if error.refused else "failed (sys.exit") in str(error)


def test_a_call_that_hangs_is_given_up_and_tried_again(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    calls, never = [], threading.Event()

    def tool(value):
        calls.append(value)
        if len(calls) == 1:
            never.wait(30)
        return value

    assert outcomes(Tool(tool, retries=1, timeout=0.05), 7) == [7]
    never.set()
    calls.clear()
    never.clear()
    [error] = outcomes(Tool(tool, timeout=0.05), 7)
    never.set()
    assert "failed (TimeoutError: no result within 0.05 s)" in str(error)


def test_a_call_that_hangs_does_not_keep_the_process():
    code = (
        "import threading; from sysdpo_jax import Tool; "
        "tool = Tool(lambda x: threading.Event().wait(), timeout=0.1, concurrency=2); "
        "print(tool.outcomes({'x': [1, 2]}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("TimeoutError: no result within 0.1 s") >= 1


def test_ctrl_c_in_a_tool_is_none_of_its_failures():
    for concurrency, timeout in ((1, None), (2, None), (1, 5.0)):
        with pytest.raises(KeyboardInterrupt):
            outcomes(Tool(Paid([1], KeyboardInterrupt), concurrency, 2, timeout), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"concurrency": 0}, "concurrency 0 must be at least 1"),
        ({"retries": -1}, "retries -1"),
        ({"timeout": 0.0}, "timeout 0.0 above 0"),
    ],
)
def test_settings_that_no_call_can_have(settings, message):
    with pytest.raises(ValueError, match=message):
        Tool(shout, **settings)


def test_how_a_tool_is_called_is_no_part_of_the_system():
    """Nothing compiles anew, and a run may go on."""
    plain, other = (
        CompoundSystem(("x",), (Node("t", tool, ("x",)),)) for tool in (Tool(shout), Tool(shout, 4, 2, 9.0))
    )
    assert plain == other
    assert hash(plain) == hash(other)


def test_a_row_without_inputs_keeps_its_place_and_calls_no_tool():
    """The draws of the other rows are those that they are with a row there, before a failed row and behind it too."""
    paid = Paid([2])
    nodes = (
        Node("y", Gaussian(2, parent_size=1), ("x",)),
        Node("paid", Tool(lambda y, x: paid(int(x[0])) * np.ones(1), on_error="skip"), ("y", "x")),
        Node("z", Gaussian(2, parent_size=1), ("paid",)),
    )
    system = CompoundSystem(("x",), nodes)
    params = system.init(KEY)
    rows = [{"x": np.array([float(x)])} for x in range(5)]
    paid.fails = ()
    whole = system.sample(params, rows, KEY)
    paid.calls, paid.fails = [], (2,)
    runs = system.attempt(params, [None, rows[1], rows[2], None, rows[4]], KEY)
    assert paid.calls == [1, 2, 4]
    assert (runs[0], runs[3]) == (None, None)
    assert "node 'paid'" in str(runs[2])
    for place in (1, 4):
        for name in ("y", "paid", "z"):
            np.testing.assert_array_equal(runs[place][name], whole[place][name])
    assert system.attempt(params, [None, None], KEY) == [None, None]


def test_a_copy_of_a_plate_without_a_value_leaves_its_run_without_one():
    paid = Paid([3])
    system = CompoundSystem(
        ("x",),
        (Node("parts", Tool(list), ("x",), plate=2), Node("paid", Tool(paid, on_error="skip"), ("parts",), plate=2)),
    )
    runs = system.attempt({}, [{"x": (1, 2)}, {"x": (3, 4)}, {"x": (5, 6)}], KEY)
    assert [run["paid"] for run in (runs[0], runs[2])] == [[10, 20], [50, 60]]
    assert "node 'paid': the tool" in str(runs[1])
    assert paid.calls == [1, 2, 3, 4, 5, 6]


def test_a_tool_has_one_candidate():
    paid = Paid()
    assert Tool(paid).candidates({}, {"x": [1, 2]}, 4, KEY) == [[10], [20]]
    assert paid.calls == [1, 2]


def test_a_refused_row_stops_no_other(caplog):
    """A refusal is about its row alone, whatever on_error says."""
    asked = []

    def picky(x):
        asked.append(x)
        if x == 0:
            raise RecordError("no zeros")
        return x

    outcomes = Tool(picky).outcomes({"x": [0, 1, 2]})
    assert asked == [0, 1, 2]
    assert isinstance(outcomes[0], ToolError)
    assert outcomes[1:] == [1, 2]
