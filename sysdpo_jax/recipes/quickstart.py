"""The judge of docs/quickstart.md: a short answer is a good answer."""

from collections.abc import Mapping
from typing import Any


def brevity(run: Mapping[str, Any]) -> float:
    """1 for an answer of one word, 0.5 of two, and so on; 0 for none."""
    words = len(run["answer"].split())
    return 1 / words if words else 0.0
