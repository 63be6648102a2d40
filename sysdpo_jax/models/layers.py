"""Pieces shared by the models: dense products, root-mean-square norm, rotary position embedding.

Axes: B batch, L length, H heads, K head width, D model width.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Initializer = nn.initializers.Initializer


class Dense(nn.Module):
    """y = x kernel + bias on the last axis, computed as one 2-D product.

    Flattening the leading axes first makes it the plain matrix product that backends have a fast kernel for.
    dtype: precision of the product and of the result; param_dtype: precision the parameters are kept in.
    Parameters: kernel [D, F], bias [F].
    """

    features: int
    use_bias: bool = True
    dtype: Any = "float32"
    param_dtype: Any = "float32"
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*leading width"]) -> Float[Array, "*leading features"]:
        width = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, self.features), self.param_dtype)
        flat = x.reshape(-1, width).astype(self.dtype)
        y = flat @ kernel.astype(self.dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y + bias.astype(self.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467, equation 4), in float32.

    The result is cast to dtype. Parameter: weight [D].
    """

    eps: float = 1e-6
    dtype: Any = "float32"
    param_dtype: Any = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        weight = self.param("weight", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 / jnp.sqrt(mean_square + self.eps)
        return (normed * weight.astype(jnp.float32)).astype(self.dtype)


def rotary_angles(
    positions: Int[Array, "*leading"], head_dim: int, theta: float
) -> tuple[Float[Array, "*leading half"], Float[Array, "*leading half"]]:
    """cos and sin of position * theta^(-2i / head_dim) for i < head_dim / 2, in float32.

    Source: arXiv 2104.09864, equation 15, counting i from 0.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch length heads width"],
    cos: Float[Array, "batch length half"],
    sin: Float[Array, "batch length half"],
) -> Float[Array, "batch length heads width"]:
    """Rotate the pairs (x[i], x[i + K / 2]) of a head: arXiv 2104.09864, eq. 34, in Hugging Face's order."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
