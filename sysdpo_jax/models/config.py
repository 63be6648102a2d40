"""What the models' configurations share: precision, the means of attention, and what the backward pass recomputes."""

from dataclasses import dataclass

from sysdpo_jax.models.attention import check_attention
from sysdpo_jax.models.remat import AUTO, SETTINGS


@dataclass(frozen=True, kw_only=True)
class Precision:
    """A configuration with a precision of its products.

    dtype: precision of the products; norms, softmax and the output are float32 in any case.
    param_dtype: precision that the parameters are kept in.
    """

    dtype: str = "float32"
    param_dtype: str = "float32"


@dataclass(frozen=True, kw_only=True)
class BlockOptions(Precision):
    """How the blocks of a model are computed; remat and attention change nothing in what they compute.

    remat: what of each block is recomputed in the backward pass, see `remat.recomputed`.
    attention: how attention is computed, see `attention.choose`.
    Raises ValueError for a name that these do not know.
    """

    remat: str | None = AUTO
    attention: str = "auto"

    def __post_init__(self) -> None:
        where = type(self).__name__
        check_attention(self.attention, where)
        if self.remat is not None and self.remat not in SETTINGS:
            raise ValueError(f"{where}: unknown remat {self.remat!r}: choose None or one of {', '.join(SETTINGS)}")
