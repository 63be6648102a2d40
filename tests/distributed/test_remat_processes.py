"""Two processes whose devices have unequal room recompute alike: their programs meet in collectives."""

import json

import pytest

from tests.distributed.test_sampled_run import finished

# Starting several processes takes minutes where the machine is busy.
pytestmark = pytest.mark.slow


def test_both_take_what_fits_both(tmp_path):
    printed = finished(2, ["-m", "tests.distributed.remat_processes", tmp_path])
    # The library of the collectives prints as well.
    one, two = (json.loads(text.splitlines()[-1]) for text in printed)
    assert one == two
    assert one[0] == ["full"]
