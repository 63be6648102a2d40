"""The README keeps its word: its example and those that go on from it run, its table is the run's, it is short."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from experiments.progressive.report import RESULTS
from sysdpo_jax.report import markdown_table
from tests.pretrained.checkpoints import stable_diffusion_1, write_decoder

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RUN = ROOT / "docs" / "progressive_images"


PYTHON = (ROOT / "docs" / "python.md").read_text()
[OWN_SYSTEM] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FINAL_VALUES, OWN_MODELS, SHARDED = re.findall(r"```python\n(.*?)```", PYTHON, re.DOTALL)


def run_code(code, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_examples_run_as_they_stand_and_improve_the_system(tmp_path):
    lines = run_code(OWN_SYSTEM + FINAL_VALUES + SHARDED, tmp_path).splitlines()
    before, *after = (float(line) for line in (*lines[:3], lines[-1]))
    # The mean of 2048 scores of spread about 1: its standard error is 0.03.
    assert len(after) == 3
    assert min(after) > before + 0.3
    # Between them the bytes of each component.
    assert [line for line in lines[3:-1] if "route" in line]


@pytest.mark.slow
def test_the_last_example_runs_as_it_stands_on_small_checkpoints(tmp_path):
    """What it writes is loaded by transformers and diffusers, and differs from what it was given."""
    given = write_decoder(tmp_path / "path/to/decoder", "llama", max_position_embeddings=256)
    pipeline = stable_diffusion_1()
    pipeline.save_pretrained(tmp_path / "path/to/pipeline")
    for name, grey in (("good.png", 200), ("bad.png", 30)):
        Image.new("RGB", (20, 16), (grey, grey, 90)).save(tmp_path / name)
    side = lambda caption, image: {"caption": caption, "image": str(tmp_path / image)}  # noqa: E731
    records = [
        {"inputs": {"request": word}, "chosen": side("a red ball", "good.png"), "rejected": side("a cube", "bad.png")}
        for word in ("red", "green", "small", "large")
    ]
    (tmp_path / "preferences.jsonl").write_text("\n".join(map(json.dumps, records)))
    run_code(OWN_MODELS, tmp_path)
    aligned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "aligned/writer")
    changed = [
        name for name, tensor in aligned.state_dict().items() if not torch.equal(tensor, given.state_dict()[name])
    ]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "aligned/painter")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    after = pipeline.unet.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".attn2." in name for name in moved)


def test_the_readme_is_read_in_a_few_minutes():
    assert len(README.splitlines()) <= 150


def test_the_table_is_that_of_the_run_whose_files_are_beside_it():
    results = json.loads((RUN / "results.json").read_text())
    assert markdown_table(RESULTS.table(results)) in README


def test_the_figures_hold_what_the_readme_claims():
    """Better than the start and than either component alone; the aligned system beats the best of four unaligned."""
    results = json.loads((RUN / "results.json").read_text())
    assert results["evaluated_on"] == "test"
    for other in ("before", "lm_only", "diffusion_only"):
        for figure in ("preference_score", "order_consistency"):
            gain = results["differences"][f"sysdpo - {other}"][figure]
            assert gain["n"] >= 512
            assert gain["value"] > 2 * gain["standard_error"], (other, figure)
    gain = results["differences"]["sysdpo_online - best_of_n"]
    assert gain["preference_score"]["value"] > 0
    assert gain["order_consistency"]["value"] > -2 * gain["order_consistency"]["standard_error"]


def test_the_map_names_every_folder_and_every_link_and_path_leads_somewhere():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("sysdpo_jax/*/__init__.py")}
    architecture = (ROOT / "docs" / "architecture.md").read_text()
    assert folders <= set(re.findall(r"`(sysdpo_jax/\w+)/`", architecture))
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
        for path in re.findall(r"`((?:sysdpo_jax|tests|experiments|docs)/[\w/.]*)`", page.read_text()):
            assert (ROOT / path).exists(), f"{page}: {path}"
