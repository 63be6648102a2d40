"""Rotary position embedding: the angles of the positions, and the rotation of heads by them."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sysdpo_jax.models.attention_request import Queries

# One row where all rows stand at the same positions.
Angles = Float[Array, "#batch length half"]
LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies are lowered for a longer context, under the names of Hugging Face's rope_scaling.

    rope_type "linear": every frequency is divided by `factor` (arXiv 2306.15595, equation 4).
    rope_type "llama3": those with a wavelength above original_max_position_embeddings / low_freq_factor are divided
    by `factor`, those below original_max_position_embeddings / high_freq_factor stay, and between the two the
    divisor changes smoothly (Llama 3.1, arXiv 2407.21783).
    Raises ValueError for another type, or for fields that are missing or do not belong to the type.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in LLAMA3_FIELDS if getattr(self, name) is not None]
        wanted = {"linear": [], "llama3": list(LLAMA3_FIELDS)}.get(self.rope_type)
        if wanted is None:
            raise ValueError(f"RopeScaling: unknown rope_type {self.rope_type!r}; known are 'linear' and 'llama3'.")
        if given != wanted:
            raise ValueError(
                f"RopeScaling: rope_type {self.rope_type!r} needs exactly {['factor', *wanted]}, "
                f"got {['factor', *given]}."
            )
        if self.factor <= 0:
            raise ValueError(f"RopeScaling: factor {self.factor} must be positive.")


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Float[Array, " half"]:
    """theta^(-2i / head_dim) for i < head_dim / 2 (arXiv 2104.09864, equation 15, i from 0), scaled, in float32."""
    plain = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return plain
    lowered = plain / scaling.factor
    if scaling.rope_type == "linear":
        return lowered
    low, high, length = (getattr(scaling, name) for name in LLAMA3_FIELDS)
    # How often a frequency turns within the original length decides how much of it is kept.
    turns = length * plain / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * lowered + kept * plain


def rotary_angles(
    positions: Int[Array, "*leading"], head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "*leading half"], Float[Array, "*leading half"]]:
    """cos and sin of position * frequency for each of the head_dim / 2 `frequencies`, in float32."""
    angles = positions[..., None].astype(jnp.float32) * frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Queries, cos: Angles, sin: Angles) -> Queries:
    """Rotate the pairs (x[i], x[i + K / 2]) of a head: arXiv 2104.09864, eq. 34, in Hugging Face's order."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
