"""Names for the pytrees that travel through the library.

Params:   nested dict of arrays, the parameters of one component or `{params_key: tree}` of a whole system
Features: pytree of arrays with a leading batch axis, as `prepare` returns it
Record:   `{name: raw value}`, one run of a system: its inputs and the value of each node (str, image, number ...)
Parents:  `{parent name: one raw value per row}`, ordered as `Node.parents`
Keys:     one random key for all rows, or one a row
Rows:     one number for each row of a batch
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from jaxtyping import Array, Float, Key, PyTree
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Params = PyTree
Features = PyTree
Record = Mapping[str, Any]
Parents = Mapping[str, Sequence[Any]]
Keys = Key[Array, "..."]
Rows = Float[Array, "batch"]

# Of configurations: what a file or a flag is held to.
Positive: TypeAlias = Annotated[int, PositiveInt]
Natural: TypeAlias = Annotated[int, NonNegativeInt]
AboveZero: TypeAlias = Annotated[float, PositiveFloat]
NotNegative: TypeAlias = Annotated[float, NonNegativeFloat]
