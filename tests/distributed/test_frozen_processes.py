"""Two processes encode their own rows by frozen parts that lie over a mesh of both."""

import numpy as np
import pytest

from tests.distributed.test_sampled_run import finished, losses

# Starting several processes takes minutes where the machine is busy.
pytestmark = pytest.mark.slow


def test_losses_are_those_of_one_process(tmp_path):
    """Of data that are held whole and of a dataset's batches.

    2e-4 of losses that move by 0.1 a step: the parts encode and add in another order, and a log-probability multiplies
    the rounding of a mean squared error by thousands.
    """
    for number in (1, 2):
        finished(number, ["-m", "tests.distributed.frozen_parts", tmp_path / str(number)])
    for source in ("whole", "dataset"):
        one, two = (losses(tmp_path / str(number) / source) for number in (1, 2))
        assert len(one) == 2
        assert abs(one[1] - one[0]) > 0.02
        np.testing.assert_allclose(two, one, rtol=0, atol=2e-4)
