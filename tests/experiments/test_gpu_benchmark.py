"""The benchmark at toy sizes on the CPU, and that its large shapes are the models they are called after."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.gpu import Config
from experiments.benchmarks.gpu_cases import CASES
from sysdpo_jax.models.lora import is_lora
from sysdpo_jax.trees import by_path

ROOT = Path(__file__).parents[2]
# Of the checkpoints on the Hugging Face hub, LoRA aside.
PARAMETERS = {"llama-3.2-1b": 1_235_814_400, "llama-3-8b": 8_030_261_248, "sdxl": 2_567_463_684}


def tiny(folder, *cases):
    """What `--preset tiny` writes and prints."""
    # Compilation is most of the time, and speed is not judged here.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--preset", "tiny", "--folder", str(folder)]
    command += ["--cases", *cases]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "results.json").read_text()), done.stdout


def check(name, case, printed):
    # Policy and reference are one model at the first step.
    assert case["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    times = case["seconds_per_step"]
    assert len(times["all"]) == 2
    assert 0 < times["fastest"] <= times["median"] <= times["slowest"]
    assert case["model_flops_per_second"] == pytest.approx(case["model_flops_per_step"] / times["median"])
    # No figure where the machine gives none.
    assert case["mfu"] is None
    assert case["peak_bytes"] is None
    assert name in printed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("gpu") / "run", "decoder")


@pytest.mark.slow
def test_a_decoder_is_measured_beside_the_roofline(run):
    results, printed = run
    assert results["roofline"]["matmul_flops_per_second"] > 0
    assert results["roofline"]["copy_bytes_per_second"] > 0
    [(name, case)] = results["cases"].items()
    check(name, case, printed)
    # Both sides, full of tokens.
    assert case["tokens_per_second/decoder"] == pytest.approx(2 * 2 * 16 / case["seconds_per_step"]["median"])


@pytest.mark.slow
def test_a_unet_with_all_its_weights_is_measured(tmp_path):
    """A minute of compilation, even of the smallest."""
    results, printed = tiny(tmp_path, "unet")
    case = results["cases"]["unet"]
    check("unet", case, printed)
    assert case["images_per_second/unet"] == pytest.approx(2 / case["seconds_per_step"]["median"])


@pytest.mark.slow
def test_the_flops_are_those_of_the_formula(run):
    """LoRA: 2 forward passes for the policy and 1 for the reference, and what the thin products add to each of them."""
    width, hidden, layers, heads, groups, vocabulary, rank = 32, 64, 2, 4, 2, 64, 2
    tokens, length, completion = 2 * 16, 16, 2 * 8
    key_width = width // heads * groups
    projections = 2 * width * width + 2 * width * key_width + 3 * width * hidden
    attention = 2 * length * width
    layer = layers * tokens * 2 * (projections + attention)
    head = 2 * width * vocabulary
    thin = layers * tokens * 2 * rank * (2 * (width + width) + 2 * (width + key_width))
    # The head is evaluated where the completion's tokens are predicted.
    wanted = 2 * (3 * (layer + completion * head + thin) + thin)
    assert run[0]["cases"]["decoder"]["model_flops_per_step"] == wanted


@pytest.mark.slow
def test_the_run_says_what_made_it(run):
    made = run[0]["made_by"]
    assert made["command"].startswith("python -m experiments.benchmarks.gpu --preset tiny")
    assert made["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "sdxl" else name for name in PARAMETERS]
)
def test_large_shapes_are_the_models_and_in_bfloat16(name):
    case = CASES["large"][name]()
    abstract = by_path(jax.eval_shape(case.system.init, jax.random.key(0)))
    assert not any(is_lora(path) for path in abstract)
    assert sum(leaf.size for leaf in abstract.values()) == PARAMETERS[name]
    assert {leaf.dtype for leaf in abstract.values()} == {jnp.bfloat16.dtype}


def test_random_weights_are_never_there_in_float32():
    """What the compiler needs beside 8 billion weights is below half a float32 copy of them."""
    case = CASES["large"]["llama-3-8b"]()
    memory = jax.jit(case.system.init).lower(jax.random.key(0)).compile().memory_analysis()
    assert memory.output_size_in_bytes == pytest.approx(2 * PARAMETERS["llama-3-8b"], rel=1e-3)
    assert memory.temp_size_in_bytes < 0.5 * 4 * PARAMETERS["llama-3-8b"]


def test_unknown_cases_are_refused():
    with pytest.raises(SystemExit, match="unknown case 'gpt': choose among"):
        Config(cases=("gpt",))
