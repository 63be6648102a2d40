"""Which raw values of records are the same."""

import datetime
from types import SimpleNamespace

import numpy as np
import pytest

from sysdpo_jax.values import content, distinct


def test_equal_values_are_the_same_and_others_are_not():
    same = [
        ({"a": [1, 2]}, {"a": (1, 2)}),
        (np.float32(0.5), 0.5),
        (np.arange(3), np.arange(3)),
        (datetime.date(2026, 1, 2), datetime.date(2026, 1, 2)),
    ]
    for one, other in same:
        assert content(one) == content(other)
    for one, other in [(1, True), (1, 1.0), ({}, []), ("1", 1), (np.arange(3), np.arange(3.0)), (b"a", "a")]:
        assert content(one) != content(other)
    assert distinct([1, True, 1, "a", ["a"], ["a"]]) == [1, True, "a", ["a"]]


def test_an_object_is_not_its_address():
    """Objects that were made and dropped one after the other lie at the same places."""
    days = [datetime.date(2026, 1, 1) + datetime.timedelta(day) for day in range(300)]
    assert len({content(datetime.date(day.year, day.month, day.day)) for day in days}) == 300
    with pytest.raises(TypeError):
        content(SimpleNamespace(a=1))
