"""Configurations of transformers' T5EncoderModel in its v1.1 form, the third text encoder of Stable Diffusion 3."""

from typing import Any

from sysdpo_jax.models.t5 import T5Config
from sysdpo_jax.pretrained.base import ConfigReader
from sysdpo_jax.pretrained.fields import UNUSED, build, express, number, whole
from sysdpo_jax.pretrained.names import Naming

# The decoder's settings, dropout (we have none) and the lengths of old tokenizers.
# fmt: off
DECODERS = (
    "classifier_dropout", "dropout_rate", "is_encoder_decoder", "n_positions", "num_decoder_layers", "output_past",
    "scale_decoder_outputs", "tie_word_embeddings",
)
NUMBERS = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
    "relative_attention_max_distance",
)
# fmt: on
GATED = "gated-gelu"

# The embedding is stored once or twice, under the name of the encoder's module; the last two are a whole T5's.
NAMING = Naming(
    rename=((r"\.wi\.(\d)\.", r".wi_\1."),),
    copies=(("encoder.embed_tokens.weight", "shared.weight"),),
    ignored=r"^(decoder|lm_head)\.",
)


def read(config: ConfigReader) -> T5Config:
    """The encoder that a config.json states, that of a whole T5 too. Raises `CheckpointError`."""
    # Absent it would mean "relu", so the key is required.
    config.take("feed_forward_proj")
    config.expect("feed_forward_proj", GATED)
    config.expect("is_gated_act", True)
    config.expect("dense_act_fn", "gelu_new")
    config.expect("is_decoder", False)
    config.expect("model_type", "t5")
    config.ignore(*UNUSED, *DECODERS)
    default = T5Config()
    values: dict[str, Any] = {name: whole(config, name, getattr(default, name)) for name in NUMBERS}
    values["layer_norm_epsilon"] = number(config, "layer_norm_epsilon", default.layer_norm_epsilon)
    return build(config, T5Config, values)


def write(config: T5Config) -> dict[str, Any]:
    """config.json as transformers writes it; whatever is left out has transformers' default."""
    named = {"architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": False}
    return {**named, "feed_forward_proj": GATED, **express(config)}


def naming(config: T5Config) -> Naming:
    """The names of its tensors."""
    return NAMING
