"""A comparison as HTML: whatever its values hold is shown, and nothing of it is obeyed."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sysdpo_jax.annotation.comparisons import Comparison, Side
from sysdpo_jax.components.conversations import is_messages
from sysdpo_jax.components.images import as_png
from sysdpo_jax.runs.runs_file import with_images
from sysdpo_jax.values import content


class Picture(NamedTuple):
    """Where a page finds a picture, and its size."""

    source: str
    width: int
    height: int


# What becomes of the PNG file of a picture: where the page finds it.
Placed = Callable[[bytes], str]


class Shown(NamedTuple):
    """The values of a comparison with a `Picture` in the place of each array that is one."""

    inputs: dict[str, Any]
    left: dict[str, Any]
    right: dict[str, Any]
    equal: frozenset[str]


def shown(comparison: Comparison, nodes: Sequence[str], placed: Placed) -> Shown:
    """What is shown of a comparison. nodes: all by default."""
    sides = [_opened(side) for side in (comparison.left, comparison.right)]
    outputs = [{n: v for n, v in side["outputs"].items() if not nodes or n in nodes} for side in sides]
    names = outputs[0].keys() & outputs[1].keys()
    equal = frozenset(name for name in names if content(outputs[0][name]) == content(outputs[1][name]))
    return Shown(*(_pictured(values, placed) for values in (sides[0]["inputs"], *outputs)), equal)


def asking_page(**values: Any) -> bytes:
    """The page that asks, or that says that all is answered."""
    return ENVIRONMENT.get_template("page.html.jinja").render(values).encode("utf-8", "backslashreplace")


def fragment(values: dict[str, Any]) -> str:
    """Values as HTML in one line, for pages of other tools."""
    # Half of a character has no place in a file.
    html = str(ENVIRONMENT.get_template("values.html.jinja").module.fields(values))
    return html.encode("utf-8", "backslashreplace").decode().replace("\r", "&#13;").replace("\n", "&#10;")


def _opened(side: Side) -> dict[str, Any]:
    return with_images(side.run, side.path)


def _pictured(value: Any, placed: Placed) -> Any:
    if isinstance(value, np.ndarray):
        # Written anew: a file may carry the name of what made it.
        height, width = value.shape[:2]
        return Picture(placed(as_png(value, "a picture")), width, height)
    if isinstance(value, dict):
        return {name: _pictured(item, placed) for name, item in value.items()}
    return [_pictured(item, placed) for item in value] if isinstance(value, list) else value


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_plain_list(value: Any) -> bool:
    """Whether it is a list of numbers, which takes one line."""
    return isinstance(value, list) and all(isinstance(item, int | float | None) for item in value)


ENVIRONMENT = Environment(
    loader=PackageLoader("sysdpo_jax.annotation", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TESTS: dict[str, Callable[[Any], bool]] = {
    "picture": lambda value: isinstance(value, Picture),
    "messages": is_messages,
    "conversation": lambda value: isinstance(value, dict) and is_messages(value.get("messages")),
    "plain_list": _is_plain_list,
    "listed": lambda value: isinstance(value, list),
}
ENVIRONMENT.tests |= TESTS
ENVIRONMENT.filters["as_json"] = _as_json
STYLE = Markup(Path(__file__).with_name("style.css").read_text(encoding="utf-8"))
SCRIPT = Markup(Path(__file__).with_name("keys.js").read_text(encoding="utf-8"))
