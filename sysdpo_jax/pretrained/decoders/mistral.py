"""Mistral 7B and its kin: a Llama whose layers all slide, or none."""

from typing import Any

from sysdpo_jax.models.decoder_config import DecoderConfig
from sysdpo_jax.pretrained.base import ConfigReader
from sysdpo_jax.pretrained.decoders import fields
from sysdpo_jax.pretrained.decoders.family import Family
from sysdpo_jax.pretrained.fields import build, whole_or_none


def _read(config: ConfigReader) -> DecoderConfig:
    config.expect("hidden_act", "silu")
    shape = fields.read_shape(config, "mistral") | fields.read_rope(config)
    # An absent window is transformers' default; null means none.
    return build(config, DecoderConfig, shape | {"sliding_window": whole_or_none(config, "sliding_window", 4096)})


def _express(config: DecoderConfig) -> dict[str, Any]:
    own = {"hidden_act": "silu", "sliding_window": config.sliding_window}
    return fields.express_shape(config) | fields.express_rope(config) | own


MISTRAL = Family("mistral", "MistralForCausalLM", _read, _express)
