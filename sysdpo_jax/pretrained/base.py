"""Reading configurations strictly: what changes the result is understood or refused by name, never guessed."""

import json
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from sysdpo_jax.errors import meant


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written: the message names the file, what is wrong and the remedy."""


REQUIRED: Any = object()

# Bookkeeping that every library writes and that never changes what a model computes.
# fmt: off
COMMON = frozenset((
    "_attn_implementation", "_attn_implementation_autoset", "_class_name", "_commit_hash", "_diffusers_version",
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "chunk_size_feed_forward", "dtype",
    "gradient_checkpointing", "id2label", "initializer_factor", "initializer_range", "label2id", "model_type",
    "output_attentions", "output_hidden_states", "output_scores", "problem_type", "return_dict", "tokenizer_class",
    "torch_dtype", "torchscript", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
))
# fmt: on


class ConfigReader:
    """One configuration file, key by key; `finish` refuses the keys that nobody asked for.

    values: the file's content. where: its name, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: str):
        self._values, self.where = dict(values), where
        self._unread = {name for name in values if name not in COMMON}

    def take(self, name: str, default: Any = REQUIRED) -> Any:
        """The key's value, or `default` where it is absent. Raises `CheckpointError` when there is neither."""
        self._unread.discard(name)
        if name in self._values:
            return self._values[name]
        if default is REQUIRED:
            raise CheckpointError(f"{self.where} has no {name!r}: the file is incomplete or of another kind of model")
        return default

    def expect_kind(self, kind: type | tuple[type, ...], *names: str) -> None:
        """Raise `CheckpointError` where one of the keys is there and its value is not of this kind; reads none."""
        for name in names:
            if name in self._values and not is_of_kind(self._values[name], kind):
                raise self.refused(name, "a value of another kind was expected")

    def refused(self, name: str, expected: str) -> CheckpointError:
        """The error for a key whose value the module here cannot have. expected: what it can."""
        return CheckpointError(f"{self.where}: {name}={_short(self._values.get(name))} is not supported, {expected}")

    def expect(self, name: str, *allowed: Any) -> None:
        """Raise `CheckpointError` unless the key is absent or has one of these values."""
        self._unread.discard(name)
        if name in self._values and self._values[name] not in allowed:
            raise CheckpointError(
                f"{self.where}: {name}={_short(self._values[name])} is not supported (only "
                f"{' or '.join(map(repr, allowed))}); this model would be computed wrongly"
            )

    def ignore(self, *names: str) -> None:
        """Mark keys that do not change what the model computes here."""
        self._unread.difference_update(names)

    def ignore_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Mark the keys still unread whose value is one of those that leave the model as it is without the key."""
        self.ignore(*(name for name in self._unread & set(neutral) if self._values[name] in neutral[name]))

    def finish(self) -> None:
        """Raise `CheckpointError` listing every key that was neither read nor ignored."""
        unread = [f"{name}={_short(self._values[name])}" for name in sorted(self._unread)]
        if unread:
            raise CheckpointError(
                f"{self.where} has keys that are not known here and may change the result: {', '.join(unread)}. Remove "
                "those that do not matter for this model, or add them to its family"
            )


def is_of_kind(value: Any, kind: type | tuple[type, ...]) -> bool:
    """isinstance, but a bool is no number."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _short(value: Any) -> str:
    """For an error's one sentence: a list of a thousand betas is cut."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def check_settings(kind: type, settings: Mapping[str, Any], made: Collection[str]) -> None:
    """Raise `TypeError` for settings that are no fields of the component. made: those that the checkpoint gives."""
    known = [field.name for field in fields(kind) if field.name not in made]
    for name in settings:
        if name not in known:
            raise TypeError(f"{kind.__name__} has no setting {name!r} ({meant(name, known)})")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError` when there is no such file or no object in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: give the folder that holds the checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds no JSON object: fetch it again")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
