"""Files of rows: what comes back, what is refused, and what is left where writing is broken off."""

import ml_dtypes
import numpy as np
import pytest

from sysdpo_jax import row_files
from sysdpo_jax.row_files import LEAVES, ROWS, RowFile, write_row_file
from sysdpo_jax.values import SampledText

VALUES = {
    "nothing": None,
    "numbers": [1, 1.5, True, float("inf"), -(2**70)],
    "texts": ["", "a\u2028b\n", "\0bytes", "\U0001f600"],
    "bytes": b"\x00\xff",
    "no bytes": b"",
    "tuple": (1, (2, [3])),
    "mapping": {"a": {"b": [{"c": ()}]}, "": None},
    "array": np.arange(6, dtype=np.float32).reshape(2, 3),
    "of the other order": np.arange(6, dtype=">f8").reshape(3, 2),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "every second": np.arange(12)[::2],
    "one row for all": np.broadcast_to(np.arange(3, dtype=np.uint8), (4, 3)),
    "no rows": np.zeros((0, 3), np.float32),
    "half precision": np.arange(4, dtype=ml_dtypes.bfloat16),
    "truths": np.array([True, False]),
    "scalar": np.float32(3.5),
    "text of NumPy": np.str_("ab"),
}


def equal(left, right):
    if isinstance(right, np.ndarray | np.generic) and not isinstance(right, str):
        assert left.shape == right.shape
        assert left.dtype == right.dtype.newbyteorder("=")
        np.testing.assert_array_equal(left, right)
        return
    assert type(left) is (str if isinstance(right, np.str_) else type(right))
    if isinstance(right, dict):
        assert list(left) == list(right)
        left, right = list(left.values()), list(right.values())
    if isinstance(right, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            equal(one, other)
    else:
        assert left == right


@pytest.mark.parametrize("name", VALUES)
def test_a_value_comes_back_as_it_was(name, tmp_path):
    """Arrays in this machine's order of bytes, and scalars of NumPy as arrays without axes."""
    write_row_file(tmp_path / "r", [VALUES[name], {"in": [VALUES[name]]}])
    found = list(RowFile(tmp_path / "r"))
    equal(found, [VALUES[name], {"in": [VALUES[name]]}])


def test_rows_are_found_in_any_order_and_equal_arrays_are_stored_once(tmp_path, monkeypatch):
    """Of more rows than are written together; the file of arrays grows with those that differ alone."""
    monkeypatch.setattr(row_files, "TOGETHER", 4)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 1000), np.uint8)
    rows = [{"number": number, "pixels": pixels[number % 3]} for number in range(30)]
    assert write_row_file(tmp_path / "r", iter(rows)) == 30
    found = RowFile(tmp_path / "r")
    assert len(found) == 30
    for number in (29, 0, 13, 4):
        equal(found[number], rows[number])
    assert (tmp_path / f"r{LEAVES}").stat().st_size < 2 * pixels.nbytes
    with pytest.raises(ValueError, match="read-only"):
        found[0]["pixels"][0] = 1


def test_sampled_texts_remember(tmp_path):
    made = SampledText("a", (4, 2), "stop", "f")
    write_row_file(tmp_path / "r", [(made,)])
    [(found,)] = RowFile(tmp_path / "r")
    assert (found, found.tokens, found.end, found.tokenizer) == ("a", (4, 2), "stop", "f")


@pytest.mark.parametrize("value", [object(), {1, 2}, np.array(["a"]), np.array([object()]), np.zeros(1, "f4,i4"), 1j])
def test_what_no_file_can_hold_is_refused_and_nothing_is_left(value, tmp_path):
    with pytest.raises(TypeError, match=r"not JSON serializable|cannot be kept in a file"):
        write_row_file(tmp_path / "r", [1, {"a": [value]}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_rows_that_end_with_an_error_leave_the_file_as_it_was(error, tmp_path):
    def rows():
        yield {"a": b"new"}
        raise error

    write_row_file(tmp_path / "r", [{"a": b"old"}])
    with pytest.raises(error):
        write_row_file(tmp_path / "r", rows())
    assert list(RowFile(tmp_path / "r")) == [{"a": b"old"}]
    assert {path.name for path in tmp_path.iterdir()} == {f"r{ROWS}", f"r{LEAVES}"}


def test_a_file_of_no_rows(tmp_path):
    assert write_row_file(tmp_path / "r", []) == 0
    assert list(RowFile(tmp_path / "r")) == []
