"""The measurement of a large file, on a small one."""

from experiments.benchmarks.million_rows import measure


def test_all_rows_are_read_and_found():
    result = measure(500)
    assert (result["rows"], result["rows_per_second"] > 0) == (500, True)
