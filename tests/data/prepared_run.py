"""Prepares a file in parts of three rows: `python -m tests.data.prepared_run KIND FOLDER [KILLED]`.

With KILLED the process kills itself where it prepares records for the KILLED-th time. It prints how many it prepared.
"""

import os
import signal
import sys
from pathlib import Path

from sysdpo_jax import load_preferences
from sysdpo_jax.data import preferences, prepared
from tests.data.prepared_systems import init, pictures, texts


def main(kind: str, folder: Path, killed: int) -> None:
    made, original = [], prepared.prepare_records

    def prepare(system, params, records):
        if len(made) + 1 == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        made.append(len(records))
        return original(system, params, records)

    preferences.PART = preferences.PART_WITH_IMAGES = 3
    preferences.TOGETHER, preferences.TOGETHER_WITH_IMAGES = 2, 2
    prepared.prepare_records = prepare
    system = {"texts": texts, "pictures": pictures}[kind]()
    load_preferences(folder / f"{kind}.jsonl", system, params=init(system), cache=folder / "cache")
    print(made)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int([*sys.argv, "0"][3]))
