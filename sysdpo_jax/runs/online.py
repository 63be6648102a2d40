"""Online preference optimisation: rounds of runs, scores, pairs and training, each on the policy of the one before it.

In a round the current policy pi_k makes runs, a scorer or judge ranks them, and the SysDPO loss is minimised on their
pairs. With reference="reset" the loss compares with pi_k itself: its minimiser over all policies is pi_(k+1)
proportional to pi_k exp(r / beta), so that K rounds reach pi_0 exp(K r / beta), further from the first policy than any
single round may go. With reference="keep" it compares with pi_0, and every round has the same minimiser,
pi_0 exp(r / beta), for which later rounds give pairs where the policy is by then. See arXiv 2312.11456 (iterative DPO)
and arXiv 2402.04792 (online feedback). Nothing holds the policy near the first one but the end of the rounds: hence the
held-out figures.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from sysdpo_jax.data import Preferences, load_preferences, preference_dataset
from sysdpo_jax.data.prepared import about_system
from sysdpo_jax.data.rollouts import preferred
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.judge import Judge
from sysdpo_jax.evaluation.scoring import Scorer
from sysdpo_jax.io import locked_folder, note_of, read_json, write_json, write_json_lines
from sysdpo_jax.manifest import check_same, describe, digest, fingerprints
from sysdpo_jax.parallel.sharding import batch_shard, replicate_per_process
from sysdpo_jax.processes import by_all
from sysdpo_jax.runs.held_out import FOLDER, HeldOut, RunScorer, discard
from sysdpo_jax.runs.rounds import DONE, PLAN, Rounds, RoundStore, RoundSummary, check_watched
from sysdpo_jax.runs.runs_file import Line, moved, read_lines
from sysdpo_jax.training.metrics import EVALUATED
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.progress import tell
from sysdpo_jax.training.trainer import BatchSource, Trainer
from sysdpo_jax.typing import Params, Record
from sysdpo_jax.user_code import name_of

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
            # First of all: what refuses a start must leave nothing that refuses the next one.
            self.rounds.check_prompts(len(self.prompts))
            by_all(self._check_same)
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
                    if leads:
                        tell(f"the rounds end with round {number}: {stopped}")
                    break
            last_is_best = store.best_step() in (None, first)
            kept, step = (current, first) if last_is_best else store.restored(params, "best")
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
        _by_first(lambda: write_json(folder / PLAN, plan))
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

        _by_first(note)
        return state.params

    def _rows(self, number: int, current: Params) -> list[Line]:
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

        _by_first(write)
        return rows

    def _write_preferences(self, number: int, rows: Sequence[Line]) -> int:
        """Write a round's preferences. Returns how many of them are of earlier rounds."""
        path = self.store.round_folder(number) / PREFERENCES
        own = list(made_pairs(rows, self.rounds))
        if not own:
            raise ConfigError(
                f"round {number}: no two runs of a prompt differ by {self.rounds.min_margin:g} or more: sample more "
                "runs of each prompt, or lower min_margin"
            )
        before, mix = list[Line](), self.rounds.mix
        for each in range(1, number) if mix else ():
            source = self.store.round_folder(each) / RUNS
            before += [moved(pair, source, path) for pair in made_pairs(read_lines(source), self.rounds)]
        wanted = min(len(before), round(mix / (1 - mix) * len(own)))
        drawn = np.random.default_rng((self.store.seed, number)).choice(len(before), wanted, replace=False)
        mixed = [before[place] for place in np.sort(drawn)]
        if not path.exists():
            write_json_lines(path, own + mixed)
        return len(mixed)

    def _batches(self, records: Preferences, seed: int) -> BatchSource:
        trainer, rows = self.store.trainer, self.rounds.batch_size
        shard = batch_shard(trainer.step.mesh)
        return preference_dataset(trainer.system, records, rows, seed, shard, accumulate=trainer.accumulate)

    def _why_stop(self, last: int, planned: int) -> str | None:
        """Why no round follows the one that ended at step `last`: a watched figure fell, or patience is at its end."""
        for name in self.rounds.stop_on:
            found = self.store.best_of(f"{EVALUATED}{name}")
            if self.held_out is None or found is None or found[1] == last:
                continue
            value, best = found
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
        watched = {} if self.held_out is None else self.held_out.maker.about
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


def _by_first(work: Callable[[], None]) -> None:
    """Process 0 does the work; where it fails, all do."""
    by_all(work if jax.process_index() == 0 else lambda: None)


def made_pairs(rows: Iterable[Line], rounds: Rounds) -> Iterator[Line]:
    """The preferences within groups of adjacent runs of a prompt, both of which have a score.

    rows: as `RunScorer.rows` returns them.
    """
    for _, of_prompt in groupby(rows, lambda row: row["id"].rpartition("-")[0]):
        runs = list(of_prompt)
        size = rounds.group or len(runs)
        for start in range(0, len(runs), size):
            scored = [run for run in runs[start : start + size] if run["score"] is not None]
            if len(scored) < 2:
                continue
            scores = np.array([run["score"] for run in scored], np.float64)
            for better, worse in preferred(scores, rounds.pairs, rounds.min_margin):
                chosen, rejected = scored[better], scored[worse]
                yield {"inputs": chosen["inputs"], "chosen": chosen["outputs"], "rejected": rejected["outputs"]}


def online(
    trainer: Trainer,
    params: Params,
    prompts: Sequence[Record],
    scorer: Scorer | Judge,
    rounds: Rounds,
    *,
    held_out: Sequence[Record] = (),
    held_out_samples: int = 8,
    figures: Mapping[str, Scorer] | None = None,
    every: int | None = None,
    patience: int | None = None,
    optimizer: Callable[[int], SystemOptimizer] | None = None,
    batches: Callable[[Preferences, int], BatchSource] | None = None,
    parallel: int = 8,
    skip: bool = False,
    seed: int = 0,
) -> OnlineResult:
    """Align a system in rounds: runs of the current policy, scores, pairs, training, held-out evaluation.

    Called again with the same arguments it goes on where it was stopped, within a round too: no run is made, scored or
    trained on twice, and the result is that of an undisturbed call. The trainer's directory has round-1/, round-2/ ...
    with runs.jsonl (the runs with their scores), preferences.jsonl and checkpoints/; evaluation/ with the held-out
    runs; and one metrics.jsonl. More rounds are added by calling it with a larger `rounds.number`.

    After a round the run ends where a figure of `rounds.stop_on` is below its best by more than its noise, which is
    where the 95% interval of the paired difference (the same prompts and noise, clustered by prompt) lies below 0, or
    by more than `rounds.fall`. What is returned is the best evaluation's in any case.

    Args:
        trainer: Of each round: system, objective, optimiser, mesh and the like. Its directory is the run's.
        params: The first policy, and the first reference.
        prompts: Objects with the system's inputs.
        scorer: run -> number, higher is better; or a judge. Of the pairs and of the held-out figures.
        rounds: See `Rounds`.
        held_out: Prompts that no round trains on; without them no round is compared, and the last one counts.
        held_out_samples: Runs of each.
        figures: Further functions of a run, by name, whose held-out means are logged and may stand in `stop_on`.
        every: Steps between evaluations, beside that of each round's end.
        patience: Evaluations without a better figure after which the run ends.
        optimizer: Of a round of so many steps, for schedules; by default the trainer's, anew in each round.
        batches: Of a round's preferences and a seed, such as `SearchedBatches` for a `SamplingObjective`.
        parallel: Questions that a judge is asked at a time.
        skip: Leaves runs without a score out instead of stopping.
        seed: Of the runs, of held-out noise and of the order of pairs.

    Returns:
        The parameters of the best evaluation with its step, and the rounds.

    Raises:
        ConfigError: The folder is of other settings, or a round's runs make no pairs.
        ScoreError: A run has no score.
        Preempted: The process was asked to stop; everything is saved.
    """
    figures = dict(figures or {})
    check_watched(rounds.stop_on, figures, "rounds: ")
    folder = Path(trainer.directory)
    if isinstance(scorer, Judge):
        asked = digest([scorer.template, scorer.form, scorer.config.model, scorer.config.temperature])
    else:
        asked = name_of(scorer)
    about = {"scorer": asked, "system": digest(about_system(trainer.system))}
    maker = RunScorer(trainer.system, scorer, parallel, skip, rounds.sample_batch, about)
    watched = None
    if held_out:
        own = {"prompts": digest(list(held_out)), "samples": str(held_out_samples), "figures": ", ".join(figures)}
        measurer = replace(maker, about=about | own, figures=figures)
        watched = HeldOut(measurer, held_out, held_out_samples, seed, folder / FOLDER, about["system"])
    store = RoundStore(trainer, rounds, seed, optimizer)
    training = OnlineTraining(store, prompts, maker, folder / "prepared", watched, every, patience, batches)
    return training.run(params)
