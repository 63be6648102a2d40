"""Decoder families: the configurations of Hugging Face's language models, in and out."""

from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.decoders.family import Family
from sysdpo_jax.pretrained.decoders.gemma import GEMMA2, GEMMA3_TEXT
from sysdpo_jax.pretrained.decoders.llama import LLAMA
from sysdpo_jax.pretrained.decoders.mistral import MISTRAL
from sysdpo_jax.pretrained.decoders.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3_TEXT)
}

__all__ = ["FAMILIES", "Family", "find_family"]


def find_family(model_type: str, where: str) -> Family:
    """The family of that model_type. Raises `CheckpointError` naming `where` and the families there are."""
    if model_type == "gemma3":
        raise CheckpointError(
            f"{where}: model_type 'gemma3' is Gemma3ForConditionalGeneration, which also reads images; its language "
            "model alone is known, as 'gemma3_text': load the whole in transformers, make its model.language_model the "
            "`model` of a Gemma3ForCausalLM of config.text_config, tie its weights, save that and load it from there"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{where}: model_type {model_type!r} is not known; known decoders are {known}")
    return FAMILIES[model_type]
