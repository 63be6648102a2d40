"""Scorers against pictures whose attributes are known in closed form."""

import numpy as np
import pytest

from sysdpo_jax.evaluation import CalibratedScorer, brightness, foreground, height, redness, size

DARK = 0.1
MEASURES = (brightness, size, redness, height)


def draw(cover, colour, background=DARK):
    """One picture: cover [height, width] of a colour over a uniform background."""
    cover = np.asarray(cover, np.float64)[..., None]
    return (background + cover * (np.asarray(colour) - background))[None]


def box(top, bottom, left, right, side=16):
    """Share of each pixel inside a box with edges anywhere: the product of the two overlaps."""
    pixels = np.arange(side)
    overlap = lambda low, high: np.clip(np.minimum(pixels + 1, high) - np.maximum(pixels, low), 0, 1)  # noqa: E731
    return np.outer(overlap(top, bottom), overlap(left, right))


def test_a_box_on_whole_pixels():
    """Centre 4.5 rows of 16 below the top; rounding is all that may differ."""
    image = draw(box(2, 7, 3, 9), (0.9, 0.5, 0.3))
    np.testing.assert_allclose(size(image), [5 * 6 / 256], rtol=1e-12)
    np.testing.assert_allclose(height(image), [1 - 4.5 / 16], rtol=1e-12)
    np.testing.assert_allclose(brightness(image), [(0.9 + 0.5 + 0.3) / 3], rtol=1e-12)
    np.testing.assert_allclose(redness(image), [0.75], rtol=1e-12)


def test_a_box_that_covers_half_of_its_edge_pixels():
    """The mask keeps a half as it is, so area and centre of mass stay exact."""
    image = draw(box(3.5, 8.5, 4, 10), (0.2, 0.7, 0.8))
    np.testing.assert_allclose(size(image), [5 * 6 / 256], rtol=1e-12)
    np.testing.assert_allclose(height(image), [1 - 6 / 16], rtol=1e-12)


def test_an_edge_keeps_its_area_on_average():
    """Over a box's position within a pixel the stretched mask has the box's area: the stretch is odd about 1/2."""
    images = np.concatenate([draw(box(3 + shift, 8 + shift, 4, 10), (1.0, 1.0, 1.0)) for shift in np.arange(64) / 64])
    np.testing.assert_allclose(size(images).mean(), 5 * 6 / 256, rtol=1e-12)


def test_faint_noise_counts_nothing():
    """Amplitude 0.05 against an object 0.8 away from its background: below a fifth, so the mask is the clean one."""
    noise = np.random.default_rng(0).uniform(-0.05, 0.05, size=(1, 16, 16, 3))
    cover = box(2, 7, 3, 9)
    clean, noisy = draw(cover, (0.9, 0.9, 0.9)), draw(cover, (0.9, 0.9, 0.9)) + noise
    np.testing.assert_array_equal(foreground(noisy), cover[None])
    np.testing.assert_allclose(size(noisy), size(clean), rtol=1e-12)
    np.testing.assert_allclose(height(noisy), height(clean), rtol=1e-12)


def test_a_dark_object_on_a_light_background_is_found():
    cover = box(4, 8, 4, 8)
    np.testing.assert_allclose(foreground(draw(cover, (0.2, 0.1, 0.3), background=0.9))[0], cover, atol=1e-12)


@pytest.mark.parametrize(("measure", "value"), [*zip(MEASURES, (0.0, 0.0, 0.5, 0.5), strict=True)])
@pytest.mark.parametrize("shade", [0.0, 0.1, 1.0])
def test_an_empty_picture_has_a_defined_value(measure, value, shade):
    np.testing.assert_array_equal(measure(np.full((2, 8, 8, 3), shade)), [value, value])


@pytest.mark.parametrize("measure", MEASURES)
def test_a_batch_is_its_pictures_one_by_one(measure):
    images = np.random.default_rng(1).random((5, 9, 9, 3))
    alone = np.concatenate([measure(image[None]) for image in images])
    np.testing.assert_allclose(measure(images), alone, rtol=1e-14)


def test_a_calibrated_scorer_is_a_straight_line_without_ends():
    scorer = CalibratedScorer(height, low=0.25, high=0.75)
    images = np.concatenate([draw(box(top, top + 2, 6, 9), (0.8, 0.5, 0.5)) for top in (1, 3, 7, 11, 13)])
    np.testing.assert_allclose(scorer(images), [1.25, 1.0, 0.5, 0.0, -0.25], atol=1e-12)


def test_a_scale_without_length_is_refused():
    with pytest.raises(ValueError, match="two ends"):
        CalibratedScorer(size, 0.5, 0.5)
