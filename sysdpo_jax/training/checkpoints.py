"""Checkpoints of a run, through Orbax: what training changes, and the identity of all that it does not.

A checkpoint holds the step, trained leaves, optimiser state and average, as `{path: array}`, their fingerprints, and
the run's `Identity`. The reference and frozen leaves are not stored, only fingerprinted: a run resumes from the same
initial parameters. The step is the whole state of the input pipeline too, as every batch is a function of it; the
random key is part of the identity, because a step's key is folded from it and the step.

Arrays are copied to the host, then written in the background into a folder of another name, which is renamed when it is
complete: a process that is killed leaves the older checkpoints and nothing else that counts.
"""

import json
import logging
import math
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils

from sysdpo_jax.io import write_json
from sysdpo_jax.manifest import CheckpointMismatchError, Identity, array_types, check_same, fingerprints
from sysdpo_jax.training.progress import tell
from sysdpo_jax.training.state import TrainState
from sysdpo_jax.trees import by_path

# What Orbax warns of, and is meant: saving before the evaluation has its figure, looking at a run from outside.
EXPECTED = ("Requested `tracked_metric`", "CheckpointManagerOptions.read_only=True", "Given directory is read only")

# Of all the runs of a process.
ONE_SAVE = threading.Lock()

# The name of a metric, and which of its values is the best.
Best = tuple[str, Literal["min", "max"]]

ARRAYS, ABOUT = "state", "about"


class CorruptCheckpointError(RuntimeError):
    """A checkpoint cannot be read or is not what was written: the message names its path and the reason."""


class CheckpointWriteError(OSError):
    """A checkpoint cannot be written: the message names its step and folder, the reason, and what is left to use."""


class Checkpoints:
    """The newest `keep` checkpoints below `directory` and the best one, of equal ones the newest.

    Use it as a context manager: leaving waits until everything is written. Partial checkpoints that it finds are
    renamed to `<step>.corrupt-<number>` with a warning, and so are damaged ones by `restore`; not if it only reads.

    Args:
        directory: Of the checkpoints.
        state: Any state of the run, for its structure, placement, reference and frozen leaves.
        config: `{path: text}`, which a checkpoint must agree with.
        keep: How many of the newest.
        best: By which metric of `save`; None keeps no best one.
        read_only: To look at the checkpoints of a run that may be writing them now; of `config` it compares what it is
            given alone.

    Raises:
        FileNotFoundError: With read_only, if there is no directory.
        ValueError: For a keep below 1.
    """

    def __init__(
        self,
        directory: str | Path,
        state: TrainState,
        config: dict[str, str],
        keep: int = 2,
        best: Best | None = None,
        read_only: bool = False,
    ):
        if keep < 1:
            raise ValueError(f"keep {keep} must be at least 1: the newest checkpoint is what a run resumes from")
        self._identity: Identity = {
            "configuration": config,
            "array": array_types(state.mutable),
            "reference": fingerprints(state.reference),
            "frozen": fingerprints(state.frozen),
        }
        self.directory, self._keep, self._best = Path(directory).absolute(), keep, best
        self._read_only = read_only
        if read_only and not self.directory.is_dir():
            raise FileNotFoundError(f"{self.directory} does not exist: the run has saved nothing yet")
        if jax.process_index() == 0 and not read_only:
            self._set_partial_aside()
        multihost_utils.sync_global_devices("sysdpo_jax: partial checkpoints are set aside")
        # Importing it takes half as long as the rest of the library.
        from orbax.checkpoint import CheckpointManager

        self._manager = CheckpointManager(self.directory, options=_options(keep, best, read_only))
        # The step that the background is writing, None when it has written all.
        self._writing: int | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            # Orbax reports an error once: then it closes.
            with self._reported(self._writing), closing(self._manager):
                self._manager.wait_until_finished()
        except CheckpointWriteError as problem:
            if error is None:
                raise
            # What ended the block matters more.
            tell(f"warning: {problem}")
        if error is not None and not self._read_only and jax.process_index() == 0:
            # Where nothing was saved, what ended the block leaves nothing behind.
            with suppress(OSError):
                self.directory.rmdir()

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, None when there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the checkpoint with the best metric, None when no checkpoint has one."""
        return None if self._best is None else self._manager.best_step()

    @property
    def oldest(self) -> int:
        """The step of the oldest of the newest `keep` checkpoints, 0 when there is none."""
        return min(sorted(self._manager.all_steps())[-self._keep :], default=0)

    @property
    def set_aside(self) -> tuple[Path, ...]:
        """Where the checkpoints are that could not be used."""
        return tuple(sorted(self.directory.glob("*.corrupt-*")))

    def _set_partial_aside(self) -> None:
        """Of what a kill left of a checkpoint that newer ones had replaced the deletion is finished."""
        paths = sorted((path for path in self.directory.glob("*") if path.name.isdigit()), key=lambda p: int(p.name))
        whole = 0
        for path in reversed(paths):
            problem = _missing(path)
            if problem is None:
                whole += 1
            elif self._best is None and whole >= self._keep:
                shutil.rmtree(path)
            else:
                _set_aside(path, problem)

    def save(self, state: TrainState, metric: float | None = None) -> None:
        """Write the state unless its step is the newest already. Returns once the state may be donated.

        Args:
            state: Of the run.
            metric: The value of `best`'s metric; one that is not finite is none.

        Raises:
            CheckpointWriteError: Where this checkpoint, or the one before it, which was still being written, cannot be
                written.
            RuntimeError: Where Orbax does not take it.
        """
        self.wait()
        step = int(state.step)
        if step == self.latest:
            return
        about = {"identity": self._identity, "fingerprints": fingerprints(state.mutable)}
        from orbax.checkpoint import args

        items = {ARRAYS: args.StandardSave(by_path(state.mutable)), ABOUT: args.JsonSave(about)}
        metrics = {self._best[0]: metric} if self._best and metric is not None and math.isfinite(metric) else None
        with self._reported(step), ONE_SAVE:
            taken = self._manager.save(step, args=args.Composite(**items), metrics=metrics, force=True)
            if threading.current_thread() is not threading.main_thread():
                # Orbax numbers the saves of a process, and a save waits for signs of its number: of two that overlap,
                # as those of runs side by side, one would wait for the other's.
                self._manager.wait_until_finished()
        if not taken:
            raise RuntimeError(
                f"{self.directory} did not take the checkpoint of step {step}; its newest is {self.latest}"
            )
        self._writing = step

    def wait(self) -> None:
        """Return once all checkpoints are on disk. Raises `CheckpointWriteError` where one cannot be written."""
        step, self._writing = self._writing, None
        with self._reported(step):
            self._manager.wait_until_finished()

    def grade(self, step: int, metric: float) -> None:
        """Give the newest checkpoint, once it is written, the value of `best`'s metric, in the place of any before it.

        For a figure that is measured when the state is safe already. Process 0's counts.

        Args:
            step: Of the newest checkpoint.
            metric: The value.

        Raises:
            ValueError: For another step, or where there is no `best`.
        """
        if self._best is None or step != self.latest:
            raise ValueError(f"step {step} cannot be graded: the newest checkpoint is {self.latest}, best {self._best}")
        self.wait()
        if jax.process_index() == 0:
            # Where and as Orbax writes the metrics of a save.
            write_json(self.directory / str(step) / "metrics" / "metrics", {self._best[0]: metric})
        multihost_utils.sync_global_devices("sysdpo_jax: the newest checkpoint is graded")
        self._manager.reload()

    def restore(self, state: TrainState, step: int | None = None) -> TrainState:
        """Read a checkpoint.

        The placement may be another than that of the run which saved it, on other devices or processes. On several
        processes the one that meets damage sets it aside and raises `CorruptCheckpointError`, because the others wait
        for it in the middle of reading: start all of them again, and they use the one before.

        Args:
            state: For the placement; its reference and frozen leaves are kept.
            step: None for the newest that can be read; damaged ones are set aside with a warning, once another is read.
                Of a run that is only read it is the newest.

        Returns:
            The state of that step.

        Raises:
            CheckpointMismatchError: Naming the differing fields, when the checkpoint belongs to another run.
            FileNotFoundError: When there is none.
            CorruptCheckpointError: When `step` is damaged or none is left.
        """
        if step is not None:
            return self._read(state, step)
        if self._read_only and self.latest is not None:
            return self._read(state, self.latest)
        damaged: dict[int, str] = {}
        for newest in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(state, newest)
            except CorruptCheckpointError as error:
                if jax.process_count() > 1:
                    _set_aside(self.directory / str(newest), str(error))
                    raise
                damaged[newest] = str(error)
                continue
            for other, problem in damaged.items():
                _set_aside(self.directory / str(other), problem)
            if damaged:
                self._manager.reload()
            return restored
        if damaged or self.set_aside:
            names = [*map(str, damaged), *(path.name for path in self.set_aside)]
            raise CorruptCheckpointError(
                f"{self.directory} has no checkpoint that can be used, {', '.join(names)} are damaged: fix one and "
                "give it its number as name, or train in another directory"
                + "".join(f"\n  {problem}" for problem in damaged.values())
            )
        raise FileNotFoundError(f"{self.directory} holds no checkpoint")

    @contextmanager
    def _reported(self, step: int | None) -> Iterator[None]:
        """What Orbax and TensorStore raise while they write the step, as `CheckpointWriteError`."""
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:
                # Orbax may count the step that failed.
                with suppress(OSError):
                    self._manager.reload()
            newest = "there is none to go on from" if self.latest is None else f"the newest is {self.latest}"
            raise CheckpointWriteError(
                f"{self.directory} does not take the checkpoint of step {step} ({_first_line(error)}); {newest}: make "
                "room for it, then give the same command again"
            ) from error

    def _read(self, state: TrainState, step: int) -> TrainState:
        from orbax.checkpoint import args

        path = self.directory / str(step)
        with _reading(path):
            about = self._manager.restore(step, args=args.Composite(**{ABOUT: args.JsonRestore()}))[ABOUT]
            identity, saved = about["identity"], about["fingerprints"]
        if self._read_only:
            known = self._identity["configuration"]
            identity["configuration"] = {name: identity["configuration"].get(name, "nothing") for name in known}
        remedy = "choose another directory, or restore what differs"
        check_same(f"the checkpoint {path}", identity, self._identity, remedy, CheckpointMismatchError)
        mutable = by_path(state.mutable)
        wanted = {p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in mutable.items()}
        with _reading(path):
            items = args.Composite(**{ARRAYS: args.StandardRestore(wanted)})
            arrays = self._manager.restore(step, args=items)[ARRAYS]
        restored = jax.tree.unflatten(jax.tree.structure(state.mutable), [arrays[name] for name in wanted])
        changed = [name for name, text in fingerprints(restored).items() if saved.get(name) != text]
        if changed:
            raise CorruptCheckpointError(f"{path}: the array {changed[0]} is not the one that was saved")
        return state.after(restored)


def _options(keep: int, best: Best | None, read_only: bool) -> Any:
    """Orbax's `CheckpointManagerOptions`."""
    from orbax.checkpoint import CheckpointManagerOptions
    from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

    # What a killed run left half-written is removed.
    writes = not read_only
    options: dict[str, Any] = {"read_only": read_only, "create": writes, "cleanup_tmp_directories": writes}
    kept: list[Any] = [LatestN(keep)]
    if best is not None:
        name, mode = best

        def value(metrics: dict[str, float]) -> float:
            # Of an earlier start with another metric nothing is known.
            return metrics.get(name, -math.inf if mode == "max" else math.inf)

        kept.append(BestN(get_metric_fn=value, reverse=mode == "min", n=1, keep_checkpoints_without_metrics=False))
        options |= {"best_fn": value, "best_mode": mode}
    return CheckpointManagerOptions(preservation_policy=AnyPreservationPolicy(kept), **options)


def _missing(path: Path) -> str | None:
    """Why a folder is not a whole checkpoint, None when it has all its parts."""
    if not (path / ARRAYS).is_dir():
        return f"its folder {ARRAYS} is missing"
    # The second one is there where `best` is.
    for name in (f"{ABOUT}/metadata", "metrics/metrics"):
        try:
            json.loads((path / name).read_text(encoding="utf-8"))
        except ValueError as error:
            return f"its file {name} is not JSON: {error}"
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            if name.startswith(ABOUT):
                return f"its file {name} is missing"
    return None


def _set_aside(path: Path, problem: str) -> None:
    if not path.exists():
        # Another process was faster.
        return
    names = (path.with_name(f"{path.name}.corrupt-{number}") for number in count(1))
    target = next(name for name in names if not name.exists())
    path.rename(target)
    warnings.warn(f"the checkpoint {path} cannot be used and is now {target}: {problem}", stacklevel=3)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What Orbax and TensorStore raise for a damaged checkpoint, as `CorruptCheckpointError`."""
    try:
        yield
    except Exception as error:
        # Orbax wraps what TensorStore says of a file in a plain Exception.
        cause = error.__cause__ if type(error) is Exception else error
        # Other errors, such as of memory or rights, are no damage.
        if not isinstance(cause, KeyError | ValueError | TypeError | FileNotFoundError | NotADirectoryError):
            raise
        raise CorruptCheckpointError(f"{path} cannot be read: {_first_line(cause)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


logging.getLogger("absl").addFilter(lambda record: not str(record.msg).startswith(EXPECTED))
