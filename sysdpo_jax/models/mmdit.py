"""The multimodal diffusion transformer of Stable Diffusion 3 (arXiv 2403.03206), as diffusers' SD3Transformer2DModel.

Images are [batch, height, width, channels], where diffusers has the channels first. Structure, semantics and names of
parameters are diffusers'; members of its lists are named by their index: net_0, to_out_0.
Axes: B batch, L patches, N patches of the largest square sample, row by row, S text tokens, D width.
"""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.attention import attend
from sysdpo_jax.models.config import BlockOptions
from sysdpo_jax.models.layers import (
    Conv,
    Dense,
    EmbeddingMLP,
    Projection,
    RMSNorm,
    join_heads,
    split_heads,
    standardise,
    timestep_embedding,
)
from sysdpo_jax.models.partitioning import constrain, residual
from sysdpo_jax.models.remat import recomputed

Image = Float[Array, "batch height width channels"]
Patches = Float[Array, "batch length width"]
Text = Float[Array, "batch text width"]
Condition = Float[Array, "batch width"]
EPS = 1e-6
TIME_WIDTH = 256


@dataclass(frozen=True)
class MMDiTConfig(BlockOptions):
    """Defaults are those of diffusers: a small Stable Diffusion 3 (arXiv 2403.03206).

    sample_size: height of the latents in training; only a new model's positions depend on it.
    pos_embed_max_size: side of the table of positions, in patches.
    dual_attention_layers: blocks with a second attention among the patches, as in Stable Diffusion 3.5 medium.
    qk_norm: None or "rms_norm", of the queries and keys of each head.
    Raises ValueError for what cannot be built.
    """

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size not in (1, 2):
            raise ValueError(f"MMDiTConfig: patch_size must be 1 or 2, not {self.patch_size}")
        if self.width % 4:
            raise ValueError(
                f"MMDiTConfig: num_attention_heads * attention_head_dim = {self.width} must be a multiple of 4, the "
                "sines and cosines of rows and columns"
            )
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"MMDiTConfig: caption_projection_dim={self.caption_projection_dim} must be num_attention_heads * "
                f"attention_head_dim = {self.width}, for text and patches attend jointly"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"MMDiTConfig: unknown qk_norm {self.qk_norm!r}: None or 'rms_norm'")
        beyond = [i for i in self.dual_attention_layers if not 0 <= i < self.num_layers]
        if beyond:
            raise ValueError(f"MMDiTConfig: dual_attention_layers has {beyond[0]}, but there are {self.num_layers}")

    @property
    def width(self) -> int:
        """Of the patches and of the text inside the model."""
        return self.num_attention_heads * self.attention_head_dim


def position_waves(c: MMDiTConfig) -> Float[np.ndarray, "rows half"]:
    """Sines, then cosines, of each row's position * 10000^(-4k / width) for k < width / 4; columns have the same.

    Row i of max is at i * s / max, where s is sample_size in patches. Positions are rounded to float32, angles computed
    in float64, as diffusers does.
    """
    trained = c.sample_size // c.patch_size
    positions = np.arange(c.pos_embed_max_size, dtype=np.float32) / np.float32(c.pos_embed_max_size / trained)
    quarter = c.width // 4
    angles = np.outer(positions.astype(np.float64), 1.0 / 10000 ** (np.arange(quarter) / quarter))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def position_table(c: MMDiTConfig) -> Float[Array, "1 patches width"]:
    """The encoded column, then the encoded row, of each patch, as a new model of diffusers has them.

    Up to a gigabyte, so only its waves are computed on the host: below a trace the table costs nothing.
    """
    waves, size = position_waves(c), c.pos_embed_max_size
    columns, rows = (jnp.broadcast_to(half, (size, size, c.width // 2)) for half in (waves[None], waves[:, None]))
    return jnp.concatenate([columns, rows], axis=-1).reshape(1, size**2, c.width)


def modulate(x: Patches, scale: Condition, shift: Condition) -> Patches:
    """standardised x * (1 + scale) + shift, in float32: a LayerNorm whose affine part is given (arXiv 2212.09748)."""
    normed = standardise(x.astype(jnp.float32), (-1,), EPS)
    return (normed * (1 + scale.astype(jnp.float32)[:, None]) + shift.astype(jnp.float32)[:, None]).astype(x.dtype)


class Modulation(nn.Module):
    """The shifts, scales and gates of a block, linear in SiLU of time and pooled text. Parameter: linear."""

    config: MMDiTConfig
    parts: int

    @nn.compact
    def __call__(self, condition: Condition) -> tuple[Condition, ...]:
        parts = Dense(self.config, self.parts * self.config.width, name="linear")(nn.silu(condition))
        return tuple(constrain(part, "batch", "residual") for part in jnp.split(parts, self.parts, axis=-1))


class TimeAndText(nn.Module):
    """The sum of the embedded time and the embedded pooled text. Parameters: timestep_embedder, text_embedder."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, time: Float[Array, "batch"], pooled: Float[Array, "batch pooled_width"]) -> Condition:
        c = self.config
        wave = timestep_embedding(time, TIME_WIDTH, flip_sin_to_cos=True, freq_shift=0).astype(c.dtype)
        of_time, of_text = (EmbeddingMLP(c, c.width, name=f"{source}_embedder") for source in ("timestep", "text"))
        return of_time(wave) + of_text(pooled)


class PatchEmbed(nn.Module):
    """Patches as tokens, row by row, with the positions of the table's centre added.

    Parameters: proj; pos_embed [1, N, D], the table, a constant: a checkpoint may hold another than a new model's.
    """

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x: Image) -> Float[Array, "batch length out"]:
        c = self.config
        x = Conv(c, c.width, c.patch_size, c.patch_size, name="proj")(x)
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
        mixed = join_heads(attend(queries, keys, values, implementation=c.attention))
        out = Dense(c, c.width, name="to_out_0")(mixed[:, :length])
        return out, Dense(c, c.width, name="to_add_out")(mixed[:, length:]) if self.returns_text else None

    def _heads(self, x: Array, projections: tuple[str, str, str], norms: tuple[str, str]) -> list[Array]:
        """Queries, keys and values [B, L, H, K]; queries and keys normalised by head where the configuration says."""
        c = self.config
        made = [split_heads(Dense(c, c.width, name=name)(x), c.num_attention_heads) for name in projections]
        if c.qk_norm:
            made[:2] = [RMSNorm(c, EPS, name=name)(part) for name, part in zip(norms, made, strict=False)]
        return made


class FeedForward(nn.Module):
    """Linear, GELU in its tanh form (arXiv 1606.08415), linear. Parameters: net_0/proj, net_2."""

    config: MMDiTConfig

    @nn.compact
    def __call__(self, x: Patches) -> Patches:
        c = self.config
        hidden = Projection(c, 4 * c.width, name="net_0")(x)
        hidden = constrain(nn.gelu(hidden, approximate=True), "batch", "length", "mlp")
        return Dense(c, c.width, name="net_2")(hidden)


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


class MMDiT(nn.Module):
    """Predicts the velocity of a noisy latent from its time, the encoded text and the pooled text."""

    config: MMDiTConfig

    @nn.compact
    def __call__(
        self,
        sample: Float[Array, "batch height width channels"],
        timesteps: Float[Array, "batch"] | Int[Array, "batch"],
        encoder_hidden_states: Float[Array, "batch text text_width"],
        pooled_projections: Float[Array, "batch pooled_width"],
    ) -> Float[Array, "batch height width out_channels"]:
        """timesteps in [0, 1000]. The output is float32.

        Raises ValueError for a height or width that is no multiple of patch_size or exceeds pos_embed_max_size patches.
        """
        c = self.config
        height, width = sample.shape[1:3]
        most = c.patch_size * c.pos_embed_max_size
        if any(side % c.patch_size or side > most for side in (height, width)):
            raise ValueError(
                f"MMDiT: latents of {height} x {width}: both must be multiples of patch_size={c.patch_size} and at "
                f"most {most} (pos_embed_max_size={c.pos_embed_max_size} patches)"
            )
        block_type = recomputed(JointBlock, c.remat, c.dtype)
        x = PatchEmbed(c, name="pos_embed")(sample)
        condition = TimeAndText(c, name="time_text_embed")(timesteps.astype(jnp.float32), pooled_projections)
        text: Array | None = residual(Dense(c, c.width, name="context_embedder")(encoder_hidden_states))
        for i in range(c.num_layers):
            block = block_type(c, i in c.dual_attention_layers, i == c.num_layers - 1, name=f"transformer_blocks_{i}")
            x, text = block(x, text, condition)
        scale, shift = Modulation(c, 2, name="norm_out")(condition)
        x = Dense(c, c.patch_size**2 * c.out_channels, name="proj_out")(modulate(x, scale, shift))
        rows, columns = height // c.patch_size, width // c.patch_size
        x = x.reshape(-1, rows, columns, c.patch_size, c.patch_size, c.out_channels).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, height, width, c.out_channels).astype(jnp.float32)
        return constrain(x, "batch", "height", "width", None)
