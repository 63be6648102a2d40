"""The text encoder of CLIP (arXiv 2103.00020), with the semantics and parameter names of transformers' CLIPTextModel.

Axes: B batch, S tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.config import Precision
from sysdpo_jax.models.layers import Dense, LayerNorm, embedding, gelu, join_heads, split_heads
from sysdpo_jax.models.partitioning import constrain, residual

States = Float[Array, "batch tokens width"]
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "gelu": gelu,
}


@dataclass(frozen=True)
class CLIPTextConfig(Precision):
    """Shape of a text encoder, under the field names and with the defaults of transformers' CLIPTextConfig.

    with_projection: transformers' CLIPTextModelWithProjection, whose pooled state is projected to projection_dim.
    eos_token_id: where the pooled state is read, see `CLIPTextEncoder.outputs`.
    Raises ValueError for an unknown activation or heads that do not divide the width.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int = 512
    with_projection: bool = False
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"CLIPTextConfig: unknown hidden_act {self.hidden_act!r}: {', '.join(ACTIVATIONS)}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"CLIPTextConfig: {self.num_attention_heads} heads do not divide hidden_size {self.hidden_size}"
            )


class CLIPTextOutputs(NamedTuple):
    """last_hidden_state: after the final norm. penultimate: what enters the last layer, not normed. All float32.

    pooled: last_hidden_state at the end of the text, projected where the encoder has a projection.
    """

    last_hidden_state: States
    penultimate: States
    pooled: Float[Array, "batch pooled"]


class CLIPAttention(nn.Module):
    """Causal multi-head attention. Parameters: q_proj, k_proj, v_proj, out_proj."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: States) -> States:
        c = self.config
        queries, keys, values = (
            split_heads(Dense(c, c.hidden_size, name=name)(x), c.num_attention_heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        return Dense(c, c.hidden_size, name="out_proj")(join_heads(attend(queries, keys, values, causal=True)))


class CLIPMLP(nn.Module):
    """Parameters: fc1, fc2."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: States) -> States:
        c = self.config
        h = ACTIVATIONS[c.hidden_act](Dense(c, c.intermediate_size, name="fc1")(x))
        return Dense(c, c.hidden_size, name="fc2")(constrain(h, "batch", "length", "mlp"))


class CLIPEncoderLayer(nn.Module):
    """Attention and MLP, each after a LayerNorm and around a residual."""

    config: CLIPTextConfig

    @nn.compact
    def __call__(self, x: States) -> States:
        c = self.config
        first, second = (LayerNorm(c, c.layer_norm_eps, name=f"layer_norm{i}") for i in (1, 2))
        x = residual(x + CLIPAttention(c, name="self_attn")(first(x)))
        return residual(x + CLIPMLP(c, name="mlp")(second(x)))


class CLIPTextEncoder(nn.Module):
    """Token ids to the last hidden state after the final norm, or to all `outputs`.

    Parameters: token_embedding and position_embedding (each `embedding`), layers_<i>, final_layer_norm, and
    text_projection [D, projection_dim] where the configuration has it.
    """

    config: CLIPTextConfig

    def __call__(self, token_ids: Int[Array, "batch tokens"]) -> States:
        """Raises ValueError for more tokens than positions. The output is float32."""
        return self.outputs(token_ids).last_hidden_state

    @nn.compact
    def outputs(self, token_ids: Int[Array, "batch tokens"]) -> CLIPTextOutputs:
        """Raises ValueError for more tokens than positions.

        The text ends at the first eos_token_id or, where that is 2, at the first of the greatest ids: configurations
        of before transformers 4.31 hold a wrong 2, and the true one is the last of the vocabulary.
        """
        c, (batch, length) = self.config, token_ids.shape
        if length > c.max_position_embeddings:
            raise ValueError(
                f"CLIPTextEncoder: {length} tokens, but max_position_embeddings={c.max_position_embeddings}"
            )
        tokens = embedding(c, c.vocab_size, c.hidden_size, 0.02, "token_embedding")(token_ids)
        places = embedding(c, c.max_position_embeddings, c.hidden_size, 0.02, "position_embedding")
        x = penultimate = residual(tokens + places(jnp.arange(length)))
        for i in range(c.num_hidden_layers):
            penultimate = x
            x = CLIPEncoderLayer(c, name=f"layers_{i}")(x)
        last = LayerNorm(c, c.layer_norm_eps, name="final_layer_norm")(x)
        end = jnp.argmax(token_ids if c.eos_token_id == 2 else token_ids == c.eos_token_id, axis=1)
        pooled = last[jnp.arange(batch), end]
        if c.with_projection:
            pooled = Dense(c, c.projection_dim, False, name="text_projection")(pooled)
        return CLIPTextOutputs(*(y.astype(jnp.float32) for y in (last, penultimate, pooled)))
