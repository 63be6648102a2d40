"""Prompts: what a system's inputs are, a line each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sysdpo_jax as sj
from sysdpo_jax.data.formats import refuse_unread
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import read_text
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.values import from_json


def read_prompts(path: str | Path, system: sj.CompoundSystem, ignore: Sequence[str] = ()) -> list[dict[str, Any]]:
    """JSON Lines of objects with the system's inputs or, for a system with one input, a .txt file with a prompt a line.

    ignore: fields that are left unread; any other that is no input and holds something is an error.
    Raises `ConfigError` naming file, line and field.
    """
    path = Path(path)
    if path.suffix == ".txt":
        if len(system.inputs) != 1:
            raise ConfigError(
                f"{path}: the system has the inputs {', '.join(system.inputs)}: write JSON Lines with them"
            )
        # Not splitlines: a prompt may hold what that takes for ends of lines.
        texts = [line.strip() for line in read_text(path, str(path), "give a file of prompts").split("\n")]
        rows = [{system.inputs[0]: text} for text in texts if text]
    else:
        rows = list(read_lines(path))
    if not rows:
        raise ConfigError(f"{path} holds no prompt")
    for number, row in enumerate(rows, 1):
        for name in system.inputs:
            if name not in row:
                raise ConfigError(f"{path}, prompt {number} lacks the input {name!r}: add the field")
        try:
            refuse_unread(row, system.inputs, ignore)
        except sj.RecordError as error:
            raise ConfigError(f"{path}, prompt {number}: {error}") from None
    return [{name: from_json(row[name]) for name in system.inputs} for row in rows]
