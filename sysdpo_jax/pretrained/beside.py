"""What was trained beside LoRA's factors: the weights that are no longer those of the files they were loaded from."""

import logging

import numpy as np

from sysdpo_jax.components import Diffusion, FlowMatching, LanguageModel
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.language import base_tensors
from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.params import changed_tensors
from sysdpo_jax.pretrained.parts import part_tensors
from sysdpo_jax.pretrained.pipelines import denoiser_part
from sysdpo_jax.typing import Params

logger = logging.getLogger(__name__)


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
