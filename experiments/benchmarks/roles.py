"""Three roles of one language model beside one of them, and their rows together beside one pass for each role.

    python -m experiments.benchmarks.roles > docs/benchmarks/roles.json

Memory: the whole step on one chip, of one role and of three with as many pairs each, under both settings of `remat`
that keep no products. Passes: a step of few tokens on each of several chips, over which the weights lie, and what its
program reads, computes and sends where roles go through the model together and where each goes alone. All figures are
the TPU compiler's, of shapes alone, so that any machine gives the same numbers; it needs libtpu:
`pip install ".[tpu-aot]"`. A scanned layer counts once in its FLOPs and bytes, in every program alike.
"""

import json
import sys
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import jax

from experiments import compile_tpu
from experiments.common.command import made_by, parse
from experiments.scaling.systems import Config as Step

MODULE = "experiments.benchmarks.roles"


@dataclass(frozen=True)
class Config:
    """role, roles: names in experiments/scaling/systems.py. chip, pairs, tokens: of the memory. chips, few: topology
    and tokens, prompt and completion, of the passes, with a pair for each chip. level: the compiler's effort."""

    role: str = "llama3-8b-role"
    roles: str = "llama3-8b-roles"
    chip: str = "v5p:1x1x1"
    pairs: int = 2
    tokens: int = 1024
    chips: str = "v5e:2x4"
    few: int = 256
    level: str = "O1"


def compiled(step: Step) -> dict[str, Any]:
    """The compiler's account of a step, without what it says of seconds."""
    made = compile_tpu.run(step)
    names = ("memory_per_chip_gib", "collectives_per_chip", "compiler_flops_per_chip", "compiler_bytes_per_chip")
    return {name: made[name] for name in names}


def memory(config: Config, remat: str) -> dict[str, Any]:
    """Of one role and of three, in GiB; ratio: of arguments and temporaries."""
    step = Step(config.role, config.chip, "lora", batch=config.pairs, sequence=config.tokens, remat=remat)
    one, three = (compiled(replace(step, system=name))["memory_per_chip_gib"] for name in (config.role, config.roles))
    size = lambda found: found["arguments"] + found["temporaries"]  # noqa: E731
    return {"remat": remat, "one": one, "three": three, "ratio": round(size(three) / size(one), 3)}


def passes(config: Config) -> dict[str, Any]:
    """Of three roles together and apart."""
    step = Step(config.roles, config.chips, "lora", sequence=config.few, remat="full")
    together = compiled(step)
    alone = patch("sysdpo_jax.roles.pays", lambda *_: False)
    with alone:
        apart = compiled(step)
    return {"together": together, "apart": apart}


def main(arguments: list[str]) -> None:
    """Print the figures as JSON."""
    config = parse(Config(), arguments, __doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_optimization_level", config.level)
    result = {"memory": [memory(config, remat) for remat in ("full", "whole")], "passes": passes(config)}
    about = {"pairs": config.pairs, "tokens": config.tokens, "chip": config.chip}
    few = {"chips": config.chips, "few_tokens": config.few, "level": config.level}
    print(json.dumps({**about, **few, **result, "made_by": made_by(MODULE, arguments, ("jax", "libtpu"))}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
