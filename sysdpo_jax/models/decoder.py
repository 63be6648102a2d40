"""Llama, Mistral, Qwen and Gemma: a causal transformer decoder with an explicit key-value cache.

RMSNorm around the sublayers (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245),
gated feed-forward (2002.05202), local attention in some layers (2004.05150), Gemma's norms and soft caps (2408.00118).
Configuration and parameter names follow Hugging Face's; the layers' parameters are stacked on a leading axis.

Axes: B batch, L length, S cache slots, N layers, T kinds of layers, H heads, G key-value heads, K head width,
      D model width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.cached_attention import attend_cached, put
from sysdpo_jax.models.decoder_config import ACTIVATIONS, DecoderConfig
from sysdpo_jax.models.head import INIT, SCALE, Head, Logits, States, logits_of
from sysdpo_jax.models.layers import Dense, RMSNorm, embedding, join_heads, split_heads
from sysdpo_jax.models.partitioning import constrain, residual
from sysdpo_jax.models.remat import recomputed
from sysdpo_jax.models.rotary import rotary_angles, rotate
from sysdpo_jax.models.shared_prefix import SharedPrefix
from sysdpo_jax.typing import Params

# The collection of what `hidden_states` makes beside its result: a layer's keys and values, if they are asked for.
KEPT = "intermediates"
# Names of parameters that are rounded to the precision of the products wherever they are read.
READ_BY_PRODUCTS = frozenset({"kernel", "bias", "embedding", "lora_a", "lora_b"})
Tokens = Int[Array, "batch length"]
Mask = Bool[Array, "batch length"] | None
Hidden = Float[Array, "batch length width"]
Slot = int | Int[Array, ""]
# Keys and values [B, G, S, K] of one layer's cache.
Pair = tuple[Array, Array]
# What a layer's tokens can see of earlier ones: caches that several rows share, and last the rows' own. Without a cache
# None, as there is nothing earlier.
Past = tuple[Pair, ...] | None
# Which slots a token of a row sees, in the layers of one kind and of all; None where that is every token before it. As
# for angles, one row stands for all where they are alike.
Visible = Bool[Array, "#batch tokens slots"] | None
VisibleByKind = Bool[Array, "kinds #batch tokens slots"] | None
# Cosines and sines of the places in rows, also where the tokens are packed.
Rotation = tuple[Float[Array, "#rows places half"], Float[Array, "#rows places half"]]
Rotations = tuple[Float[Array, "kinds #rows places half"], Float[Array, "kinds #rows places half"]]


class KVCache(NamedTuple):
    """Keys (already rotated) and values of the tokens seen so far, which slots hold a real token, and its position.

    Every layer has arrays of its own: a loop that carries them writes and reads them in place.
    """

    keys: tuple[Array, ...]  # N of [B, G, S, K]
    values: tuple[Array, ...]  # N of [B, G, S, K]
    valid: Array  # bool [B, S]
    positions: Array  # int32 [B, S]


def init_cache(config: DecoderConfig, batch: int, slots: int) -> KVCache:
    """An empty cache for `batch` rows of at most `slots` tokens, padding included."""
    shape = (batch, config.num_key_value_heads, slots, config.head_width)
    keys, values = (tuple(jnp.zeros(shape, config.dtype) for _ in config.layer_kinds) for _ in range(2))
    return KVCache(keys, values, jnp.zeros((batch, slots), bool), jnp.zeros((batch, slots), jnp.int32))


def _dense(config: DecoderConfig, features: int, name: str, use_bias: bool = False) -> Dense:
    return Dense(config, features, use_bias, INIT, name=name)


def _norm(config: DecoderConfig, name: str | None = None) -> RMSNorm:
    return RMSNorm(config, config.rms_norm_eps, config.norm_unit_offset, name=name)


class Attention(nn.Module):
    """Grouped-query attention; given one layer's cached keys and values, the new ones join them at `slot`.

    Without a cache the keys, rotated, and values [B, L, G, K] are variables of the collection KEPT, if that is asked
    for.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        past: Past,
        rotation: Rotation,
        visible: Visible | tuple[Array, ...],
        slot: Slot,
        prefix: SharedPrefix | None,
    ) -> tuple[Hidden, Pair | None]:
        """The layer's output and, if `past` was given, the rows' own part of it with the new keys and values.

        visible: as in `Block`, of this layer's kind. prefix: how x, if it is packed, becomes rows.
        """
        c = self.config

        def heads(name: str, count: int) -> Array:
            return split_heads(_dense(c, count * c.head_width, name, c.attention_bias or c.qkv_bias)(x), count)

        queries, keys = heads("q_proj", c.num_attention_heads), heads("k_proj", c.num_key_value_heads)
        values = heads("v_proj", c.num_key_value_heads)
        if c.qk_norm:
            queries, keys = _norm(c, "q_norm")(queries), _norm(c, "k_norm")(keys)
        if prefix is not None:
            queries, keys, values = (_heads(prefix.unpack(y)) for y in (queries, keys, values))
        queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        output = _dense(c, x.shape[-1], "o_proj", c.attention_bias)
        if past is not None:
            *shared, own = past
            masks = cast(tuple[Array, ...], visible)
            written = put(own[0], keys, slot), put(own[1], values, slot)
            parts = [(*part, seen) for part, seen in zip((*shared, written), masks, strict=True)]
            mixed = attend_cached(queries, parts, c.score_scale, c.attn_logit_softcapping)
            return output(join_heads(mixed)), written
        for name, made in (("keys", keys), ("values", values)):
            self.sow(KEPT, name, made, init_fn=lambda: None, reduce_fn=lambda _, new: new)
        mixed = attend(
            queries,
            keys,
            values,
            cast(Visible, visible),
            c.score_scale,
            c.attn_logit_softcapping,
            causal=visible is None,
            window=c.window(c.layer_kinds[0]) if visible is None else None,
            implementation=c.attention,
        )
        if prefix is not None:
            mixed = prefix.pack(mixed)
        return output(join_heads(mixed)), None


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
    """One layer: attention, then MLP, each on the normed residual. Without a cache it is the body of a scan.

    All layers have this one body; `kind` picks what differs between them from the rotations and masks of all kinds.
    visible: with a cache a mask for each part of `past`, without one a mask, or None where layers are all of one kind
    and a token sees every token before it, within the layers' window.
    """

    config: DecoderConfig

    @nn.compact
    def __call__(
        self,
        x: Hidden,
        kind: int | Int[Array, ""],
        rotations: Rotations,
        visible: VisibleByKind | tuple[Array, ...],
        prefix: SharedPrefix | None = None,
        past: Past = None,
        slot: Slot = 0,
    ) -> tuple[Hidden, Pair | None]:
        c = self.config
        rotation, seen = jax.tree.map(lambda table: _pick(table, kind), (rotations, visible))
        normed = _norm(c, "input_layernorm")(x)
        mixed, own = Attention(c, name="self_attn")(normed, past, rotation, seen, slot, prefix)
        if not c.post_norms:
            x = residual(x + mixed)
            return residual(x + MLP(c, name="mlp")(_norm(c, "post_attention_layernorm")(x))), own
        x = residual(x + _norm(c, "post_attention_layernorm")(mixed))
        inner = MLP(c, name="mlp")(_norm(c, "pre_feedforward_layernorm")(x))
        return residual(x + _norm(c, "post_feedforward_layernorm")(inner)), own


def _pick(table: Array, kind: int | Array) -> Array:
    if table.shape[0] == 1 or isinstance(kind, int):
        return table[0 if table.shape[0] == 1 else kind]
    return jax.lax.dynamic_index_in_dim(table, kind, keepdims=False)


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
            variable_axes={"params": 0, KEPT: 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 3),
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
        prefix: tokens are `prefix.pack` of such rows, and so are the hidden states; positions and mask are left out.
        """
        c = self.config
        # Without positions or a mask of their own all rows are alike.
        shape = (1, tokens.shape[1] if prefix is None else prefix.sizes.length)
        valid = jnp.ones(shape if positions is None else tokens.shape, bool) if mask is None else mask
        places = _counted(valid, 0, valid.shape[1]) if positions is None else positions
        # A window counts positions; only without given ones are they those of the slots.
        alike = len(set(c.layer_kinds)) == 1 and (positions is None or c.window(c.layer_kinds[0]) is None)
        self._check(valid.shape[1])
        visible = None
        if mask is not None or not alike:
            before = jnp.arange(valid.shape[1])
            visible = self._in_windows(valid[:, None] & (before <= before[:, None]), places, places)
        kind = jnp.array([self._kinds.index(name) for name in c.layer_kinds])
        x, _ = self.layers(self.embed(tokens), kind, self._rotations(places), visible, prefix)
        return self.norm(x)

    def extend(
        self,
        tokens: Tokens,
        cache: KVCache,
        cache_slot: Slot,
        positions: Tokens | None = None,
        mask: Mask = None,
        shared: KVCache | None = None,
    ) -> tuple[Hidden, KVCache]:
        """Hidden states of tokens put at slots cache_slot, cache_slot + 1, ..., and the cache with them.

        A token sees itself, the real tokens that the cache holds and those before it among the new ones, in sliding
        layers those whose position is less than the window behind its own. What the slots held before is overwritten.
        cache_slot + L must not exceed the slots. `shared` is an earlier cache that is read
        only, of which each row is that of B / rows rows of tokens that follow each other; with it give the positions.
        The layers run one after the other, each with its own part of the parameters: stacked ones are cut here, in a
        loop at every round, unless `unstacked` has done it before.
        """
        c, (length, slots) = self.config, (tokens.shape[1], cache.valid.shape[1])
        self._check(slots + (0 if shared is None else shared.valid.shape[1]))
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=cache_slot, axis=1)
        valid = write(cache.valid, jnp.ones(tokens.shape, bool) if mask is None else mask)
        if positions is None:
            positions = _counted(valid, cache_slot, length)
        placed = write(cache.positions, positions.astype(jnp.int32))
        behind = jnp.arange(slots) - (cache_slot + jnp.arange(length))[:, None]
        later = (behind > 0) & (jnp.arange(slots) < cache_slot + length)
        visible = [self._in_windows(valid[:, None] & ~later, positions, placed)]
        if shared is not None:
            spread = (jnp.repeat(x, len(tokens) // len(x), axis=0) for x in (shared.valid, shared.positions))
            earlier, their_positions = spread
            earlier = jnp.broadcast_to(earlier[:, None], (len(tokens), length, earlier.shape[1]))
            visible.insert(0, self._in_windows(earlier, positions, their_positions))
        x, rotations, written = self.embed(tokens), self._rotations(positions), []
        caches = [cache] if shared is None else [shared, cache]
        for number, name in enumerate(c.layer_kinds):
            past = tuple((part.keys[number], part.values[number]) for part in caches)
            params = _of_layer(self.variables["params"]["layers"], number)
            x, own = Block(c, parent=None).apply(
                {"params": params}, x, self._kinds.index(name), rotations, tuple(visible), None, past, cache_slot
            )
            written.append(own)
        keys, values = zip(*written, strict=True)
        return self.norm(x), KVCache(keys, values, valid, placed)

    def embed(self, tokens: Tokens) -> Hidden:
        """What enters the first layer."""
        x = residual(self.embed_tokens(tokens))
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype) if self.config.scale_embeddings else x

    def head(self, hidden: States) -> Logits:
        """Logits in float32 of hidden states, whichever stretch of the sequence they come from."""
        c = self.config
        tied = c.tie_word_embeddings
        logits = logits_of(hidden, self.embed_tokens.embedding.T, c.dtype) if tied else self.lm_head(hidden)
        cap = c.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.config.layer_kinds))

    def _check(self, slots: int) -> None:
        room = self.config.max_position_embeddings
        if slots > room:
            raise ValueError(f"Decoder: {slots} tokens exceed max_position_embeddings {room}; shorten the input.")

    def _rotations(self, positions: Tokens) -> Rotations:
        c = self.config
        angles = [rotary_angles(positions, c.head_width, *c.rope(kind)) for kind in self._kinds]
        return jnp.stack([cos for cos, _ in angles]), jnp.stack([sin for _, sin in angles])

    def _in_windows(self, seen: Array, positions: Tokens, slot_positions: Array) -> Array:
        """What tokens at `positions` see in the layers of each kind [T, B, L, S], of what they see without windows."""
        distance = positions[:, :, None] - slot_positions[:, None, :]
        windows = [self.config.window(kind) for kind in self._kinds]
        return jnp.stack([seen if window is None else seen & (distance < window) for window in windows])


def unstacked(config: DecoderConfig, params: Params) -> Params:
    """A Decoder's parameters for `extend` in a loop, a second copy of them: what no round of it should do again.

    Each layer is apart, and what products read is in their precision; all else stays in its own.
    """

    def as_read(path: Any, x: Array) -> Array:
        return x.astype(config.dtype) if path[-1].key in READ_BY_PRODUCTS else x

    rounded: Params = jax.tree.map_with_path(as_read, params)
    layers = {str(number): _of_layer(rounded["layers"], number) for number in range(config.num_hidden_layers)}
    return rounded | {"layers": layers}


def _of_layer(layers: Params, number: int) -> Params:
    return layers[str(number)] if str(number) in layers else jax.tree.map(lambda x: x[number], layers)


def _counted(valid: Bool[Array, "batch slots"], slot: Slot, length: int) -> Tokens:
    """The number of real tokens before each of the `length` slots from `slot` on."""
    counts = jax.lax.dynamic_slice_in_dim(jnp.cumsum(valid, axis=1), slot, length, axis=1)
    return jnp.maximum(counts - 1, 0)
