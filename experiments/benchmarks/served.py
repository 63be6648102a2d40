"""Rollouts of SmolLM2-135M by a vLLM server beside our own decoding, with the same weights on the same machine.

    make benchmark-served
    python -m experiments.benchmarks.served --vllm-python PATH [--prompts 16] [--samples 4] [--new-tokens 64]

The server (float32, the model as `pretrained.save` writes it) is started by this script and stopped at the end. Both
sides sample the same number of texts of at most as many tokens from the same prompts at temperature 1, by turns, so
that whatever else the machine does is shared by both; each is warmed up before. The figures are medians over the
repeats: new tokens a second, the trainer's check of the server's log-probabilities included in its side, their ratio
within a repeat, and the share of the server's side that is not waiting for the server. Both have LoRA factors as large
as after training, which are handed over as an adapter; the table has the seconds until the first answer with it, and
how far the server's log-probabilities are from the model's, in nats a token. A mean gap of 1e-2 or more ends the script
with 1.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jax

import sysdpo_jax as sj
from experiments.common.command import made_by, parse
from experiments.common.models import smollm2_file
from sysdpo_jax.io import write_json
from sysdpo_jax.serving import Handover, Server, served
from sysdpo_jax.typing import Params

QUESTIONS = ("What is a red ball?", "Name three animals.", "Why is the sky blue?", "Write one sentence about rain.")
LARGEST_GAP = 1e-2
# Of the server's start.
PATIENCE = 600.0


@dataclass(frozen=True)
class Config:
    """vllm_python: of an environment with vLLM; repeats: timed rollouts of each side; note: behind the machine."""

    vllm_python: str = ""
    prompts: int = 16
    samples: int = 4
    new_tokens: int = 64
    repeats: int = 3
    folder: Path = Path("runs/served")
    note: str = ""


@contextmanager
def vllm_server(python: str, model: Path, length: int, log: Path) -> Iterator[str]:
    """The address of a server that is ready. Raises `RuntimeError` where it ends, or is not ready in `PATIENCE`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--served-model-name", "base"]
    command += ["--max-model-len", str(length), "--enable-lora", "--max-lora-rank", "16"]
    needed = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=defaults | os.environ | needed, stdout=file, stderr=file)
    url, ends = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > ends:
                raise RuntimeError(f"the server did not start: see {log}")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).is_success
    except httpx.TransportError:
        return False


class TimedHandover(Handover):
    """waited: seconds for answers of the server, with what is handed over."""

    waited = 0.0

    def ask(self, *arguments: Any, **named: Any) -> list[Any]:
        began = time.perf_counter()
        try:
            return super().ask(*arguments, **named)
        finally:
            self.waited += time.perf_counter() - began


def sampled(config: Config, system: sj.CompoundSystem, params: Params, repeat: int) -> tuple[int, float]:
    """New tokens, and seconds."""
    rows = [{"question": [{"role": "user", "content": text}]} for text in QUESTIONS * config.prompts][: config.prompts]
    began = time.perf_counter()
    runs = sj.rollout(system, params, rows, jax.random.key(repeat), samples=config.samples)
    return sum(len(run["answer"].tokens) for run in runs), time.perf_counter() - began


def compared(
    config: Config, system: sj.CompoundSystem, by_server: sj.CompoundSystem, own: Params, handover: TimedHandover
) -> dict[str, Any]:
    """The figures of both sides."""
    ours, theirs, outside = list[float](), list[float](), list[float]()
    for repeat in range(config.repeats + 1):
        tokens, seconds = sampled(config, system, own, repeat)
        handover.waited = 0.0
        served_tokens, served_seconds = sampled(config, by_server, own, repeat)
        # The first one compiles.
        if repeat > 0:
            ours.append(tokens / seconds)
            theirs.append(served_tokens / served_seconds)
            outside.append(1 - handover.waited / served_seconds)
            print(f"repeat {repeat}: ours {ours[-1]:.4g}, by the server {theirs[-1]:.4g} tokens a second", flush=True)
    return {
        "ours_tokens_per_second": statistics.median(ours),
        "server_tokens_per_second": statistics.median(theirs),
        "server_over_ours": statistics.median(each / other for each, other in zip(theirs, ours, strict=True)),
        "share_outside_server": statistics.median(outside),
        "repeats": [list(map(round, side, [2] * len(side))) for side in (ours, theirs)],
    }


def moved(params: Params) -> Params:
    """With LoRA factors as large as after training: the second one of fresh factors is 0, as which none is seen."""
    fresh = sj.add_lora(params, sj.LoRA(8, 16.0, ("attention", "mlp")), jax.random.key(0))
    draw = lambda path, leaf: leaf + 0.02 if path[-1].key == "lora_b" else leaf  # noqa: E731
    return jax.tree_util.tree_map_with_path(draw, fresh)


def main() -> None:
    config = parse(Config(), sys.argv[1:], __doc__)
    if not config.vllm_python:
        raise SystemExit("error: give --vllm-python, the Python of an environment with vLLM")
    length = 64 + config.new_tokens
    model, params = sj.pretrained.load(smollm2_file(), max_prompt_length=64, max_new_tokens=config.new_tokens)
    system = sj.CompoundSystem(("question",), (sj.Node("answer", model, ("question",)),))
    config.folder.mkdir(parents=True, exist_ok=True)
    base = config.folder / "base"
    if not base.exists():
        sj.pretrained.save(base, model, params)
    own = {"answer": moved(params)}
    versions = [config.vllm_python, "-c", "from importlib.metadata import version; print(version('vllm-cpu'))"]
    row: dict[str, Any] = {"vllm": subprocess.run(versions, capture_output=True, text=True, check=True).stdout.strip()}
    with vllm_server(config.vllm_python, base, length, config.folder / "server.log") as url:
        handover = TimedHandover(Server(url, "base"), config.folder / "handed_over", "answer")
        by_server = served(system, {"answer": handover})
        began = time.perf_counter()
        sj.rollout(by_server, own, [{"question": "Hello"}], jax.random.key(0))
        row["first_answer_seconds"] = time.perf_counter() - began
        row |= compared(config, system, by_server, own, handover)
        row["mean_gap"], row["worst_gap"], row["compared_tokens"] = handover.gap
    sizes = {"prompts": config.prompts, "samples": config.samples, "new-tokens": config.new_tokens}
    sizes["repeats"] = config.repeats
    # Folders say nothing of what was measured.
    arguments = ["--vllm-python PATH", *(f"--{name} {value}" for name, value in sizes.items())]
    made = made_by("experiments.benchmarks.served", arguments, ("jax", "python"), note=config.note)
    write_json(config.folder / "results.json", {**made, "results": row})
    for name, value in row.items():
        print(f"{name:30} {f'{value:.4g}' if isinstance(value, float) else value}")
    raise SystemExit(row["mean_gap"] >= LARGEST_GAP)


if __name__ == "__main__":
    main()
