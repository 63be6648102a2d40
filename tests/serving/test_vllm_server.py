"""A vLLM server that samples in online rounds, with the adapter and the weights of each round handed over.

`make test-slow` builds vLLM's environment, below that of the tests or where READERS says.
"""

import os
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import sysdpo_jax as sj
from experiments.benchmarks.served import vllm_server
from sysdpo_jax.serving import Handover, Server, served
from tests.components.stubs import byte_tokenizer
from tests.pretrained.checkpoints import write_decoder

READERS = Path(os.environ.get("READERS", Path(sys.prefix) / "readers"))
VLLM = READERS / "vllm" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not VLLM.exists(), reason=f"{VLLM} is not there: make test-slow builds it"),
]
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
            for number in range(2):
                by_server = served(system, {"y": handover})
                runs = sj.rollout(by_server, current, PROMPTS, jax.random.key(number), samples=4)
                seen.append(handover.gaps[-1])
                scores = np.array([length(run) for run in runs])
                pairs = sj.make_pairs(system, runs, scores, group=4)
                trainer = sj.Trainer(system, sj.DirectObjective(beta=0.1), optimizer, tmp_path / kind / str(number))
                batches = sj.epoch_batches(sj.prepare_pairs(system, pairs), batch_size=len(pairs), seed=0)
                state = sj.create_state(system, current, optimizer)
                current = trainer.fit(state, batches, 3, jax.random.key(2)).params
            assert all(gap.mean < 1e-2 for gap in seen)
            assert all(gap.tokens > 16 for gap in seen)
            # What was trained is what the server has: by the first parameters its texts are less likely, or likelier.
            records = system.prepare(runs)
            first, last = (system.log_prob(tree, records, jax.random.key(0))["y"] for tree in ({"y": own}, current))
            assert float(abs(first - last).sum()) / seen[-1].tokens > 5e-2
            # Of the last round alone.
            assert len(list((tmp_path / kind / "handed").iterdir())) == 1
