"""Fields that several families share, in the style of the hub's older files and in that of transformers 5."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sysdpo_jax.models.decoder_config import FULL, SLIDING, DecoderConfig
from sysdpo_jax.models.rotary import LLAMA3_FIELDS, RopeScaling
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader, is_of_kind
from sysdpo_jax.pretrained.fields import UNUSED, flag, listed, number, number_or_none, whole, whole_or_none

# The kinds of rotary scaling, with the parameters that each has.
ROTATIONS: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": {"factor", *LLAMA3_FIELDS}}


def read_shape(config: ConfigReader, model_type: str, tied: bool = False) -> dict[str, Any]:
    """The fields that every family has under the same names, and what must be so in all of them.

    tied: what the family takes an absent tie_word_embeddings to be.
    """
    heads = whole(config, "num_attention_heads")
    # A null stands for the default, as in transformers.
    groups, head_dim = whole_or_none(config, "num_key_value_heads"), whole_or_none(config, "head_dim")
    config.expect("attention_dropout", 0.0, None)
    config.expect("is_encoder_decoder", False)
    config.ignore(*UNUSED)
    numbers = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    return {
        **{name: whole(config, name) for name in numbers},
        "num_attention_heads": heads,
        "num_key_value_heads": heads if groups is None else groups,
        "head_dim": head_dim,
        "rms_norm_eps": number(config, "rms_norm_eps", 1e-6),
        "tie_word_embeddings": flag(config, "tie_word_embeddings", tied),
        "model_type": model_type,
    }


def express_shape(config: DecoderConfig) -> dict[str, Any]:
    """`read_shape`'s keys, with their defaults filled in."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_width,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
    }


def read_rope(config: ConfigReader, theta: float = 10000.0) -> dict[str, Any]:
    """rope_theta and rope_scaling, from rope_parameters (transformers 5) or from keys of those names.

    theta: what the family takes an absent rope_theta to be.
    Raises `CheckpointError` where the two say something different.
    """
    older, newer = config.take("rope_scaling", None), config.take("rope_parameters", None)
    stated, scaling = stated_rope(config, "rope_theta", older, newer)
    return {"rope_theta": theta if stated is None else stated, "rope_scaling": scaling}


def stated_rope(config: ConfigReader, key: str, *places: Any) -> tuple[float | None, RopeScaling | None]:
    """theta, None where nothing states it, and the scaling, from all places in which a file may state them.

    key: of theta where it stands by itself. places: dictionaries of rotary parameters.
    Raises `CheckpointError` where two of them say something different.
    """
    theta = number_or_none(config, key)
    thetas, scalings = set() if theta is None else {theta}, set()
    for place in places:
        if not isinstance(place, Mapping | None) or not is_of_kind((place or {}).get("rope_theta", 0.0), (int, float)):
            raise _unknown_rotation(config, place)
        values = dict(place or {})
        if "rope_theta" in values:
            thetas.add(float(values.pop("rope_theta")))
        if values:
            scalings.add(read_scaling(config, values))
    if len(thetas) > 1 or len(scalings) > 1:
        raise CheckpointError(
            f"{config.where}: rope_parameters says something else than rope_scaling or {key} does (theta "
            f"{sorted(thetas)}, scaling {list(scalings)}): remove those that are wrong"
        )
    return next(iter(thetas), None), next(iter(scalings), None)


def express_rope(config: DecoderConfig) -> dict[str, Any]:
    """`read_rope`'s keys of the older style, which every version reads."""
    return {"rope_theta": config.rope_theta, "rope_scaling": express_scaling(config.rope_scaling)}


def read_scaling(config: ConfigReader, values: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling in a dictionary of rotary parameters without theta; None for the type "default"."""
    kind = values.get("rope_type", values.get("type", "default"))
    rest = {name: value for name, value in values.items() if name not in ("rope_type", "type")}
    # The whole head is rotated, as without the key.
    if rest.get("partial_rotary_factor") == 1.0:
        del rest["partial_rotary_factor"]
    numbers = all(is_of_kind(value, (int, float)) for value in rest.values())
    if not isinstance(kind, str) or kind not in ROTATIONS or set(rest) != ROTATIONS[kind] or not numbers:
        raise _unknown_rotation(config, values)
    if kind == "default":
        return None
    context = rest.pop("original_max_position_embeddings", None)
    factors = {name: float(value) for name, value in rest.items()}
    try:
        return RopeScaling(kind, original_max_position_embeddings=context, **factors)
    except ValueError as error:
        raise CheckpointError(f"{config.where} describes no model: {error}") from None


def _unknown_rotation(config: ConfigReader, values: Any) -> CheckpointError:
    return CheckpointError(
        f"{config.where}: rotary scaling {values!r} is not supported (only {', '.join(ROTATIONS)}, with exactly their "
        "own parameters); this model would be computed wrongly"
    )


def express_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    given = {name: getattr(scaling, name) for name in LLAMA3_FIELDS if getattr(scaling, name) is not None}
    return {"rope_type": scaling.rope_type, "factor": scaling.factor, **given}


def read_layers(
    config: ConfigReader, layers: int, window: int | None, is_sliding: Callable[[int], bool]
) -> dict[str, Any]:
    """sliding_window and layer_types, which are those of `is_sliding(layer)` where the file has no layer_types."""
    if config.take("layer_types", None) is None:
        return {"sliding_window": window, "layer_types": pattern(layers, is_sliding)}
    return {"sliding_window": window, "layer_types": listed(config, "layer_types", None, str)}


def pattern(layers: int, is_sliding: Callable[[int], bool]) -> tuple[str, ...]:
    return tuple(SLIDING if is_sliding(layer) else FULL for layer in range(layers))


def first_sliding(kinds: Iterable[str]) -> int:
    """How many layers come before the first sliding one, all of them if there is none."""
    kinds = list(kinds)
    return kinds.index(SLIDING) if SLIDING in kinds else len(kinds)
