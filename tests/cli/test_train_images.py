"""A language model and Stable Diffusion from small folders: trained, evaluated with pictures, exported."""

import json

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.training import read_metrics
from tests.cli.test_runs import read_runs
from tests.pretrained.checkpoints import stable_diffusion_1, unet, write_decoder

# The U-Net's step takes minutes to compile.
pytestmark = pytest.mark.slow

CONFIG = """
directory: {folder}/run
system:
  inputs: [request]
  nodes:
    caption: {{component: writer, parents: [request]}}
    image: {{component: painter, parents: [caption]}}
  components:
    writer: {{checkpoint: {folder}/writer, mode: full, settings: {{max_prompt_length: 8, max_new_tokens: 8}}}}
    painter:
      checkpoint: {folder}/painter
      lora: {{rank: 2}}
      settings: {{truncation: keep_start, num_steps: 2, guidance_scale: 1.0}}
data: {{source: {folder}/pairs.jsonl}}
schedule: {{steps: 2, batch_size: 2, warmup: 1, learning_rate: 1e-2}}
evaluation: {{prompts: {folder}/prompts.txt, scorer: "{module}:brightness", every: 1}}
log_every: 1
"""


def brightness(run):
    return float(np.mean(run["image"]))


def test_from_folders_to_a_report_and_a_pipeline(tmp_path, capsys):
    write_decoder(tmp_path / "writer", "llama", num_hidden_layers=1)
    one_block = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    pipeline = stable_diffusion_1()
    pipeline.register_modules(unet=unet(block_out_channels=(8,), **one_block))
    pipeline.save_pretrained(tmp_path / "painter")
    for name, grey in (("good.png", 200), ("bad.png", 30)):
        Image.new("RGB", (20, 16), (grey, grey, 90)).save(tmp_path / name)
    sides = {"chosen": ("a red ball", "good.png"), "rejected": ("a cube", "bad.png")}
    row = {name: {"caption": caption, "image": image} for name, (caption, image) in sides.items()}
    rows = [{"inputs": {"request": word}, **row} for word in ("red", "green", "small", "large")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "prompts.txt").write_text("a\nthe\n")
    (tmp_path / "run.yaml").write_text(CONFIG.format(folder=tmp_path, module=__name__))

    dispatch(["train", str(tmp_path / "run.yaml"), "--dry-run"])
    assert "pixels, after the codec" in capsys.readouterr().out
    dispatch(["train", str(tmp_path / "run.yaml")])
    evaluated = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/score" in row]
    runs = read_runs(tmp_path / "run" / "evaluation" / "runs-00000002.jsonl")
    assert evaluated[-1]["eval/score"] == pytest.approx(np.mean([brightness(run["outputs"]) for run in runs]), abs=2e-3)
    report = (tmp_path / "run" / "report.html").read_text()
    # Two prompts, before and after.
    assert report.count("data:image/png;base64") == 4

    dispatch(["export", "--directory", str(tmp_path / "run"), "--output", str(tmp_path / "aligned")])
    before, after = (
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / name, safety_checker=None).unet
        for name in ("painter", "aligned/painter")
    )
    moved = [torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert 0 < moved.count(False) < len(moved)
