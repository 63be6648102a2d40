"""A small Stable Diffusion pipeline, made from nothing: it draws coloured shapes for plain captions, 16 pixels a side.

example:
  python -m experiments.programs.painter painter

The folder is one of diffusers' StableDiffusionPipeline, trained by PyTorch in a quarter of an hour on a CPU: first the
autoencoder, then text encoder and U-Net together. It stands for the painter that the owner of the program of
docs/programs/pictures.md has. Its captions are short and plain, and such are the prompts that it understands.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sysdpo_jax.recipes.pictures import COLOURS, RADII, SIDE, Kind, drawn, kinds

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 32
# Shares of captions that are empty, for guidance, and of attributes that a caption leaves out.
EMPTY, LEFT_OUT = 0.1, 0.1
BATCH = 32
FORMS = (
    lambda words: " ".join(("a", *words)),
    lambda words: " ".join(words),
    lambda words: " ".join(("a picture of a", *words)),
    lambda words: ", ".join(words[::-1]),
)


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte pairs, learned from the captions and the wishes that the system is aligned on."""
    texts = [
        *(form(words) for words in kinds() for form in FORMS),
        *(files("sysdpo_jax.recipes") / "pictures_wishes.txt").read_text().splitlines(),
    ]
    learned = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learned.normalizer = normalizers.Lowercase()
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learned.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    )
    merges: Any = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {piece: number for number, piece in enumerate((*dict.fromkeys(pieces), START, END))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def captions(drawn_kinds: Sequence[Kind], rng: np.random.Generator) -> list[str]:
    """A caption of each drawing, which may leave something out or say nothing."""
    made = []
    for kind in drawn_kinds:
        said = tuple(word for word in kind if rng.random() >= LEFT_OUT)
        made.append("" if rng.random() < EMPTY else FORMS[rng.integers(len(FORMS))](said))
    return made


def pictures(drawn_kinds: Sequence[Kind], rng: np.random.Generator) -> Tensor:
    """Drawings [B, 3, side, side] in [-1, 1], each a little different in size and colour."""
    made = [
        drawn(RADII[size] + rng.uniform(-0.3, 0.3), np.clip(COLOURS[colour] + rng.uniform(-0.07, 0.07, 3), 0, 1), shape)
        for size, colour, shape in drawn_kinds
    ]
    return torch.tensor(np.stack(made), dtype=torch.float32).permute(0, 3, 1, 2) * 2 - 1


def fitted_vae(images: Tensor, steps: int) -> Any:
    """An autoencoder of the pictures; latents have half the side and are scaled to deviation 1."""
    vae: Any = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=SIDE,
    )

    def loss(rows: Tensor) -> Tensor:
        posterior = vae.encode(images[rows]).latent_dist
        error = functional.mse_loss(vae.decode(posterior.sample()).sample, images[rows])
        return error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    _fit(vae.parameters(), loss, len(images), steps, 2e-3, "autoencoder")
    with torch.no_grad():
        deviation = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(256)]).std()
    vae.register_to_config(scaling_factor=1 / float(deviation))
    return vae.eval()


def fitted(images: Tensor, texts: Sequence[str], vae_steps: int, steps: int) -> Any:
    """The pipeline after so many steps of the autoencoder, and of text encoder and U-Net."""
    words = tokenizer()
    vae = fitted_vae(images, vae_steps)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    unet: Any = diffusers.UNet2DConditionModel(
        sample_size=SIDE // 2,
        block_out_channels=(48, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
    )
    scheduler: Any = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(256)])
    latents = latents * vae.config.scaling_factor
    tokens = words(list(texts), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids

    def loss(rows: Tensor) -> Tensor:
        noise, times = torch.randn_like(latents[rows]), torch.randint(1000, (len(rows),))
        noisy = scheduler.add_noise(latents[rows], noise, times)
        states = encoder(tokens[rows]).last_hidden_state
        return functional.mse_loss(unet(noisy, times, states).sample, noise)

    _fit(chain(unet.parameters(), encoder.parameters()), loss, len(images), steps, 1e-3, "U-Net and text encoder")
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _fit(
    parameters: Iterable[Tensor], loss_of: Callable[[Tensor], Tensor], number: int, steps: int, rate: float, name: str
) -> None:
    """Adam with a cosine to 0. loss_of: of the numbers of a batch's rows."""
    optimizer = torch.optim.Adam(list(parameters), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        loss = loss_of(torch.randint(number, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == steps - 1:
            print(f"{name}: step {step}, loss {loss.item():.4f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The folder that the words of a command line ask for, by default those of this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=8192)
    parser.add_argument("--vae-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=4000)
    flags = parser.parse_args(arguments)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    asked = [kinds()[i] for i in rng.integers(len(kinds()), size=flags.examples)]
    fitted(pictures(asked, rng), captions(asked, rng), flags.vae_steps, flags.steps).save_pretrained(flags.folder)


if __name__ == "__main__":
    main()
