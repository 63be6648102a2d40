"""A vLLM server that samples in online rounds, with the adapter and the weights of each round handed over.

`make test-slow` builds vLLM's environment, below that of the tests or where READERS says.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import sysdpo_jax as sj
from experiments.benchmarks.served import vllm_server
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.serving import Handover, Server, served
from tests.components.stubs import byte_tokenizer
from tests.pretrained.checkpoints import write_decoder
from tests.serving.test_served_rounds import MADE, write

READERS = Path(os.environ.get("READERS", Path(sys.prefix) / "readers"))
VLLM = READERS / "vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.exists(), reason=f"{VLLM} is not there: make test-slow builds it"),
]
LOGS = ("server.log", "again.log")
PROMPTS = [{"x": text} for text in ("the red tea", "green", "a b c", "12 14")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_decoder(path, "llama", vocab_size=264, head_dim=32, hidden_size=128, tie_word_embeddings=False)
    byte_tokenizer().save_pretrained(path)
    return path


def length(run):
    return -float(len(run["y"].tokens))


def test_rounds_on_a_servers_texts(folder, tmp_path):
    """Two rounds by LoRA and two of whole weights: texts by the server, 1e-2 nats a token from the trainer at most."""
    component, params = sj.pretrained.load(folder, max_prompt_length=24, max_new_tokens=16)
    system = sj.CompoundSystem(("x",), (sj.Node("y", component, ("x",)),))
    with vllm_server(str(VLLM), folder, 64, tmp_path / "server.log") as url:
        for kind in ("adapter", "weights"):
            own = sj.add_lora(params, sj.LoRA(4, 8.0, ("attention", "mlp")), jax.random.key(0))
            own = own if kind == "adapter" else params
            trainable = sj.LORA_PARAMS if kind == "adapter" else ".*"
            optimizer = sj.make_optimizer({"y": sj.ComponentOptimizer(optax.adam(1e-2), trainable=trainable)})
            handover = Handover(Server(url, "base"), tmp_path / kind / "handed", "writer")
            current, seen = {"y": own}, []
            for number in range(3):
                by_server = served(system, {"y": handover})
                runs = sj.rollout(by_server, current, PROMPTS, jax.random.key(number), samples=4)
                seen.append(handover.gaps[-1])
                if number == 2:
                    break
                scores = np.array([length(run) for run in runs])
                pairs = sj.make_pairs(system, runs, scores, group=4)
                trainer = sj.Trainer(system, sj.DirectObjective(beta=0.1), optimizer, tmp_path / kind / str(number))
                batches = sj.epoch_batches(sj.prepare_pairs(system, pairs), batch_size=len(pairs), seed=0)
                state = sj.create_state(system, current, optimizer)
                current = trainer.fit(state, batches, 3, jax.random.key(2)).params
            assert all(gap.worst < 1e-2 for gap in seen)
            assert all(gap.tokens > 16 for gap in seen)
            # What was trained is what the server has: by the first parameters its texts are less likely, or likelier.
            records = system.prepare(runs)
            first, last = (system.log_prob(tree, records, jax.random.key(0))["y"] for tree in ({"y": own}, current))
            assert float(abs(first - last).sum()) / seen[-1].tokens > 5e-2
            # The adapter of the last round; whole weights are the server's.
            assert len(list((tmp_path / kind / "handed").iterdir())) == (kind == "adapter")


def online(file, log):
    """The command in a process of its own, as users start it."""
    command = [sys.executable, "-m", "sysdpo_jax", "online", file]
    with log.open("w") as out:
        return subprocess.Popen(command, stderr=out, stdout=out)


def test_rounds_by_the_command_go_on_with_another_server(folder, tmp_path):
    """The run is killed in its second round, and its server ends: started again, both do what is left, and no more."""
    log = tmp_path / "said.txt"
    with vllm_server(str(VLLM), folder, 64, tmp_path / LOGS[0]) as url:
        run = online(write(tmp_path, url, folder, tmp_path / "caches"), log)
        first = tmp_path / "run" / "round-1"
        while run.poll() is None and not (first / "done.json").exists():
            time.sleep(0.05)
        assert run.poll() is None, log.read_text()
        run.kill()
        run.wait()
        before = (first / "runs.jsonl").read_text()
    with vllm_server(str(VLLM), folder, 64, tmp_path / LOGS[1]) as url:
        assert online(write(tmp_path, url, folder, tmp_path / "caches"), log).wait(600) == 0, log.read_text()
    assert (first / "runs.jsonl").read_text() == before
    rows = [list(read_lines(tmp_path / "run" / f"round-{number}" / "runs.jsonl")) for number in (1, 2)]
    assert list(map(len, rows)) == [MADE, MADE]
    gaps = re.findall(r"server (\S+) nats a token from writer", log.read_text())
    assert gaps
    assert max(map(float, gaps)) < 1e-2
    # Both servers loaded adapters, and the first one's are none of the second's but that of round 1.
    loaded = [set(re.findall(r"name 'writer-(\w+)-", (tmp_path / name).read_text())) for name in LOGS]
    assert len(loaded[0] | loaded[1]) == 3
