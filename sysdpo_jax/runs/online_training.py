"""The engine of online rounds: what a round does, where it goes on, and which round is the last."""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sysdpo_jax.data.batches import preference_dataset
from sysdpo_jax.data.preferences import Preferences, load_preferences
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.io import locked_folder, note_of, read_json, write_json, write_json_lines
from sysdpo_jax.manifest import check_same, describe, digest, fingerprints
from sysdpo_jax.parallel.replicate import replicate_per_process
from sysdpo_jax.parallel.sharding import batch_shard, make_mesh
from sysdpo_jax.processes import by_all
from sysdpo_jax.runs.begun import discard
from sysdpo_jax.runs.held_out import HeldOut
from sysdpo_jax.runs.round_store import DONE, PLAN, RoundStore, RoundSummary
from sysdpo_jax.runs.rounds import Pair, Rounds, earlier_pairs, made_pairs, moved_pair
from sysdpo_jax.runs.runs_file import Run, read_lines
from sysdpo_jax.runs.scored_runs import RunScorer
from sysdpo_jax.training.progress import tell
from sysdpo_jax.training.trainer import BatchSource
from sysdpo_jax.typing import Params, Record

# In the folder of the run, and in that of a round.
ABOUT, RUNS, PREFERENCES = "online.json", "runs.jsonl", "preferences.jsonl"
REMEDY = "choose another directory, or give what it says"


class OnlineResult(NamedTuple):
    """What the rounds came to.

    Args:
        params: Of the best held-out evaluation, the first parameters among them; without held-out prompts of the last
            step.
        step: The one whose parameters they are.
        rounds: One after the other.
        stopped: Why they ended early, or None.
    """

    params: Params
    step: int
    rounds: tuple[RoundSummary, ...]
    stopped: str | None


@dataclass(frozen=True)
class OnlineTraining:
    """The rounds of a run, which go on wherever they were stopped.

    prompts: Of all rounds. maker: Makes and scores the runs. cache: Of prepared preferences, None for none. held_out:
    What is evaluated, at the end of each round and every `every` steps; None for nothing. patience: Evaluations without
    a better figure that end the run; None for no such end. batches: Of a round's preferences and seed;
    `preference_dataset` by default.
    """

    store: RoundStore
    prompts: Sequence[Record]
    maker: RunScorer
    cache: Path | None
    held_out: HeldOut | None = None
    every: int | None = None
    patience: int | None = None
    batches: Callable[[Preferences, int], BatchSource] | None = None

    @property
    def rounds(self) -> Rounds:
        """Their settings."""
        return self.store.rounds

    def run(self, params: Params, accepted: Callable[[], None] | None = None) -> OnlineResult:
        """Do what is missing of the rounds, with `params` as the first policy.

        accepted: Called by process 0 once no setting refuses the run.
        Raises `ConfigError` where the folder holds rounds of other settings, and as `Trainer.fit` and `RunScorer.rows`
        do; what is done stays done.
        """
        store, leads = self.store, jax.process_index() == 0
        with locked_folder(store.folder) if leads else nullcontext():
            by_all(self._check_same)
            self.rounds.check_prompts(len(self.prompts))
            if leads and accepted is not None:
                accepted()
            current, first, stopped = params, 0, None
            for number in range(1, self.rounds.number + 1):
                if store.summary(number) is None:
                    current = self._round(number, params, current, first)
                else:
                    current, _ = store.restored_round(number, params, current)
                done = store.summary(number)
                assert done is not None
                first, stopped = done.last, done.stopped
                if stopped is not None:
                    break
            if stopped is not None and leads:
                tell(f"the rounds end with round {number}: {stopped}")
            kept, step = current, first
            if store.best_step() not in (None, first):
                kept, step = store.restored(params, "best")
            return OnlineResult(kept, step, store.summaries()[:number], stopped)

    def _round(self, number: int, initial: Params, current: Params, first: int) -> Params:
        """The policy at the end of a round that begins with the step `first`."""
        store, folder, leads = self.store, self.store.round_folder(number), jax.process_index() == 0
        system = store.trainer.system
        rows = self._rows(number, current)
        earlier = by_all(lambda: self._write_preferences(number, rows) if leads else 0)
        own = replicate_per_process(system.frozen_params(current))
        records = load_preferences(folder / PREFERENCES, system, params=own, cache=self.cache)
        steps = self.rounds.steps_of(len(records), f"round {number}")
        score = float(np.mean([row["score"] for row in rows if row["score"] is not None]))
        plan = {"first": first, "steps": steps, "pairs": len(records), "runs": len(rows), "score": score}
        by_all(lambda: write_json(folder / PLAN, plan) if leads else None)
        if leads:
            tell(f"round {number}: {len(rows)} runs, mean score {score:.4g}; {len(records)} pairs, {steps} steps")
        evaluation = None
        if self.held_out is not None:
            every, patience = self.every or sys.maxsize, self.patience
            evaluation = self.held_out.evaluation(every, None if patience is None else (store.figure, "max", patience))
        trainer = store.trainer_of(number, steps, evaluation)
        state, batches = store.state(trainer, initial, current, first), self.batches or self._batches
        state = trainer.fit(state, batches(records, self.store.seed + number), first + steps, store.key)
        last = int(state.step)

        def note() -> None:
            stopped = self._why_stop(last, first + steps)
            write_json(folder / DONE, {**plan, "last": last, "earlier": earlier, "stopped": stopped})

        by_all(note if leads else lambda: None)
        return state.params

    def _rows(self, number: int, current: Params) -> list[Run]:
        """The scored runs of a round, made where the file is not there."""
        path, samples = self.store.round_folder(number) / RUNS, self.rounds.samples_of(number)
        about = {
            **self.maker.about,
            "prompts": digest(list(self.prompts)),
            "samples": str(samples),
            "batch": str(self.maker.batch_size),
            "seed": f"{self.store.seed}, round {number}",
        }
        noted = about | {"parameters": digest(fingerprints(replicate_per_process(current)))}
        if path.exists():
            check_same(str(path), read_json(note_of(path)), noted, REMEDY)
            if jax.process_index() == 0:
                # A kill may have come before it.
                discard(path)
            return list(read_lines(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        key = jax.random.fold_in(jax.random.key(self.store.seed), number)
        rows = replace(self.maker, about=about).rows(path, current, self.prompts, samples, key, f"round {number}")
        if all(row["score"] is None for row in rows):
            raise ConfigError(f"{path}: no run of round {number} has a score: fix the scorer, or the prompts")

        def write() -> None:
            write_json(note_of(path), noted)
            write_json_lines(path, rows)
            discard(path)

        by_all(write if jax.process_index() == 0 else lambda: None)
        return rows

    def _write_preferences(self, number: int, rows: Sequence[Run]) -> int:
        """Write a round's preferences. Returns how many of them are of earlier rounds."""
        path = self.store.round_folder(number) / PREFERENCES
        own = list(made_pairs(rows, self.rounds))
        if not own:
            raise ConfigError(
                f"round {number}: no two runs of a prompt differ by {self.rounds.min_margin:g} or more: sample more "
                "runs of each prompt, or lower min_margin"
            )
        before: list[Pair] = []
        for each in range(1, number) if self.rounds.mix else ():
            source = self.store.round_folder(each) / RUNS
            before += [moved_pair(pair, source, path) for pair in made_pairs(list(read_lines(source)), self.rounds)]
        mixed = earlier_pairs(before, len(own), self.rounds.mix, (self.store.seed, number))
        if not path.exists():
            write_json_lines(path, own + mixed)
        return len(mixed)

    def _batches(self, records: Preferences, seed: int) -> BatchSource:
        trainer = self.store.trainer
        shard = batch_shard(make_mesh() if trainer.mesh is None else trainer.mesh)
        return preference_dataset(trainer.system, records, self.rounds.batch_size, seed, shard)

    def _why_stop(self, last: int, planned: int) -> str | None:
        """Why no round follows the one that ended at step `last`: a watched figure fell, or patience is at its end."""
        for name in self.rounds.stop_on if self.held_out is not None else ():
            best, value = self.store.best_of(name, last)
            if best == last or self.held_out is None:
                continue
            change = self.held_out.difference(name, last, best)
            below = change.interval is not None and change.interval.high < 0
            if below or (self.rounds.fall is not None and -change.value > self.rounds.fall):
                ends = "" if change.interval is None else f" [{change.interval.low:.3g}, {change.interval.high:.3g}]"
                return (
                    f"{name} on held-out prompts changed by {change.value:.3g}{ends} since step {best}, where it was "
                    f"{value:.4g}"
                )
        return f"{self.store.figure} was no better in {self.patience} evaluations" if last < planned else None

    def _check_same(self) -> None:
        """Note the settings of the rounds, or raise `ConfigError` where the folder has others."""
        path = self.store.folder / ABOUT
        watched = {} if self.held_out is None else self.held_out.about
        present = {
            **describe("rounds", {name: value for name, value in asdict(self.rounds).items() if name != "number"}),
            **{f"runs {name}": text for name, text in self.maker.about.items()},
            **{f"held-out {name}": text for name, text in watched.items()},
            "prompts": digest(list(self.prompts)),
            "seed": str(self.store.seed),
        }
        if path.exists():
            check_same(str(path), read_json(path), present, REMEDY)
        elif jax.process_index() == 0:
            write_json(path, present)
