"""Every implementation of attention against the formula written out, in float32 on the CPU.

Tolerances are of the largest entry: 2e-6 between float32 sums in another order, 1e-5 for the kernel, which sums blocks
one after another and rescales them.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

from sysdpo_jax.models import attention, blocks
from sysdpo_jax.models.attention import attend, choose
from sysdpo_jax.models.attention_request import AttentionRequest
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.models.mmdit import MMDiTConfig
from sysdpo_jax.models.unet import UNetConfig
from tests.components.drawn import drawn

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Case:
    """Shape and restrictions of one attention."""

    length: int
    slots: int
    heads: int = 2
    groups: int = 2
    width: int = 8
    causal: bool = False
    window: int | None = None
    scale: float | None = None


CASES = {
    "image": Case(144, 144, width=40, scale=0.3),
    "text": Case(130, 77),
    "grouped, causal": Case(200, 200, heads=4, causal=True),
    "window": Case(140, 140, heads=3, groups=1, causal=True, window=9),
}


def inputs(case: Case) -> tuple[jax.Array, ...]:
    """Queries, keys, values and what the result is multiplied with."""
    shapes = [(2, case.length, case.heads, case.width), *[(2, case.slots, case.groups, case.width)] * 2]
    keys = jax.random.split(jax.random.key(0), 4)
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, [*shapes, shapes[0]], strict=True))


def formula(case: Case, queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """softmax(scale q k) v, head by head."""
    scale = case.width**-0.5 if case.scale is None else case.scale
    keys, values = (jnp.repeat(x, case.heads // case.groups, axis=2) for x in (keys, values))
    scores = scale * jnp.einsum("blhk,bshk->bhls", queries, keys, precision="highest")
    behind = np.arange(case.length)[:, None] - np.arange(case.slots)
    seen = (behind >= 0) | (not case.causal)
    if case.window is not None:
        seen &= behind < case.window
    weights = jnp.exp(scores - scores.max(-1, keepdims=True)) * seen
    return jnp.einsum("bhls,bshk->blhk", weights / weights.sum(-1, keepdims=True), values, precision="highest")


def both(case: Case, function: Callable[..., jax.Array]) -> tuple[jax.Array, ...]:
    """Values and gradients in queries, keys and values."""
    *args, onto = inputs(case)

    def run(args: list[jax.Array], onto: jax.Array) -> tuple[jax.Array, ...]:
        out, back = jax.vjp(function, *args)
        return out, *back(onto)

    return jax.jit(run)(args, onto)


@functools.cache
def written_out(case: Case) -> tuple[jax.Array, ...]:
    """The formula's, compiled once for all implementations."""
    return both(case, functools.partial(formula, case))


def check(case: Case, implementation: str, tolerance: float) -> None:
    settings = {"scale": case.scale, "causal": case.causal, "window": case.window}
    found = both(case, functools.partial(attend, implementation=implementation, **settings))
    for got, wanted in zip(found, written_out(case), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("implementation", ["plain", "xla"])
def test_products(case: Case, implementation: str) -> None:
    check(case, implementation, 2e-6)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 2,000 scores: parts of one row's queries in most cases, the last of them padded."""
    monkeypatch.setattr(blocks, "BLOCK", 2000)
    monkeypatch.setattr(attention, "BLOCK", 2000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_blocks(case: Case) -> None:
    check(case, "blocks", 2e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("batch", "length"), [(2, 61), (23, 8)])
def test_blocks_take_masks_and_soft_caps(batch: int, length: int, softcap: float | None) -> None:
    """Parts of rows, parts of the batch with padded rows, a query that sees nothing; and gradients."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(batch, length, 4, 4), *[(batch, length, 2, 4)] * 2, (batch, length, 4, 4)]
    *args, onto = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False))
    visible = jax.random.bernoulli(keys[4], 0.6, (batch, length, length)).at[0, 3].set(False)

    def run(implementation: str) -> tuple[jax.Array, ...]:
        def function(*args: jax.Array) -> jax.Array:
            return attend(*args, visible, softcap=softcap, causal=True, implementation=implementation)

        out, back = jax.vjp(function, *args)
        return out, *back(onto)

    for got, wanted in zip(jax.jit(run, static_argnums=0)("blocks"), run("plain"), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


@pytest.mark.usefixtures("small_blocks")
def test_blocks_under_vmap_and_remat() -> None:
    """Ten rows in blocks and mapped over pairs of them, recomputed or not."""
    shape = (10, 16, 2, 4)
    args = [jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(1), 3)]

    def loss(queries: jax.Array, keys: jax.Array, values: jax.Array, implementation: str) -> jax.Array:
        return jnp.sin(attend(queries, keys, values, implementation=implementation)).sum()

    def mapped(*args: jax.Array) -> jax.Array:
        apart = [x.reshape(2, 5, *shape[1:]) for x in args]
        return jax.vmap(jax.checkpoint(functools.partial(loss, implementation="blocks")))(*apart).sum()

    wanted = jax.grad(functools.partial(loss, implementation="plain"), (0, 1, 2))(*args)
    for got, expected in zip(jax.jit(jax.grad(mapped, (0, 1, 2)))(*args), wanted, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_blocks_on_a_mesh() -> None:
    """Each device loops over its own rows and heads; without a mesh there is no loop."""
    command = [sys.executable, "-m", "tests.models.blocks_on_mesh"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["error"] < 2e-6
    assert found["loops"]["mesh"] > 0
    assert found["loops"]["no mesh"] == 0
    # Two of the eight rows lie on a device.
    assert all(rows == 2 for rows in found["rows"])


def test_blocks_hold_no_scores() -> None:
    """Forward and backward of 16 million scores, 64 MiB in float32, in a quarter of it; plain needs all of it."""
    shape = jax.ShapeDtypeStruct((32, 256, 8, 4), jnp.float32)

    def temporary(implementation: str) -> int:
        def run(queries, keys, values, onto):
            return jax.vjp(functools.partial(attend, implementation=implementation), queries, keys, values)[1](onto)

        return jax.jit(run).lower(*(shape,) * 4).compile().memory_analysis().temp_size_in_bytes

    assert temporary("auto") < 2**24 + 8 * 2**21
    assert temporary("plain") > 2**26


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs in Pallas's interpreter."""
    made = functools.partial(kernels.make_splash_mha, interpret=True)
    monkeypatch.setattr(kernels, "make_splash_mha", made)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_kernel(case: Case) -> None:
    check(case, "flash", 1e-5)


@pytest.mark.parametrize("implementation", ["plain", "xla"])
def test_a_mask_joins_causality(implementation: str) -> None:
    case = Case(6, 6, heads=4, causal=True)
    *args, _ = inputs(case)
    visible = jax.random.bernoulli(jax.random.key(1), 0.6, (2, 6, 6)) | jnp.eye(6, dtype=bool)
    both = attend(*args, visible, causal=True, implementation=implementation)
    once = attend(*args, visible & jnp.tril(jnp.ones((6, 6), bool)), implementation="plain")
    np.testing.assert_allclose(both, once, rtol=0, atol=2e-6 * np.abs(once).max())
    assert np.abs(both - attend(*args, visible, implementation="plain")).max() > 0.1


def test_what_auto_chooses() -> None:
    def auto(backend: str, dtype: str = "bfloat16", length: int = 4096, **rest: bool) -> str:
        return choose("auto", backend, AttentionRequest(2, length, length, 8, 8, 64, dtype, **rest))

    assert auto("tpu") == auto("tpu", "float32") == "flash"
    assert auto("tpu", length=77) == auto("tpu", masked=True) == auto("tpu", "float16") == "xla"
    assert auto("tpu", softcap=True) == auto("gpu", softcap=True) == auto("cpu", length=128) == "plain"
    assert auto("cpu") == auto("cpu", softcap=True) == auto("cpu", "float32", masked=True) == "blocks"


def test_a_named_implementation_runs_or_says_why_not() -> None:
    args = [jnp.zeros((1, 4, 2, 8))] * 3
    visible = jnp.ones((1, 4, 4), bool)
    with pytest.raises(ValueError, match="'flash' takes no mask"):
        attend(*args, visible, implementation="flash")
    with pytest.raises(ValueError, match="'xla' has no soft cap"):
        attend(*args, softcap=2.0, implementation="xla")
    with pytest.raises(ValueError, match="'flash' computes in float32 and bfloat16"):
        attend(*(x.astype("float16") for x in args), implementation="flash")
    with pytest.raises(ValueError, match="'cudnn' computes in bfloat16 and float16"):
        attend(*args, implementation="cudnn")
    with pytest.raises(ValueError, match="'cudnn' needs a head width"):
        attend(*(jnp.zeros((1, 4, 2, 12), "bfloat16"),) * 3, implementation="cudnn")
    with pytest.raises(ValueError, match="'cudnn' needs an NVIDIA GPU"):
        attend(*(x.astype("bfloat16") for x in args), implementation="cudnn")
    with pytest.raises(ValueError, match="unknown attention 'best'"):
        attend(*args, implementation="best")
    with pytest.raises(ValueError, match="window 2 needs causal"):
        attend(*args, window=2)
    for config in (UNetConfig, MMDiTConfig):
        with pytest.raises(ValueError, match="unknown attention 'best'"):
            config(attention="best")
        with pytest.raises(ValueError, match="unknown remat 'some'"):
            config(remat="some")


@pytest.mark.usefixtures("interpreted")
def test_the_decoder_computes_as_its_configuration_says() -> None:
    config = DecoderConfig(64, 32, 48, 1, 4, 2, attention="flash")
    plain, flash = Decoder(dataclasses.replace(config, attention="plain")), Decoder(config)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 20)))
    params = drawn(lambda key: plain.init(key, tokens))
    wanted = jax.jit(plain.apply)(params, tokens)
    np.testing.assert_allclose(jax.jit(flash.apply)(params, tokens), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    with pytest.raises(ValueError, match="takes no mask"):
        jax.eval_shape(lambda p, t, m: flash.apply(p, t, mask=m), params, tokens, jnp.ones((2, 20), bool))


def test_the_kernel_compiles_for_a_tpu() -> None:
    pytest.importorskip("libtpu", reason="pip install libtpu to compile for TPUs")
    command = [sys.executable, "-m", "tests.models.tpu_kernel"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    # Forward, recomputed forward and two of the backward pass, in the loops over the layers.
    assert found["kernels"] >= 4
    assert (found["gathers"], found["scores"]) == (0, 0)
