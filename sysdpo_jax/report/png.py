"""PNG files of 8-bit RGB pictures, written with zlib alone (PNG specification, W3C, third edition, 2025)."""

import struct
import zlib
from base64 import b64encode
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

Pixels = UInt8[np.ndarray, "height width 3"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Bit depth 8, colour type 2 (RGB), deflate, adaptive filtering, not interlaced.
FORMAT = (8, 2, 0, 0, 0)


def to_pixels(image: Float[np.ndarray, "height width 3"]) -> Pixels:
    """Values in [0, 1], clipped, to the nearest of 256 levels. Raises ValueError for values that are not finite."""
    if not np.isfinite(image).all():
        raise ValueError("a picture holds values that are not finite: look for the step that made them")
    return np.rint(np.clip(image.astype(np.float64), 0, 1) * 255).astype(np.uint8)


def encode_png(pixels: Pixels) -> bytes:
    """The bytes of a PNG file."""
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, *FORMAT)
    # Each scan line starts with its filter; 0 is none.
    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return SIGNATURE + b"".join(_chunk(kind, data) for kind, data in chunks)


def data_uri(pixels: Pixels) -> str:
    """The picture as a data: URI, for an HTML page that needs no other file."""
    return "data:image/png;base64," + b64encode(encode_png(pixels)).decode()


def write_png(path: str | Path, pixels: Pixels) -> None:
    """Write a PNG file."""
    Path(path).write_bytes(encode_png(pixels))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
