"""Configuration files of the hub's decoders, read as transformers reads them and written so that it reads them back."""

import dataclasses
from typing import Any

import pytest
from transformers.models.auto import CONFIG_MAPPING

from sysdpo_jax.models.decoder_config import DecoderConfig
from sysdpo_jax.models.rotary import RopeScaling
from sysdpo_jax.pretrained.base import NEUTRAL, CheckpointError, ConfigReader
from sysdpo_jax.pretrained.decoders import FAMILIES, find_family
from tests.pretrained import hub_configs

FULL, SLIDING = "full_attention", "sliding_attention"


def config_json(model_type: str, shape: str, **rest: Any) -> dict[str, Any]:
    """A config.json of the hub; shape: vocabulary, width, feed-forward, layers, heads, key-value heads, positions."""
    names = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings"
    )
    shared = {
        "_name_or_path": "somewhere",
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "initializer_range": 0.02,
        "model_type": model_type,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_cache": True,
    }
    return shared | dict(zip(names.split(), map(int, shape.split()), strict=True)) | rest


SILU = {"hidden_act": "silu"}
LLAMA31 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}
LLAMA = SILU | {"rms_norm_eps": 1e-05, "pretraining_tp": 1, "attention_bias": False}
LLAMA3 = LLAMA | {"rope_theta": 500000.0, "mlp_bias": False}
QWEN = SILU | {"rms_norm_eps": 1e-06, "use_sliding_window": False}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06}
GEMMA |= {"attention_bias": False, "cache_implementation": "hybrid", "pad_token_id": 0}
HUB = {
    "Llama-2-7b": config_json(
        "llama", "32000 4096 11008 32 32 32 4096", **LLAMA, rope_scaling=None, tie_word_embeddings=False
    ),
    "Llama-3.1-8B": config_json(
        "llama", "128256 4096 14336 32 32 8 131072", **LLAMA3, rope_scaling=LLAMA31 | {"factor": 8.0}
    ),
    "Llama-3.2-1B-Instruct": hub_configs.LLAMA_32_1B_INSTRUCT,
    "SmolLM2-135M": config_json(
        "llama",
        "49152 576 1536 30 9 3 8192",
        **LLAMA,
        rope_theta=100000,
        rope_scaling=None,
        rope_interleaved=False,
        is_llama_config=True,
        tie_word_embeddings=True,
    ),
    "Mistral-7B-v0.1": config_json(
        "mistral", "32000 4096 14336 32 32 8 32768", **SILU, rms_norm_eps=1e-05, rope_theta=10000.0, sliding_window=4096
    ),
    "Mistral-7B-v0.3": config_json(
        "mistral", "32768 4096 14336 32 32 8 32768", **SILU, rms_norm_eps=1e-05, rope_theta=1e6, sliding_window=None
    ),
    "Qwen1.5-1.8B-Chat": config_json(
        "qwen2",
        "151936 2048 5504 24 16 16 32768",
        **QWEN,
        rope_theta=1000000.0,
        sliding_window=32768,
        max_window_layers=21,
        tie_word_embeddings=False,
    ),
    "Qwen2.5-0.5B": config_json(
        "qwen2",
        "151936 896 4864 24 14 2 32768",
        **QWEN,
        rope_theta=1000000.0,
        sliding_window=32768,
        max_window_layers=24,
        tie_word_embeddings=True,
        use_mrope=False,
    ),
    "Qwen3-0.6B": hub_configs.QWEN3_06B,
    "gemma-2-2b": config_json(
        "gemma2",
        "256000 2304 9216 26 8 4 8192",
        **GEMMA,
        hidden_act="gelu_pytorch_tanh",
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        rope_theta=10000.0,
        sliding_window=4096,
    ),
    "gemma-2-9b-it": hub_configs.GEMMA2_9B_IT,
    "gemma-2-27b-it": hub_configs.GEMMA2_27B_IT,
    "gemma-3-1b-it": hub_configs.GEMMA3_1B_IT,
}
GEMMA_FIELDS = {
    "tie_word_embeddings": True,
    "hidden_act": "gelu_pytorch_tanh",
    "post_norms": True,
    "norm_unit_offset": True,
    "scale_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256.0,
}
GEMMA2_FIELDS = GEMMA_FIELDS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
# The fields in which a model differs from a Llama 2 of its shape.
EXPECTED = {
    "Llama-2-7b": {"rms_norm_eps": 1e-5},
    "Llama-3.1-8B": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    },
    "Llama-3.2-1B-Instruct": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling("llama3", 32.0, 1.0, 4.0, 8192),
        "tie_word_embeddings": True,
    },
    "SmolLM2-135M": {"rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True},
    "Mistral-7B-v0.1": {"rms_norm_eps": 1e-5, "sliding_window": 4096},
    "Mistral-7B-v0.3": {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "Qwen1.5-1.8B-Chat": {"qkv_bias": True, "rope_theta": 1e6},
    "Qwen2.5-0.5B": {"qkv_bias": True, "rope_theta": 1e6, "tie_word_embeddings": True},
    "Qwen3-0.6B": {"qk_norm": True, "rope_theta": 1e6, "tie_word_embeddings": True, "head_dim": 128},
    "gemma-2-2b": GEMMA2_FIELDS | {"layer_types": (SLIDING, FULL) * 13},
    "gemma-2-9b-it": GEMMA2_FIELDS | {"layer_types": (SLIDING, FULL) * 21},
    "gemma-2-27b-it": GEMMA2_FIELDS
    | {"layer_types": (SLIDING, FULL) * 23, "head_dim": 128, "query_pre_attn_scalar": 144.0},
    "gemma-3-1b-it": GEMMA_FIELDS
    | {"qk_norm": True, "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    | {"sliding_window": 512, "layer_types": ((SLIDING,) * 5 + (FULL,)) * 4 + (SLIDING, SLIDING)},
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA_SMALL = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 16}
SCALED = {"rope_type": "linear", "factor": 2.0}
GLOBAL_SCALED = {FULL: SCALED | {"rope_theta": 5e5}, SLIDING: {"rope_type": "default", "rope_theta": 1e3}}
# Files with what those of the hub above do not have.
OTHERS = {
    "linear, of the oldest kind": ("llama", {"rope_scaling": {"type": "linear", "factor": 2}, "attention_bias": True}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
    "qwen3 window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2 with a window in every layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    ),
    "gemma2 in every respect": ("gemma2", GEMMA_SMALL | {"attn_logit_softcapping": None, "query_pre_attn_scalar": 11}),
    "gemma3 with scaling": (
        "gemma3_text",
        GEMMA_SMALL
        | {"sliding_window_pattern": 3, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 5},
    ),
    "gemma3 of global layers": ("gemma3_text", GEMMA_SMALL | {"layer_types": [FULL] * 4, "rope_theta": 5e5}),
}
FILES = HUB | {name: {"model_type": kind} | SMALL | values for name, (kind, values) in OTHERS.items()}
by_file = pytest.mark.parametrize("values", FILES.values(), ids=FILES.keys())


def read(values: dict[str, Any]) -> DecoderConfig:
    return FAMILIES[values["model_type"]].read(ConfigReader(values, "config.json"))


def transformers_dict(values: dict[str, Any]) -> dict[str, Any]:
    """What transformers understands and would write itself."""
    return CONFIG_MAPPING[values["model_type"]].from_dict(values).to_dict()


def decisive(values: dict[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The entries that decide what transformers computes."""
    void = {"architectures", "dtype", "_name_or_path", "transformers_version", "cache_implementation"}
    void |= {"is_llama_config", "rope_interleaved", "use_mrope", "sliding_window_size"}
    # layer_types are there in their place.
    void |= {"max_window_layers", "_sliding_window_pattern"}
    if "hidden_activation" in values:
        void |= {"hidden_act"}
    rope = {name: value for name, value in values["rope_parameters"].items() if name != "type"}
    # Qwen's and Gemma's files also describe sliding layers that are not there.
    if SLIDING not in config.layer_kinds:
        void |= {"sliding_window"}
        rope.pop(SLIDING, None)
    return {name: value for name, value in values.items() if name not in void} | {"rope_parameters": rope}


@pytest.mark.parametrize("name", HUB)
def test_files_of_the_hub(name: str) -> None:
    values = HUB[name]
    shape = {field: values[field] for field in SMALL}
    assert read(values) == DecoderConfig(**shape, **EXPECTED[name], model_type=values["model_type"])


@by_file
def test_both_styles_of_file_are_the_same_model(values: dict[str, Any]) -> None:
    """transformers reads the older file and writes it anew in its own style."""
    newer = transformers_dict(values)
    assert "rope_parameters" in newer
    assert read(newer) == read(values)


@by_file
def test_written_and_read_back(values: dict[str, Any]) -> None:
    """By us to the same configuration; by transformers to what it makes of the file from the hub."""
    config, family = read(values), FAMILIES[values["model_type"]]
    written = family.write(config)
    assert read(written) == config
    assert written["architectures"] == [family.architecture]
    tokens = {name: value for name, value in values.items() if name.endswith("token_id")}
    back, wanted = (decisive(transformers_dict(file), config) for file in (written | tokens, values))
    assert {name: back.get(name) for name in wanted} == wanted


def test_precision_and_remat_are_no_part_of_a_file() -> None:
    config = read(HUB["Qwen2.5-0.5B"])
    run = dataclasses.replace(config, dtype="bfloat16", param_dtype="bfloat16", remat="full", attention="xla")
    assert FAMILIES["qwen2"].write(run) == FAMILIES["qwen2"].write(config)


def test_files_before_layer_types_keep_their_pattern() -> None:
    """What older versions of transformers and other programs read in place of layer_types."""
    qwen = FAMILIES["qwen2"].write(read(FILES["qwen2 window"]))
    assert (qwen["use_sliding_window"], qwen["sliding_window"], qwen["max_window_layers"]) == (True, 8, 3)
    gemma = FAMILIES["gemma3_text"].write(read(HUB["gemma-3-1b-it"]))
    assert (gemma["sliding_window_pattern"], gemma["rope_local_base_freq"], gemma["rope_theta"]) == (6, 1e4, 1e6)
    mixed = dataclasses.replace(read(FILES["qwen2 window"]), layer_types=(SLIDING, FULL, FULL, SLIDING))
    assert "max_window_layers" not in FAMILIES["qwen2"].write(mixed)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"model_type": "qwen2"}, "cannot say model_type='qwen2'"),
        ("llama", {"sliding_window": 8}, "a llama checkpoint cannot say sliding_window=8"),
        ("llama", {"qkv_bias": True}, "cannot say qkv_bias=True"),
        ("llama", {"hidden_act": "gelu_pytorch_tanh"}, "cannot say hidden_act"),
        ("llama", {"final_logit_softcapping": 5.0}, "cannot say final_logit_softcapping=5.0"),
        ("mistral", {"sliding_window": 8, "layer_types": (SLIDING, FULL) * 2}, "cannot say layer_types"),
        ("qwen2", {"attention_bias": True, "qkv_bias": True}, "cannot say attention_bias=True"),
        ("qwen3", {}, "cannot say qk_norm=False"),
        ("gemma2", {}, "cannot say hidden_act='silu'"),
    ],
)
def test_what_a_family_cannot_express_is_refused(model_type: str, change: dict[str, Any], message: str) -> None:
    config = DecoderConfig(**SMALL, **{"model_type": model_type} | change)
    with pytest.raises(CheckpointError, match=message):
        FAMILIES[model_type].write(config)


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ("llama", {"mlp_bias": True}, "mlp_bias=True"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config says that the weights are quantised"),
        ("llama", {"sliding_window": 8}, "keys that are not known here.*sliding_window=8"),
        ("llama", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama", {"tie_encoder_decoder": True}, "tie_encoder_decoder=True"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "'partial_rotary_factor': 0.5.* not supported",
        ),
        ("llama", {"rope_scaling": SCALED, "rope_parameters": SCALED | {"factor": 4.0}}, "something else than"),
        ("llama", {"rope_scaling": SCALED, "rope_parameters": {"rope_type": "default"}}, "something else than"),
        ("llama", {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, r"theta \[10000.0, 500000.0\]"),
        (
            "gemma3_text",
            {"rope_scaling": SCALED, "rope_parameters": {FULL: {"rope_type": "default"}}},
            "something else",
        ),
        ("gemma3_text", {"rope_local_base_freq": 1e4, "rope_parameters": GLOBAL_SCALED}, r"theta \[1000.0, 10000.0\]"),
        ("mistral", {"attention_bias": True}, "attention_bias=True"),
        ("mistral", {"mlp_bias": True}, "mlp_bias=True"),
        ("mistral", {"pretraining_tp": 2}, "pretraining_tp=2"),
        ("gemma2", {"sliding_window": 8, "sliding_window_size": 16}, "sliding_window_size=16 is not supported .only 8"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling .*'dynamic'.* not supported"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 0.0}}, "describes no model: .*factor 0.0"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "with exactly their own parameters"),
        ("llama", {"num_key_value_heads": 4}, "describes no model: .*6 attention heads"),
        ("mistral", {"layer_types": [FULL] * 4}, "layer_types"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("qwen2", {"layer_types": [SLIDING] * 4}, "need a sliding_window"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (
            "gemma3_text",
            {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 2.0}}},
            "'sliding_attention' without scaling",
        ),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(model_type: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read({"model_type": model_type} | SMALL | change)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize(
    "more",
    [
        {"_attn_implementation_autoset": True, "attn_implementation": "sdpa", "gradient_checkpointing": True},
        {"tokenizer_class": "LlamaTokenizer", "typical_p": 1.0, "prefix": None, "num_beams": 1},
        {name: values[0] for name, values in NEUTRAL.items() if name != "sliding_window"},
    ],
    ids=["running", "generating", "switches that are off"],
)
def test_keys_that_change_nothing_are_accepted(model_type: str, more: dict[str, Any]) -> None:
    plain = {"model_type": model_type} | SMALL | (GEMMA_SMALL if "gemma" in model_type else {})
    assert read(plain | more) == read(plain)


@pytest.mark.parametrize(
    ("model_type", "change", "same"),
    [
        ("llama", {"sliding_window": None}, {}),
        ("gemma2", {"sliding_window": 8, "sliding_window_size": 8}, {"sliding_window": 8}),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}}, {}),
        ("llama", {"rope_scaling": None, "rope_parameters": SCALED}, {"rope_scaling": SCALED}),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": SCALED},
            {"rope_scaling": SCALED},
        ),
        ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 500000}}, {"rope_theta": 5e5}),
        (
            "gemma3_text",
            {"rope_scaling": SCALED, "rope_local_base_freq": 1e3, "rope_parameters": GLOBAL_SCALED},
            {"rope_scaling": SCALED, "rope_local_base_freq": 1e3, "rope_theta": 5e5},
        ),
    ],
)
def test_keys_that_say_the_same_are_accepted(model_type: str, change: dict[str, Any], same: dict[str, Any]) -> None:
    plain = {"model_type": model_type} | SMALL
    assert read(plain | change) == read(plain | same)


def test_unknown_families_are_refused_by_name() -> None:
    assert find_family("qwen3", "config.json") is FAMILIES["qwen3"]
    with pytest.raises(CheckpointError, match=r"here: model_type 'mamba' is not known; known .* gemma2, .*qwen3"):
        find_family("mamba", "here")
    with pytest.raises(CheckpointError, match=r"Gemma3ForConditionalGeneration.*gemma3_text.*language_model"):
        find_family("gemma3", "here")
