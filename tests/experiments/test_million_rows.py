"""The measurement of large sources, on small ones."""

from functools import partial

import pytest

from experiments.benchmarks import million_rows
from experiments.benchmarks.million_rows import language_system, measure, picture_system, write_pictures, write_texts
from sysdpo_jax import CompoundSystem
from tests.components.drawn import drawn


@pytest.mark.parametrize(
    ("system", "write", "rows"),
    [(language_system, write_texts, 300), (picture_system, write_pictures, 24)],
    ids=["texts", "images"],
)
def test_all_rows_are_read_prepared_and_found(system, write, rows, monkeypatch):
    init = CompoundSystem.init
    monkeypatch.setattr(CompoundSystem, "init", lambda self, key: drawn(partial(init, self)))
    result = measure(system(), write, rows)
    assert (result["rows"], result["rows_per_second"] > 0, result["disk_mib"] > 0) == (rows, True, True)
    assert 0 <= result["memory_growth_mib"] <= result["memory_bound_mib"]


def test_memory_beyond_its_bound_gives_no_figures(monkeypatch):
    monkeypatch.setattr(million_rows, "MEMORY_MIB", -1000)
    with pytest.raises(RuntimeError, match=r"more than its bound of -1000 MiB"):
        measure(language_system(), write_texts, 20)
