"""Two processes encode their own rows by frozen parts that lie over a mesh of both."""

import numpy as np
import pytest

from tests.distributed.test_sampled_run import finished, losses

# Starting several processes takes minutes where the machine is busy.
pytestmark = pytest.mark.slow


def test_losses_are_those_of_one_process(tmp_path):
    """Of data that are held whole and of a dataset's batches: 1e-5, the devices add in another order."""
    for number in (1, 2):
        finished(number, ["-m", "tests.distributed.frozen_parts", tmp_path / str(number)])
    for source in ("whole", "dataset"):
        one, two = (losses(tmp_path / str(number) / source) for number in (1, 2))
        assert len(one) == 2
        assert len(set(one)) == 2
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-5)
