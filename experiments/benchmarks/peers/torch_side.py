"""What the sides in PyTorch share. Runs in the peers' environment, which need not have JAX."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from experiments.benchmarks.peers.side import Measured, peak_rss, versions
from experiments.benchmarks.peers.work import Decode, Device, Precision, TextDPO

DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def device_of(device: Device) -> torch.device:
    """PyTorch's. Raises SystemExit where there is no such device."""
    if device == "gpu" and not torch.cuda.is_available():
        raise SystemExit("PyTorch has no gpu")
    return torch.device("cuda" if device == "gpu" else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def llama(work: TextDPO | Decode, weights: Path | None) -> Any:
    """A Llama on the work's device and in its precision: with random weights, or with those of a folder."""
    place, dtype = device_of(work.device), DTYPES[work.precision]
    # Any: transformers' annotations do not admit what its classes take and make.
    kind: Any = transformers.LlamaForCausalLM
    if weights is not None:
        return kind.from_pretrained(weights, dtype=dtype, attn_implementation="sdpa").to(place)
    torch.manual_seed(0)
    config = llama_config(work.decoder)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with place:
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def llama_config(decoder: Mapping[str, Any]) -> Any:
    """transformers' configuration of our fields."""
    kind: Any = transformers.LlamaConfig
    fields = dict(decoder)
    theta = fields.pop("rope_theta", 1e4)
    rope = {"rope_type": "default", "rope_theta": theta}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    return kind(**fields, **special, rope_parameters=rope, attn_implementation="sdpa")


def parameters_of(model: Any) -> int:
    """How many numbers they are."""
    return sum(weights.numel() for weights in model.parameters())


def measured(
    device: torch.device,
    seconds: list[float],
    first_seconds: float,
    model: Any,
    checks: Mapping[str, Any],
    packages: tuple[str, ...],
    about: Mapping[str, Any] | None = None,
) -> Measured:
    """With the memory of the GPU or, on a CPU, of the process. model: None where another process holds it."""
    gpu = device.type == "cuda"
    peak = float(torch.cuda.max_memory_allocated()) if gpu else peak_rss()
    return Measured(
        seconds,
        first_seconds,
        None if model is None else parameters_of(model),
        checks,
        None if model is None else peak,
        torch.cuda.get_device_name() if gpu else "cpu",
        versions("torch", *packages),
        about or {},
    )
