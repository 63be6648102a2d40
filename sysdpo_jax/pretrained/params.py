"""Parameter trees from stored tensors and back, one block at a time.

Reading asks the source for just the block that a device holds, so a host never holds more than what its own devices
take and one parameter in transit. Writing hands out one tensor at a time.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from sysdpo_jax.components import Component
from sysdpo_jax.models.lora import LEAVES, is_lora, merged_kernel, strip_lora
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.gguf import GGUFTensors
from sysdpo_jax.pretrained.names import Index, Naming, Tensor, tensors_of
from sysdpo_jax.pretrained.tensors import Safetensors
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params

# What gives a block of a tensor, by its name, when it is asked for.
TensorSource = Safetensors | GGUFTensors
# From abstract parameters (anything with a shape and dtype) to a sharding for each.
Shardings = Callable[[PyTree], PyTree]


def widest_dtype(params: Params) -> str:
    """The precision that holds all leaves but LoRA's factors: who reads a file in it rounds nothing."""
    kinds = [leaf.dtype for leaf in jax.tree.leaves(strip_lora(params))]
    return str(np.dtype(reduce(jnp.promote_types, kinds)))


def load_params(
    abstract: PyTree, source: TensorSource, naming: Naming, dtype: Any = None, shardings: Shardings | None = None
) -> Params:
    """The tree of `abstract` (of `jax.eval_shape`) filled from the source.

    dtype: of the parameters, by default each as it is stored; a parameter that is stacked of layers in several
    precisions has the one that holds them all (float32 of bfloat16 and float16).
    shardings: where they go, by default the first device.
    Raises `CheckpointError` that lists every missing, unexpected and misshapen tensor at once.
    """
    leaves = by_path(abstract)
    tensors = {path: list(tensors_of(path, leaf.shape, naming)) for path, leaf in leaves.items()}
    stored = _check({path: (leaves[path].shape, parts) for path, parts in tensors.items()}, source, naming)
    found = {path: [source.dtype(stored[part.name]) for part in parts] for path, parts in tensors.items()}
    widest = {path: np.dtype(reduce(jnp.promote_types, kinds)) for path, kinds in found.items()}
    dtypes = widest if dtype is None else dict.fromkeys(widest, np.dtype(dtype))
    wanted = jax.tree.unflatten(
        jax.tree.structure(abstract),
        [jax.ShapeDtypeStruct(leaf.shape, dtypes[path]) for path, leaf in leaves.items()],
    )
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    places = jax.tree.leaves(jax.tree.map(lambda leaf: one, wanted) if shardings is None else shardings(wanted))

    def fill(path: str, place: jax.sharding.Sharding) -> Array:
        parts, shape = tensors[path], leaves[path].shape

        def block(index: Index | None) -> np.ndarray:
            bounded = tuple(slice(*i.indices(n)) for i, n in zip(index or (), shape, strict=True))
            # Cast on the host: the device never holds the stored precision beside the wanted one.
            return _block(source, stored, parts, bounded, dtypes[path])

        return jax.make_array_from_callback(shape, place, block)

    filled = [fill(path, place) for path, place in zip(leaves, places, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(abstract), filled)


def stored_tensors(params: Params, naming: Naming) -> Iterator[tuple[str, np.ndarray]]:
    """`(name, array)` of every stored tensor, one at a time. LoRA factors are merged into their kernel, layer by layer.

    A tree of adapters and base is thus written as the plain model that it computes.
    """
    leaves = by_path(params)
    for path, leaf in leaves.items():
        if is_lora(path):
            continue
        module = path.rpartition("/")[0]
        adapted = path.endswith("/kernel") and f"{module}/lora_a" in leaves
        factors = {name: leaves[f"{module}/{name}"] for name in LEAVES} if adapted else {}
        for tensor in tensors_of(path, leaf.shape, naming):
            whole = leaf if tensor.layer is None else leaf[tensor.layer]
            if factors:
                layer = {k: v if tensor.layer is None else v[tensor.layer] for k, v in factors.items()}
                whole = merged_kernel({"kernel": whole, **layer})
            yield tensor.name, tensor.to_stored(np.asarray(whole))


def changed_tensors(params: Params, source: TensorSource, naming: Naming) -> Iterator[tuple[str, np.ndarray]]:
    """`(name, array)` of the stored tensors, LoRA's factors aside, that are not those of the source.

    The source is read one tensor at a time, and compared in the parameters' precision.
    """
    present = _by_todays_name(source, naming)
    for path, leaf in by_path(strip_lora(params)).items():
        for tensor in tensors_of(path, leaf.shape, naming):
            ours = tensor.to_stored(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]))
            stored = present.get(tensor.name)
            if stored is None or not np.array_equal(source.read(stored, ()).astype(ours.dtype), ours):
                yield tensor.name, ours


def check_params(component: Component, params: Params) -> None:
    """Raise `CheckpointError` when a tree, LoRA's leaves aside, is not that of the component."""
    if not isinstance(params, Mapping) or not all(isinstance(key, str) for key in params):
        raise CheckpointError(f"parameters are one component's tree of arrays, not {type(params).__name__}")
    abstract = jax.eval_shape(component.init, jax.random.key(0))
    wanted, found = (
        {path: leaf.shape for path, leaf in by_path(tree).items()} for tree in (abstract, strip_lora(params))
    )
    differing = [path for path in sorted(wanted.keys() | found.keys()) if wanted.get(path) != found.get(path)]
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"these parameters are not the component's: {len(differing)} arrays differ, such as {first} (expected "
            f"{wanted.get(first, 'none')}, given {found.get(first, 'none')}). Pass one component's tree, as in "
            "state.params['name']"
        )


def _check(
    tensors: Mapping[str, tuple[tuple[int, ...], list[Tensor]]], source: TensorSource, naming: Naming
) -> dict[str, str]:
    """`{our name of a tensor: its name in the source}`."""
    present = _by_todays_name(source, naming)
    missing, misshapen, wanted = [], [], set()
    for shape, parts in tensors.values():
        for tensor in parts:
            wanted.add(tensor.name)
            expected = tensor.shape(shape if tensor.layer is None else shape[1:])
            if tensor.name not in present:
                missing.append(f"{tensor.name} {list(expected)}")
            elif source.shapes[present[tensor.name]] != expected:
                found = list(source.shapes[present[tensor.name]])
                misshapen.append(f"{tensor.name}: the configuration says {list(expected)}, the file {found}")
    known = wanted | {copy for copy, _ in naming.copies}
    extra = [name for name in present if name not in known and not re.search(naming.ignored or "(?!)", name)]
    for copy, original in naming.copies:
        if copy in present and original in present and not _equal(source, present[copy], present[original]):
            misshapen.append(f"{copy}: the configuration ties it to {original}, but they differ")
    problems = [("missing", missing), ("unexpected", extra), ("misshapen", misshapen)]
    lines = [f"  {kind}: {item}" for kind, items in problems for item in sorted(items)]
    if any("lora_" in name for name in extra):
        raise CheckpointError(
            f"{source.where}: the weights hold the factors of an adapter beside the kernels they adapt "
            f"({next(name for name in extra if 'lora_' in name)}): merge them with the library that wrote them "
            "(merge_and_unload in peft, fuse_lora in diffusers) and save_pretrained again"
        )
    for name in sorted(present.keys() & wanted):
        # First, as quantised weights also have other shapes and scales beside them, which are not the cause.
        source.dtype(present[name])
    if lines:
        raise CheckpointError(
            "\n".join([f"{source.where}: {len(lines)} tensors do not fit the configuration beside it:", *lines])
        )
    return present


def _by_todays_name(source: TensorSource, naming: Naming) -> dict[str, str]:
    present: dict[str, str] = {}
    for stored in source.shapes:
        name = stored
        for pattern, replacement in naming.aliases:
            name = re.sub(pattern, replacement, name)
        present[name] = stored
    for copy, original in naming.copies:
        if copy in present and original not in present:
            present[original] = present.pop(copy)
    return present


def _equal(source: TensorSource, first: str, second: str, rows: int = 4096) -> bool:
    """Compared a few rows at a time: these are embeddings, the largest tensors there are."""
    shape = source.shapes[first]
    if shape != source.shapes[second]:
        return False
    rest = (slice(None),) * (len(shape) - 1)
    blocks = [(slice(start, min(start + rows, shape[0])), *rest) for start in range(0, shape[0], rows)]
    return all(np.array_equal(source.read(first, block), source.read(second, block)) for block in blocks)


def _block(
    source: TensorSource, stored: Mapping[str, str], parts: list[Tensor], index: Index, dtype: np.dtype
) -> np.ndarray:
    if parts[0].layer is None:
        [tensor] = parts
        return tensor.to_ours(source.read(stored[tensor.name], tensor.index(index))).astype(dtype, copy=False)
    layers = parts[index[0]]
    made: np.ndarray | None = None
    for place, tensor in enumerate(layers):
        # Layer by layer: each may be stored in a precision of its own.
        layer = tensor.to_ours(source.read(stored[tensor.name], tensor.index(index[1:])))
        if made is None:
            made = np.empty((len(layers), *layer.shape), dtype)
        made[place] = layer
    assert made is not None
    return made
