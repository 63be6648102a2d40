"""LoRA factors in the layouts that PEFT (language models) and diffusers (image models) read. Only safetensors.

Beside them may stand what was trained too: the weights that are no longer those of the files they were loaded from.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from sysdpo_jax.components import Diffusion, FlowMatching, LanguageModel
from sysdpo_jax.pretrained.base import CheckpointError, write_json
from sysdpo_jax.pretrained.image_models import part_tensors
from sysdpo_jax.pretrained.language import base_tensors
from sysdpo_jax.pretrained.names import Naming, tensors_of
from sysdpo_jax.pretrained.params import changed_tensors
from sysdpo_jax.pretrained.pipelines import denoiser_part
from sysdpo_jax.pretrained.tensors import write_safetensors
from sysdpo_jax.typing import Params

logger = logging.getLogger(__name__)


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

    def resized(self, rank: int, scale: float) -> "Adapter":
        """The same product with a rank that is no smaller, by zeros, and with another scale, by its share in B."""
        more, rest = rank - self.rank, [(0, 0)] * (self.down.ndim - 2)
        share = self.scale / scale
        # The float32 scale is alpha / rank to seven digits; what is only its rounding leaves B as it was trained.
        up = self.up if abs(share - 1) < 1e-6 else (self.up * np.float32(share)).astype(self.up.dtype)
        down, up = np.pad(self.down, [(0, more), (0, 0), *rest]), np.pad(up, [(0, 0), (0, more), *rest])
        return Adapter(self.module, down, up, scale)


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


def write_peft_adapter(
    folder: Path, params: Params, naming: Naming, base_model: str | None, whole: Mapping[str, np.ndarray]
) -> None:
    """adapter_config.json and adapter_model.safetensors of a decoder, for peft.PeftModel.from_pretrained and vLLM.

    All layers have the largest rank and the most common scale, so that readers that know one r and one lora_alpha (vLLM
    for long) compute the same as those that know PEFT's patterns.

    Args:
        base_model: folder or repository of the model that the adapter belongs to, noted for readers.
        whole: weights that were trained beside the factors, by their stored names. PEFT keeps such modules whole.

    Raises:
        CheckpointError: for parameters without LoRA.
    """
    adapters = list(adapters_of(params, naming))
    rank = max(adapter.rank for adapter in adapters)
    scale = Counter(adapter.scale for adapter in adapters).most_common(1)[0][0]
    # Without the rounding of the float32 scale.
    alpha = float(f"{scale * rank:.6g}")
    config = {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": [name.removesuffix(".weight").rpartition(".")[2] for name in whole] or None,
        "peft_type": "LORA",
        "r": rank,
        # Whole names, so that exactly these layers are adapted.
        "target_modules": sorted(adapter.module for adapter in adapters),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", config)
    factors = _factors("base_model.model.", (adapter.resized(rank, alpha / rank) for adapter in adapters))
    others = ((f"base_model.model.{name}", array) for name, array in whole.items())
    write_safetensors(folder, "adapter_model", chain(factors, others))


def write_diffusers_adapter(folder: Path, params: Params, naming: Naming, name: str) -> None:
    """pytorch_lora_weights.safetensors of one model, for diffusers' load_lora_weights and load_lora_adapter.

    name: the model's in its pipeline, "unet" or "transformer". All layers have the largest rank, and a scale of 1 that
    is multiplied into B. diffusers refuses a key for alpha in this layout, and takes alpha to be the rank: today each
    layer's own, in older versions (0.35 and before) the first layer's for all. With one rank all of them are right.
    Raises `CheckpointError` for parameters without LoRA.
    """
    adapters = list(adapters_of(params, naming))
    rank = max(adapter.rank for adapter in adapters)
    folder.mkdir(parents=True, exist_ok=True)
    factors = _factors(f"{name}.", (adapter.resized(rank, 1.0) for adapter in adapters))
    write_safetensors(folder, "pytorch_lora_weights", factors)


def _factors(before: str, adapters: Iterable[Adapter]) -> Iterator[tuple[str, np.ndarray]]:
    for adapter in adapters:
        yield f"{before}{adapter.module}.lora_A.weight", adapter.down
        yield f"{before}{adapter.module}.lora_B.weight", adapter.up


def whole_modules(component: LanguageModel, params: Params) -> frozenset[str]:
    """The stored weights that PEFT can keep whole: a tied head would not follow its embedding, nor factors a kernel."""
    if component.decoder.config.tie_word_embeddings:
        return frozenset()
    head = () if "lora_a" in params["lm_head"] else ("lm_head.weight",)
    return frozenset(("model.embed_tokens.weight", *head))


def trained_beside(
    component: LanguageModel | Diffusion | FlowMatching, params: Params, naming: Naming, allowed: frozenset[str]
) -> dict[str, np.ndarray]:
    """The weights that are no longer those of the files, by their stored names.

    Raises `CheckpointError` naming those that are not among the allowed, and when the files are gone.
    """
    source = component.source
    if source is None:
        logger.warning(
            "This component was not loaded from files: only its LoRA factors are written, and whatever else was "
            "trained is not in the adapter. save writes everything."
        )
        return {}
    if not isinstance(component, LanguageModel):
        name, part = denoiser_part(component)
        source = source.below(name)
    if not source.path.exists():
        raise CheckpointError(
            f"{source.path}, which the model was loaded from, is gone, so that nobody can tell whether more than the "
            "LoRA factors was trained: put it back, or use save"
        )
    if isinstance(component, LanguageModel):
        tensors = base_tensors(component, source)
    else:
        tensors = part_tensors(source.path, part, source.variant)
    kept, refused = {}, []
    for stored, array in changed_tensors(params, tensors, naming):
        if stored in allowed:
            kept[stored] = array
        else:
            refused.append(stored)
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise CheckpointError(
            f"an adapter has no place for what was trained beside its factors: {', '.join(refused[:3])}{more} differ "
            f"from {source.path}. Write the whole model with save, or train the factors alone (LORA_PARAMS)"
        )
    return kept
