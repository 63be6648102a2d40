"""LoRA factors in the layouts that PEFT (language models) and diffusers (image models) read. Only safetensors."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from sysdpo_jax.pretrained.base import CheckpointError, write_json
from sysdpo_jax.pretrained.names import Naming, tensors_of
from sysdpo_jax.pretrained.tensors import write_safetensors
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class Adapter:
    """One stored layer's factors, down: A as [rank, in], up: B as [out, rank], with the 1 x 1 of a convolution."""

    module: str
    down: np.ndarray
    up: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def alpha(self) -> float:
        """scale * rank, without the rounding of the float32 scale."""
        return float(f"{self.scale * self.rank:.6g}")


def adapters_of(params: Params, naming: Naming) -> Iterator[Adapter]:
    """The adapter of each stored layer that carries factors, one layer of a stack at a time.

    Raises `CheckpointError` when no layer does.
    """
    flat = flatten_dict(params, sep="/")
    paths = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if not paths:
        raise CheckpointError("these parameters carry no LoRA factors: add_lora makes them, save writes whole models")
    for path in paths:
        a, b, scale = (np.asarray(flat[f"{path}/{name}"]) for name in ("lora_a", "lora_b", "lora_scale"))
        for tensor in tensors_of(f"{path}/kernel", flat[f"{path}/kernel"].shape, naming):
            one = ... if tensor.layer is None else tensor.layer
            # Both factors are stored as a kernel is: transposed, and as 1 x 1 convolutions where it is one.
            down, up = tensor.to_stored(a[one]), tensor.to_stored(b[one])
            yield Adapter(tensor.name.removesuffix(".weight"), down, up, float(scale[one]))


def write_peft_adapter(folder: Path, params: Params, naming: Naming, base_model: str | None) -> None:
    """adapter_config.json and adapter_model.safetensors of a decoder, for peft.PeftModel.from_pretrained.

    base_model: folder or repository of the model that the adapter belongs to, noted for readers.
    Raises `CheckpointError` for parameters without LoRA.
    """
    adapters = list(adapters_of(params, naming))
    rank = Counter(adapter.rank for adapter in adapters).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters).most_common(1)[0][0]
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        # Whole names, so that exactly these layers are adapted; the patterns name those that differ.
        "target_modules": sorted(adapter.module for adapter in adapters),
        "rank_pattern": {adapter.module: adapter.rank for adapter in adapters if adapter.rank != rank},
        "alpha_pattern": {adapter.module: adapter.alpha for adapter in adapters if adapter.alpha != alpha},
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    tensors = ((f"base_model.model.{adapter.module}", adapter.down, adapter.up) for adapter in adapters)
    write_safetensors(folder, "adapter_model", _factors(tensors))


def write_diffusers_adapter(folder: Path, params: Params, naming: Naming, name: str) -> None:
    """pytorch_lora_weights.safetensors of one model, for diffusers' load_lora_weights and load_lora_adapter.

    name: the model's in its pipeline, "unet" or "transformer". The scale is multiplied into B: the layout has no place
    for alpha that all of its readers know, and without one they take alpha = rank, which is then right.
    Raises `CheckpointError` for parameters without LoRA.
    """
    adapters = list(adapters_of(params, naming))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (
        (f"{name}.{adapter.module}", adapter.down, (adapter.up * np.float32(adapter.scale)).astype(adapter.up.dtype))
        for adapter in adapters
    )
    write_safetensors(folder, "pytorch_lora_weights", _factors(tensors))


def _factors(tensors: Iterator[tuple[str, np.ndarray, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    for module, down, up in tensors:
        yield f"{module}.lora_A.weight", down
        yield f"{module}.lora_B.weight", up
