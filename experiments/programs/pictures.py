"""The program of docs/programs/pictures.md by PyTorch alone, on the held-out wishes: what its folders draw, in figures.

example:
  python -m experiments.programs.pictures --writer aligned/writer --painter aligned/painter --output figures.json

Run it on the folders that `sysdpo export` writes, and on those before: nothing here is of this library but the recipe's
functions, and the standard errors of the figures.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from sysdpo_jax.evaluation import Estimate, clustered_mean
from sysdpo_jax.recipes.pictures import request, right, score

Say = Callable[[list[dict[str, str]]], str]


def writer_in(folder: Path) -> Say:
    """What says a prompt, of a folder or a GGUF file."""
    place = {"gguf_file": folder.name} if folder.suffix == ".gguf" else {}
    folder = folder.parent if place else folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **place)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **place).eval()

    def say(messages: list[dict[str, str]]) -> str:
        tokens: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        sampled = model.generate(**tokens, max_new_tokens=24, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
        return str(tokenizer.decode(sampled[0, tokens.input_ids.shape[1] :], skip_special_tokens=True))

    return say


def draw(wish: str, say: Say, painter: Any) -> dict[str, Any]:
    """One run of the program."""
    prompt = say(request(wish))
    [picture] = painter(prompt, num_inference_steps=20, guidance_scale=3.0, output_type="np").images
    return {"wish": wish, "prompt": prompt, "picture": picture}


def figures(runs: list[dict[str, Any]]) -> dict[str, Estimate]:
    """Means with standard errors, clustered by wish."""
    wishes = np.array([run["wish"] for run in runs])
    return {of.__name__: clustered_mean(np.array([of(run) for run in runs]), wishes) for of in (score, right)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--writer", type=Path, required=True)
    parser.add_argument("--painter", type=Path, required=True)
    parser.add_argument("--wishes", type=Path, default=Path(str(files("sysdpo_jax.recipes"))) / "pictures_held_out.txt")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    torch.manual_seed(0)
    say = writer_in(flags.writer)
    painter: Any = diffusers.StableDiffusionPipeline.from_pretrained(flags.painter)
    painter.set_progress_bar_config(disable=True)
    runs = [draw(wish, say, painter) for wish in flags.wishes.read_text().splitlines() for _ in range(flags.samples)]
    written = {name: asdict(mean) for name, mean in figures(runs).items()}
    flags.output.write_text(json.dumps(written | {"prompts": [run["prompt"] for run in runs]}, indent=1))
    print(json.dumps(written))


if __name__ == "__main__":
    main()
