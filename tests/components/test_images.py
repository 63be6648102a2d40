"""Images in the forms users have them, against Pillow read the plain way."""

import io
import math
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from sysdpo_jax import RecordError
from sysdpo_jax.components.images import as_png, fit_image, read_image

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
        (b"not a picture", "image in row 3: .* bytes cannot be read"),
        (png(Image.fromarray(PIXELS))[:60], "image in row 3: .* bytes cannot be read"),
        (np.zeros((4, 4)), r"image in row 3 is ndarray of shape \(4, 4\)"),
        (np.zeros((0, 4, 3)), r"image in row 3 is ndarray of shape \(0, 4, 3\)"),
        ([[1.0], [1.0, 2.0]], "image in row 3 is list, which is no array"),
        (7, "image in row 3 is int of shape"),
        (np.full((2, 2, 3), 2.0), r"image in row 3 has values outside \[0, 1\]"),
        (np.full((2, 2, 3), np.nan), r"image in row 3 has values outside \[0, 1\]"),
    ],
)
def test_what_is_no_picture_is_refused(value, message):
    with pytest.raises(RecordError, match=message):
        read_image(value, 3)


def two_steps(pixels, height, width):
    """The whole picture resized by Pillow in floats, then cut: what `fit_image` promises."""
    old_height, old_width = pixels.shape[:2]
    scale = max(height / old_height, width / old_width)
    # The smallest size that covers: one side is the wanted one, the other is rounded up.
    size = math.ceil(round(old_width * scale, 6)), math.ceil(round(old_height * scale, 6))
    channels = [Image.fromarray(np.ascontiguousarray(c)).resize(size, Image.Resampling.BICUBIC) for c in
                np.moveaxis(pixels.astype(np.float32) / 255, 2, 0)]  # fmt: skip
    whole = np.stack([np.asarray(channel) for channel in channels], axis=2).clip(0, 1)
    top, left = (size[1] - height) // 2, (size[0] - width) // 2
    return whole[top : top + height, left : left + width]


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (64, 64), (20, 30), (7, 90), (200, 17)])
@pytest.mark.parametrize("size", [(64, 64), (32, 80), (128, 100)])
def test_cutting_out_first_changes_nothing(shape, size):
    """Against the whole picture resized, in float32: 1e-5."""
    pixels = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_allclose(fit_image(pixels, *size, 0).pixels, two_steps(pixels, *size), atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 1500), (1500, 2), (1, 20_000)])
def test_the_cost_of_a_narrow_picture_is_that_of_the_result(shape):
    """Resized whole it would have up to 5 * 10^9 pixels; arrays take ten times the result's bytes at most."""
    pixels = np.random.default_rng(3).integers(0, 256, (*shape, 3), np.uint8)
    tracemalloc.start()
    fitted = fit_image(pixels, 512, 512, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert fitted.pixels.shape == (512, 512, 3)
    assert peak < 10 * fitted.pixels.nbytes
    # The middle of the long axis, whose pixels are wider than the result.
    middle = pixels[shape[0] // 2 - 1 : shape[0] // 2 + 1, shape[1] // 2 - 1 : shape[1] // 2 + 1].mean((0, 1)) / 255
    np.testing.assert_allclose(fitted.pixels[255:257, 255:257].mean((0, 1)), middle, atol=0.1)


def photograph(orientation, size=(24, 16), form="JPEG"):
    """A file whose upper half is white as it is to be shown, turned back by an EXIF orientation."""
    back = {1: 0, 3: 180, 6: 90, 8: 270}[orientation]
    shown = np.zeros((*size, 3), np.uint8)
    shown[: size[0] // 2] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(np.rot90(shown, back // 90)).save(buffer, form, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_every_way_in_is_turned_once(tmp_path, orientation):
    data = photograph(orientation)
    (tmp_path / "photograph.jpg").write_bytes(data)
    for form in (data, tmp_path / "photograph.jpg", Image.open(io.BytesIO(data))):
        pixels = read_image(form, 0)
        assert pixels.shape == (24, 16, 3)
        assert pixels[:10].min() > 0.9 > 0.1 > pixels[14:].max()
    again = as_png(Image.open(io.BytesIO(data)), "")
    np.testing.assert_allclose(read_image(again, 0), read_image(data, 0))


def test_other_colours_and_depths_are_the_picture_that_is_seen():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    for mode in ("CMYK", "YCbCr"):
        buffer = io.BytesIO()
        red.convert(mode).save(buffer, "JPEG", quality=100)
        np.testing.assert_allclose(read_image(buffer.getvalue(), 0)[0, 0], [1, 0, 0], atol=0.02)
    palette = red.convert("P")
    palette.info["transparency"] = bytes(range(256))
    np.testing.assert_allclose(read_image(png(palette), 0)[0, 0], [1, 0, 0], atol=0.02)
    np.testing.assert_allclose(read_image(png(Image.new("1", (4, 4), 1)), 0), 1)
    np.testing.assert_allclose(read_image(png(Image.new("LA", (4, 4), (102, 9))), 0), 0.4)


def damaged_png():
    """A file whose header and checksums are right, with pixels that zlib refuses."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 9, 6, 8, 2, 0, 0, 0)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", b"no stream of zlib"), chunk(b"IEND", b"")]
    return bytes([137, *b"PNG", 13, 10, 26, 10]) + b"".join(chunks)


def frames(form):
    buffer = io.BytesIO()
    pictures = [Image.fromarray(np.roll(PIXELS, shift, 0)) for shift in range(3)]
    pictures[0].save(buffer, form, save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    {
        "nothing": (b"", "0 bytes cannot be read"),
        "a text": (b"<svg></svg>", "11 bytes cannot be read"),
        "pixels": (damaged_png(), "cannot be read"),
        "a cut JPEG": (photograph(6)[:400], "cannot be read"),
        "a cut TIFF": (frames("TIFF")[:60], "cannot be read"),
        "an animation": (frames("GIF"), "image in row 2 is 3 pictures in one file: give one of them"),
        "pages": (frames("TIFF"), "image in row 2 is 3 pictures in one file: give one of them"),
    }.values(),
)  # fmt: skip
def test_files_that_hold_no_one_picture_are_refused(data, message):
    with pytest.raises(RecordError, match=message) as error:
        read_image(data, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [struct.error("bad"), IndexError(), zlib.error(), SyntaxError("x"), TypeError("y")])
def test_whatever_a_decoder_raises_is_the_error_of_the_record(error, monkeypatch):
    def load(self):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    for form in (png(Image.fromarray(PIXELS)), Image.open(io.BytesIO(png(Image.fromarray(PIXELS))))):
        with pytest.raises(RecordError, match=f"cannot be read .({error}|{type(error).__name__})"):
            read_image(form, 0)


def test_more_pixels_than_pillow_takes_for_safe_are_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    # Pillow would only warn of 54.
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(RecordError, match="has 9 x 6 pixels, more than"):
        read_image(png(Image.fromarray(PIXELS)), 0)
    assert read_image(Image.fromarray(PIXELS), 0).shape == (6, 9, 3)


def test_a_picture_needs_three_channels():
    with pytest.raises(RecordError, match="image in row 0 has 1 channels"):
        fit_image(np.zeros((4, 4, 1)), 4, 4, 0)
