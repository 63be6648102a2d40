"""Writing preferences, their images beside them or inside."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sysdpo_jax.components.conversations import MESSAGES
from sysdpo_jax.components.images import open_picture
from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.data.rows import LINES, TABLE
from sysdpo_jax.values import SampledText, from_json, to_json


def save_preferences(path: str | Path, records: Sequence[PreferenceRecord]) -> None:
    """Write records that `load_preferences` reads back, whole or not at all.

    path: .jsonl, with images (arrays, PIL images, bytes) as PNG files in `<stem>_images/` beside it; or .parquet, with
    images inside. Arrays of other shapes become lists. Texts that a model sampled keep their tokens, see
    `values.to_json`. Raises `ValueError` for another suffix.
    """
    path = Path(path)
    if path.suffix not in (*LINES, *TABLE):
        raise ValueError(f"{path}: name a file that ends in {', '.join((*LINES, *TABLE))}")
    partial = path.with_suffix(f"{path.suffix}.partial")
    try:
        if path.suffix in TABLE:
            # Imported late: it takes a second.
            import datasets

            rows = [_row(_tabular(record), number, ImageFiles.inside) for number, record in enumerate(records)]
            datasets.Dataset.from_list(_of_one_kind(rows)).to_parquet(str(partial))
        else:
            images = ImageFiles(path)
            with partial.open("w", encoding="utf-8") as file:
                for number, record in enumerate(records):
                    file.write(json.dumps(_row(record, number, images.beside)) + "\n")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
        pixels = open_picture(image, name)
        # Whatever its mode was, Pillow writes red, green and blue.
        whole = pixels if pixels.dtype == np.uint8 else np.rint(255 * pixels).astype(np.uint8)
        picture = Image.fromarray(whole[..., 0] if whole.shape[-1] == 1 else whole)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()


def _tabular(record: PreferenceRecord) -> PreferenceRecord:
    """The record with JSON for tools and arguments of templates, which a table would make all of one shape."""

    def tabular(value: Any) -> Any:
        if not isinstance(value, Mapping) or MESSAGES not in value:
            return value
        return {name: item if name == MESSAGES else json.dumps(item) for name, item in value.items()}

    return replace(record, inputs={name: tabular(value) for name, value in record.inputs.items()})


def _of_one_kind(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with plain texts as objects without tokens where their column holds sampled texts: it has one type."""
    sampled = {
        (part, name) for row in rows for part, values in row.items() for name in values if _has_sampled(values[name])
    }

    def alike(value: Any) -> Any:
        if isinstance(value, str):
            return to_json(SampledText(value, (), "end", ""))
        return [alike(item) for item in value] if isinstance(value, list) else value

    return [
        {
            part: {name: alike(value) if (part, name) in sampled else value for name, value in values.items()}
            for part, values in row.items()
        }
        for row in rows
    ]


def _has_sampled(value: Any) -> bool:
    """Whether the value, as JSON has it, holds a sampled text."""
    if isinstance(value, list):
        return any(map(_has_sampled, value))
    return isinstance(from_json(value), SampledText)


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
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else to_json(value)
