"""A Diffusion-DPO step of diffusers' U-Net in PyTorch, eager or through `torch.compile`.

Weights in float32 under automatic mixed precision where the work is in bfloat16, as diffusers' own training scripts do;
the reference in bfloat16. Nothing is recomputed.
"""

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

from experiments.benchmarks.peers.side import Measured, answer, timed
from experiments.benchmarks.peers.torch_side import DTYPES, device_of, measured, synchronize
from experiments.benchmarks.peers.work import FILLED_WITH, LEARNING_RATE, ImageDPO

# Of -beta / 2 in equation 14 of arXiv 2311.12908, section 5.1; it has no part in the time.
HALF_BETA = 2500.0
TIMES = 1000


def measure(work: ImageDPO, folder: Path, told: Mapping[str, Any]) -> Measured:
    """told: "compile"."""
    began, device = time.perf_counter(), device_of(work.device)
    torch.manual_seed(0)
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in work.unet.items()}
    kind: Any = diffusers.UNet2DConditionModel
    with device:
        unet = kind(sample_size=work.latent, **fields)
    dtype = DTYPES[work.precision]
    reference = copy.deepcopy(unet).to(dtype).requires_grad_(False)
    sized = unet.config.addition_embed_type is not None
    checks = {} if sized else {"probe": probe(work, copy.deepcopy(unet))}
    optimizers: dict[str, Any] = {
        "adamw": lambda p: torch.optim.AdamW(p, LEARNING_RATE, weight_decay=0.0),
        "adafactor": lambda p: torch.optim.Adafactor(p, LEARNING_RATE),
    }
    optimizer = optimizers[work.optimizer](unet.parameters())
    model, frozen = (torch.compile(unet), torch.compile(reference)) if told["compile"] else (unet, reference)
    rows, pairs, channels = 2 * work.pairs, work.pairs, unet.config.in_channels
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    latents = torch.randn(rows, channels, work.latent, work.latent, **made)
    text = torch.randn(rows, work.text, unet.config.cross_attention_dim, **made)
    added: dict[str, Any] = {}
    if sized:
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        ids = torch.full((rows, 6), 8.0 * work.latent, device=device)
        added = {"added_cond_kwargs": {"text_embeds": torch.randn(rows, pooled, **made), "time_ids": ids}}
    scheduler: Any = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    mixed = work.precision == "bfloat16"
    losses: list[torch.Tensor] = []

    def run() -> None:
        # A pair's images share time and noise.
        times = torch.randint(0, TIMES, (pairs,), device=device).repeat(2)
        noise = torch.randn(pairs, *latents.shape[1:], **made).repeat(2, 1, 1, 1)
        noisy = scheduler.add_noise(latents, noise, times)
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            predicted = model(noisy, times, text, **added).sample
            with torch.no_grad():
                before = frozen(noisy, times, text, **added).sample
        errors, others = ((x.float() - noise.float()).square().mean((1, 2, 3)) for x in (predicted, before))
        chosen, rejected = (errors - others).chunk(2)
        loss = -F.logsigmoid(-HALF_BETA * (chosen - rejected)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    def wait() -> None:
        synchronize(device)

    timed(run, wait, 1, 1)
    first = time.perf_counter() - began
    timed(run, wait, 1, 2)
    seconds = timed(run, wait, work.repeats, work.steps)
    if not all(bool(torch.isfinite(loss)) for loss in losses):
        raise SystemExit("a loss is not finite")
    return measured(device, seconds, first, unet, {"loss": float(losses[0]), **checks}, ("diffusers",))


def probe(work: ImageDPO, unet: Any) -> float:
    """The root mean square of what the U-Net makes of the work's fixed inputs when all its weights are one number."""
    inputs = work.probe(unet.config.in_channels, unet.config.cross_attention_dim)
    latents, times, text = (torch.from_numpy(x).to(unet.device) for x in inputs)
    with torch.no_grad():
        for weights in unet.parameters():
            weights.fill_(FILLED_WITH)
        made = unet(latents.permute(0, 3, 1, 2), times, text).sample
    return float(made.square().mean().sqrt())


if __name__ == "__main__":
    answer(measure)
