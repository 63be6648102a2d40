"""The map from hidden states to logits.

Axes: D model width, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sysdpo_jax.models.decoder_config import DecoderConfig
from sysdpo_jax.models.lora import low_rank
from sysdpo_jax.models.partitioning import constrain

# Of the weights of a new decoder.
SCALE = 0.02
INIT = nn.initializers.normal(SCALE)
States = Float[Array, "*leading width"]
Logits = Float[Array, "*leading vocab"]


class Head(nn.Module):
    """Logits from hidden states, accumulated and returned in float32. Parameter: kernel [D, V]."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, hidden: States) -> Logits:
        c = self.config
        kernel = self.param("kernel", INIT, (c.hidden_size, c.vocab_size), c.param_dtype)
        logits = logits_of(hidden, kernel, c.dtype)
        if self.has_variable("params", "lora_a"):
            logits = logits + low_rank(self, hidden.astype(c.dtype), "float32")
        return logits


def logits_of(hidden: States, kernel: Float[Array, "width vocab"], dtype: str) -> Logits:
    """hidden kernel, with operands in dtype and the result in float32."""
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
