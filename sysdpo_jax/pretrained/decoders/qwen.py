"""Qwen 1.5, 2 and 2.5 (qwen2: biases on queries, keys and values) and Qwen 3 (normed queries and keys)."""

from typing import Any

from sysdpo_jax.models.decoder_config import SLIDING, DecoderConfig
from sysdpo_jax.pretrained.base import ConfigReader
from sysdpo_jax.pretrained.decoders import fields
from sysdpo_jax.pretrained.decoders.family import Family
from sysdpo_jax.pretrained.fields import build, flag, whole, whole_or_none


def _read_shared(config: ConfigReader, model_type: str) -> dict[str, Any]:
    config.expect("hidden_act", "silu")
    config.expect("use_mrope", False)
    shape = fields.read_shape(config, model_type) | fields.read_rope(config)
    # The files state a window even where it is not used.
    window = whole_or_none(config, "sliding_window", 4096)
    used = flag(config, "use_sliding_window", False)
    start = whole(config, "max_window_layers", 28)
    window = window if used else None
    return shape | fields.read_layers(
        config, shape["num_hidden_layers"], window, lambda layer: window is not None and layer >= start
    )


def _express_shared(config: DecoderConfig) -> dict[str, Any]:
    kinds = config.layer_kinds
    start = fields.first_sliding(kinds)
    own = {
        "hidden_act": "silu",
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": list(kinds),
    }
    if all(kind == SLIDING for kind in kinds[start:]):
        own["max_window_layers"] = start
    return fields.express_shape(config) | fields.express_rope(config) | own


def _read_qwen2(config: ConfigReader) -> DecoderConfig:
    return build(config, DecoderConfig, _read_shared(config, "qwen2") | {"qkv_bias": True})


def _read_qwen3(config: ConfigReader) -> DecoderConfig:
    own = {"attention_bias": flag(config, "attention_bias", False), "qk_norm": True}
    # A file without head_dim means this width, not hidden_size / heads.
    values = _read_shared(config, "qwen3")
    return build(config, DecoderConfig, values | own | {"head_dim": whole_or_none(config, "head_dim", 128)})


def _express_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return _express_shared(config) | {"attention_bias": config.attention_bias}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _express_shared)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _express_qwen3)
