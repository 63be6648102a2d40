"""What makes two runs the same run: what a thing was made from, and the one comparison of two such descriptions.

Learning rates and schedules are hidden inside optax functions; an experiment that wants them compared gives them as
part of its own configuration.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, PyTree, UInt32

from sysdpo_jax.errors import ConfigError
from sysdpo_jax.trees import by_path
from sysdpo_jax.user_code import is_users, name_of

# {section: {path: text}}, plain JSON.
Identity = dict[str, dict[str, str]]
# In the place of a field that a description lacks.
NOTHING = object()
# Differences that a message names, and letters of a value in it.
SHOWN, LONG = 5, 80


class CheckpointMismatchError(ValueError):
    """A checkpoint belongs to another run: the message names the differing paths with both values."""


def describe(name: str, value: Any) -> dict[str, str]:
    """`{path: text}` of a value and its fields, paths "."-joined below `name`; the same in every process.

    Dataclasses by field, mappings by key, sequences that hold such by number; numbers and strings as they are, others
    by the name of their type.
    """
    parts = _parts(value)
    if parts is None:
        return {name: _text(value)}
    kind = type(value).__name__ if dataclasses.is_dataclass(value) else f"{len(parts)} values"
    below = [describe(f"{name}.{key}", part) for key, part in parts.items()]
    return {name: kind} | {path: text for texts in below for path, text in texts.items()}


def array_types(tree: PyTree) -> dict[str, str]:
    """`{path: "float32[2,3]"}` of the leaves."""
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in by_path(tree).items()}


def fingerprints(tree: PyTree) -> dict[str, str]:
    """`{path: type and 64-bit fingerprint}` of the leaves, computed where they lie; independent of their sharding.

    Every process gets those of the whole leaves, whatever part it holds.
    """
    # One at a time: programs with collectives that do not wait for each other hang on CPUs of several processes.
    # Arrays of NumPy, as files of weights hold them, have those of the same numbers on a device.
    leaves = {path: leaf if isinstance(leaf, Array) else jnp.asarray(leaf) for path, leaf in by_path(tree).items()}
    words = {path: jax.device_get(_fingerprint_of(_whole(leaf))(leaf)) for path, leaf in leaves.items()}
    types = array_types(leaves)
    return {path: f"{types[path]} {high:08x}{low:08x}" for path, (high, low) in words.items()}


def check_same(
    what: str, noted: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str, kind: type[BaseException] = ConfigError
) -> None:
    """Raise an error of that kind where the description that `what` carries is not the wanted one.

    Args:
        what: Names the thing that belongs to a run, for the message.
        noted: How it was made.
        wanted: How it would be made now.
        remedy: What to do about it.
    """
    found = differences(noted, wanted)
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise kind(f"{what} is of another run ({'; '.join(found[:SHOWN])}{more}): {remedy}")


def differences(noted: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """All in which two descriptions differ, as "field was old, now new"; fields of nested ones are "."-joined.

    Values are what JSON makes of them: a list is a tuple. Of a value whose kind differs the fields are left out.
    """
    found, changed = list[str](), list[str]()
    for name in sorted({*noted, *wanted}):
        old, new = noted.get(name, NOTHING), wanted.get(name, NOTHING)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{line}" for line in differences(old, new)]
        elif _json(old) != _json(new) and not any(name.startswith(f"{other}.") for other in changed):
            changed.append(name)
            found.append(f"{name} was {_shown(old, new)}, now {_shown(new, old)}")
    return found


def _json(value: Any) -> str:
    return repr(value) if value is NOTHING else json.dumps(value, sort_keys=True, default=str)


def _shown(value: Any, other: Any) -> str:
    """A value beside another one: of long ones the part in which they differ."""
    if value is NOTHING:
        return "nothing"
    # Quoted where it would not be clear what is a text.
    texts = isinstance(value, str) and value and (other is NOTHING or (isinstance(other, str) and other))
    said, beside = (x if texts else repr(list(x) if isinstance(x, tuple) else x) for x in (value, other))
    if len(said) <= LONG:
        return said
    same = next((place for place, pair in enumerate(zip(said, beside, strict=False)) if len({*pair}) > 1), 0)
    start = max(0, same - LONG // 3)
    end = start + LONG
    return ("..." if start else "") + said[start:end] + ("..." if end < len(said) else "")


def as_text(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration of JSON values as `{name: text}`. Raises `TypeError` for values that JSON does not know."""
    return {name: json.dumps(value, sort_keys=True) for name, value in config.items()}


def digest(value: Any) -> str:
    """A hash of everything that a static value computes with, the same in every process.

    More than `describe` tells apart: a function by its source as well as by its name, a tokenizer by all that it holds.
    """
    return hashlib.sha256(repr(_detailed(value)).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    """All that texts and token ids depend on. Truncation and padding are settings of the last call."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        model = dict(sorted(tokenizer.get_vocab().items()))
    else:
        whole = json.loads(backend.to_str())
        model = {name: part for name, part in whole.items() if name not in ("truncation", "padding")}
    names = ("special_tokens_map", "chat_template", "model_max_length", "clean_up_tokenization_spaces")
    sides = ("padding_side", "truncation_side")
    return model, *(getattr(tokenizer, name, None) for name in (*names, *sides))


def _detailed(value: Any) -> Any:
    if hasattr(value, "get_vocab"):
        return repr(tokenizer_state(value))
    if isinstance(value, functools.partial):
        return [_detailed(value.func), _detailed(value.args), _detailed(value.keywords)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [(field, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
        counted = {f.name: _detailed(part) for f, part in parts if f.compare or hasattr(part, "get_vocab")}
        return [_source(type(value)), counted]
    if isinstance(value, Mapping):
        return {str(name): _detailed(part) for name, part in sorted(value.items(), key=lambda item: str(item[0]))}
    if isinstance(value, tuple | list):
        return [_detailed(part) for part in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_detailed(part)) for part in value)
    if isinstance(value, np.ndarray):
        return [value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if value is None or isinstance(value, bool | int | float | str | bytes | PurePath | Enum | np.dtype):
        return repr(value)
    if not callable(value):
        return type(value).__qualname__
    # What a function takes from around it, and what an object holds that is called.
    return [_source(value), [_detailed(part) for part in _around(value)]]


def _around(code: Any) -> list[Any]:
    if not is_users(code) or inspect.isclass(code):
        return []
    if inspect.ismethod(code):
        return [code.__self__, code.__func__]
    if not inspect.isfunction(code):
        return [getattr(code, "__dict__", None)]
    cells = [cell.cell_contents for cell in code.__closure__ or () if cell.cell_contents is not code]
    return [code.__defaults__, code.__kwdefaults__, *cells]


def _source(code: Any) -> list[str]:
    """The name of a function or class and, of the users', its source."""
    told = [name_of(code)]
    if is_users(code):
        # Of what was made in an interactive session, say, the name must do.
        with suppress(OSError, TypeError):
            told.append(inspect.getsource(code if inspect.isclass(code) or inspect.isroutine(code) else type(code)))
    return told


def _parts(value: Any) -> dict[str, Any] | None:
    """The values that make up a value, None for one that is described as a whole."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, tuple | list) and any(_parts(part) is not None for part in value):
        return {str(number): part for number, part in enumerate(value)}
    return None


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_text, value))})"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def _whole(leaf: Array) -> Sharding:
    placed = leaf.sharding
    return NamedSharding(placed.mesh, PartitionSpec()) if isinstance(placed, NamedSharding) else placed


@cache
def _fingerprint_of(result: Sharding) -> Callable[[Array], Array]:
    """result: where the fingerprint lies; each process can read its own copy."""
    return jax.jit(_fingerprint, out_shardings=result)


def _fingerprint(leaf: Array) -> UInt32[Array, "2"]:
    """Sums of mixed (bits, place) words modulo 2^32: additions commute, so any partition gives the same."""
    bits = leaf.astype(jnp.uint8) if leaf.dtype == jnp.bool_ else leaf
    width = np.dtype(bits.dtype).itemsize
    words = jax.lax.bitcast_convert_type(bits, {1: jnp.uint8, 2: jnp.uint16}.get(width, jnp.uint32)).astype(jnp.uint32)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    seeds = (0x9E3779B9, 0x85EBCA6B)
    return jnp.stack(
        [_mix(_mix(place * np.uint32(2) + np.uint32(1), seed) ^ words, seed).sum(dtype=jnp.uint32) for seed in seeds]
    )


def _mix(x: Array, seed: int) -> Array:
    """The finaliser of MurmurHash3, a bijection of 32-bit words that spreads every bit."""
    x = x ^ np.uint32(seed)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
