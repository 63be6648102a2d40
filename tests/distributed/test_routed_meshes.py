"""Rows that are routed on 8 virtual devices."""

import pytest

from tests.distributed.test_meshes import printed

pytestmark = pytest.mark.slow


def test_every_mesh_makes_the_step_of_one_device() -> None:
    """Sums in another order: 1e-6 of updates of about 1e-3. Each device computes its share of the rows that ran."""
    found = printed("routed_on_meshes")
    assert len(found) == 24
    for case, figures in found.items():
        assert figures["error"] < 1e-6, case
    # An eighth of the products and of what is done for each row; all of what finds the rows.
    assert found["models 8x1x1 1"]["share"] < 1 / 4
