"""The shape of a decoder, under Hugging Face's field names where it has one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from sysdpo_jax.models.config import BlockOptions
from sysdpo_jax.models.rotary import RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS: dict[str, Callable[..., Any]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclass(frozen=True)
class DecoderConfig(BlockOptions):
    """Shape of a decoder: with the defaults a Llama, with other values a Mistral, Qwen or Gemma.

    head_dim: width of a head, by default hidden_size / num_attention_heads.
    attention: how attention without a cache is computed, see `attention.choose`; with one see `attend_cached`.
    hidden_act: of the feed-forward's gate, one of ACTIVATIONS.
    rope_scaling: how the rotary frequencies are lowered; None leaves them.
    rope_local_base_freq: theta of the sliding layers, unscaled; by default they rotate as the others do.
    sliding_window: a token sees itself and the sliding_window - 1 positions before it, in the sliding layers.
    layer_types: "full_attention" or "sliding_attention" for each layer; by default all slide if there is a window.
    attention_bias: biases on all four projections of attention; qkv_bias: on queries, keys and values alone.
    qk_norm: RMSNorm on each head's queries and keys, before the rotation.
    post_norms: RMSNorm on the output of attention and of the feed-forward as well as on their input.
    norm_unit_offset: RMSNorms multiply by 1 + weight.
    scale_embeddings: token embeddings times sqrt(hidden_size), rounded to dtype as transformers does.
    query_pre_attn_scalar: scores are divided by its square root, by default head_dim.
    attn_logit_softcapping, final_logit_softcapping: c in c tanh(scores / c), for scores and for logits.
    model_type: the family under whose name Hugging Face knows such a model; it decides nothing in the mathematics.

    A field that restates its default is stored as None, so that equal models have equal configurations.
    Raises ValueError for heads that do not divide evenly or are of odd width, and for layers, windows and activations
    that make no sense.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    rope_scaling: RopeScaling | None = None
    rope_local_base_freq: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    attention_bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    norm_unit_offset: bool = False
    scale_embeddings: bool = False
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads()
        self._check_layers()
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"DecoderConfig: unknown hidden_act {self.hidden_act!r}; known are {', '.join(ACTIVATIONS)}."
            )
        self._forget_restated_defaults()

    def _check_heads(self) -> None:
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"DecoderConfig: {heads} attention heads must be a multiple of the {groups} key-value heads."
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"DecoderConfig: hidden_size {self.hidden_size} is no multiple of its {heads} heads; set head_dim."
            )
        if self.head_width % 2:
            raise ValueError(f"DecoderConfig: head_dim {self.head_width} must be even for rotary embeddings.")

    def _check_layers(self) -> None:
        kinds = self.layer_kinds
        if len(kinds) != self.num_hidden_layers or not set(kinds) <= {FULL, SLIDING}:
            raise ValueError(
                f"DecoderConfig: layer_types {kinds} must name {FULL!r} or {SLIDING!r} for each of the "
                f"{self.num_hidden_layers} layers."
            )
        if SLIDING in kinds and (self.sliding_window is None or self.sliding_window < 1):
            raise ValueError(
                f"DecoderConfig: {SLIDING!r} layers need a sliding_window of at least 1, got {self.sliding_window}."
            )

    def _forget_restated_defaults(self) -> None:
        def forget(*names: str) -> None:
            for name in names:
                object.__setattr__(self, name, None)

        if SLIDING not in self.layer_kinds:
            forget("sliding_window", "layer_types", "rope_local_base_freq")
        elif FULL not in self.layer_kinds:
            forget("layer_types")
        if self.rope_local_base_freq == self.rope_theta and self.rope_scaling is None:
            forget("rope_local_base_freq")
        if self.query_pre_attn_scalar == self.head_width:
            forget("query_pre_attn_scalar")
        if self.head_dim is not None and self.head_dim * self.num_attention_heads == self.hidden_size:
            forget("head_dim")

    @property
    def head_width(self) -> int:
        """K, head_dim with its default filled in."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """layer_types with its default filled in."""
        if self.layer_types is not None:
            return self.layer_types
        return (FULL if self.sliding_window is None else SLIDING,) * self.num_hidden_layers

    @property
    def score_scale(self) -> float | None:
        """What attention scores are multiplied by; None stands for 1 / sqrt(K)."""
        return None if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar**-0.5

    def window(self, kind: str) -> int | None:
        """How many positions a token sees in the layers of a kind, itself included; None for all before it."""
        return self.sliding_window if kind == SLIDING else None

    def rope(self, kind: str) -> tuple[float, RopeScaling | None]:
        """theta and scaling of the layers of a kind."""
        if kind == SLIDING and self.rope_local_base_freq is not None:
            return self.rope_local_base_freq, None
        return self.rope_theta, self.rope_scaling
