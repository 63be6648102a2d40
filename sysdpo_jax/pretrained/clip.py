"""transformers' CLIPTextModel and CLIPTextModelWithProjection."""

from typing import Any

from sysdpo_jax.models.clip import ACTIVATIONS, CLIPTextConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.fields import UNUSED, build, express, number, whole
from sysdpo_jax.pretrained.names import Naming

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
# Our tree leaves out the levels that hold nothing else. Written with "text_model.", which every version reads.
RENAME = (
    (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
    (r"^layers\.", "text_model.encoder.layers."),
    (r"^final_layer_norm\.", "text_model.final_layer_norm."),
)
# transformers 5 writes a CLIPTextModel without it.
ALIASES = ((r"^(?!text_model\.|text_projection\.)", "text_model."),)
# 0, 1, 2 ..., which older versions stored.
IGNORED = r"^text_model\.embeddings\.position_ids$"


def read(config: ConfigReader) -> CLIPTextConfig:
    """Raises `CheckpointError` for a text encoder that the module here cannot be."""
    classes = config.take("architectures")
    if classes not in ([PLAIN], [PROJECTED]):
        raise CheckpointError(f"{config.where}: architectures={classes!r} is not supported ({PLAIN} or {PROJECTED})")
    for name in ("attention_dropout", "dropout"):
        config.expect(name, 0.0)
    config.expect("is_encoder_decoder", False)
    config.expect("model_type", "clip_text_model")
    config.expect("hidden_act", *ACTIVATIONS)
    config.ignore(*UNUSED, "tie_word_embeddings")
    default = CLIPTextConfig()
    numbers = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
        "projection_dim",
        "eos_token_id",
    )
    values = {
        **{name: whole(config, name, getattr(default, name)) for name in numbers},
        "hidden_act": config.take("hidden_act", default.hidden_act),
        "layer_norm_eps": number(config, "layer_norm_eps", default.layer_norm_eps),
        "with_projection": classes == [PROJECTED],
    }
    return build(config, CLIPTextConfig, values)


def write(config: CLIPTextConfig) -> dict[str, Any]:
    """config.json as transformers writes it; whatever is left out has transformers' default."""
    name = PROJECTED if config.with_projection else PLAIN
    return {"architectures": [name], "model_type": "clip_text_model", **express(config, "with_projection")}


def naming(config: CLIPTextConfig) -> Naming:
    return Naming(rename=RENAME, aliases=ALIASES, ignored=IGNORED)
