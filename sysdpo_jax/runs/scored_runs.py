"""Runs of a system with their scores: made and scored by all processes together, each run once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PRNGKeyArray

from sysdpo_jax.data.files import ImageFiles
from sysdpo_jax.data.rollouts import run_batches
from sysdpo_jax.evaluation.judge import Judge
from sysdpo_jax.evaluation.scoring import Scorer, score_of, score_runs
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.manifest import digest, fingerprints
from sysdpo_jax.parallel.distributed import gathered
from sysdpo_jax.parallel.sharding import replicate_per_process
from sysdpo_jax.runs.begun import Begun
from sysdpo_jax.runs.runs_file import Run
from sysdpo_jax.training.progress import Lines
from sysdpo_jax.typing import Params


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
        self,
        path: Path,
        params: Params,
        prompts: Sequence[Mapping[str, Any]],
        samples: int,
        key: PRNGKeyArray,
        label: str,
    ) -> list[Run]:
        """`samples` runs of each prompt, those of a prompt adjacent, as lines of a file with "score" and "figures".

        Of several processes each samples and scores its share of the batches on its own devices, and all return all
        rows; what is drawn does not depend on their number. What is there already, whatever ended an earlier call, a
        kill included, is taken: see `Begun`. `discard(path)` removes it once the rows are written.

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
        begun = Begun(path, {**self.about, "parameters": digest(fingerprints(own))})
        names = [f"{prompt}-{sample}" for prompt in range(len(prompts)) for sample in range(samples)]
        mine = [place for place in range(len(names)) if place // self.batch_size % count == index]
        done = {place for place in mine if names[place] in begun.runs}
        lines, images = Lines(f"{label}, runs", len(done), len(mine)), ImageFiles(path)
        shard = index, count
        for batch in run_batches(self.system, own, prompts, key, samples, self.batch_size, shard, frozenset(done)):
            stop = begun.add_runs(self.system, prompts, images, [(names[place], run) for place, run in batch])
            if stop is not None:
                raise stop
            done |= {place for place, _ in batch}
            if index == 0:
                lines.report(len(done), "")
        # Of the lines, as `sysdpo score` has them: a run has the same score after a stop as without one.
        waiting = [names[place] for place in mine if names[place] in begun.runs and names[place] not in begun.scores]
        score_runs(self.scorer, waiting, begun.values, self.parallel, self.skip, begun.add_score)
        numbered = [(place, self._with_figures(begun, names[place])) for place in mine]
        together = [pair for pairs in gathered(numbered) for pair in pairs]
        return [row for _, row in sorted(together, key=lambda pair: pair[0])]

    def _with_figures(self, begun: Begun, name: str) -> Run:
        row = begun.row(name)
        if not self.figures or row["score"] is None:
            return row
        values = begun.values(name)
        return row | {"figures": {title: score_of(figure, values, name) for title, figure in self.figures.items()}}
