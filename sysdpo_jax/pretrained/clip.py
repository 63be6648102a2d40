"""transformers' CLIPTextModel and CLIPTextModelWithProjection."""

from typing import Any

from sysdpo_jax.models.clip import ACTIVATIONS, CLIPTextConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.fields import build, express, whole
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
# What older versions wrote for every model: token ids, settings of generate and of other tasks.
# fmt: off
UNUSED = (
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cross_attention_hidden_size", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "typical_p",
    "use_bfloat16",
)
# fmt: on


def read(config: ConfigReader) -> CLIPTextConfig:
    """Raises `CheckpointError` for a text encoder that the module here cannot be."""
    classes = config.take("architectures")
    if classes not in ([PLAIN], [PROJECTED]):
        raise CheckpointError(f"{config.where}: architectures={classes!r} is not supported ({PLAIN} or {PROJECTED})")
    for name in ("attention_dropout", "dropout"):
        config.expect(name, 0.0)
    for name in ("add_cross_attention", "is_decoder", "is_encoder_decoder"):
        config.expect(name, False)
    config.expect("pruned_heads", {})
    config.expect("model_type", "clip_text_model")
    config.expect("hidden_act", *ACTIVATIONS)
    config.ignore(*UNUSED)
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
        "layer_norm_eps": float(config.take("layer_norm_eps", default.layer_norm_eps)),
        "with_projection": classes == [PROJECTED],
    }
    return build(config, CLIPTextConfig, values)


def write(config: CLIPTextConfig) -> dict[str, Any]:
    """config.json as transformers writes it; whatever is left out has transformers' default."""
    name = PROJECTED if config.with_projection else PLAIN
    return {"architectures": [name], "model_type": "clip_text_model", **express(config, "with_projection")}


def naming(config: CLIPTextConfig) -> Naming:
    return Naming(rename=RENAME, aliases=ALIASES, ignored=IGNORED)
