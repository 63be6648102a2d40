"""Llama 2 and 3, SmolLM2, and whatever else calls itself llama."""

from typing import Any

from sysdpo_jax.models.decoder_config import DecoderConfig
from sysdpo_jax.pretrained.base import ConfigReader
from sysdpo_jax.pretrained.decoders import fields
from sysdpo_jax.pretrained.decoders.family import Family
from sysdpo_jax.pretrained.fields import build, flag


def _read(config: ConfigReader) -> DecoderConfig:
    config.expect("hidden_act", "silu")
    config.expect("mlp_bias", False)
    config.expect("rope_interleaved", False)
    # pretraining_tp cuts the same products into pieces.
    config.ignore("pretraining_tp", "is_llama_config")
    shape = fields.read_shape(config, "llama") | fields.read_rope(config)
    return build(config, DecoderConfig, shape | {"attention_bias": flag(config, "attention_bias", False)})


def _express(config: DecoderConfig) -> dict[str, Any]:
    own = {"hidden_act": "silu", "mlp_bias": False, "attention_bias": config.attention_bias}
    return fields.express_shape(config) | fields.express_rope(config) | own


LLAMA = Family("llama", "LlamaForCausalLM", _read, _express)
