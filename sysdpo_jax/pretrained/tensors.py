"""Tensors on disk: safetensors files and their shards, read slice by slice, written shard by shard. Never pickle."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy, which safetensors looks up by name
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sysdpo_jax.pretrained.base import CheckpointError, read_json, write_json
from sysdpo_jax.pretrained.names import Index

SHARD_BYTES = 5 * 10**9
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Safetensors:
    """The tensors of `<stem>.safetensors` in a folder, or of the shards that `<stem>.safetensors.index.json` lists.

    variant: of the file's name, as in "model.fp16.safetensors".
    Raises `CheckpointError` for a folder without them, naming the pickle files that are there instead.
    """

    def __init__(self, folder: Path, stem: str, variant: str | None = None):
        self.where = str(folder)
        whole, index = weight_files(folder, stem, variant)
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        named = read_json(index).get("weight_map", {}).values() if index.exists() else ()
        shards = sorted({folder / name for name in named})
        if whole.exists() and shards not in ([], [whole]):
            raise CheckpointError(
                f"{folder} holds the weights twice, as {whole.name} and as the shards of {index.name}: of the two "
                "transformers reads the first, diffusers the second; remove the one that is not the model"
            )
        files = [whole] if whole.exists() else shards
        if not files:
            raise _nothing_to_read(folder, stem, whole.name)
        for file in files:
            self._list(file)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """`{name: shape}` of all of them."""
        return self._shapes

    def dtype(self, name: str) -> np.dtype:
        """The precision a tensor is stored in. Raises `CheckpointError` for one that parameters cannot have."""
        kind = self._dtypes[name]
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self._files[name]}: tensor {name!r} is stored as {kind}, which is not supported (only "
                f"{', '.join(DTYPES)}): fetch an unquantised checkpoint"
            )
        return np.dtype(DTYPES[kind])

    def read(self, name: str, index: Index) -> np.ndarray:
        """A block of a tensor; an empty index stands for the whole."""
        # Opened anew each time: the pages of a file that stays mapped would count as this process's memory.
        with safe_open(self._files[name], "numpy") as file:
            return file.get_slice(name)[index] if index else file.get_tensor(name)

    def _list(self, file: Path) -> None:
        try:
            with safe_open(file, "numpy") as opened:
                for name in opened.keys():  # noqa: SIM118  not a mapping
                    view = opened.get_slice(name)
                    self._files[name], self._shapes[name] = file, tuple(view.get_shape())
                    self._dtypes[name] = view.get_dtype()
        except FileNotFoundError:
            raise CheckpointError(f"{file} is listed by its index but missing: fetch the whole checkpoint") from None
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}): fetch it again") from None


DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_safetensors(
    folder: Path, stem: str, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write named tensors as `<stem>.safetensors`, or as shards of at most shard_bytes with their index.

    Only one shard's tensors are in memory at a time.
    """
    shards: list[tuple[Path, Sequence[str]]] = []
    waiting: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        file = folder / f"{stem}-part{len(shards)}.safetensors"
        save_file(waiting, file, metadata={"format": "pt"})
        shards.append((file, list(waiting)))
        waiting.clear()

    for name, array in tensors:
        if waiting and sum(a.nbytes for a in waiting.values()) + array.nbytes > shard_bytes:
            flush()
        waiting[name] = array
        total += array.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{stem}.safetensors")
        return
    places: dict[str, str] = {}
    for number, (file, names) in enumerate(shards, start=1):
        final = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        file.rename(folder / final)
        places |= dict.fromkeys(names, final)
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def weight_files(folder: Path, stem: str, variant: str | None) -> tuple[Path, Path]:
    """Where the weights are if they are one file, and the index of their shards if they are several."""
    middle = f".{variant}" if variant else ""
    index, older = (folder / f"{stem}.safetensors{end}.json" for end in (f".index{middle}", f"{middle}.index"))
    return folder / f"{stem}{middle}.safetensors", older if older.exists() else index


def _nothing_to_read(folder: Path, stem: str, wanted: str) -> CheckpointError:
    found = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    named = rf"{stem}\.(?:(\w+)\.safetensors|safetensors\.(?:index\.(\w+)|(\w+)\.index)\.json)"
    variants = [match[1] or match[2] or match[3] for name in found if (match := re.fullmatch(named, name))]
    if pickles and not variants:
        return CheckpointError(
            f"{folder} holds {', '.join(pickles)} but no {wanted}: pickle files can run code and are never read. Load "
            "the model once with the library that wrote it and save it with save_pretrained(safe_serialization=True)"
        )
    hint = f": pass variant={variants[0]!r}" if variants else ""
    return CheckpointError(f"{folder} has no {wanted} (it holds {', '.join(found) or 'nothing'}){hint}")
