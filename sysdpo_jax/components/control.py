"""What decides which nodes run: a choice among branches, and the turns of a loop."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from sysdpo_jax.components.deterministic import Deterministic
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Keys, Params, Parents
from sysdpo_jax.values import content


@dataclass(frozen=True)
class Switch(Deterministic):
    """The value of the branch that the first parent chooses: the branches are the other parents, one for each case.

    What only branches read runs where such a branch is chosen, and nowhere else.

    Args:
        cases: The values of the first parent, in the order of the branches: whole numbers, texts, booleans.

    Raises:
        ValueError: Where there is no case, or one of them twice.
    """

    cases: tuple[Hashable, ...]

    def __post_init__(self) -> None:
        hold_tuples(self)
        if not self.cases or len(set(map(content, self.cases))) < len(self.cases):
            raise ValueError(f"Switch: the cases {self.cases!r} must be one or more values, each of them once")

    def branch(self, value: Any) -> int:
        """Which branch a value of the first parent chooses.

        Args:
            value: Of the first parent.

        Returns:
            The branch's number, from 0.

        Raises:
            ToolError: For a value that is no case.
        """
        try:
            return [content(case) for case in self.cases].index(content(value))
        except (ValueError, TypeError):
            cases = ", ".join(map(repr, self.cases))
            raise ToolError(f"{value!r} is none of the cases {cases}: choose one of them", refused=True) from None

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        rows = zip(*parents.values(), strict=True)
        return [row[1 + self.branch(row[0])] for row in rows]


@dataclass(frozen=True)
class Turns(Deterministic):
    """The turns of a loop, as `Loop` makes it: a list of `{body node: value}`.

    Args:
        turns: How many there are at most.
        until: Whether a turn is the last one; None for a loop that always has all of them.

    Raises:
        ValueError: For no turn, or a condition that cannot be called.
    """

    turns: int
    until: Callable[[Mapping[str, Any]], bool] | None = None

    def __post_init__(self) -> None:
        if self.turns < 1:
            raise ValueError(f"Loop: turns {self.turns} must be at least 1")
        if not (self.until is None or callable(self.until)):
            raise ValueError(f"Loop: until is {self.until!r}, which cannot be called: give a function of a turn")

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        raise NotImplementedError("a loop is sampled by its system")
