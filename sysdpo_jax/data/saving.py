"""Writing preferences, their images beside them or inside."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.data.rows import LINES, TABLE


def save_preferences(path: str | Path, records: Sequence[PreferenceRecord]) -> None:
    """Write records that `load_preferences` reads back, whole or not at all.

    path: .jsonl, with images (arrays, PIL images, bytes) as PNG files in `<stem>_images/` beside it; or .parquet, with
    images inside. Arrays of other shapes become lists. Raises `ValueError` for another suffix.
    """
    path = Path(path)
    partial = path.with_suffix(f"{path.suffix}.partial")
    if path.suffix in LINES:
        images = ImageFiles(path)
        lines = (json.dumps(_row(record, number, images.beside)) for number, record in enumerate(records))
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    elif path.suffix in TABLE:
        # Imported late: it takes a second.
        import datasets

        rows = [_row(record, number, ImageFiles.inside) for number, record in enumerate(records)]
        datasets.Dataset.from_list(rows).to_parquet(str(partial))
    else:
        raise ValueError(f"{path}: name a file that ends in {', '.join((*LINES, *TABLE))}")
    partial.replace(path)


class ImageFiles:
    """Images as PNG: their bytes, or files in a folder beside the file of records or runs at `path`."""

    def __init__(self, path: Path):
        self._folder = path.with_name(f"{path.stem}_images")

    def beside(self, name: str, image: Any) -> str:
        """Write the image into the folder; its path, relative to the file of records."""
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / f"{name}.png"
        file.write_bytes(self.inside(name, image))
        return f"{self._folder.name}/{file.name}"

    @staticmethod
    def inside(name: str, image: Any) -> bytes:
        """The bytes of the image as PNG, or those that it is."""
        if isinstance(image, bytes):
            return image
        if not isinstance(image, Image.Image):
            array = np.asarray(image)
            image = Image.fromarray(array if array.dtype == np.uint8 else (255 * array).round().astype(np.uint8))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()


def _row(record: PreferenceRecord, number: int, image: Any) -> dict[str, Any]:
    parts = {"inputs": record.inputs, "chosen": record.chosen, "rejected": record.rejected}
    return {
        part: {name: as_json(value, f"{number}-{part}-{name}", image) for name, value in values.items()}
        for part, values in parts.items()
    }


def as_json(value: Any, name: str, image: Any) -> Any:
    """A value as JSON has it, with what `image(name, image)` returns in the place of an image."""
    if isinstance(value, bytes | Image.Image) or (isinstance(value, np.ndarray) and value.ndim == 3):
        return image(name, value)
    if isinstance(value, list | tuple):
        return [as_json(item, f"{name}-{place}", image) for place, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {key: as_json(item, f"{name}-{key}", image) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
