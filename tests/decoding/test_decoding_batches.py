"""Lists of prompts: widths, parts of like lengths, places."""

import numpy as np
import pytest

from sysdpo_jax.decoding.batches import parts, places, width


def test_widths_are_few_and_fit() -> None:
    widths = [width(longest, 1000) for longest in range(1, 1001)]
    assert sorted(set(widths)) == [32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]
    for longest, found in enumerate(widths, 1):
        assert longest <= found <= max(32, 1.5 * longest)
    assert width(20, 24) == 24


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (128, 128), (200, 128), (512, 128), (2048, 512)])
def test_places(rows: int, expected: int) -> None:
    assert places(rows) == expected


def test_rows_of_unlike_lengths_are_decoded_apart() -> None:
    lengths = np.random.default_rng(0).permutation([10] * 30 + [40] * 30 + [400] * 4)
    found = parts(lengths, 512)
    assert len(found) == 4
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(64))
    longest = [lengths[part].max() for part in found]
    assert longest == sorted(longest)
    assert longest[0] == 10
    assert longest[-1] == 400


@pytest.mark.parametrize("lengths", [[40] * 64, [10] * 8 + [400] * 8, [60, 64] * 50, [5]])
def test_else_all_rows_stay_together_in_their_order(lengths: list[int]) -> None:
    [found] = parts(np.array(lengths), 512)
    np.testing.assert_array_equal(found, np.arange(len(lengths)))
