"""Checkpoints of a run, through Orbax: what training changes, and the identity of all that it does not.

A checkpoint holds the step, trained leaves, optimiser state and average, as `{path: array}`, and the run's `Identity`.
The reference and frozen leaves are not stored, only fingerprinted: a run resumes from the same initial parameters.
"""

from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint as ocp

from sysdpo_jax.training.identity import Identity, array_types, check_same, fingerprints
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.training.sharding import by_path
from sysdpo_jax.training.state import TrainState, join, split


class Checkpoints:
    """The newest `keep` checkpoints below `directory`. Writing goes on in the background and is atomic.

    state: any state of the run, for its structure, placement, reference and frozen leaves. config: `{name: text}`.
    Use it as a context manager: leaving waits until everything is written.
    """

    def __init__(
        self,
        directory: str | Path,
        state: TrainState,
        optimizer: SystemOptimizer,
        config: dict[str, str],
        keep: int = 2,
    ):
        self._mask = optimizer.mask(state.params)
        carry, fixed = split(state, self._mask)
        self._identity: Identity = {
            "configuration": config,
            "array": array_types(carry),
            "reference": fingerprints(fixed.reference),
            "frozen": fingerprints(fixed.frozen),
        }
        self.directory = Path(directory).absolute()
        self._manager = ocp.CheckpointManager(self.directory, options=ocp.CheckpointManagerOptions(max_to_keep=keep))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None when there is none."""
        return self._manager.latest_step()

    @property
    def oldest(self) -> int:
        """The step of the oldest checkpoint, 0 when there is none."""
        return min(self._manager.all_steps(), default=0)

    def save(self, state: TrainState) -> None:
        """Write the state unless its step is the newest already. Returns once the state may be donated."""
        step = int(state.step)
        if step == self.latest:
            return
        arrays = by_path(split(state, self._mask)[0])
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), identity=ocp.args.JsonSave(self._identity))
        if not self._manager.save(step, args=items, force=True):
            raise RuntimeError(
                f"{self.directory} did not take the checkpoint of step {step}; its newest is {self.latest}"
            )

    def restore(self, state: TrainState) -> TrainState:
        """The newest checkpoint with the placement of `state`, whose reference and frozen leaves it keeps.

        Raises `CheckpointMismatchError` naming the differing paths when the checkpoint belongs to another run, and
        `FileNotFoundError` when there is none.
        """
        if self.latest is None:
            raise FileNotFoundError(f"{self.directory} holds no checkpoint")
        identity = self._manager.restore(self.latest, args=ocp.args.Composite(identity=ocp.args.JsonRestore())).identity
        check_same(identity, self._identity, f"the checkpoint {self.directory / str(self.latest)}")
        carry, fixed = split(state, self._mask)
        wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in by_path(carry).items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(wanted))
        arrays = self._manager.restore(self.latest, args=items).state
        return join(jax.tree.unflatten(jax.tree.structure(carry), [arrays[path] for path in wanted]), fixed)
