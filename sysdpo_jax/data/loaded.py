"""Preferences that were read: records by number from files on disk, and what their features were made with."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

import numpy as np

from sysdpo_jax.data.prepared import PreparedRows, about_system
from sysdpo_jax.data.records import Counts, PreferenceRecord
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.manifest import digest, fingerprints
from sysdpo_jax.typing import Params

# The digest of a system and the fingerprints of its frozen parts.
About: TypeAlias = tuple[str, dict[str, str]]


@dataclass(eq=False, repr=False)
class Preferences(Sequence[PreferenceRecord]):
    """Records by number, read from memory-mapped files when they are asked for, and their features where there are any.

    Args:
        rows: What is on disk; `load_preferences` makes it.
        usable: The numbers of the rows that count.
        counts: Of the rows that were read, and of those left out.
        source: Where they come from.
        system: The one that the features are of; None where there are none.
        about: Its digest, and fingerprints of what encoded them.
    """

    rows: PreparedRows
    usable: np.ndarray
    counts: Counts
    source: str
    system: CompoundSystem | None
    about: About

    def __len__(self) -> int:
        return len(self.usable)

    @overload
    def __getitem__(self, row: int) -> PreferenceRecord: ...

    @overload
    def __getitem__(self, row: slice) -> list[PreferenceRecord]: ...

    def __getitem__(self, row: int | slice) -> PreferenceRecord | list[PreferenceRecord]:
        if isinstance(row, slice):
            return [self[number] for number in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"record {row} of {len(self)}")
        return self.rows.record(int(self.usable[row]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def fits(self, system: CompoundSystem) -> bool:
        """Whether the features are there, and those that the system prepares: with these tokenizers and settings.

        Args:
            system: To compare with.

        Returns:
            Whether they are.
        """
        return self.system is not None and digest(about_system(system)) == self.about[0]

    def encoded_by(self, params: Params) -> bool:
        """Whether the frozen parts of these parameters are those that encoded the features.

        Args:
            params: `{params_key: tree}`.

        Returns:
            Whether they are.
        """
        return self.system is not None and fingerprints(self.system.frozen_params(params)) == self.about[1]

    @property
    def held(self) -> bool:
        """Whether the records hold the system's intermediate values; True where no system is known."""
        return bool(self.rows.held[self.usable[0]])

    def summary(self) -> str:
        """The counts in a line.

        Returns:
            With the first of the errors and how many were left out for what.
        """
        return self.counts.summary(self.source)
