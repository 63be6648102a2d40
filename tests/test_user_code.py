"""Whatever a user's code raises is named as that code's failure; a stop is not."""

import logging
import subprocess
import sys

import pytest

from sysdpo_jax.user_code import user_code


class Failure(ValueError):
    """What the caller wants to be raised."""


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (ConnectionError("no route"), "ConnectionError: no route"),
        (StopIteration(), "StopIteration: "),
        (SystemExit(0), r"sys.exit\(0\)"),
        (SystemExit("no ones"), r"sys.exit\('no ones'\)"),
    ],
)
def test_any_exception_is_a_failure_of_the_code(raised, said, caplog):
    with pytest.raises(Failure, match=f"^the tool shop:price failed .{said}.: fix it$"):  # noqa: SIM117
        with caplog.at_level(logging.ERROR), user_code("the tool shop:price", Failure):
            raise raised
    assert "the tool shop:price failed" in caplog.text
    assert "Traceback" in caplog.text


def test_sys_exit_does_not_end_the_process():
    with pytest.raises(Failure), user_code("the scorer", Failure):
        sys.exit(3)


def test_a_stop_and_what_is_expected_go_through():
    with pytest.raises(KeyboardInterrupt), user_code("the tool", Failure):
        raise KeyboardInterrupt
    with pytest.raises(LookupError, match="as meant"), user_code("the tool", Failure, (LookupError,)):
        raise LookupError("as meant")


def test_the_log_begins_with_the_users_own_frame():
    """In a process of its own: the tests' type checks put frames of theirs between."""
    script = """
from sysdpo_jax import Tool

def broken(price):
    return {}["price"]

Tool(broken).outcomes({"price": [1]})
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "in broken" in run.stderr
    assert "KeyError: 'price'" in run.stderr
    assert "tenacity" not in run.stderr
    assert "sysdpo_jax/" not in run.stderr
