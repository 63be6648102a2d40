"""Runs of a system with their scores: made and scored by all processes together, each run once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
from jaxtyping import PRNGKeyArray

from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.data.rollouts import run_batches
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.judge import Judge
from sysdpo_jax.evaluation.scoring import Scorer, score_of, score_runs
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.io import ResumableJsonl
from sysdpo_jax.manifest import digest, fingerprints
from sysdpo_jax.parallel.distributed import gathered
from sysdpo_jax.parallel.replicate import replicate_per_process
from sysdpo_jax.runs.runs_file import Line, Outcomes, keep_runs, values_of, with_images
from sysdpo_jax.training.progress import Lines
from sysdpo_jax.typing import Params, Record


@dataclass(frozen=True)
class RunScorer:
    """How runs are made and scored.

    scorer: a function of a run, or a judge, which is asked `parallel` questions at a time. skip: leaves a run without a
    score out. batch_size: runs that are sampled together; part of what is drawn. figures: further functions of a run,
    by name, cheap ones: they are asked again after a stop. about: tells scorers, and whatever else the runs depend on,
    from others.
    """

    system: CompoundSystem
    scorer: Scorer | Judge
    parallel: int
    skip: bool
    batch_size: int
    about: Mapping[str, str]
    figures: Mapping[str, Scorer] = field(default_factory=dict)

    def rows(
        self, path: Path, params: Params, prompts: Sequence[Record], samples: int, key: PRNGKeyArray, label: str
    ) -> list[Line]:
        """`samples` runs of each prompt, those of a prompt adjacent, as lines of a file with "score" and "figures".

        Of several processes each samples and scores its share of the batches on its own devices, and all return all
        rows; what is drawn does not depend on their number. What is there already, whatever ended an earlier call, a
        kill included, is taken. `discard(path)` removes it once the rows are written.

        Args:
            path: Of the file that the rows are for. Images lie beside it.
            params: Of the system, on the mesh of all processes or on each one's devices.
            label: Stands before the count on standard error.

        Raises:
            ScoreError: A run has no score, and is not to be skipped.
            ToolError: A tool stopped the runs.
        """
        own = replicate_per_process(params)
        index, count = jax.process_index(), jax.process_count()
        begun = _begun(path, {**self.about, "parameters": digest(fingerprints(own))})
        names = [f"{prompt}-{sample}" for prompt in range(len(prompts)) for sample in range(samples)]
        mine = [place for place in range(len(names)) if place // self.batch_size % count == index]
        done = frozenset(place for place in mine if names[place] in begun.made)
        lines, images, shard = Lines(f"{label}, runs", len(done), len(mine)), ImageFiles(path), (index, count)
        for batch in run_batches(self.system, own, prompts, key, samples, self.batch_size, shard, done):
            keep_runs(begun, self.system, prompts, ((names[place], run) for place, run in batch), images)
            if index == 0:
                lines.report(len(begun.made) + len(begun.failed), "")

        def values(name: str) -> Line:
            # Of the lines, as `sysdpo score` has them: a run has the same score after a stop as without one.
            return values_of(with_images(begun.made[name], path))

        def row(name: str) -> Line:
            line = begun.made.get(name) or begun.failed[name]
            scored = line | {"score": line.get("score")}
            if not self.figures or scored["score"] is None:
                return scored
            run = values(name)
            return scored | {"figures": {title: score_of(figure, run, name) for title, figure in self.figures.items()}}

        def keep(name: str, score: float) -> None:
            begun.add([{"id": name, "score": score}])

        waiting = [name for name, line in begun.made.items() if "score" not in line]
        score_runs(self.scorer, waiting, values, self.parallel, self.skip, keep)
        together = [pair for pairs in gathered([(place, row(names[place])) for place in mine]) for pair in pairs]
        return [line for _, line in sorted(together, key=lambda pair: pair[0])]


def _begun(path: Path, about: Mapping[str, str]) -> Outcomes:
    """What this process has of the runs of a file, and then of their scores, until the file is whole.

    What is there of one that was made in the same way is taken; of another one it is dropped: no evaluation can use it
    any more.
    """
    part = f"begun-{jax.process_index() + 1:05d}-of-{jax.process_count():05d}"
    own = path.with_name(f"{path.name}.{part}")
    try:
        ResumableJsonl(own, about)
    except ConfigError:
        discard(path, part)
    return Outcomes(own, about)


def discard(path: Path, part: str = "begun-?????-of-?????") -> None:
    """Remove what all processes, or one of them, had of the runs of a file, with the notes of how they were made."""
    for own in path.parent.glob(f"{path.name}.{part}*"):
        own.unlink(missing_ok=True)
