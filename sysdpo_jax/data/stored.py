"""Preference records in an Arrow file: any of them is found by its number, and few are in memory."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sysdpo_jax.data.records import PreferenceRecord
from sysdpo_jax.values import from_json, to_json

# Rows and bytes that wait in memory to be written together. A file of many small parts is slow to open.
TOGETHER, BYTES_TOGETHER = 1000, 2**26
# Stands in a record's JSON for the bytes of that number.
BYTES = "\0bytes"


def write_records(path: Path, records: Iterable[PreferenceRecord]) -> None:
    """Records have no common schema, so each is a text in JSON, and a list of the bytes that JSON cannot hold."""
    # Imported late: it takes a second.
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features({"record": Value("large_string"), "blobs": List(Value("large_binary"))})
    with ArrowWriter(path=str(path), features=features, writer_batch_size=TOGETHER) as writer:
        waiting = 0
        for record in records:
            blobs: list[bytes] = []
            parts = [packed(part, blobs) for part in (record.inputs, record.chosen, record.rejected)]
            writer.write({"record": json.dumps(parts), "blobs": blobs})
            waiting += sum(map(len, blobs))
            if waiting > BYTES_TOGETHER:
                writer.write_examples_on_file()
                waiting = 0
        writer.finalize()


class StoredRecords:
    """The records of a file that `write_records` made, memory-mapped."""

    def __init__(self, path: Path):
        from datasets import Dataset

        self._table = Dataset.from_file(str(path))

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, row: int) -> PreferenceRecord:
        stored = self._table[row]
        return PreferenceRecord(*(unpacked(part, stored["blobs"]) for part in json.loads(stored["record"])))


def packed(value: Any, blobs: list[bytes]) -> Any:
    """The value as JSON has it, its bytes moved to `blobs`."""
    if isinstance(value, bytes):
        blobs.append(value)
        return {BYTES: len(blobs) - 1}
    if isinstance(value, Mapping):
        return {name: packed(item, blobs) for name, item in value.items()}
    return [packed(item, blobs) for item in value] if isinstance(value, list | tuple) else to_json(value)


def unpacked(value: Any, blobs: Sequence[bytes]) -> Any:
    """What `packed` was given."""
    if isinstance(value, dict):
        if BYTES in value:
            return blobs[value[BYTES]]
        return from_json({name: unpacked(item, blobs) for name, item in value.items()})
    return [unpacked(item, blobs) for item in value] if isinstance(value, list) else value
