"""Pieces shared by the models: dense products, convolution, norms.

Axes: D model width, F features, C channels.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.config import Precision
from sysdpo_jax.models.lora import low_rank
from sysdpo_jax.models.partitioning import constrain, gathered_kernel

Initializer = nn.initializers.Initializer


class Dense(nn.Module):
    """y = x kernel + bias on the last axis, computed as one 2-D product.

    Flattening the leading axes first makes it the plain matrix product that backends have a fast kernel for.
    The product and the result are in config.dtype, the parameters in config.param_dtype, as in all layers here.
    Parameters: kernel [D, F], bias [F]; with LoRA's factors beside them (see lora.py) their product is added.
    """

    config: Precision
    features: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "*leading width"]) -> Float[Array, "*leading features"]:
        width = x.shape[-1]
        kernel = self.param("kernel", self.kernel_init, (width, self.features), self.config.param_dtype)
        flat = x.reshape(-1, width).astype(self.config.dtype)
        y = flat @ gathered_kernel(self.path, kernel.astype(self.config.dtype))
        if self.has_variable("params", "lora_a"):
            y = y + low_rank(self, x.astype(self.config.dtype), self.config.dtype).reshape(y.shape)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.config.param_dtype)
            y = y + bias.astype(self.config.dtype)
        return y.reshape(*x.shape[:-1], self.features)


class Projection(nn.Module):
    """The first linear map of a feed-forward layer, a module only for its name. Parameter: proj."""

    config: Precision
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "*leading width"]) -> Float[Array, "*leading features"]:
        return Dense(self.config, self.features, name="proj")(x)


class EmbeddingMLP(nn.Module):
    """linear_1, SiLU, linear_2: of a timestep's waves, of a pooled text or of sizes, to one width."""

    config: Precision
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch width"]) -> Float[Array, "batch features"]:
        first, second = (Dense(self.config, self.features, name=f"linear_{i}") for i in (1, 2))
        return constrain(second(constrain(nn.silu(first(x)), "batch", "mlp")), "batch", "residual")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (arXiv 1910.07467, equation 4), in float32.

    unit_offset: multiply by 1 + weight instead. The result is cast to config.dtype. Parameter: weight [D].
    """

    config: Precision
    eps: float = 1e-6
    unit_offset: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        init = nn.initializers.zeros if self.unit_offset else nn.initializers.ones
        weight = self.param("weight", init, (x.shape[-1],), self.config.param_dtype).astype(jnp.float32)
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 / jnp.sqrt(mean_square + self.eps)
        return (normed * (1 + weight if self.unit_offset else weight)).astype(self.config.dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis (arXiv 1607.06450), in float32.

    Parameters: weight [D], bias [D].
    """

    config: Precision
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        weight, bias = _weight_and_bias(self, x.shape[-1])
        return (standardise(x.astype(jnp.float32), (-1,), self.eps) * weight + bias).astype(self.config.dtype)


class GroupNorm(nn.Module):
    """Each row's channels, in groups, standardised over the group and the image (arXiv 1803.08494), in float32.

    Raises ValueError when the groups do not divide the channels. Parameters: weight [C], bias [C].
    """

    config: Precision
    groups: int
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        if x.shape[-1] % self.groups:
            raise ValueError(f"GroupNorm: {self.groups} groups do not divide {x.shape[-1]} channels")
        centred = x.astype(jnp.float32)
        centred = centred - self._of_groups(centred)
        deviation = jax.lax.rsqrt(self._of_groups(jnp.square(centred)) + self.eps)
        weight, bias = _weight_and_bias(self, x.shape[-1])
        return (centred * (deviation * weight) + bias).astype(self.config.dtype)

    def _of_groups(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch 1 1 channels"]:
        """The mean of each channel's group: over the image first, so that no pass over it goes group by group."""
        channels = x.mean((1, 2)).reshape(len(x), self.groups, -1)
        means = jnp.broadcast_to(channels.mean(-1, keepdims=True), channels.shape)
        return means.reshape(len(x), 1, 1, -1)


class Conv(nn.Module):
    """A square convolution over images. Parameters: kernel [size, size, C, F], bias [F].

    padding: rows and columns of zeros (before, after) the image, by default (size - 1) / 2 on each side.
    """

    config: Precision
    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[int, int] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w features"]:
        c, shape = self.config, (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, c.param_dtype).astype(c.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), c.param_dtype).astype(c.dtype)
        edges = ((self.size - 1) // 2,) * 2 if self.padding is None else self.padding
        y = jax.lax.conv_general_dilated(
            x.astype(c.dtype),
            gathered_kernel(self.path, kernel),
            window_strides=(self.stride, self.stride),
            padding=(edges, edges),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias


def embedding(config: Precision, rows: int, width: int, scale: float, name: str | None = None) -> nn.Embed:
    """A table [rows, width] that starts as normal draws times `scale`."""
    init = nn.initializers.normal(scale)
    return nn.Embed(rows, width, config.dtype, config.param_dtype, embedding_init=init, name=name)


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x Phi(x), Phi the normal distribution function (arXiv 1606.08415, equation 1).

    In float32 Phi = (1 + erf) / 2 as in PyTorch, at half of what erfc costs; a narrower type would round the sum off.
    """
    if x.dtype != jnp.float32:
        return nn.gelu(x, approximate=False)
    return 0.5 * x * (1 + jax.lax.erf(math.sqrt(0.5) * x))


def split_heads(x: Float[Array, "batch length all_heads"], heads: int) -> Float[Array, "batch length heads head_width"]:
    """What a projection made, head by head and laid out over the mesh so."""
    return constrain(x.reshape(*x.shape[:2], heads, -1), "batch", "length", "heads", None)


def join_heads(x: Float[Array, "batch length heads head_width"]) -> Float[Array, "batch length all_heads"]:
    """The inverse of `split_heads`, of what attention made."""
    return constrain(x, "batch", "length", "heads", None).reshape(*x.shape[:2], -1)


def timestep_embedding(
    time: Float[Array, "batch"], width: int, flip_sin_to_cos: bool, freq_shift: int
) -> Float[Array, "batch width"]:
    """sin and cos of time * 10000^(-i / (width / 2 - freq_shift)); cos first if flipped. Float32."""
    half = width // 2
    angles = time[:, None] * jnp.exp(-jnp.log(10000.0) * jnp.arange(half) / (half - freq_shift))
    parts = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jax.lax.concatenate(parts, dimension=1)


def standardise(x: Float[Array, "*shape"], axes: tuple[int, ...], eps: float) -> Float[Array, "*shape"]:
    """(x - mean) / sqrt(variance + eps), both over the axes."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    centred = x - mean
    return centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=axes, keepdims=True) + eps)


def _weight_and_bias(norm: LayerNorm | GroupNorm, width: int) -> tuple[Array, Array]:
    """In float32."""
    weight = norm.param("weight", nn.initializers.ones, (width,), norm.config.param_dtype)
    bias = norm.param("bias", nn.initializers.zeros, (width,), norm.config.param_dtype)
    return weight.astype(jnp.float32), bias.astype(jnp.float32)
