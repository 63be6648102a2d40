"""Gemma 2 (soft caps, alternating local and global layers) and the text model of Gemma 3 (two rotary bases)."""

from collections.abc import Mapping
from typing import Any

from sysdpo_jax.models.decoder_config import FULL, SLIDING, DecoderConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.decoders import fields
from sysdpo_jax.pretrained.decoders.family import Family
from sysdpo_jax.pretrained.fields import build, flag, number, number_or_none, whole, whole_or_none

ACTIVATION = "gelu_pytorch_tanh"


def _read_shared(config: ConfigReader, model_type: str, period: int) -> dict[str, Any]:
    config.expect("hidden_activation", ACTIVATION)
    # transformers computes the tanh form whatever this older key says.
    config.ignore("hidden_act")
    config.expect("use_bidirectional_attention", False, None)
    shape = fields.read_shape(config, model_type, tied=True)
    window = whole_or_none(config, "sliding_window", 4096)
    # The window once more, in the files of Gemma 2 9B and 27B.
    config.expect("sliding_window_size", window)
    layers = fields.read_layers(config, shape["num_hidden_layers"], window, lambda layer: bool((layer + 1) % period))
    gemma = {
        # A file without head_dim means this width, not hidden_size / heads.
        "head_dim": whole_or_none(config, "head_dim", 256),
        "hidden_act": ACTIVATION,
        "attention_bias": flag(config, "attention_bias", False),
        "post_norms": True,
        "norm_unit_offset": True,
        "scale_embeddings": True,
        "query_pre_attn_scalar": number(config, "query_pre_attn_scalar", 256),
    }
    return shape | layers | gemma


def _express_shared(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.head_width if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    return fields.express_shape(config) | {
        "hidden_activation": ACTIVATION,
        "attention_bias": config.attention_bias,
        # transformers wants an integer where it is one.
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        # transformers makes the local mask even where no layer asks for it.
        "sliding_window": 4096 if config.sliding_window is None else config.sliding_window,
        "layer_types": list(config.layer_kinds),
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _read_gemma2(config: ConfigReader) -> DecoderConfig:
    values = _read_shared(config, "gemma2", period=2) | fields.read_rope(config)
    caps = {
        "attn_logit_softcapping": number_or_none(config, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": number_or_none(config, "final_logit_softcapping", 30.0),
    }
    return build(config, DecoderConfig, values | caps)


def _express_gemma2(config: DecoderConfig) -> dict[str, Any]:
    own = {"attn_logit_softcapping": config.attn_logit_softcapping}
    return _express_shared(config) | fields.express_rope(config) | own


def _read_gemma3(config: ConfigReader) -> DecoderConfig:
    # transformers reads this key and leaves the scores uncapped, so only null is unambiguous.
    config.expect("attn_logit_softcapping", None)
    period = whole(config, "sliding_window_pattern", whole(config, "_sliding_window_pattern", 6))
    values = _read_shared(config, "gemma3_text", period) | _read_two_ropes(config)
    cap = number_or_none(config, "final_logit_softcapping")
    return build(config, DecoderConfig, values | {"final_logit_softcapping": cap, "qk_norm": True})


def _read_two_ropes(config: ConfigReader) -> dict[str, Any]:
    """The global layers' theta and scaling and the local layers' theta, in either style or in both if they agree."""
    both = config.take("rope_parameters", None) or {}
    if not isinstance(both, Mapping):
        raise config.refused("rope_parameters", f"only a mapping of {FULL!r} and {SLIDING!r}")
    theta, scaling = fields.stated_rope(config, "rope_theta", config.take("rope_scaling", None), both.get(FULL))
    local_theta, local_scaling = fields.stated_rope(config, "rope_local_base_freq", both.get(SLIDING))
    if set(both) - {FULL, SLIDING} or local_scaling is not None:
        raise CheckpointError(
            f"{config.where}: rope_parameters={both!r} is not supported (only {FULL!r}, and {SLIDING!r} without "
            "scaling); this model would be computed wrongly"
        )
    return {
        "rope_theta": 1e6 if theta is None else theta,
        "rope_scaling": scaling,
        "rope_local_base_freq": 1e4 if local_theta is None else local_theta,
    }


def _express_gemma3(config: DecoderConfig) -> dict[str, Any]:
    local = config.rope_theta if config.rope_local_base_freq is None else config.rope_local_base_freq
    values = _express_shared(config) | fields.express_rope(config) | {"rope_local_base_freq": local}
    # Versions before layer_types know a period alone.
    period = config.layer_kinds.index(FULL) + 1 if FULL in config.layer_kinds else config.num_hidden_layers + 1
    if fields.pattern(config.num_hidden_layers, lambda layer: bool((layer + 1) % period)) == config.layer_kinds:
        values["sliding_window_pattern"] = period
    return values


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _express_gemma2)
GEMMA3_TEXT = Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _express_gemma3)
