"""The work of a DPO step whose prompts go through the model once for both sides, beside the plain step's.

    python -m experiments.benchmarks.shared_prompts > docs/benchmarks/shared_prompts.json

Floating-point operations in matrix products are counted from the traced step (`count_flops`): policy and reference,
forward and backward pass, attention and head included, nothing recomputed. Nothing is computed or allocated, so any
machine gives the same numbers.
"""

import json
import sys
from dataclasses import dataclass, replace
from typing import Any

import jax

import sysdpo_jax as sj
from experiments.common.command import made_by, parse
from experiments.scaling import systems
from sysdpo_jax.models import DecoderConfig
from sysdpo_jax.training import count_flops

MODULE = "experiments.benchmarks.shared_prompts"


@dataclass(frozen=True)
class Config:
    """decoders: names in shapes.yaml; lengths: tokens of prompt and completion; pairs: in a step."""

    decoders: tuple[str, ...] = ("llama-3.2-1b", "llama-3-8b")
    lengths: tuple[tuple[int, int], ...] = ((256, 768), (512, 512), (1024, 256), (2048, 128))
    pairs: int = 8


def step_work(config: DecoderConfig, prompt: int, completion: int, pairs: int, shared: bool) -> int:
    """FLOPs of the gradient of one step."""
    plain = replace(config, attention="plain", remat=None)
    model = systems.writer(plain, prompt, completion)
    system = sj.CompoundSystem(("prompt",), (sj.Node("answer", model, ("prompt",)),))
    side = {k: v for k, v in systems.text_features(model, pairs).items() if shared or k != "shared"}
    batch = sj.PairBatch({"answer": side}, {"answer": side})
    params = jax.eval_shape(system.init, jax.random.key(0))

    def loss(params: Any, reference: Any, batch: Any) -> Any:
        return sj.DirectObjective()(system, params, reference, batch, jax.random.key(0))[0]

    return count_flops(jax.grad(loss), params, params, batch)


def main(arguments: list[str]) -> None:
    """Print the figures as JSON."""
    config = parse(Config(), arguments, __doc__)
    cases = []
    for name in config.decoders:
        for prompt, completion in config.lengths:
            plain, shared = (
                step_work(systems.DECODERS[name], prompt, completion, config.pairs, each) for each in (False, True)
            )
            case = {"decoder": name, "prompt": prompt, "completion": completion}
            cases.append({**case, "plain_flops": plain, "shared_flops": shared, "ratio": round(shared / plain, 3)})
    result = {"pairs": config.pairs, "cases": cases}
    print(json.dumps({**result, "made_by": made_by(MODULE, arguments, ("jax",))}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
