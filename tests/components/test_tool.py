"""Deterministic nodes: called once a row or once a copy, and worth nothing in the log-ratio."""

import jax
import numpy as np
import pytest

from sysdpo_jax import CompoundSystem, Node, RecordError, Tool

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
