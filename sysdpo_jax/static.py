"""What makes a value fit to be static in a jitted function: it can be hashed."""

from dataclasses import fields, is_dataclass
from typing import Any


def hold_tuples(instance: Any) -> None:
    """Put tuples in the place of lists in the fields of a frozen dataclass; JSON and YAML know lists alone."""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, list | tuple):
            object.__setattr__(instance, field.name, tuples(value))


def unhashable(value: Any, name: str) -> str | None:
    """The place of what keeps a value, called `name`, from being hashed, and its type; None where nothing does."""
    try:
        hash(value)
    except TypeError:
        counted = [field.name for field in fields(value) if field.compare] if is_dataclass(value) else []
        parts = [(getattr(value, field, None), f"{name}.{field}") for field in counted]
        if isinstance(value, tuple):
            parts = [(item, f"{name}[{place}]") for place, item in enumerate(value)]
        inner = (unhashable(part, where) for part, where in parts)
        return next(filter(None, inner), f"{name}, a {type(value).__name__}")
    return None


def tuples(value: Any) -> Any:
    """The value with tuples in the place of lists, at any depth."""
    # A tuple with a name for each place stays what it is.
    return tuple(map(tuples, value)) if type(value) in (list, tuple) else value
