"""Pictures as a page holds them, and the layout of grids."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from sysdpo_jax.report import ImageRow, ImageSequence, Report, image_grid, to_image, write_report
from sysdpo_jax.report.pictures import GAP, METHOD_GAP, picture


def sequence(method, *shades, side=36):
    """One picture a shade (of 255)."""
    images = np.stack([np.full((side, side, 3), shade / 255) for shade in shades])
    return ImageSequence(method, images, tuple(f"shade {shade}" for shade in shades))


@pytest.mark.parametrize(("shape", "size"), [((1, 1), (72, 72)), ((5, 9), (72, 40)), ((64, 131), (131, 64))])
def test_a_picture_is_a_png_file_that_is_read_back_pixel_for_pixel(shape, size):
    """And it is shown larger where it is small."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    shown = picture(pixels / 255)
    start, data = shown.uri.split(",")
    assert start == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as read:
        assert (read.format, read.mode) == ("PNG", "RGB")
        np.testing.assert_array_equal(np.asarray(read), pixels)
    assert (shown.width, shown.height) == size


def test_values_become_the_nearest_level():
    values = np.array([-0.5, 0.0, 0.499 / 255, 0.501 / 255, 1.0, 1.5])
    pixels = np.asarray(to_image(np.broadcast_to(values[None, :, None], (2, 6, 3))))
    np.testing.assert_array_equal(pixels[1, :, 2], [0, 0, 0, 1, 255, 255])
    with pytest.raises(ValueError, match="not finite"):
        to_image(np.full((1, 1, 3), np.nan))


def test_a_grid_puts_prompts_below_and_methods_beside_each_other():
    """Pictures of 36 pixels are doubled to 72; a shorter line is filled with white, an empty one left out."""
    rows = (
        ImageRow("first", (sequence("before", 10, 20), sequence("after", 30, 40))),
        ImageRow("second", (sequence("before", 50), ImageSequence("failed", np.zeros((0, 36, 36, 3)), ()))),
        ImageRow("nothing", ()),
    )
    grid = np.asarray(image_grid(rows))
    width = 2 * (2 * 72 + GAP) + METHOD_GAP
    assert grid.shape == (2 * 72 + GAP, width, 3)
    lefts = [0, 72 + GAP, 2 * 72 + GAP + METHOD_GAP, 3 * 72 + 2 * GAP + METHOD_GAP]
    for left, shade in zip(lefts, (10, 20, 30, 40), strict=True):
        assert (grid[:72, left : left + 72] == shade).all()
    assert (grid[72 + GAP :, :72] == 50).all()
    assert (grid[72 + GAP :, 72:] == 255).all()
    assert (grid[72 : 72 + GAP] == 255).all()


def test_pictures_of_several_sizes_are_no_grid():
    row = ImageRow("x", (sequence("a", 1, side=8), sequence("b", 1, side=9)))
    with pytest.raises(ValueError, match=r"one size, got \[\(8, 8\), \(9, 9\)\]"):
        image_grid((row,))
    with pytest.raises(ValueError, match="got none"):
        image_grid(())


def test_a_picture_needs_a_caption():
    with pytest.raises(ValueError, match="2 pictures and 1 captions"):
        ImageSequence("a", np.zeros((2, 4, 4, 3)), ("only one",))


def test_captions_stand_below_their_pictures(tmp_path):
    row = ImageRow("a <prompt>", (sequence("before", 1, 2),))
    write_report(tmp_path / "report.html", Report("t", "", images=(row,)))
    text = (tmp_path / "report.html").read_text()
    assert "a &lt;prompt&gt;" in text
    assert text.index("base64") < text.index("<figcaption>shade 1") < text.index("<figcaption>shade 2")
    assert text.count("<img ") == 2
