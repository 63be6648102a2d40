"""Fields of configurations that are read and written alike."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader

Model = TypeVar("Model")
# How we compute and keep parameters; a checkpoint's configuration does not say.
OURS = ("dtype", "param_dtype", "remat", "attention")
# What transformers writes for every model: token ids, settings of generate, of storage and of other tasks.
# fmt: off
UNUSED = (
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "eos_token_id", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "pad_token_id", "prefix", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "top_k", "top_p", "transformers.js_config", "typical_p", "use_bfloat16",
)
# fmt: on
# Switches of some families, with the values that say what the families without them compute.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "is_decoder": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "quantization_config": (None,),
    "rope_interleaved": (False,),
    "sliding_window": (None,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False,),
    "use_sliding_window": (False,),
}


def whole(config: ConfigReader, name: str, default: Any) -> int:
    """A whole number. Raises `CheckpointError` for anything else, such as a list with one for each block."""
    value = config.take(name, default)
    if type(value) is not int:
        raise CheckpointError(f"{config.where}: {name}={value!r} is not supported, only one whole number")
    return value


def whole_or_each(config: ConfigReader, name: str, default: Any) -> int | tuple[int, ...]:
    """A whole number or a tuple of them. Raises `CheckpointError` for anything else, such as a list of lists."""
    value = config.take(name, default)
    if type(value) is int:
        return value
    if not isinstance(value, list | tuple) or not all(type(member) is int for member in value):
        raise CheckpointError(
            f"{config.where}: {name}={value!r} is not supported, only a whole number or a list with one for each block"
        )
    return tuple(value)


def build(config: ConfigReader, kind: type[Model], values: Mapping[str, Any]) -> Model:
    """A configuration with these fields, once nothing in the file is left unread but switches that are off."""
    config.ignore_neutral(NEUTRAL)
    config.finish()
    try:
        return kind(**values)
    except ValueError as error:
        raise CheckpointError(f"{config.where} describes no model: {error}") from None


def express(config: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a configuration dataclass as JSON has them, without our own and those left out."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in (*OURS, *left_out)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def with_ours(config: Model, other: Any) -> Model:
    """A configuration that was read from a file, with the fields that no file has taken from another one."""
    return replace(config, **{f.name: getattr(other, f.name) for f in fields(other) if f.name in OURS})  # type: ignore[type-var]
