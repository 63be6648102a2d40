"""The contract every component keeps: pure functions over explicit parameters, and one host-side `prepare` before them.

prepare(values, parents) -> raw features      host: strings, images, numbers to NumPy arrays; no parameters
encode(params, raw features) -> features      device: the frozen parts alone, once; identity by default
log_prob(params, features, key) -> [batch]    the step sees nothing but this
sample(params, parents, key) -> values
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from sysdpo_jax.typing import Features, Keys, Params, Parents
from sysdpo_jax.values import distinct

LogProbs = Float[Array, "batch"]
Metrics = Mapping[str, Float[Array, "batch"]]


class RecordError(ValueError):
    """A record cannot be used: the message names the node, the row, what is wrong and the remedy."""


class Raw(NamedTuple):
    """An entry of features that is still to be encoded. leading: axes before a row's own; rows: encoded at once."""

    leading: int
    rows: int


@runtime_checkable
class Component(Protocol):
    """One generator of the system: p(value | parents).

    Implementations are frozen dataclasses: hashable, because a system is a static argument of the jitted step.
    Subclass this protocol to inherit what has a default.
    """

    def init(self, key: PRNGKeyArray) -> Params:
        """Make fresh parameters.

        Args:
            key: Of the draws.

        Returns:
            The component's tree, any pytree.
        """
        ...

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        """Turn raw values into arrays, on the host.

        Args:
            values: One a row.
            parents: `{parent: values}`, in the order of the node's parents.

        Returns:
            A NumPy pytree with a leading batch axis of `len(values)`.

        Raises:
            RecordError: For what cannot be used, naming the row.
        """
        ...

    @property
    def prepared_by(self) -> Any:
        """All that `prepare`, `mark_shared`, `encode`, `sizes` and `resize` read, beside the frozen parameters.

        Features that are kept on disk are made anew where it changes. By default the component as a whole; leave out
        what only `log_prob` and `sample` read.
        """
        return self

    @property
    def several_sizes(self) -> bool:
        """Whether the values of a call of `prepare` choose, together, among several sizes the one they all get.

        Both sides of a preference then belong into one call, and a batch holds rows of one size.
        """
        return False

    @property
    def frozen(self) -> tuple[str, ...]:
        """The entries of the parameter tree that only `encode` and `sample` read, and that are never trained."""
        return ()

    def raw(self, features: Features) -> Mapping[str, Raw]:
        """The entries of the features that `encode` has still to encode; none by default. Host side.

        `CompoundSystem.encode` encodes each of these entries by itself.

        Args:
            features: Of any number of rows, whatever axes lie before the rows' own.

        Returns:
            `{entry: Raw}`.
        """
        return {}

    def encode(self, params: Params, features: Features) -> Features:
        """Encode raw features by the frozen parts. Jittable; of encoded features the identity.

        Args:
            params: Of which the frozen entries alone are read, and there may be no others.
            features: With some of the entries that `raw` names, or all.

        Returns:
            What `log_prob` takes: each of these entries is replaced by one of another name.
        """
        return features

    def mark_shared(self, runs: Sequence[Features]) -> Sequence[Features]:
        """Mark what the runs of a preference have in common, where computing it once saves work. Host side.

        Args:
            runs: Features, each with a first axis of preferences; further axes before a row's own (copies of a plate,
                intermediates) are of one preference too.

        Returns:
            The same with what `fold_runs` makes use of; by default as they are.
        """
        return runs

    def fold_runs(self, features: Features, axes: int) -> Features:
        """Fold the leading axes into one of rows, for `log_prob`. Jittable.

        Args:
            features: Every array has first an axis of preferences, then those of their runs.
            axes: How many axes become one.

        Returns:
            The features; rows of a preference follow each other, as many as the axes say.
        """
        return as_rows(features, axes)

    def join_turns(
        self, features: Features, ran: Bool[np.ndarray, "records turns"]
    ) -> tuple[Features, Bool[np.ndarray, "records turns"]]:
        """Join turns of a loop that one row can hold, where computing them once saves work. Host side.

        A turn that was joined to another one has not run any more, and what `log_prob` gives for the turns that are
        left adds up to the same. By default nothing is joined.

        Args:
            features: As `prepare` made them, every array [records, turns, ...] with the turns of a run in their order.
                What a turn that did not run holds is arbitrary.
            ran: Which turns there are.

        Returns:
            Both in the same form: sizes that `resize` changes may be others.
        """
        return features, ran

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        """log p(value | parents) of each row, up to a constant that does not depend on `params`. Jittable.

        Args:
            params: The component's tree.
            features: Encoded.
            key: One for all rows or, as `CompoundSystem` passes it, one a row (see `row_keys`). The same key gives the
                same noise, whatever the parameters: policy and reference share it.

        Returns:
            A number a row, in nats.
        """
        ...

    def log_prob_with_metrics(self, params: Params, features: Features, key: Keys) -> tuple[LogProbs, Metrics]:
        """`log_prob`, and figures worth logging for policy and reference (none by default).

        Args:
            params: The component's tree.
            features: Encoded.
            key: As for `log_prob`.

        Returns:
            The log-probabilities, and `{name: a number a row}`.
        """
        return self.log_prob(params, features, key), {}

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        """Draw one value for each row. The inner loop is jitted.

        Args:
            params: The component's tree.
            parents: `{parent: values}`, in the order of the node's parents.
            key: One for all rows or, for a node that does not run in every row, one a row (see `row_keys`): what a row
                draws then depends on its own key alone.

        Returns:
            A raw value for each row.
        """
        ...

    def candidates(self, params: Params, parents: Parents, number: int, key: PRNGKeyArray) -> list[list[Any]]:
        """Find distinct likely values: the intermediates of SysDPO-Sampling. By default what differs among samples.

        Args:
            params: The component's tree.
            parents: `{parent: values}`, in the order of the node's parents.
            number: How many are wanted.
            key: Of the draws.

        Returns:
            From 1 to `number` values for each row, the likeliest first if it is known.
        """
        spread = {name: [value for value in column for _ in range(number)] for name, column in parents.items()}
        values = self.sample(params, spread, key)
        return [distinct(values[start : start + number]) for start in range(0, len(values), number)]

    def sizes(self, features: Features) -> Mapping[str, Int[np.ndarray, "..."]]:
        """How long each row is; host side. Rows are stored at their own sizes, see `resize`.

        Args:
            features: Whatever axes lie before the rows' own.

        Returns:
            The lengths by axis, such as {"prompt": [batch], "completion": [batch]}; none by default.
        """
        return {}

    def resize(self, features: Features, sizes: Mapping[str, int]) -> Features:
        """Pad or cut features to other sizes; host side. `log_prob` stays the same.

        Args:
            features: As `prepare` made them.
            sizes: By axis, as `sizes` names them; every row fits in.

        Returns:
            The features in these sizes.
        """
        return features

    def padding(self, features: Features) -> float:
        """How much of the features is padding; host side.

        Args:
            features: As `prepare` made them.

        Returns:
            A share in [0, 1].
        """
        return 0.0

    def units(self, features: Features) -> Mapping[str, int]:
        """What speed is counted in, as "throughput/<unit>_per_second/<node>"; none by default. Host side.

        Args:
            features: Prepared, whatever axes lie before theirs.

        Returns:
            `{"tokens" or "images" or ...: how many there are}`.
        """
        return {}


def as_rows(tree: PyTree, axes: int) -> PyTree:
    """Every array [batch, ..., *rest] with its first `axes` axes as one of rows, those of a preference together.

    A mesh that cuts the batch cuts the rows in the same way. (The axis that `vmap` adds would be the outer one, and the
    compiler would gather the whole batch to apply a convolution.)
    """
    return jax.tree.map(lambda x: x.reshape(math.prod(x.shape[:axes]), *x.shape[axes:]), tree)


def batch_size(parents: Parents, component: str) -> int:
    """The number of rows that the parents hold. Raises `ValueError` when there is no parent to count."""
    if not parents:
        raise ValueError(f"{component} needs at least one parent to know how many rows to draw")
    return len(next(iter(parents.values())))
