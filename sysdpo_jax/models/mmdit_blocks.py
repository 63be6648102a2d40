"""The blocks of an MMDiT, with the structure, semantics and parameter names of diffusers' JointTransformerBlock.

Members of diffusers' lists are named by their index: net_0, to_out_0.
Axes: B batch, L patches, N patches of the largest square sample, S text tokens, D width.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.layers import Conv, Dense, EmbeddingMLP, Projection, RMSNorm, standardise
from sysdpo_jax.models.mmdit_config import MMDiTConfig, position_table
from sysdpo_jax.models.partitioning import constrain, residual
from sysdpo_jax.models.unet_blocks import timestep_embedding

Image = Float[Array, "batch height width channels"]
Patches = Float[Array, "batch length width"]
Text = Float[Array, "batch text width"]
Condition = Float[Array, "batch width"]
EPS = 1e-6
TIME_WIDTH = 256


def dense(c: MMDiTConfig, features: int, name: str) -> Dense:
    return Dense(features, True, c.dtype, c.param_dtype, name=name)


def modulate(
    x: Float[Array, "batch length width"], scale: Condition, shift: Condition
) -> Float[Array, "batch length width"]:
    """standardised x * (1 + scale) + shift, in float32: a LayerNorm whose affine part is given (arXiv 2212.09748)."""
    normed = standardise(x.astype(jnp.float32), (-1,), EPS)
    return (normed * (1 + scale.astype(jnp.float32)[:, None]) + shift.astype(jnp.float32)[:, None]).astype(x.dtype)


class Modulation(nn.Module):
    """The shifts, scales and gates of a block, linear in SiLU of time and pooled text. Parameter: linear."""

    config: MMDiTConfig
    parts: int

    @nn.compact
    def __call__(self, condition: Condition) -> tuple[Condition, ...]:
        parts = dense(self.config, self.parts * self.config.width, "linear")(nn.silu(condition))
        return tuple(constrain(part, "batch", "residual") for part in jnp.split(parts, self.parts, axis=-1))


class TimeAndText(nn.Module):
    """The sum of the embedded time and the embedded pooled text. Parameters: timestep_embedder, text_embedder."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, time: Float[Array, "batch"], pooled: Float[Array, "batch pooled_width"]) -> Condition:
        c = self.config
        wave = timestep_embedding(time, TIME_WIDTH, flip_sin_to_cos=True, freq_shift=0).astype(c.dtype)
        of_time, of_text = (
            EmbeddingMLP(c.width, c.dtype, c.param_dtype, name=f"{source}_embedder") for source in ("timestep", "text")
        )
        return of_time(wave) + of_text(pooled)


class PatchEmbed(nn.Module):
    """Patches as tokens, row by row, with the positions of the table's centre added.

    Parameters: proj; pos_embed [1, N, D], the table, a constant: a checkpoint may hold another than a new model's.
    """

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch length out"]:
        c = self.config
        x = Conv(c.width, c.patch_size, c.patch_size, c.dtype, c.param_dtype, name="proj")(x)
        rows, columns = x.shape[1:3]
        side = c.pos_embed_max_size
        table = self.param("pos_embed", lambda key: position_table(c).astype(c.param_dtype))
        top, left = ((side - n) // 2 for n in (rows, columns))
        crop = table.reshape(side, side, c.width)[top : top + rows, left : left + columns]
        positions = jax.lax.stop_gradient(crop).astype(jnp.float32)
        return residual((x + positions).astype(c.dtype).reshape(x.shape[0], -1, c.width))


class JointAttention(nn.Module):
    """Attention among the patches and, given the text, among both at once (arXiv 2403.03206, figure 2).

    Parameters: to_q, to_k, to_v, to_out_0; for the text add_q_proj, add_k_proj, add_v_proj and, if it is returned,
    to_add_out; with qk_norm norm_q, norm_k and for the text norm_added_q, norm_added_k.
    """

    config: MMDiTConfig
    returns_text: bool = False

    @nn.compact
    def __call__(self, x: Patches, text: Text | None = None) -> tuple[Patches, Text | None]:
        c, length = self.config, x.shape[1]
        queries, keys, values = self._heads(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        if text is not None:
            added = self._heads(text, ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k"))
            queries, keys, values = (
                jnp.concatenate(pair, axis=1) for pair in zip((queries, keys, values), added, strict=True)
            )
        mixed = constrain(attend(queries, keys, values, implementation=c.attention), "batch", "length", "heads", None)
        mixed = mixed.reshape(x.shape[0], -1, c.width)
        out = dense(c, c.width, "to_out_0")(mixed[:, :length])
        return out, dense(c, c.width, "to_add_out")(mixed[:, length:]) if self.returns_text else None

    def _heads(self, x: Array, projections: tuple[str, str, str], norms: tuple[str, str]) -> list[Array]:
        """Queries, keys and values [B, L, H, K]; queries and keys normalised by head where the configuration says."""
        c = self.config
        made = [
            dense(c, c.width, name)(x).reshape(*x.shape[:2], c.num_attention_heads, c.attention_head_dim)
            for name in projections
        ]
        made = [constrain(part, "batch", "length", "heads", None) for part in made]
        if c.qk_norm:
            made[:2] = [
                RMSNorm(EPS, c.dtype, c.param_dtype, name=name)(part) for name, part in zip(norms, made, strict=False)
            ]
        return made


class FeedForward(nn.Module):
    """Linear, GELU in its tanh form (arXiv 1606.08415), linear. Parameters: net_0/proj, net_2."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x: Patches) -> Patches:
        c = self.config
        hidden = Projection(4 * c.width, c.dtype, c.param_dtype, name="net_0")(x)
        hidden = constrain(nn.gelu(hidden, approximate=True), "batch", "length", "mlp")
        return dense(c, c.width, "net_2")(hidden)


class JointBlock(nn.Module):
    """Joint attention and two feed-forward layers, each modulated and gated, around residuals.

    dual: a second attention among the patches alone. last: the text is read for the last time and not returned.
    """

    config: MMDiTConfig
    dual: bool
    last: bool

    @nn.compact
    def __call__(self, x: Patches, text: Text, condition: Condition) -> tuple[Patches, Text | None]:
        c = self.config
        parts = Modulation(c, 9 if self.dual else 6, name="norm1")(condition)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = parts
        if self.last:
            text_scale, text_shift = Modulation(c, 2, name="norm1_context")(condition)
        else:
            text_shift, text_scale, text_gate, *text_ff = Modulation(c, 6, name="norm1_context")(condition)
        joint = JointAttention(c, returns_text=not self.last, name="attn")
        mixed, text_mixed = joint(modulate(x, scale, shift), modulate(text, text_scale, text_shift))
        out = residual(x + gate[:, None] * mixed)
        if second:
            shift2, scale2, gate2 = second
            out = residual(out + gate2[:, None] * JointAttention(c, name="attn2")(modulate(x, scale2, shift2))[0])
        out = residual(out + gate_ff[:, None] * FeedForward(c, name="ff")(modulate(out, scale_ff, shift_ff)))
        if text_mixed is None:
            return out, None
        text = residual(text + text_gate[:, None] * text_mixed)
        shift_ff, scale_ff, gate_ff = text_ff
        inner = FeedForward(c, name="ff_context")(modulate(text, scale_ff, shift_ff))
        return out, residual(text + gate_ff[:, None] * inner)
