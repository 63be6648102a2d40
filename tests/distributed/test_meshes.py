"""Fully sharded and mixed meshes of 8 virtual devices give the losses of one device; test_splits.py has others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
# Level 0 compiles in half the time and keeps every collective.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
)


def printed(module):
    """What a module of this folder prints when it runs in a process with 8 devices."""
    # Another process may be writing a program just now.
    warnings = ["-W", "error", "-W", "ignore:Error reading persistent compilation cache entry"]
    command = [sys.executable, *warnings, "-m", f"tests.distributed.{module}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def results():
    return printed("eight_devices")


@pytest.mark.parametrize("mesh", ["fsdp", "mixed"])
def test_losses_are_those_of_one_device(results, mesh):
    """1e-5 over 20 steps: the devices add in another order, in float32, and Adam carries the difference on."""
    one, other = (np.array(results["runs"][name]["losses"]) for name in ("one", mesh))
    assert len(one) == 20
    assert one[0] - one[-1] > 0.01  # it trains, so the parameters matter
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mesh", ["one", "fsdp", "mixed"])
def test_the_state_keeps_its_placement_and_is_donated(results, mesh):
    assert results["runs"][mesh]["placement_kept"]
    assert results["runs"][mesh]["donated"]


def test_parameters_and_moments_are_cut_as_the_rules_say(results):
    """The kernel of 256 x 256 is cut by default, the embedding of 64 rows by a rule."""
    rows = {
        name: [run[k] for k in ("value_kernel", "value_moment", "embedding")] for name, run in results["runs"].items()
    }
    assert rows == {"one": [256, 256, 64], "fsdp": [32, 32, 8], "mixed": [128, 128, 32]}


def test_a_sharded_run_resumes_bit_for_bit(results):
    assert results["resumed_bit_for_bit"]


def test_the_chunked_head_gathers_its_kernel_once_and_sums_its_gradient_once():
    """6 chunks of 4 tokens; 1e-5 off the gradient by hand in float64."""
    found = printed("head_on_meshes")
    kernel = 8 * 64 * 4
    assert set(found) == {"8x1x1", "1x8x1", "2x2x2", "1x4x2", "1x1x8"}
    for result in found.values():
        assert max(result["errors"].values()) < 1e-5
    assert found["8x1x1"]["collectives"] == [["all-reduce", kernel, 1]]
    assert found["1x8x1"]["collectives"] == [["all-gather", kernel, 1], ["all-reduce", kernel, 1]]
    for name in ("2x2x2", "1x4x2"):
        split = found[name]["collectives"]
        assert [each for each in split if each[1] >= kernel / 2] == [
            ["all-gather", kernel // 2, 1],
            ["all-reduce", kernel // 2, 1],
        ], name
        # The maximum and the sum of a chunk's exponentials over the vocabulary's parts: the loop is there.
        assert any(times >= 6 for _, _, times in split)
