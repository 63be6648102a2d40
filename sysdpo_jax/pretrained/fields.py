"""Fields of configurations that are read and written alike."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from sysdpo_jax.pretrained.base import REQUIRED, CheckpointError, ConfigReader, is_of_kind

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


def whole(config: ConfigReader, name: str, default: Any = REQUIRED) -> int:
    """A whole number. Raises `CheckpointError` for anything else, such as a list with one for each block."""
    value = config.take(name, default)
    if not is_of_kind(value, int):
        raise config.refused(name, "only one whole number")
    return int(value)


def whole_or_none(config: ConfigReader, name: str, default: int | None = None) -> int | None:
    """A whole number, or None where the file says null or, by default, nothing."""
    return None if config.take(name, default) is None else whole(config, name, default)


def whole_or_each(config: ConfigReader, name: str, default: Any) -> int | tuple[int, ...]:
    """A whole number or a tuple of them. Raises `CheckpointError` for anything else, such as a list of lists."""
    value = config.take(name, default)
    if is_of_kind(value, int):
        return int(value)
    if not is_of_kind(value, (list, tuple)) or not all(is_of_kind(member, int) for member in value):
        raise config.refused(name, "only a whole number or a list with one for each block")
    return tuple(value)


def size(config: ConfigReader, default: Any) -> int | tuple[int, int] | None:
    """sample_size: None, one number for both sides or (height, width)."""
    value = None if config.take("sample_size", default) is None else whole_or_each(config, "sample_size", default)
    if not isinstance(value, tuple):
        return value
    if len(value) != 2:
        raise config.refused("sample_size", "only one whole number or two, height and width")
    return value[0], value[1]


def number(config: ConfigReader, name: str, default: Any = REQUIRED) -> float:
    """Raises `CheckpointError` for anything else than a number."""
    value = config.take(name, default)
    if not is_of_kind(value, (int, float)):
        raise config.refused(name, "only one number")
    return float(value)


def number_or_none(config: ConfigReader, name: str, default: float | None = None) -> float | None:
    """A number, or None where the file says null or, by default, nothing."""
    return None if config.take(name, default) is None else number(config, name, default)


def flag(config: ConfigReader, name: str, default: bool) -> bool:
    """True or false; null is false, as in Python. Raises `CheckpointError` for anything else."""
    value = config.take(name, default)
    if not isinstance(value, bool | None):
        raise config.refused(name, "only true or false")
    return bool(value)


def listed(config: ConfigReader, name: str, default: Any, kind: type) -> tuple[Any, ...]:
    """A list of one kind. Raises `CheckpointError` for anything else."""
    value = config.take(name, default)
    if not is_of_kind(value, (list, tuple)) or not all(is_of_kind(member, kind) for member in value):
        raise config.refused(name, f"only a list of {kind.__name__}")
    return tuple(value)


def build(config: ConfigReader, kind: type[Model], values: Mapping[str, Any]) -> Model:
    """A configuration with these fields, once nothing in the file is left unread but switches that are off."""
    config.ignore_neutral(NEUTRAL)
    refuse_quantised(config)
    config.finish()
    try:
        return kind(**values)
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{config.where} describes no model: {error}") from None


def refuse_quantised(config: ConfigReader) -> None:
    """Raise `CheckpointError` for weights that are stored quantised, with what makes them readable."""
    for name in ("quantization_config", "compression_config"):
        stated = config.take(name, None)
        if stated is not None:
            method = stated.get("quant_method", "of no name") if isinstance(stated, dict) else stated
            raise CheckpointError(
                f"{config.where}: {name} says that the weights are quantised ({method}), which are not read: load the "
                "checkpoint that they were made from, or load this one with the library that wrote it and save what "
                "model.dequantize() gives"
            )


def express(config: Any, *left_out: str) -> dict[str, Any]:
    """The fields of a configuration dataclass as JSON has them, without our own and those left out."""
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in (*OURS, *left_out)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def with_ours(config: Model, other: Any) -> Model:
    """A configuration that was read from a file, with the fields that no file has taken from another one."""
    return replace(config, **{f.name: getattr(other, f.name) for f in fields(other) if f.name in OURS})  # type: ignore[type-var]
