"""Roles on meshes of 8 virtual devices: the figures of one device; the base is cut, and gathered once for all roles."""

import numpy as np
import pytest

from tests.distributed.test_meshes import printed


@pytest.mark.slow
def test_roles_on_meshes():
    """1e-5 over 3 steps of Adam, relative for the gradients' norms: other sums in float32."""
    found = printed("roles_on_meshes")
    one = np.array(found["one"]["figures"])
    for name in ("fsdp", "mixed", "fsdp, apart"):
        np.testing.assert_allclose(found[name]["figures"], one, rtol=1e-4, atol=1e-5, err_msg=name)
    assert one[0, 0] - one[-1, 0] > 1e-3
    assert found["fsdp"]["base"] < 0.3 * found["one"]["base"]
    assert 0 < found["fsdp"]["gathered"] < 0.6 * found["fsdp, apart"]["gathered"]
