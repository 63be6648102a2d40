"""Llama, Mistral, Qwen and Gemma: a causal transformer decoder with an explicit key-value cache.

RMSNorm around the sublayers (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245),
gated feed-forward (2002.05202), local attention in some layers (2004.05150), Gemma's norms and soft caps (2408.00118).
Configuration and parameter names follow Hugging Face's; the layers' parameters are stacked on a leading axis.

Axes: B batch, L length, S cache slots, N layers, T kinds of layers, H heads, G key-value heads, K head width,
      D model width, V vocabulary.
"""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.decoder_config import ACTIVATIONS, DecoderConfig
from sysdpo_jax.models.layers import Dense, RMSNorm, embedding, join_heads, split_heads
from sysdpo_jax.models.lora import low_rank
from sysdpo_jax.models.partitioning import constrain, residual
from sysdpo_jax.models.remat import recomputed
from sysdpo_jax.models.rotary import Angles, rotary_angles, rotate
from sysdpo_jax.models.shared_prefix import SharedPrefix
from sysdpo_jax.typing import Params

SCALE = 0.02
INIT = nn.initializers.normal(SCALE)
Tokens = Int[Array, "batch length"]
Mask = Bool[Array, "batch length"] | None
Hidden = Float[Array, "batch length width"]
States = Float[Array, "*leading width"]
Logits = Float[Array, "*leading vocab"]
Slot = int | Int[Array, ""]
# Keys and values, of a cache [N, B, S, G, K], in a layer without N, or of new tokens, [B, L, G, K].
Pair = tuple[Array, Array] | None
# Which slots a token of a row sees, in the layers of one kind and of all; None where that is every token before it. As
# for angles, one row stands for all where they are alike.
Visible = Bool[Array, "#batch tokens slots"] | None
VisibleByKind = Bool[Array, "kinds #batch tokens slots"] | None
Rotation = tuple[Angles, Angles]
Rotations = tuple[Float[Array, "kinds #batch length half"], Float[Array, "kinds #batch length half"]]


class KVCache(NamedTuple):
    """Keys (already rotated) and values of the tokens seen so far, which slots hold a real token, and its position."""

    keys: Array  # [N, B, S, G, K]
    values: Array  # [N, B, S, G, K]
    valid: Array  # bool [B, S]
    positions: Array  # int32 [B, S]


def init_cache(config: DecoderConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
    shape = (config.num_hidden_layers, batch, slots, config.num_key_value_heads, config.head_width)
    keys, values = jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype)
    return KVCache(keys, values, jnp.zeros((batch, slots), bool), jnp.zeros((batch, slots), jnp.int32))


def _dense(config: DecoderConfig, features: int, name: str, use_bias: bool = False) -> Dense:
    return Dense(config, features, use_bias, INIT, name=name)


def _norm(config: DecoderConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config, config.rms_norm_eps, config.norm_unit_offset, name=name)


class Attention(nn.Module):
    """Grouped-query attention; given one layer's cached keys and values, the new ones join them at `slot`."""

    config: DecoderConfig

    @nn.compact
    def __call__(
        self, x: Hidden, past: Pair, rotation: Rotation, visible: Visible, slot: Slot, prefix: SharedPrefix | None
    ) -> tuple[Hidden, Pair]:
        """The layer's output and, if `past` was given, the new keys and values [B, L, G, K].

        visible: as in `Block`, of this layer's kind. prefix: how x, if it is packed, becomes rows.
        """
        c = self.config

        def heads(name: str, count: int) -> Array:
            return split_heads(_dense(c, count * c.head_width, name, c.attention_bias or c.qkv_bias)(x), count)

        queries, keys = heads("q_proj", c.num_attention_heads), heads("k_proj", c.num_key_value_heads)
        values = heads("v_proj", c.num_key_value_heads)
        if c.qk_norm:
            queries, keys = _norm(c, "q_norm")(queries), _norm(c, "k_norm")(keys)
        queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        fresh = None
        if prefix is not None:
            queries, keys, values = (_heads(prefix.spread(y)) for y in (queries, keys, values))
        if past is not None:
            fresh = keys, values
            keys = jax.lax.dynamic_update_slice_in_dim(past[0], keys, slot, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(past[1], values, slot, axis=1)
        mixed = attend(
            queries,
            keys,
            values,
            visible,
            c.score_scale,
            c.attn_logit_softcapping,
            causal=visible is None,
            window=c.window(c.layer_kinds[0]) if visible is None else None,
            implementation=c.attention if past is None else "auto",
        )
        if prefix is not None:
            mixed = prefix.collect(mixed)
        return _dense(c, x.shape[-1], "o_proj", c.attention_bias)(join_heads(mixed)), fresh


def _heads(x: Array) -> Array:
    return constrain(x, "batch", "length", "heads", None)


class MLP(nn.Module):
    """Gated feed-forward: down(act(gate x) * up x), with silu SwiGLU (arXiv 2002.05202, equation 6)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        c = self.config
        gate, up = (_dense(c, c.intermediate_size, name)(x) for name in ("gate_proj", "up_proj"))
        hidden = constrain(ACTIVATIONS[c.hidden_act](gate) * up, "batch", "length", "mlp")
        return _dense(c, x.shape[-1], "down_proj")(hidden)


class Block(nn.Module):
    """One layer, the body of the scan over layers: attention, then MLP, each on the normed residual.

    All layers have this one body; `kind` picks what differs between them from the rotations and masks of all kinds.
    visible: None where layers are all of one kind and a token sees every token before it, within the layers' window.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        past: Pair,
        kind: Int[Array, ""],
        rotations: Rotations,
        visible: VisibleByKind,
        slot: Slot,
        prefix: SharedPrefix | None,
    ) -> tuple[Hidden, Pair]:
        c, (cos, sin) = self.config, (_pick(table, kind) for table in rotations)
        seen = None if visible is None else _pick(visible, kind)
        normed = _norm(c, "input_layernorm")(x)
        mixed, fresh = Attention(c, name="self_attn")(normed, past, (cos, sin), seen, slot, prefix)
        if not c.post_norms:
            x = residual(x + mixed)
            return residual(x + MLP(c, name="mlp")(_norm(c, "post_attention_layernorm")(x))), fresh
        x = residual(x + _norm(c, "post_attention_layernorm")(mixed))
        inner = MLP(c, name="mlp")(_norm(c, "pre_feedforward_layernorm")(x))
        return residual(x + _norm(c, "post_feedforward_layernorm")(inner)), fresh


def _pick(table: Array, kind: Array) -> Array:
    return table[0] if table.shape[0] == 1 else jax.lax.dynamic_index_in_dim(table, kind, keepdims=False)


class Head(nn.Module):
    """Logits from hidden states, accumulated and returned in float32. Parameter: kernel [D, V]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: States) -> Logits:
        c = self.config
        kernel = self.param("kernel", INIT, (c.hidden_size, c.vocab_size), c.param_dtype)
        logits = _logits(hidden, kernel, c.dtype)
        if self.has_variable("params", "lora_a"):
            flat = hidden.reshape(-1, c.hidden_size).astype(c.dtype)
            logits = logits + low_rank(self, flat, "float32").reshape(logits.shape)
        return logits


def _logits(hidden: Array, kernel: Array, dtype: str) -> Array:
    flat = hidden.reshape(-1, hidden.shape[-1]).astype(dtype)
    logits = constrain(_product(flat, kernel.astype(dtype)), "batch", "vocab")
    return logits.reshape(*hidden.shape[:-1], -1)


@jax.custom_vjp
def _product(x: Array, kernel: Array) -> Array:
    """x kernel in float32. The products of its gradient are in the precision of x, as those of all layers are."""
    return jnp.matmul(x, kernel, preferred_element_type=jnp.float32)


def _product_transposed(kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, kernel = kept
    rounded = cotangent.astype(x.dtype)
    return rounded @ kernel.T, x.T @ rounded


_product.defvjp(lambda x, kernel: (_product(x, kernel), (x, kernel)), _product_transposed)


def head_params(config: DecoderConfig, params: Params) -> Params:
    """The part of a Decoder's parameters that its method "head" reads."""
    name = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return {name: params[name]}


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
        self.embed_tokens = embedding(c, c.vocab_size, c.hidden_size, SCALE)
        block = recomputed(Block, c.remat, c.dtype, prevent_cse=c.num_hidden_layers == 1)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, *(nn.broadcast,) * 4),
            length=c.num_hidden_layers,
        )(c)
        self.norm = _norm(c)
        if not c.tie_word_embeddings:
            self.lm_head = Head(c)

    def __call__(
        self,
        tokens: Tokens,
        positions: Tokens | None = None,
        mask: Mask = None,
        cache: KVCache | None = None,
        cache_slot: Slot | None = None,
    ) -> Logits | tuple[Logits, KVCache]:
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
        tokens: Tokens,
        positions: Tokens | None = None,
        mask: Mask = None,
        prefix: SharedPrefix | None = None,
    ) -> Hidden:
        """Hidden states after the final norm, in config.dtype.

        Leave the mask out where rows are padded on the right alone: a real token sees none of the padding anyway, and
        no mask [B, L, L] is built if the layers are all of one kind.
        prefix: tokens are `prefix.collect` of such rows, and so are the hidden states; positions and mask are left out.
        """
        c = self.config
        # Without positions or a mask of their own all rows are alike.
        shape = (1, tokens.shape[1] if prefix is None else prefix.length)
        valid = jnp.ones(shape if positions is None else tokens.shape, bool) if mask is None else mask
        places = _counted(valid, 0, valid.shape[1]) if positions is None else positions
        # A window counts positions; only without given ones are they those of the slots.
        alike = len(set(c.layer_kinds)) == 1 and (positions is None or c.window(c.layer_kinds[0]) is None)
        visible = None if mask is None and alike else self._visible(valid, places, places, 0)
        self._check_room(valid.shape[1])
        hidden, _ = self._run(tokens, places if prefix is None else prefix.positions, None, visible, 0, prefix)
        return hidden

    def extend(
        self, tokens: Tokens, cache: KVCache, cache_slot: Slot, positions: Tokens | None = None, mask: Mask = None
    ) -> tuple[Hidden, KVCache]:
        """Hidden states of tokens put at slots cache_slot, cache_slot + 1, ..., and the cache with them.

        A token sees the real tokens at its own and earlier slots, in sliding layers those whose position is less than
        the window behind its own. cache_slot + L must not exceed the slots.
        """
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache_slot)
        valid = write(cache.valid, jnp.ones(tokens.shape, bool) if mask is None else mask, axis=1)
        if positions is None:
            positions = _counted(valid, cache_slot, tokens.shape[1])
        placed = write(cache.positions, positions.astype(jnp.int32), axis=1)
        self._check_room(placed.shape[1])
        visible = self._visible(valid, positions, placed, cache_slot)
        hidden, fresh = self._run(tokens, positions, (cache.keys, cache.values), visible, cache_slot)
        # One write for all layers, which XLA does in place when the cache is a loop's carry.
        keys, values = (
            write(old, new, axis=2) for old, new in zip((cache.keys, cache.values), fresh or (), strict=True)
        )
        return hidden, KVCache(keys, values, valid, placed)

    def embed(self, tokens: Tokens) -> Hidden:
        """What enters the first layer."""
        x = residual(self.embed_tokens(tokens))
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.scale_embeddings else x

    def head(self, hidden: States) -> Logits:
        """Logits in float32 of hidden states, whichever stretch of the sequence they come from."""
        c = self.config
        tied = c.tie_word_embeddings
        logits = _logits(hidden, self.embed_tokens.embedding.T, c.dtype) if tied else self.lm_head(hidden)
        cap = c.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def _run(
        self,
        tokens: Array,
        positions: Array,
        past: Pair,
        visible: VisibleByKind,
        slot: Slot,
        prefix: SharedPrefix | None = None,
    ) -> tuple[Array, Pair]:
        c, kinds = self.config, self._kinds
        angles = [rotary_angles(positions, c.head_width, *c.rope(kind)) for kind in kinds]
        rotations = jnp.stack([cos for cos, _ in angles]), jnp.stack([sin for _, sin in angles])
        kind = jnp.array([kinds.index(name) for name in c.layer_kinds])
        x, fresh = self.layers(self.embed(tokens), past, kind, rotations, visible, slot, prefix)
        return self.norm(x), fresh

    @property
    def _kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.config.layer_kinds))

    def _visible(self, valid: Array, positions: Array, slot_positions: Array, slot: Slot) -> VisibleByKind:
        """What tokens at these positions, of which the first is at `slot`, see in the layers of each kind."""
        own_slot = slot + jnp.arange(positions.shape[1])
        seen = valid[:, None, :] & (jnp.arange(valid.shape[1]) <= own_slot[:, None])
        distance = positions[:, :, None] - slot_positions[:, None, :]
        windows = [self.config.window(kind) for kind in self._kinds]
        return jnp.stack([seen if window is None else seen & (distance < window) for window in windows])

    def _check_room(self, slots: int) -> None:
        room = self.config.max_position_embeddings
        if slots > room:
            raise ValueError(f"Decoder: {slots} tokens exceed max_position_embeddings {room}; shorten the input.")


def _counted(valid: Bool[Array, "batch slots"], slot: Slot, length: int) -> Tokens:
    """The number of real tokens before each of the `length` slots from `slot` on."""
    counts = jax.lax.dynamic_slice_in_dim(jnp.cumsum(valid, axis=1), slot, length, axis=1)
    return jnp.maximum(counts - 1, 0)
