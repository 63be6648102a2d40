"""The encoder of T5 v1.1 (arXiv 1910.10683, 2002.05202), with the semantics and names of transformers' T5EncoderModel.

Axes: B batch, S tokens, H heads, K head width, D width.
"""

from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sysdpo_jax.models.config import Precision
from sysdpo_jax.models.layers import Dense, RMSNorm, embedding, join_heads, split_heads
from sysdpo_jax.models.partitioning import constrain, residual

States = Float[Array, "batch tokens width"]
Mask = Bool[Array, "batch tokens"] | None
Bias = Float[Array, "1 heads tokens tokens"]


@dataclass(frozen=True)
class T5Config(Precision):
    """Shape of an encoder, under the field names and with the defaults of transformers' T5Config; no dropout.

    The feed-forward layers are gated by GELU in its tanh form ("gated-gelu").
    relative_attention_num_buckets: of both directions; distances of relative_attention_max_distance or more share one.
    Raises ValueError for buckets that do not make two halves of exact and logarithmic ones.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or distance <= buckets // 4:
            raise ValueError(
                f"T5Config: relative_attention_num_buckets={buckets} must be a multiple of 4 and a quarter of it less "
                f"than relative_attention_max_distance={distance}"
            )


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "tokens tokens"]:
    """The bucket of the distance from each token (row) to each token (column); later tokens have the upper half.

    Of a half's buckets the first half is for single distances, the others grow by a constant factor up to
    max_distance (arXiv 1910.10683, section 2.1). The logarithm is float32, as in transformers.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    scaled = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = scaled / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + grown.astype(np.int64), half - 1)
    return np.where(distance < exact, distance, far) + np.where(offset > 0, half, 0)


class T5Attention(nn.Module):
    """Parameters: q, k, v, o and, in the first block, relative_attention_bias. Returns the bias for the next blocks."""

    config: T5Config

    @nn.compact
    def __call__(self, x: States, mask: Mask, bias: Bias | None) -> tuple[States, Bias]:
        c = self.config
        if bias is None:
            buckets = relative_buckets(x.shape[1], c.relative_attention_num_buckets, c.relative_attention_max_distance)
            exact, scale = replace(c, dtype="float32"), c.d_model**-0.5
            table = embedding(exact, c.relative_attention_num_buckets, c.num_heads, scale, "relative_attention_bias")
            bias = table(jnp.asarray(buckets)).transpose(2, 0, 1)[None]
        queries, keys, values = (
            split_heads(Dense(c, c.num_heads * c.d_kv, False, name=name)(x), c.num_heads) for name in "qkv"
        )
        # Without a scale, and jax.nn's attention has no float16 on CPUs.
        scores = jnp.einsum("bqhk,bshk->bhqs", queries, keys, preferred_element_type=jnp.float32) + bias
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        mixed = jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores, axis=-1).astype(values.dtype), values)
        return Dense(c, c.d_model, False, name="o")(join_heads(mixed)), bias


class T5AttentionLayer(nn.Module):
    """RMSNorm and attention, around a residual. Parameters: layer_norm, SelfAttention."""

    config: T5Config

    @nn.compact
    def __call__(self, x: States, mask: Mask, bias: Bias | None) -> tuple[States, Bias]:
        normed = RMSNorm(self.config, self.config.layer_norm_epsilon, name="layer_norm")(x)
        mixed, bias = T5Attention(self.config, name="SelfAttention")(normed, mask, bias)
        return residual(x + mixed), bias


class T5GatedMLP(nn.Module):
    """wo(gelu(wi_0 x) * wi_1 x), the tanh form of GELU (arXiv 2002.05202, equation 6)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: States) -> States:
        c = self.config
        gate, up = (Dense(c, c.d_ff, False, name=f"wi_{i}")(x) for i in range(2))
        hidden = constrain(nn.gelu(gate, approximate=True) * up, "batch", "length", "mlp")
        return Dense(c, c.d_model, False, name="wo")(hidden)


class T5FeedForwardLayer(nn.Module):
    """RMSNorm and the gated MLP, around a residual. Parameters: layer_norm, DenseReluDense (transformers' name)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: States) -> States:
        normed = RMSNorm(self.config, self.config.layer_norm_epsilon, name="layer_norm")(x)
        return residual(x + T5GatedMLP(self.config, name="DenseReluDense")(normed))


class T5Block(nn.Module):
    """Parameters: layer_0 (attention), layer_1 (feed-forward)."""

    config: T5Config

    @nn.compact
    def __call__(self, x: States, mask: Mask, bias: Bias | None) -> tuple[States, Bias]:
        x, bias = T5AttentionLayer(self.config, name="layer_0")(x, mask, bias)
        return T5FeedForwardLayer(self.config, name="layer_1")(x), bias


class T5Stack(nn.Module):
    """Parameters: block_<i>, final_layer_norm."""

    config: T5Config

    @nn.compact
    def __call__(self, x: States, mask: Mask) -> States:
        bias = None
        for i in range(self.config.num_layers):
            x, bias = T5Block(self.config, name=f"block_{i}")(x, mask, bias)
        return RMSNorm(self.config, self.config.layer_norm_epsilon, name="final_layer_norm")(x)


class T5Encoder(nn.Module):
    """Token ids to the last hidden state after the final norm. Parameters: shared, encoder."""

    config: T5Config

    @nn.compact
    def __call__(self, token_ids: Int[Array, "batch tokens"], mask: Mask = None) -> States:
        """mask: the tokens that are seen; all by default, padding too, as Stable Diffusion 3 does. Output float32."""
        c = self.config
        x = residual(embedding(c, c.vocab_size, c.d_model, 1.0, "shared")(token_ids))
        return T5Stack(c, name="encoder")(x, mask).astype(jnp.float32)
