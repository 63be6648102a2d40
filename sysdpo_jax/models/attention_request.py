"""What an attention is asked to do: all that the choice of a kernel depends on."""

from dataclasses import dataclass

from jaxtyping import Array, Float

Queries = Float[Array, "batch length heads width"]
# Keys or values.
Slots = Float[Array, "batch slots groups width"]


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
        cls, queries: Queries, keys: Slots, values: Slots, masked: bool, softcap: bool, causal: bool, window: int | None
    ) -> "AttentionRequest":
        """That of these arguments of `attend`."""
        (batch, length, heads, width), (_, slots, groups, _) = queries.shape, keys.shape
        dtype = ", ".join(sorted({x.dtype.name for x in (queries, keys, values)}))
        return cls(batch, length, slots, heads, groups, width, dtype, masked, softcap, causal, window)
