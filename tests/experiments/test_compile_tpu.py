"""Compiling for TPUs ahead of time: what is read from HLO, what is refused, and a tiny system as far as libtpu goes."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from experiments import compile_tpu
from experiments.scaling.systems import DECODERS, UNETS, painter, writer
from sysdpo_jax import make_mesh
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.parallel import topology as chips
from sysdpo_jax.parallel.hlo import HloError, collectives_by_kind

SCALING = Path(__file__).parents[2] / "docs" / "scaling"
COLUMNS = (
    *("system", "mode", "topology", "level", "pairs", "tokens", "pixels", "M"),
    *("arguments", "temporaries", "peak", "of", "compile s"),
)

# As the TPU compiler writes it, shortened: a scan of 12 layers with a gather, a sum that is scattered, and a gather in
# parts that run beside other work.
HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%fused_computation.1 (p: bf16[8,64]) -> (bf16[8,64], bf16[128,64]) {
  %p.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.26 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=6, dimensions={0}
  ROOT %custom-call.2 = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, /*index=1*/u32[]{:S(2)}) custom-call(%all-gather.26)
}

%fused_computation.2 (p: bf16[8,64]) -> bf16[128,64] {
  %p.2 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.30 = bf16[128,64]{1,0:T(8,128)(2,1)} all-gather(%p.2), channel_id=6, dimensions={0}
  ROOT %custom-call.4 = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} custom-call(%p.2, %all-gather.30)
}

%all-reduce-scatter.clone (input: f32[32,64]) -> f32[2,64] {
  %input = f32[32,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.4 = f32[32,64]{1,0:T(8,128)} all-reduce(%input), channel_id=8, replica_groups={{0,1}}, to_apply=%add
  ROOT %dynamic-slice.19 = f32[2,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.4, %input), dynamic_slice_sizes={2,64}
}

%body (carry: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %carry = (s32[], bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[8,64]{1,0:T(8,128)(2,1)} get-tuple-element(%carry), index=1
  %all-gather.1 = bf16[8,1024]{1,0:T(8,128)(2,1)S(1)} all-gather(%x), channel_id=10, dimensions={1}
  %start = (bf16[8,64]{1,0}, bf16[128,64]{1,0}) fusion(%x), kind=kCustom, calls=%fused_computation.1
  %done = bf16[128,64]{1,0} fusion(%start), kind=kCustom, calls=%fused_computation.2
  %fusion.38 = f32[2,64]{1,0:T(8,128)S(1)} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.clone
}

%condition (carry: (s32[], bf16[8,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12)
  %carry.1 = (s32[]{:T(128)}, bf16[8,64]{1,0:T(8,128)(2,1)}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %limit), direction=LT, metadata={op_name="jit(step)/while/cond/lt"}
}

ENTRY %main.9 (x: bf16[8,64]) -> f32[] {
  %zero = s32[]{:T(128)} constant(0)
  %x.1 = bf16[8,64]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.28 = s32[]{:T(128)} copy(%zero), backend_config={"flag_configs":[]}
  %tuple.49 = (s32[]{:T(128)}, bf16[8,64]{1,0}) tuple(%copy.28, %x.1)
  %while.27 = (s32[]{:T(128)}, bf16[8,64]{1,0}) while(%tuple.49), condition=%condition, body=%body, metadata={x="y"}
  %scalar = f32[]{:T(256)} constant(1)
  %flags = pred[3]{0:T(512)} constant({...})
  %all-gather-start.1 = (bf16[8,64]{1,0}, bf16[128,64]{1,0}) all-gather-start(%x.1), channel_id=11, dimensions={0}
  %all-gather-done.1 = bf16[128,64]{1,0} all-gather-done(%all-gather-start.1)
  ROOT %all-reduce.2 = (f32[], pred[3]) all-reduce(%scalar, %flags), channel_id=12, to_apply=%add
}
"""


def test_collectives_count_as_often_as_they_run_and_the_parts_of_one_once():
    whole = 128 * 64 * 2
    assert collectives_by_kind(HLO) == {
        # Two in each of 12 rounds, the second in parts, and one outside.
        "all-gather": {"count": 2 * 12 + 1, "bytes": (12 * 2 + 1) * whole},
        "all-reduce": {"count": 1, "bytes": 4 + 3},
        "reduce-scatter": {"count": 12, "bytes": 12 * 32 * 64 * 4},
    }


def test_a_loop_says_how_often_it_runs_or_is_refused_where_it_matters():
    other_start = HLO.replace("constant(0)", "constant(5)")
    assert collectives_by_kind(other_start)["reduce-scatter"]["count"] == 7
    stated = HLO.replace('metadata={x="y"}', 'backend_config={"known_trip_count":{"n":"3"}}')
    assert collectives_by_kind(stated)["reduce-scatter"]["count"] == 3
    for unknown in (HLO.replace("direction=LT", "direction=NE"), HLO.replace("copy(%zero)", "negate(%zero)")):
        with pytest.raises(HloError, match=r"no trip count that can be read: while\.27"):
            collectives_by_kind(unknown)
        # Without collectives it does not matter.
        assert "reduce-scatter" not in collectives_by_kind(unknown.replace("body=%body", "body=%add"))
    with pytest.raises(HloError, match="no ENTRY"):
        collectives_by_kind("HloModule empty")


@pytest.mark.parametrize(
    ("component", "published"),
    [
        # As published of Meta-Llama-3-8B, Qwen1.5-1.8B, SmolLM2-135M and the U-Nets of Stable Diffusion 1.5 and XL.
        (writer(DECODERS["llama-3-8b"], 8, 8), 8_030_261_248),
        (writer(DECODERS["qwen1.5-1.8b"], 8, 8), 1_836_828_672),
        (writer(DECODERS["smollm2-135m"], 8, 8), 134_515_008),
        (painter(UNETS["sd15"], 64), 859_520_964),
        (painter(UNETS["sdxl"], 64), 2_567_463_684),
    ],
    ids=["llama", "qwen", "smollm2", "sd15", "sdxl"],
)
def test_the_shapes_are_those_of_the_published_models(component, published):
    params = jax.eval_shape(component.init, jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == published


def test_unknown_names_are_answered_with_the_known_ones(monkeypatch):
    with pytest.raises(SystemExit, match=r"smollm2-135m.sd15, qwen1.5-1.8b-x2, llama3-8b.sdxl"):
        compile_tpu.plan(compile_tpu.Config(system="gpt"), make_mesh())
    for name in ("v5x:2x2", "v5e", "v5e:2x"):
        with pytest.raises(ConfigError, match="v4, v5e, v5p, v6e"):
            chips.topology(name)
    topology = chips.topology
    monkeypatch.setattr(chips, "topology", lambda name: jax.devices()[:1])
    with pytest.raises(ConfigError, match="v5e:2x2: data 3 x tensor 1 does not divide the 1 devices"):
        compile_tpu.run(compile_tpu.Config(data=3))
    monkeypatch.setattr(chips, "topology", lambda name: jax.devices() * 2)
    with pytest.raises(ConfigError, match="is 1 of 2 chips: take all"):
        compile_tpu.run(compile_tpu.Config(fsdp=1))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'libtpu: pip install "sysdpo_jax\[tpu-aot\]"'):
        topology("v5e:2x2")


def test_the_plan_of_full_fine_tuning_and_of_lora():
    config = compile_tpu.Config(system="qwen1.5-1.8b-x2", sequence=64)
    full = compile_tpu.plan(config, make_mesh())[2]
    kernel = full.params["draft"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == "bfloat16"
    assert full.reference["draft"]["layers"]["mlp"]["up_proj"]["kernel"].dtype == "bfloat16"
    # Master weights and two moments.
    bytes_of = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    trained = sum(leaf.size for leaf in jax.tree.leaves(full.params))
    assert bytes_of(full.opt_state) == pytest.approx(12 * trained, rel=1e-6)
    lora = compile_tpu.plan(replace(config, mode="lora"), make_mesh())[2]
    assert bytes_of(lora.opt_state) < 0.02 * bytes_of(full.opt_state)
    # What LoRA leaves alone is one tree, not two.
    kernel = lambda params: params["draft"]["layers"]["mlp"]["up_proj"]["kernel"]  # noqa: E731
    assert kernel(lora.reference) is None
    assert kernel(lora.reference_params) is kernel(lora.params)


# The compiler takes a minute and a half of one core for the image model's many small operations.
@pytest.mark.parametrize(
    ("system", "mode"), [pytest.param("tiny", "full", marks=pytest.mark.slow), ("tiny-x2", "lora")]
)
def test_a_tiny_step_compiles_for_four_chips(system, mode):
    pytest.importorskip("libtpu")
    root = Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.experiments.tiny_compile", system, mode],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout)
    memory = result["memory_per_chip_gib"]
    assert result["fits"]
    assert result["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert result["pairs_per_step"] == 4
    # The state is updated in place.
    assert 0 < memory["aliased"] <= memory["outputs"] <= memory["aliased"] * 1.1 + 0.001
    assert result["collectives_per_chip"]["all-gather"]["bytes"] > 0
    flops = result["flops"]
    assert flops["model_total"] == sum(flops["model"].values())
    assert flops["with_recomputation"] > flops["model_total"]


def figures_table(results):
    """Markdown. Memory of one chip in GiB; pixels a side; M: intermediates."""
    rules = ["---"] * 4 + ["---:"] * (len(COLUMNS) - 4)
    return "\n".join(f"| {' | '.join(row)} |" for row in (COLUMNS, rules, *map(row_of, results)))


def row_of(result):
    names = ("system", "mode", "topology", "level", "pairs_per_step", "sequence", "image_size", "intermediates")
    memory = result["memory_per_chip_gib"]
    held = [memory[name] for name in ("arguments", "temporaries", "peak")] + [result["usable_hbm_gib"]]
    sizes = ("–" if result[name] is None else str(result[name]) for name in names)  # noqa: RUF001
    return [*sizes, *(f"{size:.2f}" for size in held), f"{result['seconds']['compile']:.0f}"]


def test_the_page_shows_what_the_compiler_said():
    results = [json.loads(path.read_text()) for path in sorted(SCALING.glob("*.json"))]
    assert figures_table(results) in SCALING.with_suffix(".md").read_text()
    for result in results:
        assert result["fits"], result["made_by"]["command"]
        assert result["memory_per_chip_gib"]["peak"] <= result["usable_hbm_gib"]
