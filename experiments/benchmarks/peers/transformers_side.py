"""transformers' `generate`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.benchmarks.peers.side import COMPARED_TOKENS, Measured, answer, timed
from experiments.benchmarks.peers.torch_side import device_of, llama, measured, synchronize
from experiments.benchmarks.peers.work import Decode


def measure(work: Decode, folder: Path, told: Mapping[str, Any]) -> Measured:
    """told: nothing of it is read."""
    began, device = time.perf_counter(), device_of(work.device)
    model = llama(work, folder / "weights" if work.same_weights else None).eval()
    # No token ends a sequence.
    model.generation_config.eos_token_id = None
    prompts = torch.tensor(work.prompts(), dtype=torch.long, device=device)
    drawing: dict[str, Any] = {"do_sample": False} if work.greedy else {"do_sample": True, "top_k": 0}
    made: Any = None

    def run() -> None:
        nonlocal made
        with torch.inference_mode():
            made = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=work.new,
                pad_token_id=0,
                **drawing,
            )

    def wait() -> None:
        synchronize(device)

    timed(run, wait, 1, 1)
    first = time.perf_counter() - began
    seconds = timed(run, wait, work.repeats, 1)
    tokens = made[:, work.prompt :].cpu().numpy()
    checks: dict[str, Any] = {"shape": list(tokens.shape)}
    if work.same_weights:
        checks["tokens"] = tokens[:, :COMPARED_TOKENS].tolist()
    return measured(device, seconds, first, model, checks, ("transformers",))


if __name__ == "__main__":
    answer(measure)
