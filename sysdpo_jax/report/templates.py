"""The templates of this folder: those of pages escape whatever is not markup already, those of Markdown say how."""

import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """The template of this name, filled in. A value that it lacks is an error; half of a character is shown escaped."""
    return ENVIRONMENT.get_template(template).render(values).encode("utf-8", "backslashreplace").decode("utf-8")


def code(text: str) -> str:
    """A text as code in a line of Markdown, also in a cell of a table, whatever it holds."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line or not line else ""
    return f"{fence}{space}{line}{space}{fence}".replace("|", r"\|")


def fenced(text: str, language: str) -> str:
    """A text as a block of code in Markdown, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


ENVIRONMENT = Environment(
    loader=PackageLoader("sysdpo_jax.report", ""),
    autoescape=lambda name: not (name or "").endswith(".md.jinja"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ENVIRONMENT.filters |= {"code": code, "fenced": fenced}
