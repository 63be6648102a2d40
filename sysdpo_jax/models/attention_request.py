"""What an attention is asked to do: all that the choice of a kernel depends on."""

from dataclasses import dataclass

import jax


@dataclass(frozen=True)
class AttentionRequest:
    """Queries [batch, length, heads, width] on keys and values [batch, slots, groups, width], and what restricts them.

    dtype: of queries, keys and values; where they differ, all of them. masked: whether a mask is given beside `causal`
    and `window`. softcap: whether the scores are bounded.
    """

    batch: int
    length: int
    slots: int
    heads: int
    groups: int
    width: int
    dtype: str
    masked: bool = False
    softcap: bool = False
    causal: bool = False
    window: int | None = None

    @classmethod
    def of(
        cls,
        queries: jax.Array,
        keys: jax.Array,
        values: jax.Array,
        visible: jax.Array | None,
        softcap: float | None,
        causal: bool,
        window: int | None,
    ) -> "AttentionRequest":
        """That of these arguments of `attend`."""
        batch, length, heads, width = queries.shape
        dtype = ", ".join(sorted({x.dtype.name for x in (queries, keys, values)}))
        return cls(
            batch,
            length,
            keys.shape[1],
            heads,
            keys.shape[2],
            width,
            dtype,
            visible is not None,
            softcap is not None,
            causal,
            window,
        )
