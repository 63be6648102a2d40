"""Sampling and beam search with parameters spread over 8 virtual devices."""

import pytest

from tests.distributed.test_meshes import printed

pytestmark = pytest.mark.slow


def test_every_mesh_decodes_what_one_device_does() -> None:
    """The same tokens, with and without rows that wait, and scores within float32 roundings of sums over 7 tokens."""
    found = printed("decode_on_meshes")
    assert found.pop("distinct") > 10
    for mesh, errors in found.items():
        assert errors.pop("scores") < 1e-3, mesh
        assert not any(errors.values()), mesh
