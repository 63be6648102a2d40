"""Settings of the alignment of the reference system, and its components as systems of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import sysdpo_jax as sj
from experiments.common import models
from experiments.progressive.system import IMAGE, LANGUAGE
from sysdpo_jax.training import SystemOptimizer

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


def language_part(system: sj.CompoundSystem) -> sj.CompoundSystem:
    """The language model alone."""
    return sj.CompoundSystem(("request",), (system.node("answer"),))


def image_part(system: sj.CompoundSystem) -> sj.CompoundSystem:
    """The image model alone: one picture for one caption, with the log-ratio's weight of the whole system."""
    node = system.node("images")
    assert isinstance(node.component, sj.Diffusion)

    single = replace(node.component, strata=1)
    return sj.CompoundSystem(("caption",), (sj.Node("image", single, ("caption",), params=IMAGE, weight=node.weight),))
