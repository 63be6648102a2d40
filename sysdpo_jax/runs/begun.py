"""An evaluation under way: its runs, then their scores, in a file that grows beside the final one until it is whole."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import ResumableJsonl, note_of
from sysdpo_jax.runs.runs_file import Run, as_row, failed_row, lacks_images, read_lines, values_of, with_images


class Begun:
    """What this process has of an evaluation, in lines {"id", "inputs", "outputs"} and {"id", "score"}.

    What is there of one that was made in the same way is taken; of another one it is dropped. Runs that a tool left
    out, and those without a score, are tried again.

    Args:
        path: Of the final file.
        about: How runs and scores are made.
    """

    def __init__(self, path: Path, about: Mapping[str, str]):
        index, count = jax.process_index(), jax.process_count()
        own = path.with_name(f"{path.name}.begun-{index + 1:05d}-of-{count:05d}")
        try:
            self._file = ResumableJsonl(own, about)
        except ConfigError:
            # Of other parameters, prompts or scores: no evaluation can use it any more.
            _remove(own)
            self._file = ResumableJsonl(own, about)
        self.runs: dict[str, Run] = {}
        self.scores: dict[str, float] = {}
        self._left: dict[str, Run] = {}
        # A machine that went down may have left a line without its images.
        for row in read_lines(own) if own.exists() else ():
            if "score" in row:
                self.scores[row["id"]] = row["score"]
            elif not lacks_images(row, own):
                self.runs[row["id"]] = row

    def add_runs(
        self,
        system: CompoundSystem,
        prompts: Sequence[Mapping[str, Any]],
        images: ImageFiles,
        found: Sequence[tuple[str, Any]],
    ) -> ToolError | None:
        """Keep the runs among (id, run or `ToolError`). Returns the error of a tool that stops the evaluation."""
        rows, stop = list[Run](), None
        for name, run in found:
            if not isinstance(run, ToolError):
                rows.append(as_row(system, run, name, images))
                continue
            prompt, sample = map(int, name.split("-"))
            named = run.at(f"prompt {prompt + 1}, sample {sample + 1}")
            if run.skip:
                self._left[name] = failed_row(system, prompts[prompt], name, named)
            else:
                stop = named
        if rows:
            self._file.append(rows)
        self.runs |= {row["id"]: row for row in rows}
        return stop

    def add_score(self, name: str, score: float) -> None:
        """Keep the score of a run."""
        self._file.append([{"id": name, "score": score}])
        self.scores[name] = score

    def values(self, name: str) -> dict[str, Any]:
        """What a scorer takes of a run."""
        return values_of(with_images(self.runs[name], self._file.path))

    def row(self, name: str) -> Run:
        """The line of a run in the final file, with None where it has no score."""
        return (self.runs.get(name) or self._left[name]) | {"score": self.scores.get(name)}


def discard(path: Path) -> None:
    """Remove what all processes had of the evaluation whose final file, at `path`, is whole."""
    for own in path.parent.glob(f"{path.name}.begun-?????-of-?????"):
        _remove(own)


def _remove(own: Path) -> None:
    own.unlink(missing_ok=True)
    note_of(own).unlink(missing_ok=True)
