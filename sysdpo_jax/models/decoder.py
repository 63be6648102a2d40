"""The Llama-architecture language model: a causal transformer decoder with an explicit key-value cache.

RMSNorm before each sublayer (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention
(2305.13245), SwiGLU (2002.05202). Configuration and parameter names follow Hugging Face's LlamaForCausalLM;
the layers' parameters are stacked on a leading axis.

Axes: B batch, L length, S cache slots, N layers, H heads, G key-value heads, K head width,
      D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sysdpo_jax.models.layers import Dense, RMSNorm, attend, rotary_angles, rotate

INIT = nn.initializers.normal(0.02)
Slot = int | Int[Array, ""]
Rotation = tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder, under the field names of Hugging Face's LlamaConfig.

    head_dim: width of a head, by default hidden_size / num_attention_heads.
    remat: recompute each layer's activations in the backward pass.
    dtype: precision of the products; norms, softmax and logits are float32 in any case.
    Raises ValueError if the heads do not divide evenly or are of odd width.
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
    remat: bool = False
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
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

    @property
    def head_width(self) -> int:
        """K, head_dim with its default filled in."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class KVCache(NamedTuple):
    """Keys (already rotated) and values of the tokens seen so far, and which slots hold a real token."""

    keys: Array  # [N, B, S, G, K]
    values: Array  # [N, B, S, G, K]
    valid: Array  # bool [B, S]


def init_cache(config: DecoderConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_width)
    keys, values = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    return KVCache(keys, values, jnp.zeros((batch, slots), bool))


def _dense(config: DecoderConfig, features: int, name: str | None = None) -> Dense:
    return Dense(features, False, config.dtype, config.param_dtype, INIT, name=name)


def _norm(config: DecoderConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config.rms_norm_eps, config.dtype, config.param_dtype, name=name)


class Attention(nn.Module):
    """Grouped-query attention; given one layer's cached keys and values, the new ones join them at `slot`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        past: tuple[Array, Array] | None,
        rotation: Rotation,
        visible: Bool[Array, "batch length slots"],
        slot: Slot,
    ) -> tuple[Float[Array, "batch length width"], tuple[Array, Array] | None]:
        """The layer's output and, if `past` was given, the new keys and values [B, L, G, K]."""
        c = self.config

        def heads(name: str, count: int) -> Array:
            return _dense(c, count * c.head_width, name)(x).reshape(*x.shape[:2], count, c.head_width)

        queries = rotate(heads("q_proj", c.num_attention_heads), *rotation)
        keys = rotate(heads("k_proj", c.num_key_value_heads), *rotation)
        values = heads("v_proj", c.num_key_value_heads)
        fresh = None
        if past is not None:
            fresh = keys, values
            keys = jax.lax.dynamic_update_slice_in_dim(past[0], keys, slot, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(past[1], values, slot, axis=1)
        mixed = attend(queries, keys, values, visible)
        return _dense(c, x.shape[-1], "o_proj")(mixed.reshape(*x.shape[:2], -1)), fresh


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x) (arXiv 2002.05202, equation 6)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"]) -> Float[Array, "batch length width"]:
        inner = self.config.intermediate_size
        gate = _dense(self.config, inner, "gate_proj")(x)
        up = _dense(self.config, inner, "up_proj")(x)
        return _dense(self.config, x.shape[-1], "down_proj")(nn.silu(gate) * up)


class Block(nn.Module):
    """One layer, the body of the scan over layers: attention, then MLP, each on the normed residual."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length width"],
        past: tuple[Array, Array] | None,
        rotation: Rotation,
        visible: Bool[Array, "batch length slots"],
        slot: Slot,
    ) -> tuple[Float[Array, "batch length width"], tuple[Array, Array] | None]:
        normed = _norm(self.config, "input_layernorm")(x)
        mixed, fresh = Attention(self.config, name="self_attn")(normed, past, rotation, visible, slot)
        x = x + mixed
        normed = _norm(self.config, "post_attention_layernorm")(x)
        return x + MLP(self.config, name="mlp")(normed), fresh


class Head(nn.Module):
    """Logits from hidden states, accumulated and returned in float32. Parameter: kernel [D, V]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch length vocab"]:
        c = self.config
        kernel = self.param("kernel", INIT, (c.hidden_size, c.vocab_size), c.param_dtype)
        return _logits(hidden, kernel, c.dtype)


def _logits(hidden: Array, kernel: Array, dtype: str) -> Array:
    flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
    logits = jnp.matmul(flat, kernel.astype(dtype), preferred_element_type=jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1)


class Decoder(nn.Module):
    """Causal language model. `apply({"params": p}, tokens, ...)` gives logits; `method=` reaches the parts:

    "hidden_states": tokens -> normed hidden states [B, L, D];  "head": hidden states -> logits;
    "extend": the next L tokens of a cached sequence -> hidden states and the new cache.

    In all of them `mask` is True at real tokens (default: all) and `positions` default to the number of real
    tokens before each token, so padding on either side leaves the real tokens' outputs as they are.
    """

    config: DecoderConfig

    def setup(self) -> None:
        c = self.config
        self.embed_tokens = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=c.dtype, param_dtype=c.param_dtype, embedding_init=INIT
        )
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_hidden_layers,
        )(c)
        self.norm = _norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = Head(c)

    def __call__(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
        cache: KVCache | None = None,
        cache_slot: Slot | None = None,
    ) -> Float[Array, "batch length vocab"] | tuple[Float[Array, "batch length vocab"], KVCache]:
        """Next-token logits in float32, with the new cache if a cache and the first slot to write were given.

        Raises ValueError if tokens outnumber max_position_embeddings or cache comes without cache_slot.
        """
        if (cache is None) != (cache_slot is None):
            raise ValueError("Decoder: cache and cache_slot come together; give both or neither.")
        if cache is None or cache_slot is None:
            return self.head(self.hidden_states(tokens, positions, mask))
        hidden, cache = self.extend(tokens, cache, cache_slot, positions, mask)
        return self.head(hidden), cache

    def hidden_states(
        self,
        tokens: Int[Array, "batch length"],
        positions: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
    ) -> Float[Array, "batch length width"]:
        """Hidden states after the final norm, in config.dtype."""
        valid = jnp.ones(tokens.shape, bool) if mask is None else mask
        hidden, _ = self._run(tokens, positions, None, valid, 0)
        return hidden

    def extend(
        self,
        tokens: Int[Array, "batch length"],
        cache: KVCache,
        cache_slot: Slot,
        positions: Int[Array, "batch length"] | None = None,
        mask: Bool[Array, "batch length"] | None = None,
    ) -> tuple[Float[Array, "batch length width"], KVCache]:
        """Hidden states of tokens put at slots cache_slot, cache_slot + 1, ..., and the cache with them.

        A token sees the real tokens at its own and earlier slots. cache_slot + L must not exceed the slots.
        """
        fresh_valid = jnp.ones(tokens.shape, bool) if mask is None else mask
        valid = jax.lax.dynamic_update_slice_in_dim(cache.valid, fresh_valid, cache_slot, axis=1)
        hidden, fresh = self._run(tokens, positions, (cache.keys, cache.values), valid, cache_slot)
        # One write for all layers, which XLA does in place when the cache is a loop's carry.
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(old, new, cache_slot, axis=2)
            for old, new in zip((cache.keys, cache.values), fresh or (), strict=True)
        )
        return hidden, KVCache(keys, values, valid)

    def head(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch length vocab"]:
        """Logits in float32 of hidden states, whichever stretch of the sequence they come from."""
        if self.config.tie_word_embeddings:
            return _logits(hidden, self.embed_tokens.embedding.T, self.config.dtype)
        return self.lm_head(hidden)

    def _run(
        self,
        tokens: Array,
        positions: Array | None,
        past: tuple[Array, Array] | None,
        valid: Bool[Array, "batch slots"],
        slot: Slot,
    ) -> tuple[Array, tuple[Array, Array] | None]:
        c, length, slots = self.config, tokens.shape[1], valid.shape[1]
        if slots > c.max_position_embeddings:
            raise ValueError(
                f"Decoder: {slots} tokens exceed max_position_embeddings {c.max_position_embeddings}; "
                "shorten the input."
            )
        own_slot = slot + jnp.arange(length)
        visible = valid[:, None, :] & (jnp.arange(slots) <= own_slot[:, None])
        if positions is None:
            seen = jnp.cumsum(valid, axis=1)
            positions = jnp.maximum(jax.lax.dynamic_slice_in_dim(seen, slot, length, axis=1) - 1, 0)
        rotation = rotary_angles(positions, c.head_width, c.rope_theta)
        x = self.embed_tokens(tokens)
        x, fresh = self.layers(x, past, rotation, visible, slot)
        return self.norm(x), fresh
