"""From our parameter paths to Hugging Face's tensor names, by rule.

Our modules carry the names of PyTorch's, so one rule serves every family: "/" is ".", a trailing "_3" of a name is a
list member ".3", a `kernel` or `embedding` is a `weight`. A family adds only what differs, as regular expressions.
A kernel is stored transposed: dense [in, out] as [out, in], convolution [h, w, in, out] as [out, in, h, w].
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

Index = tuple[slice, ...]
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Naming:
    """What one kind of model adds to the general rule.

    rename: (regex, replacement) pairs applied in order to the dotted name.
    stacked: name of the lists whose members we keep stacked on a leading axis, or None.
    pointwise: regex of the dense kernels that are stored as 1 x 1 convolutions, or None.
    aliases: (regex, replacement) pairs from tensor names of old checkpoints to today's.
    ignored: regex of stored tensors that hold nothing a model learns, or None.
    copies: (name, original) pairs of tensors that a file may hold beside the original they are tied to; not written.
    """

    rename: Pairs = ()
    stacked: str | None = None
    pointwise: str | None = None
    aliases: Pairs = ()
    ignored: str | None = None
    copies: Pairs = ()


@dataclass(frozen=True)
class Tensor:
    """One stored tensor, a whole parameter or one layer of a stacked one.

    axes: stored axis of each of ours. trailing: stored axes of size 1 that we do not have.
    layer: its place on our leading axis, None when the parameter is not stacked.
    """

    name: str
    axes: tuple[int, ...]
    trailing: int = 0
    layer: int | None = None

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of a parameter (or a layer of one) of our shape."""
        stored = dict(zip(self.axes, ours, strict=True))
        return tuple(stored[axis] for axis in range(len(ours))) + (1,) * self.trailing

    def index(self, ours: Index) -> Index:
        """Where a block of our parameter (without its layer axis) lies in the stored tensor."""
        stored = dict(zip(self.axes, ours, strict=True))
        return tuple(stored[axis] for axis in range(len(ours))) + (slice(0, 1),) * self.trailing

    def to_ours(self, block: np.ndarray) -> np.ndarray:
        """A stored block in our layout."""
        return block.reshape(block.shape[: len(self.axes)]).transpose(self.axes)

    def to_stored(self, block: np.ndarray) -> np.ndarray:
        """The whole of our parameter, or of one layer of it, as it is stored; contiguous."""
        back = np.ascontiguousarray(block.transpose(np.argsort(self.axes)))
        return back.reshape(back.shape + (1,) * self.trailing)


def tensor_name(path: str, naming: Naming) -> str:
    """The stored name of the module or parameter at a "/"-joined path; "{layer}" stands for the place in a stack."""
    *modules, leaf = path.split("/")
    if naming.stacked in modules:
        modules.insert(modules.index(naming.stacked) + 1, "{layer}")
    listed = [re.sub(r"_(\d+)$", r".\1", name) for name in modules]
    name = ".".join([*listed, "weight" if leaf in ("kernel", "embedding") else re.sub(r"_(\d+)$", r".\1", leaf)])
    for pattern, replacement in naming.rename:
        name = re.sub(pattern, replacement, name)
    return name


def tensors_of(path: str, shape: tuple[int, ...], naming: Naming) -> Iterator[Tensor]:
    """The stored tensors that make up the parameter of that path and shape."""
    name = tensor_name(path, naming)
    stacked = naming.stacked in path.split("/")
    ndim = len(shape) - stacked
    axes, trailing = tuple(range(ndim)), 0
    if path.endswith("/kernel") or path == "kernel":
        axes = {2: (1, 0), 4: (2, 3, 1, 0)}[ndim]
        if naming.pointwise and ndim == 2 and re.search(naming.pointwise, name):
            trailing = 2
    if not stacked:
        yield Tensor(name, axes, trailing)
        return
    for layer in range(shape[0]):
        yield Tensor(name.format(layer=layer), axes, trailing, layer)
