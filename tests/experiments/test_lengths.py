"""Our side of the benchmark of unequal lengths, at toy sizes, and what its figures are made of."""

import numpy as np
import pytest

from experiments.benchmarks.lengths import Config, ours, rows, summary

TINY = Config(steps=6, pairs=4, layers=1, width=64, vocabulary=64, shapes=2)


def test_an_epoch_of_our_steps():
    result = ours(TINY)
    assert (len(result["seconds"]), result["steps"]) == (6, 6)
    assert min(result["seconds"]) > 0
    assert 1 <= len(result["shapes"]) <= 2
    # By hand: what the tokens of all rows, each answer with an end, leave free in batches of these shapes, which are
    # rounded up, but to no more than the model has.
    made = rows(TINY)
    tokens = sum(
        2 * len(row["prompt"].split()) + len((row["chosen"] + " " + row["rejected"]).split()) + 2 for row in made
    )
    places = [2 * 24 * (min(prompt, 128) + min(completion, 129)) for completion, prompt in result["shapes"]]
    least, most = 1 - tokens / min(places), 1 - tokens / max(places)
    # Rounding of a sum of 64-bit floats.
    assert least - 1e-9 <= result["padding"] <= most + 1e-9


def test_lengths_are_skewed_and_fit_their_bounds():
    lengths = np.array([len(row["prompt"].split()) for row in rows(Config(steps=250))])
    assert (lengths.min(), lengths.max()) == (4, 128)
    assert np.median(lengths) == pytest.approx(40, rel=0.1)


def test_the_ratio_is_that_of_the_means():
    side = {"padding": 0.5, "parameters": 7, "shapes": [[8, 8]]}
    result = summary({"ours": side | {"seconds": [1.0, 1.0, 4.0]}, "trl": side | {"seconds": [3.0, 5.0]}})
    assert (result["ratio"], result["ours"]["mean_seconds"], result["trl"]["median_seconds"]) == (2.0, 2.0, 4.0)
    assert (result["ours"]["compiled_shapes"], "compiled_shapes" in result["trl"]) == (1, False)
