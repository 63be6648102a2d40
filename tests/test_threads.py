"""Threads that hang hold up neither the block nor the process."""

import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError

import pytest

from sysdpo_jax import threads
from sysdpo_jax.threads import GRACE, DaemonExecutor


def test_results_come_in_the_order_of_the_calls():
    def slow_at_first(number):
        time.sleep(0.05 if number == 0 else 0)
        if number == 3:
            raise SystemExit(3)
        return number

    with DaemonExecutor(3, "test") as pool:
        assert list(pool.map(slow_at_first, range(3))) == [0, 1, 2]
        assert pool.submit(pow, 2, exp=5).result() == 32
        # Of the asker, not of the thread, which takes the next call.
        with pytest.raises(SystemExit):
            pool.submit(slow_at_first, 3).result()
        assert list(pool.map(slow_at_first, [4, 5, 6, 7])) == [4, 5, 6, 7]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("test-")]


def test_leaving_waits_for_what_goes_on_and_cancels_the_rest():
    done = []
    with DaemonExecutor(1, "test") as pool:
        first = pool.submit(lambda: (time.sleep(0.2), done.append(1)))
        second = pool.submit(done.append, 2)
        time.sleep(0.05)
    assert first.done()
    assert done == [1]
    with pytest.raises(CancelledError):
        second.result()


def test_a_call_that_hangs_is_left_alone():
    come, begun = threading.Event(), threading.Event()
    began = time.monotonic()
    with DaemonExecutor(2, "test") as pool:
        pool.submit(lambda: (begun.set(), come.wait()))
        begun.wait()
    assert GRACE - 0.1 <= time.monotonic() - began < GRACE + 3
    come.set()


def test_the_process_ends_without_it():
    code = f"""
import importlib.util, time
spec = importlib.util.spec_from_file_location("threads", {threads.__file__!r})
threads = importlib.util.module_from_spec(spec)
spec.loader.exec_module(threads)
pool = threads.DaemonExecutor(1, "test")
pool.submit(time.sleep, 1e6)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=30).returncode == 0


def test_nothing_is_taken_after_the_end():
    executor = DaemonExecutor(1, "ended")
    executor.shutdown()
    with pytest.raises(RuntimeError, match="is shut down"):
        executor.submit(abs, -1)
