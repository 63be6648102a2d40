"""Decoder families: the configurations of Hugging Face's language models, in and out.

Rotary embeddings are read in the style of the hub's older files and in that of transformers 5.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sysdpo_jax.models.decoder_config import FULL, SLIDING, DecoderConfig
from sysdpo_jax.models.rotary import LLAMA3_FIELDS, RopeScaling
from sysdpo_jax.pretrained.base import (
    CLASSES,
    REQUIRED,
    UNUSED,
    CheckpointError,
    ConfigReader,
    build,
    is_number,
    read_fields,
    with_ours,
)
from sysdpo_jax.pretrained.handing_on import handed_on

# The kinds of rotary scaling, with the parameters that each has.
ROTATIONS: dict[str, set[str]] = {"default": set(), "linear": {"factor"}, "llama3": {"factor", *LLAMA3_FIELDS}}


def read_rope(config: ConfigReader) -> dict[str, Any]:
    """rope_theta and rope_scaling, from rope_parameters (transformers 5) or from keys of those names.

    Raises `CheckpointError` where the two say something different.
    """
    older, newer = config.take("rope_scaling", None), config.take("rope_parameters", None)
    theta, scaling = _stated(config, "rope_theta", 1e4, older, newer)
    return {"rope_theta": theta, "rope_scaling": scaling}


def read_two_ropes(config: ConfigReader) -> dict[str, Any]:
    """The global layers' theta and scaling and the local layers' theta, in either style or in both if they agree."""
    both = config.take("rope_parameters", None) or {}
    if not isinstance(both, Mapping):
        raise config.refused("rope_parameters", f"only a mapping of {FULL!r} and {SLIDING!r}")
    theta, scaling = _stated(config, "rope_theta", 1e6, config.take("rope_scaling", None), both.get(FULL))
    local_theta, local_scaling = _stated(config, "rope_local_base_freq", 1e4, both.get(SLIDING))
    if set(both) - {FULL, SLIDING} or local_scaling is not None:
        raise CheckpointError(
            f"{config.where}: rope_parameters={both!r} is not supported (only {FULL!r}, and {SLIDING!r} without "
            "scaling); this model would be computed wrongly"
        )
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_local_base_freq": local_theta}


def _stated(config: ConfigReader, key: str, default: float, *places: Any) -> tuple[float, RopeScaling | None]:
    """theta and the scaling, from all places in which a file may state them.

    key: of theta where it stands by itself. default: what it is where nothing states it. places: dictionaries of rotary
    parameters.
    Raises `CheckpointError` where two of them say something different.
    """
    theta = config.read(key, float | None, None)
    thetas, scalings = set() if theta is None else {theta}, set()
    for place in places:
        if not isinstance(place, Mapping | None) or not is_number((place or {}).get("rope_theta", 0.0)):
            raise _unknown_rotation(config, place)
        values = dict(place or {})
        if "rope_theta" in values:
            thetas.add(float(values.pop("rope_theta")))
        if values:
            scalings.add(_scaling(config, values))
    if len(thetas) > 1 or len(scalings) > 1:
        raise CheckpointError(
            f"{config.where}: rope_parameters says something else than rope_scaling or {key} does (theta "
            f"{sorted(thetas)}, scaling {list(scalings)}): remove those that are wrong"
        )
    return next(iter(thetas), default), next(iter(scalings), None)


def _scaling(config: ConfigReader, values: Mapping[str, Any]) -> RopeScaling | None:
    """The scaling in a dictionary of rotary parameters without theta; None for the type "default"."""
    kind = values.get("rope_type", values.get("type", "default"))
    rest = {name: value for name, value in values.items() if name not in ("rope_type", "type")}
    # The whole head is rotated, as without the key.
    if rest.get("partial_rotary_factor") == 1.0:
        del rest["partial_rotary_factor"]
    numbers = all(is_number(value) for value in rest.values())
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


def express_rope(config: DecoderConfig) -> dict[str, Any]:
    """`read_rope`'s keys of the older style, which every version reads."""
    scaling = config.rope_scaling and {k: v for k, v in asdict(config.rope_scaling).items() if v is not None}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


# The fields that every family states under their names.
# fmt: off
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)
# fmt: on


@dataclass(frozen=True)
class Family:
    """One model_type of Hugging Face's decoders; keys.yaml has its other keys.

    architecture: the name of its class with a language-model head.
    reads: fields that its files state under their names, with what an absent key means, which is the default of
        transformers' configuration class; those of SHAPE where that is not our own.
    fixed: fields that no file states.
    rope: reads the rotary fields.
    own: reads what they say in other ways, such as which layers slide; (file, number of layers) to fields.
    express: writes that, as keys.
    """

    model_type: str
    architecture: str
    reads: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rope: Callable[[ConfigReader], dict[str, Any]] = read_rope
    own: Callable[[ConfigReader, int], dict[str, Any]] = lambda config, layers: {}
    express: Callable[[DecoderConfig], dict[str, Any]] = lambda config: {}

    def read(self, config: ConfigReader) -> DecoderConfig:
        """The configuration that a config.json states; the fields of OURS keep their defaults.

        Raises `CheckpointError` for keys that are not known and values that cannot be computed.
        """
        config.expect("attention_dropout", 0.0, None)
        config.expect("is_encoder_decoder", False)
        config.expect_class(self.architecture)
        config.ignore(*UNUSED)
        heads = config.read("num_attention_heads", int)
        # A null stands for the default, as in transformers.
        config.null_means("num_key_value_heads", heads)
        defaults = {"num_key_value_heads": heads, "max_position_embeddings": REQUIRED, **self.reads}
        values = read_fields(config, DecoderConfig, *SHAPE, **defaults)
        values |= {**self.rope(config), **self.own(config, values["num_hidden_layers"]), **self.fixed}
        return build(config, DecoderConfig, values | {"model_type": self.model_type})

    def write(self, config: DecoderConfig, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The content of a config.json that `read`, and transformers, read back to the same model.

        Token ids belong to the tokenizer and the precision to the tensors, so neither is in it. Rotary frequencies are
        written under the names that every version of transformers reads.

        Args:
            config: the model.
            source: the config.json that it was read from, whose keys are kept where they still say the same model.

        Raises:
            CheckpointError: naming the first field whose value the family cannot express.
        """
        stated = {name: getattr(config, name) for name in (*SHAPE, *self.reads)} | {"head_dim": config.head_width}
        values = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "attention_dropout": 0.0,
            **stated,
            **express_rope(config),
            **CLASSES[self.architecture].writes,
            **self.express(config),
        }

        def read(values: Mapping[str, Any]) -> DecoderConfig:
            reader = ConfigReader(values, f"the {self.model_type} config.json to be written")
            return with_ours(self.read(reader), config)

        back = read(values)
        for name in (each.name for each in fields(config)):
            wanted, found = getattr(config, name), getattr(back, name)
            if wanted != found:
                raise CheckpointError(
                    f"a {self.model_type} checkpoint cannot say {name}={wanted!r} (it would be read as "
                    f"{found!r}): write it under another model_type"
                )
        return handed_on(source or {}, values, config, read)


def _read_layers(config: ConfigReader, window: int | None, otherwise: tuple[str, ...]) -> dict[str, Any]:
    """sliding_window and layer_types, which are `otherwise` where the file has none."""
    kinds = config.read("layer_types", tuple[str, ...] | None, None)
    return {"sliding_window": window, "layer_types": otherwise if kinds is None else kinds}


def _read_qwen(config: ConfigReader, layers: int) -> dict[str, Any]:
    # The files state a window even where it is not used.
    window = config.read("sliding_window", int | None, 4096)
    start = config.read("max_window_layers", int, 28)
    if not config.read("use_sliding_window", bool, False):
        window = None
    sliding = range(layers) if window is None else range(start)
    return _read_layers(config, window, tuple(FULL if layer in sliding else SLIDING for layer in range(layers)))


def _express_qwen(config: DecoderConfig) -> dict[str, Any]:
    kinds = config.layer_kinds
    start = kinds.index(SLIDING) if SLIDING in kinds else len(kinds)
    own = {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": list(kinds),
    }
    return own if FULL in kinds[start:] else own | {"max_window_layers": start}


def _read_gemma(config: ConfigReader, layers: int, period: int) -> dict[str, Any]:
    window = config.read("sliding_window", int | None, 4096)
    # The window once more, in the files of Gemma 2 9B and 27B.
    config.expect("sliding_window_size", window)
    scalar = config.read("query_pre_attn_scalar", float, 256.0)
    return _read_layers(config, window, _every(period, layers)) | {"query_pre_attn_scalar": scalar}


def _read_gemma3(config: ConfigReader, layers: int) -> dict[str, Any]:
    period = config.read("_sliding_window_pattern", int, 6)
    return _read_gemma(config, layers, config.read("sliding_window_pattern", int, period))


def _every(period: int, layers: int) -> tuple[str, ...]:
    """Of each `period` layers the last is global, the others slide."""
    return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))


def _express_gemma(config: DecoderConfig) -> dict[str, Any]:
    scalar = config.head_width if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
    return {
        # transformers wants an integer where it is one.
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        # transformers makes the local mask even where no layer asks for it.
        "sliding_window": 4096 if config.sliding_window is None else config.sliding_window,
        "layer_types": list(config.layer_kinds),
    }


def _express_gemma3(config: DecoderConfig) -> dict[str, Any]:
    local = config.rope_theta if config.rope_local_base_freq is None else config.rope_local_base_freq
    values = _express_gemma(config) | {"rope_local_base_freq": local}
    # Versions before layer_types know a period alone.
    period = config.layer_kinds.index(FULL) + 1 if FULL in config.layer_kinds else config.num_hidden_layers + 1
    same = _every(period, config.num_hidden_layers) == config.layer_kinds
    return values | ({"sliding_window_pattern": period} if same else {})


# Without head_dim a file of Gemma means this width, not hidden_size / heads.
GEMMA = {"head_dim": 256, "attention_bias": False, "tie_word_embeddings": True}
GEMMA_FIXED = {
    "hidden_act": "gelu_pytorch_tanh",
    "post_norms": True,
    "norm_unit_offset": True,
    "scale_embeddings": True,
}
FAMILIES = {
    family.model_type: family
    for family in (
        # Llama 2 and 3, SmolLM2, and whatever else calls itself llama.
        Family("llama", "LlamaForCausalLM", reads={"attention_bias": False}),
        # Mistral 7B and its kin: a Llama whose layers all slide, or, with a null, none.
        Family("mistral", "MistralForCausalLM", reads={"sliding_window": 4096}),
        # Qwen 1.5, 2 and 2.5: biases on queries, keys and values.
        Family(
            "qwen2",
            "Qwen2ForCausalLM",
            fixed={"qkv_bias": True},
            own=_read_qwen,
            express=_express_qwen,
        ),
        # Qwen 3: normed queries and keys. A file without head_dim means this width, not hidden_size / heads.
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            reads={"attention_bias": False, "head_dim": 128},
            fixed={"qk_norm": True},
            own=_read_qwen,
            express=_express_qwen,
        ),
        # Gemma 2: soft caps, alternating local and global layers.
        Family(
            "gemma2",
            "Gemma2ForCausalLM",
            reads=GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
            fixed=GEMMA_FIXED,
            own=lambda config, layers: _read_gemma(config, layers, 2),
            express=_express_gemma,
        ),
        # The text model of Gemma 3: two rotary bases.
        Family(
            "gemma3_text",
            "Gemma3ForCausalLM",
            reads=GEMMA | {"final_logit_softcapping": None},
            fixed=GEMMA_FIXED | {"qk_norm": True},
            rope=read_two_ropes,
            own=_read_gemma3,
            express=_express_gemma3,
        ),
    )
}


def find_family(model_type: str, where: str) -> Family:
    """The family of that model_type. Raises `CheckpointError` naming `where` and the families there are."""
    if model_type == "gemma3":
        raise CheckpointError(
            f"{where}: model_type 'gemma3' is Gemma3ForConditionalGeneration, which also reads images; its language "
            "model alone is known, as 'gemma3_text': load the whole in transformers, make its model.language_model the "
            "`model` of a Gemma3ForCausalLM of config.text_config, tie its weights, save that and load it from there"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{where}: model_type {model_type!r} is not known; known decoders are {known}")
    return FAMILIES[model_type]
