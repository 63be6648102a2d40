"""vLLM's `LLM.generate` on token ids, without its cache of prefixes, which would spare the repetitions their prompts.

Its engine is a process of its own, whose memory and parameters cannot be seen from here.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vllm

from experiments.benchmarks.peers.side import COMPARED_TOKENS, Measured, answer, timed
from experiments.benchmarks.peers.torch_side import device_of, llama_config, measured, synchronize
from experiments.benchmarks.peers.work import Decode


def measure(work: Decode, folder: Path, told: Mapping[str, Any]) -> Measured:
    """told: nothing of it is read."""
    began, device = time.perf_counter(), device_of(work.device)
    where, loading = folder / "weights", dict[str, Any]()
    if not work.same_weights:
        where = folder / "vllm"
        llama_config(work.decoder).save_pretrained(where)
        loading = {"load_format": "dummy"}
    engine = vllm.LLM(
        str(where),
        dtype=work.precision,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=work.prompt + work.new,
        max_num_seqs=work.rows,
        **loading,
    )
    settings = vllm.SamplingParams(
        temperature=0.0 if work.greedy else 1.0, max_tokens=work.new, ignore_eos=True, detokenize=False
    )
    prompts: Any = [{"prompt_token_ids": row} for row in work.prompts().tolist()]
    made: Any = None

    def run() -> None:
        nonlocal made
        made = engine.generate(prompts, settings, use_tqdm=False)

    def wait() -> None:
        synchronize(device)

    timed(run, wait, 1, 1)
    first = time.perf_counter() - began
    seconds = timed(run, wait, work.repeats, 1)
    tokens = [list(row.outputs[0].token_ids) for row in made]
    checks: dict[str, Any] = {"shape": [len(tokens), len(tokens[0])]}
    if work.same_weights:
        checks["tokens"] = [row[:COMPARED_TOKENS] for row in tokens]
    return measured(device, seconds, first, None, checks, ("vllm", "transformers"))


if __name__ == "__main__":
    answer(measure)
