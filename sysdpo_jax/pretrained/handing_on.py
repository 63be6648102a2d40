"""What was read and is not trained goes out again unchanged: configurations with all their keys, and other files.

A copy is right only as long as it says what the component is, and a user may have changed that after loading. So a file
is handed on where reading it again gives what the component holds, and written anew where it does not.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sysdpo_jax.components.source import Source
from sysdpo_jax.pretrained.base import CheckpointError, write_json

# What the writer alone says. The code that auto_map names does not go along, and the model is one that is known.
OWN = ("architectures", "auto_map", "model_type")
# Where a component comes from that was made, not read.
NOWHERE = Source(Path())


def remember(
    path: Path, variant: str | None, patterns: tuple[str, ...], moved: Mapping[str, Path] = MappingProxyType({})
) -> Source:
    """The source of a folder, with the content of its files that the patterns name.

    moved: folders that take the place of the folder's own, by name.
    """
    found: dict[str, bytes] = {}
    for pattern in patterns:
        part, _, inside = pattern.partition("/")
        root = moved.get(part, path / part) if inside else path
        for file in root.glob(inside or pattern):
            if file.is_file():
                name = file.relative_to(root).as_posix()
                found[f"{part}/{name}" if inside else name] = file.read_bytes()
    # Absolute, because the weights there are read again later, when the process may be elsewhere.
    elsewhere = tuple((name, folder.absolute()) for name, folder in sorted(moved.items()))
    return Source(path.absolute(), variant, tuple(sorted(found.items())), elsewhere)


def recalled(source: Source, name: str) -> dict[str, Any]:
    """The content of a remembered JSON file, which was read once without an error; empty where there is none."""
    data = source.content(name)
    return {} if data is None else dict(json.loads(data))


def handed_on(
    values: Mapping[str, Any], written: dict[str, Any], wanted: Any, read: Callable[[Mapping[str, Any]], Any]
) -> dict[str, Any]:
    """A configuration that other programs read as before: the keys of the file it came from, and those written here.

    Args:
        values: the content of that file, empty where there was none.
        written: what the configuration here is in the file's words.
        wanted: that configuration.
        read: from a file's content to a configuration.

    Returns:
        `values`, completed by what they leave to defaults; `written` alone where they say something else than `wanted`
        because the configuration was changed after it was read.
    """
    joined = {**written, **{name: value for name, value in values.items() if name not in OWN}}
    try:
        same = read(joined) == wanted
    except CheckpointError:
        same = False
    return joined if same else written


def write_files(folder: Path, files: tuple[tuple[str, bytes], ...]) -> None:
    """Write files under their names below an existing folder."""
    for name, data in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_like(folder: Path, name: str, values: Mapping[str, Any], source: Source) -> None:
    """Write a JSON file below an existing folder: the very file of the source where that holds these values."""
    data = source.content(name)
    if data is not None and json.loads(data) == values:
        write_files(folder, ((name, data),))
    else:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, values)
