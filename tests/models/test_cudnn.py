"""cuDNN's attention without a GPU: what is chosen, that JAX takes and lowers it for CUDA, and what padding computes.

A machine that has a GPU is pretended: its kind, its capability and the version of cuDNN. JAX's own checks of the
kernel's conditions, its gradient and its lowering are the real ones.
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as kernel

from sysdpo_jax.models import cudnn
from sysdpo_jax.models.attention import attend, choose
from sysdpo_jax.models.attention_request import AttentionRequest
from tests.models.test_attention import Case, formula, inputs

ROOT = Path(__file__).parents[2]
LLAMA = AttentionRequest(2, 1024, 1024, 32, 8, 64, "bfloat16", causal=True)
IMAGE = AttentionRequest(2, 4096, 4096, 10, 10, 64, "bfloat16")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """A GPU of capability 8.0, or of the one that it is called with."""

    def pretend(capability: str) -> None:
        device = SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda **_: [device])
        cudnn._own_refusal.cache_clear()

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    pretend("8.0")
    yield pretend
    cudnn._own_refusal.cache_clear()


# {what: (request, what "auto" takes)}
TABLE: dict[str, tuple[AttentionRequest, str]] = {
    "Llama": (LLAMA, "cudnn"),
    "Llama in float16": (replace(LLAMA, dtype="float16"), "cudnn"),
    "Llama in float32": (replace(LLAMA, dtype="float32"), "xla"),
    "keys of another dtype": (replace(LLAMA, dtype="bfloat16, float32"), "xla"),
    "an odd length": (replace(LLAMA, length=1023, slots=1023), "cudnn"),
    "one query": (replace(LLAMA, length=1, slots=1), "cudnn"),
    "a key-value cache": (replace(LLAMA, length=1, causal=False, masked=True), "xla"),
    "Mistral's window": (replace(LLAMA, length=4095, slots=4095, window=1024), "cudnn"),
    "a window with fewer slots": (replace(LLAMA, slots=512, window=64), "xla"),
    "causal with fewer slots": (replace(LLAMA, slots=511), "cudnn"),
    "Gemma's heads": (replace(LLAMA, width=256), "xla"),
    "Gemma 2's soft cap": (replace(LLAMA, softcap=True), "plain"),
    "SDXL on itself": (IMAGE, "cudnn"),
    "SDXL on its text": (replace(IMAGE, slots=77), "cudnn"),
    "Stable Diffusion 1.5, 40": (replace(IMAGE, width=40, slots=77), "cudnn"),
    "Stable Diffusion 1.5, 160": (replace(IMAGE, width=160, length=64, slots=77), "xla"),
    "heads of 60": (replace(IMAGE, width=60), "xla"),
    "the autoencoder": (replace(IMAGE, heads=1, groups=1, width=512), "xla"),
    "Stable Diffusion 3": (replace(IMAGE, length=4429, slots=4429), "cudnn"),
    "CLIP": (AttentionRequest(2, 77, 77, 12, 12, 64, "bfloat16", causal=True), "cudnn"),
}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("request_", "wanted"), TABLE.values(), ids=TABLE.keys())
def test_what_auto_chooses(request_: AttentionRequest, wanted: str) -> None:
    assert choose("auto", "gpu", request_) == wanted


def test_the_gpu_decides(gpu: Callable[[str], None]) -> None:
    for capability, wanted in {"8.0": "cudnn", "9.0": "cudnn", "7.5": "xla", "gfx90a": "xla", "10.3": "cudnn"}.items():
        gpu(capability)
        assert choose("auto", "gpu", LLAMA) == wanted


def test_what_jax_refuses_is_not_chosen(gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """A condition that is not among ours: Blackwell Ultra with an old cuDNN; and none at all."""
    monkeypatch.setattr(kernel, "is_cuda_compute_capability_equal", lambda capability: capability == "10.3")
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 90800)
    gpu("10.3")
    assert choose("auto", "gpu", LLAMA) == "xla"
    with pytest.raises(ValueError, match=r"'cudnn' is refused by JAX \(Compute capability 10.3 requires cuDNN"):
        choose("cudnn", "gpu", LLAMA)


def shapes(request: AttentionRequest) -> list[jax.ShapeDtypeStruct]:
    """Queries, keys and values."""
    queries = jax.ShapeDtypeStruct((request.batch, request.length, request.heads, request.width), request.dtype)
    keys = jax.ShapeDtypeStruct((request.batch, request.slots, request.groups, request.width), request.dtype)
    return [queries, keys, keys]


def gradient(request: AttentionRequest) -> Callable[..., object]:
    """Attention with its gradient, as `attend` chooses it."""
    run = partial(attend, causal=request.causal, window=request.window)
    return lambda queries, keys, values: jax.vjp(run, queries, keys, values)[1](queries)


@pytest.mark.usefixtures("gpu")
def test_nothing_chosen_raises() -> None:
    """Every combination is traced with its gradient, where JAX checks the kernel's conditions."""
    chosen = set()
    kinds = ({}, {"causal": True}, {"causal": True, "window": 5}, {"dtype": "float32"})
    for length, slots, width, kind in itertools.product((1, 63, 64, 130), (1, 64, 77), (8, 60, 128, 256), kinds):
        request = AttentionRequest(2, length, slots, 4, 2, width, **{"dtype": "bfloat16"} | kind)
        jax.eval_shape(gradient(request), *shapes(request))
        chosen.add(choose("auto", "gpu", request))
    assert chosen == {"cudnn", "xla"}


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name", ["Llama", "Mistral's window", "causal with fewer slots", "SDXL on its text", "CLIP"])
def test_it_is_lowered_for_cuda(name: str) -> None:
    """Both kernels are in the program, on lengths that are multiples of 8, hidden slots where slots were added."""
    request, _ = TABLE[name]
    lowered = jax.jit(gradient(request)).trace(*shapes(request)).lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", lowered)) == {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    padded = f"{request.batch}x{-(-request.slots // 8) * 8}x{request.groups}x{request.width}x"
    assert padded in lowered
    kinds = {
        "Llama": "CAUSAL",
        "Mistral's window": "CAUSAL",
        "causal with fewer slots": "PADDING_CAUSAL",
        "SDXL on its text": "PADDING",
        "CLIP": "CAUSAL",
    }
    assert set(re.findall(r"mask_type\\22: \\22(\w+)\\22", lowered)) == {kinds[name]}


@pytest.mark.parametrize(
    "case",
    [
        Case(12, 77),
        Case(13, 13, heads=4, causal=True),
        Case(21, 13, causal=True),
        Case(13, 30, causal=True),
        Case(29, 29, heads=3, groups=1, causal=True, window=5),
    ],
    ids=["slots", "causal", "causal, fewer slots", "causal, more slots", "window"],
)
def test_padding_changes_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel is given, computed by XLA in float32, against the formula: sums in another order, 2e-6."""
    given = jax.nn.dot_product_attention

    def by_xla(*args: jax.Array, implementation: str, **rest: object) -> jax.Array:
        assert implementation == "cudnn"
        return given(*args, **rest, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    *args, onto = inputs(case)

    def both(function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(function, *args)
        return out, *back(onto)

    run = partial(cudnn.cudnn, scale=case.width**-0.5, causal=case.causal, window=case.window)
    found, wanted = (jax.jit(partial(both, function))() for function in (run, partial(formula, case)))
    for got, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, right, rtol=0, atol=2e-6 * np.abs(right).max())


@pytest.mark.usefixtures("gpu")
def test_a_mask_and_mixed_dtypes_reach_the_request() -> None:
    queries, keys = jnp.zeros((1, 8, 2, 8), "bfloat16"), jnp.zeros((1, 8, 2, 8))
    with pytest.raises(ValueError, match=r"'cudnn' computes in bfloat16 and float16 only .*'bfloat16, float32'"):
        attend(queries, keys, keys, implementation="cudnn")
    with pytest.raises(ValueError, match="'cudnn' takes no mask"):
        attend(queries, queries, queries, jnp.ones((1, 8, 8), bool), implementation="cudnn")
    with pytest.raises(ValueError, match="'cudnn' takes a window only where"):
        attend(queries, *(queries[:, :4],) * 2, causal=True, window=2, implementation="cudnn")


def test_each_device_has_its_own_kernel() -> None:
    """On a mesh, lowered for CUDA: the compiler meets kernels of one device's rows and heads, and none to cut."""
    command = [sys.executable, "-m", "tests.models.cudnn_on_mesh"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # Rows over data and fsdp, heads over tensor where the key-value heads divide.
    assert found == {"2 groups": ["2x64x2x64", "2x80x1x64"], "1 group": ["2x64x4x64", "2x80x1x64"]}
