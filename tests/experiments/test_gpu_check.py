"""The check of a machine's GPU, on the CPU: what is right passes, what is wrong fails its row and the command."""

import json

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks import gpu_check
from experiments.benchmarks.gpu_cases import ATTENTION, STEPS
from experiments.benchmarks.gpu_check import CheckError, check_attention, check_device, check_steps, main


@pytest.mark.parametrize("name", ["llama-3-8b, odd", "mistral-7b, window", "sdxl, text", "gemma-2-2b"])
def test_attention_is_within_the_rounding_of_bfloat16(name):
    shape = ATTENTION[name].cut(16)
    assert max(shape.length, shape.slots) <= 16
    assert (shape.length % 2, shape.slots % 2) == (ATTENTION[name].length % 2, ATTENTION[name].slots % 2)
    assert "plain, largest error 0." in check_attention(shape)


def test_a_wrong_kernel_is_found(monkeypatch):
    """Values that lose a head of their queries; a result that is not finite."""
    given = gpu_check.attend

    def shifted(queries, *rest, implementation, **settings):
        found = given(queries, *rest, implementation=implementation, **settings)
        return jnp.roll(found, 1, axis=2) if implementation == "auto" else found

    shape = ATTENTION["sdxl, text"].cut(8)
    monkeypatch.setattr(gpu_check, "attend", shifted)
    with pytest.raises(CheckError, match=r"of at most 2% \(output .*%, queries"):
        check_attention(shape)
    monkeypatch.setattr(gpu_check, "attend", lambda queries, *rest, **settings: queries * jnp.nan)
    with pytest.raises(CheckError, match="largest error nan"):
        check_attention(shape)


def test_a_tiny_model_makes_its_steps():
    assert "losses 0.6931, 0." in check_steps(STEPS["llama, LoRA"])


def test_every_family_is_checked():
    """The decoders that can be loaded, and the four pipelines; a case has the name of its node."""
    from sysdpo_jax.pretrained.decoders import FAMILIES

    assert set(FAMILIES) | {"sd-1.5", "sd-2.1", "sdxl", "sd-3"} <= set(STEPS)
    assert STEPS["qwen3"]().component.decoder.config.model_type == "qwen3"


def test_a_failure_ends_the_command(tmp_path, capsys, monkeypatch):
    """Without a GPU the first row fails; what a check raises is a row, and the rows after it are made."""
    assert jax.default_backend() == "cpu"
    with pytest.raises(CheckError, match="JAX sees no GPU, but cpu"):
        check_device()
    shapes = {"broken": None, "right": ATTENTION["clip-l"]}
    monkeypatch.setattr(gpu_check, "ATTENTION", {name: shapes[name] or Broken() for name in shapes})
    with pytest.raises(SystemExit) as end:
        main(["--preset", "tiny", "--checks", "attention", "--folder", str(tmp_path)])
    assert end.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["FAIL", "FAIL", "pass", "no"]
    assert "RuntimeError: out of luck" in lines[1]
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["passed"], results["failed"]) == (1, 2)
    assert [row["passed"] for row in results["rows"]] == [False, False, True]


class Broken:
    """A shape whose check raises what is no finding."""

    def cut(self, longest):
        return self

    @property
    def length(self):
        raise RuntimeError("out of luck")


def test_unknown_checks_are_refused():
    with pytest.raises(SystemExit, match="unknown check 'speed': choose among attention, steps, demo, benchmark"):
        main(["--checks", "speed"])


@pytest.mark.slow
def test_every_family_passes_at_toy_size(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--preset", "tiny", "--folder", str(tmp_path)])
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows if not row["passed"]] == ["a GPU"]
    assert len(rows) == 1 + len(ATTENTION) + len(STEPS)
