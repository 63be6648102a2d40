"""Which work is measured, and on which sides."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from experiments.benchmarks.peers.work import Decode, ImageDPO, TextDPO, Work
from experiments.scaling.systems import DECODERS, UNETS


@dataclass(frozen=True)
class Side:
    """A program that does the work. module: of this package; told: what it is told beside the work.

    vllm: whether it runs in vLLM's environment.
    """

    module: str
    told: Mapping[str, Any] = field(default_factory=dict)
    vllm: bool = False


OURS = "ours"
SIDES = {
    OURS: Side("ours"),
    "TRL": Side("trl_side", {"liger": False}),
    "TRL + Liger": Side("trl_side", {"liger": True}),
    "diffusers": Side("diffusers_side", {"compile": False}),
    "diffusers, compiled": Side("diffusers_side", {"compile": True}),
    "transformers": Side("transformers_side"),
    "vLLM": Side("vllm_side", vllm=True),
}
TRL, TRL_ON_GPU = ("TRL",), ("TRL", "TRL + Liger")
DIFFUSERS = ("diffusers", "diffusers, compiled")
DECODING = ("transformers", "vLLM")


@dataclass(frozen=True)
class Case:
    """Work, and the peers that do it beside us."""

    work: Work
    peers: tuple[str, ...]


def stated(config: Any) -> dict[str, Any]:
    """The fields of a configuration that are not their defaults, under Hugging Face's names."""
    values = {each.name: getattr(config, each.name) for each in fields(config)}
    defaults = {each.name: each.default for each in fields(config) if each.default is not MISSING}
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


# A decoder of 23 million parameters.
SMALL = {
    "vocab_size": 16384,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 2048,
}
SMALL_DPO = TextDPO("cpu", SMALL, "float32", pairs=8, prompt=64, completion=64, steps=9, same_weights=True)
# The demo's kind of U-Net: 0.8 million parameters, heads of a width of 8.
SMALL_UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 64,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
LLAMA_1B, LLAMA_8B = stated(DECODERS["llama-3.2-1b"]), stated(DECODERS["llama-3-8b"])
DPO_1B = TextDPO(
    "gpu",
    LLAMA_1B,
    "bfloat16",
    pairs=8,
    prompt=512,
    completion=512,
    steps=14,
)
TINY = stated(DECODERS["tiny"])
TINY_DPO = TextDPO("cpu", TINY, "float32", pairs=2, prompt=8, completion=8, steps=3, same_weights=True)

# {preset: {case: what it is}}
CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "dpo-equal": Case(SMALL_DPO, TRL),
        "dpo-lognormal": Case(
            replace(SMALL_DPO, prompt=40, completion=30, sigma=0.8, shortest=4, longest=128, steps=16), TRL
        ),
        "dpo-long-prompts": Case(replace(SMALL_DPO, prompt=192, completion=32, steps=7), TRL),
        "dpo-long-answers": Case(replace(SMALL_DPO, prompt=32, completion=192, steps=7), TRL),
        "unet": Case(
            ImageDPO("cpu", SMALL_UNET, "float32", 16, latent=16, text=16, optimizer="adamw", repeats=8, steps=1),
            ("diffusers",),
        ),
        "decode": Case(
            Decode("cpu", SMALL, "float32", 16, prompt=64, new=64, greedy=True, repeats=3, same_weights=True), DECODING
        ),
    },
    "gpu": {
        "1b": Case(DPO_1B, TRL_ON_GPU),
        "1b-16-pairs": Case(replace(DPO_1B, pairs=16), TRL_ON_GPU),
        "1b-long-prompts": Case(replace(DPO_1B, prompt=1024, completion=256), TRL_ON_GPU),
        "1b-lognormal": Case(
            replace(DPO_1B, prompt=320, completion=240, sigma=0.8, shortest=16, longest=1024, steps=24, shapes=4),
            TRL_ON_GPU,
        ),
        "8b-lora": Case(replace(DPO_1B, decoder=LLAMA_8B, pairs=4, lora_rank=16), TRL_ON_GPU),
        "sdxl": Case(
            ImageDPO(
                "gpu",
                stated(UNETS["sdxl"]),
                "bfloat16",
                pairs=2,
                latent=128,
                text=77,
                optimizer="adafactor",
                repeats=5,
                steps=4,
            ),
            DIFFUSERS,
        ),
        "1b-decode": Case(
            Decode("gpu", LLAMA_1B, "bfloat16", 64, prompt=512, new=256, greedy=False, repeats=3), DECODING
        ),
    },
    "tiny": {
        "dpo": Case(TINY_DPO, TRL),
        "dpo-lora": Case(replace(TINY_DPO, lora_rank=2, same_weights=False), TRL),
        "dpo-lognormal": Case(replace(TINY_DPO, sigma=0.8, shortest=2, longest=16, steps=4, shapes=2), TRL),
        "unet": Case(
            ImageDPO("cpu", SMALL_UNET, "float32", 2, latent=8, text=4, optimizer="adamw", repeats=2, steps=1),
            ("diffusers",),
        ),
        "decode": Case(
            Decode("cpu", TINY, "float32", 2, prompt=8, new=12, greedy=True, repeats=2, same_weights=True), DECODING
        ),
    },
}
