"""Alignment of the reference system, or of one component of it alone, with the library's Trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import PRNGKeyArray

import sysdpo_jax as sj
from experiments.common import models
from experiments.progressive import judge
from experiments.progressive.system import IMAGE, LANGUAGE
from experiments.progressive.world import Request
from sysdpo_jax.training import ProgressFactory, SystemOptimizer
from sysdpo_jax.typing import Params

# Parameters through which the caption acts on the picture.
CONDITIONING = "attn2|text_encoder"


@dataclass(frozen=True)
class AlignConfig:
    """Preference pairs and the optimisation on them.

    samples, online_samples: runs of each request that the pairs of the first and of later rounds come from.
    online_rounds: after the first; held_out_samples: runs of each validation request after a round; fall: of their mean
    score or order consistency that ends the rounds whatever its noise.
    group, min_margin: the best run of a group against its worst, when their scores differ by this much.
    image_weight, timesteps: of the images' log-ratio, see `system.build`. sft: of the winner's answer.
    epochs: most passes over the pairs; fewer pairs mean fewer steps.
    """

    beta: float = 1.0
    image_weight: float = 200.0
    timesteps: tuple[int, int] = (300, 960)
    steps: int = 200
    batch_size: int = 32
    epochs: int = 12
    language_rate: float = 3e-4
    image_rate: float = 5e-4
    sft: float = 0.3
    samples: int = 160
    online_samples: int = 96
    online_rounds: int = 1
    held_out_samples: int = 24
    fall: float = 0.05
    sample_batch: int = 256
    group: int = 8
    min_margin: float = 0.4


def optimizer_of(system: sj.CompoundSystem, trained: Sequence[str], config: AlignConfig, steps: int) -> SystemOptimizer:
    """Adam with the rates of the configuration over so many steps. trained: the parameter keys that are not frozen."""
    rates = {LANGUAGE: (config.language_rate, ".*"), IMAGE: (config.image_rate, CONDITIONING)}
    return sj.make_optimizer(
        {key: models.adam_with_warmup(*rates[key], steps) if key in trained else sj.FROZEN for key in system.param_keys}
    )


def objective_of(trained: Sequence[str], config: AlignConfig) -> sj.DirectObjective:
    """SysDPO-Direct, with the likelihood of the winner's answer where the language model is trained."""
    return sj.DirectObjective(config.beta, sft=(("answer", config.sft),) if LANGUAGE in trained else ())


def align_in_rounds(
    system: sj.CompoundSystem,
    params: Params,
    requests: Mapping[str, Sequence[Request]],
    config: AlignConfig,
    number: int,
    directory: Path,
    seed: int,
    progress: ProgressFactory,
) -> Params:
    """The system after so many online rounds on the training requests; rounds that are in the directory count.

    They end where the score or the order consistency of validation requests falls.
    """
    same = ("sample_batch", "group", "min_margin", "steps", "epochs", "batch_size", "fall")
    settings: dict[str, Any] = {name: getattr(config, name) for name in same}
    rounds = sj.Rounds(number, samples=(config.samples, config.online_samples), stop_on=("score", "order"), **settings)
    both = (LANGUAGE, IMAGE)
    first = optimizer_of(system, both, config, config.steps)
    trainer = sj.Trainer(system, objective_of(both, config), first, directory, keep=1, progress=progress)
    inputs = {part: [{"request": request.text} for request in requests[part]] for part in ("train", "validation")}
    return sj.online(
        trainer,
        params,
        inputs["train"],
        judge.score,
        rounds,
        held_out=inputs["validation"],
        held_out_samples=config.held_out_samples,
        figures={"order": judge.in_order},
        optimizer=lambda steps: optimizer_of(system, both, config, steps),
        seed=seed,
    ).params


def align(
    system: sj.CompoundSystem,
    params: Params,
    pairs: Sequence[sj.PreferenceRecord],
    trained: str,
    config: AlignConfig,
    directory: Path,
    key: PRNGKeyArray,
    progress: ProgressFactory,
    rows_per_pair: int,
) -> Params:
    """Parameters of the system after SysDPO-Direct on the pairs, with `params` as reference.

    trained: the parameter key that is trained, others are frozen. rows_per_pair: how many pairs take the place of one
    in a batch, where a pair is not a whole run.
    """
    batch_size = config.batch_size * rows_per_pair
    steps = min(config.steps, config.epochs * (len(pairs) // batch_size))
    optimizer = optimizer_of(system, (trained,), config, steps)
    trainer = sj.Trainer(system, objective_of((trained,), config), optimizer, directory, keep=1, progress=progress)
    return models.align(
        trainer, params, partial(sj.epoch_batches, sj.prepare_pairs(system, pairs), batch_size), steps, key
    )


def language_part(system: sj.CompoundSystem) -> sj.CompoundSystem:
    """The language model alone."""
    return sj.CompoundSystem(("request",), (system.node("answer"),))


def image_part(system: sj.CompoundSystem) -> sj.CompoundSystem:
    """The image model alone: one picture for one caption, with the log-ratio's weight of the whole system."""
    node = system.node("images")
    assert isinstance(node.component, sj.Diffusion)

    single = replace(node.component, strata=1)
    return sj.CompoundSystem(("caption",), (sj.Node("image", single, ("caption",), params=IMAGE, weight=node.weight),))
