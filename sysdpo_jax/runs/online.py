"""Online preference optimisation: rounds of runs, scores, pairs and training, each on the policy of the one before it.

In a round the current policy pi_k makes runs, a scorer or judge ranks them, and the SysDPO loss is minimised on their
pairs. With reference="reset" the loss compares with pi_k itself: its minimiser over all policies is pi_(k+1)
proportional to pi_k exp(r / beta), so that K rounds reach pi_0 exp(K r / beta), further from the first policy than any
single round may go. With reference="keep" it compares with pi_0, and every round has the same minimiser,
pi_0 exp(r / beta), for which later rounds give pairs where the policy is by then. See arXiv 2312.11456 (iterative DPO)
and arXiv 2402.04792 (online feedback). Nothing holds the policy near the first one but the end of the rounds: hence the
held-out figures.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sysdpo_jax.data.preferences import Preferences
from sysdpo_jax.data.prepared import about_system
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.judge import Judge
from sysdpo_jax.evaluation.scoring import Scorer
from sysdpo_jax.manifest import digest
from sysdpo_jax.runs.held_out import FOLDER, HeldOut
from sysdpo_jax.runs.online_training import OnlineResult, OnlineTraining
from sysdpo_jax.runs.round_store import RoundStore
from sysdpo_jax.runs.rounds import Rounds
from sysdpo_jax.runs.scored_runs import RunScorer
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.trainer import BatchSource, Trainer
from sysdpo_jax.typing import Params, Record
from sysdpo_jax.user_code import name_of


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
    figures = {} if figures is None else dict(figures)
    unknown = [name for name in rounds.stop_on if name not in ("score", *figures)]
    if unknown:
        known = ", ".join(("score", *figures))
        raise ConfigError(f"rounds: stop_on {unknown[0]!r} is no held-out figure: choose among {known}")
    folder = Path(trainer.directory)
    if isinstance(scorer, Judge):
        asked = digest([scorer.template, scorer.form, scorer.config.model, scorer.config.temperature])
    else:
        asked = name_of(scorer)
    about = {"scorer": asked, "system": digest(about_system(trainer.system))}
    watched = None
    if held_out:
        own = {"prompts": digest(list(held_out)), "samples": str(held_out_samples), "figures": ", ".join(figures)}
        watched = HeldOut(
            trainer.system,
            held_out,
            scorer,
            parallel,
            skip,
            held_out_samples,
            rounds.sample_batch,
            seed,
            folder / FOLDER,
            about | own,
            about["system"],
            figures,
        )
    maker = RunScorer(trainer.system, scorer, parallel, skip, rounds.sample_batch, about)
    store = RoundStore(trainer, rounds, seed, optimizer)
    training = OnlineTraining(store, prompts, maker, folder / "prepared", watched, every, patience, batches)
    return training.run(params)
