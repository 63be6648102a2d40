"""Images in the forms users have them, against Pillow read the plain way."""

import io

import numpy as np
import pytest
from PIL import Image

from sysdpo_jax import RecordError
from sysdpo_jax.components.images import fit_image, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_paths_bytes_pil_images_and_arrays_are_the_same_picture(tmp_path):
    picture = Image.fromarray(PIXELS)
    file = tmp_path / "picture.png"
    picture.save(file)
    forms = [file, str(file), png(picture), picture, PIXELS, PIXELS.astype(np.float32) / 255, PIXELS / 255]
    for form in forms:
        np.testing.assert_allclose(read_image(form, 0), PIXELS / 255, atol=1e-7)


def test_a_photograph_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    turned = read_image(png(Image.fromarray(PIXELS), exif=exif), 0)
    np.testing.assert_allclose(turned, np.rot90(PIXELS, -1) / 255, atol=1e-7)


def test_grey_and_palette_pictures_become_rgb():
    grey = Image.fromarray(PIXELS[..., 0])
    np.testing.assert_allclose(read_image(png(grey), 0), np.repeat(PIXELS[..., :1], 3, 2) / 255, atol=1e-7)
    assert read_image(png(grey.convert("P")), 0).shape == (6, 9, 3)


def test_deep_and_floating_pictures_are_scaled_not_cut_off():
    ramp = np.linspace(0, 1, 54).reshape(6, 9)
    deep = Image.fromarray((ramp * 65535).astype(np.uint16))
    np.testing.assert_allclose(read_image(png(deep), 0), np.repeat(ramp[..., None], 3, 2), atol=1e-4)
    floating = Image.fromarray(ramp.astype(np.float32))
    np.testing.assert_allclose(read_image(floating, 0), np.repeat(ramp[..., None], 3, 2), atol=1e-6)
    with pytest.raises(RecordError, match=r"image in row 4 has values outside \[0, 1\]"):
        read_image(Image.fromarray(255 * ramp.astype(np.float32)), 4)


def test_transparency_is_dropped():
    clear = np.concatenate([PIXELS, np.zeros((6, 9, 1), np.uint8)], axis=2)
    np.testing.assert_allclose(read_image(png(Image.fromarray(clear)), 0), PIXELS / 255, atol=1e-7)


def test_a_picture_of_the_right_size_is_left_alone():
    fitted = fit_image(PIXELS, 6, 9, 0)
    np.testing.assert_array_equal(fitted.pixels, PIXELS.astype(np.float32) / 255)
    assert fitted.frame == (6, 9, 0, 0, 6, 9)


@pytest.mark.parametrize(
    ("size", "frame", "box"),
    [
        ((6, 6), (6, 9, 0, 1, 6, 6), None),
        ((12, 12), (6, 9, 0, 3, 12, 12), (18, 12)),
        ((3, 8), (6, 9, 1, 0, 3, 8), (8, 6)),
    ],
)
def test_other_sizes_are_covered_and_their_middle_cut_out(size, frame, box):
    """As Pillow resizes 8-bit RGB, up to the rounding and clipping of that between its two passes: 4 levels."""
    fitted = fit_image(PIXELS, *size, 0)
    assert fitted.frame == frame
    whole = Image.fromarray(PIXELS) if box is None else Image.fromarray(PIXELS).resize(box, Image.Resampling.BICUBIC)
    top, left = frame[2:4]
    expected = np.asarray(whole)[top : top + size[0], left : left + size[1]] / 255
    np.testing.assert_allclose(fitted.pixels, expected, atol=4 / 255)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("no/such.png", "image in row 3: there is no file 'no/such.png'"),
        (b"not a picture", "image in row 3 cannot be read from its bytes"),
        (png(Image.fromarray(PIXELS))[:60], "image in row 3 cannot be read from its bytes"),
        (np.zeros((4, 4)), r"image in row 3 is ndarray of shape \(4, 4\)"),
        (7, "image in row 3 is int of shape"),
        (np.full((2, 2, 3), 2.0), r"image in row 3 has values outside \[0, 1\]"),
        (np.full((2, 2, 3), np.nan), r"image in row 3 has values outside \[0, 1\]"),
    ],
)
def test_what_is_no_picture_is_refused(value, message):
    with pytest.raises(RecordError, match=message):
        read_image(value, 3)


def test_a_picture_needs_three_channels():
    with pytest.raises(RecordError, match="image in row 0 has 1 channels"):
        fit_image(np.zeros((4, 4, 1)), 4, 4, 0)
