"""Agents, whose traces have different numbers of turns: all that a model was asked again and again is one place."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sysdpo_jax.traces.messages import output_text
from sysdpo_jax.traces.spans import LLM
from sysdpo_jax.traces.trees import Role, Tree, Turn, shape_of


def with_loops(trees: list[Tree]) -> list[Tree]:
    """The trees with turns in the place of a model that speaks several times, if more of them have one shape then."""
    most = _alike(trees)
    for role in dict.fromkeys(role for tree in trees for role in _speakers(tree)):
        folded = [_folded(tree, role) for tree in trees]
        longest = max((len(tree.turns) for tree in folded), default=0)
        # One that ended with a call of a tool before it had all turns has no end that a condition could tell.
        pairs = zip(trees, folded, strict=True)
        kept = [old if _is_cut(new) and len(new.turns) < longest else new for old, new in pairs]
        if _alike(kept) > most:
            return kept
    return trees


def told(turn: Turn) -> Any:
    """What the model is told after a turn: what its tool answered, a list of several, or "" where it called none."""
    answers = [output_text(span) for span in turn.tools]
    return answers if len(answers) > 1 else "".join(answers)


def _alike(trees: Sequence[Tree]) -> int:
    return max(Counter(map(shape_of, trees)).values(), default=0)


def _is_cut(tree: Tree) -> bool:
    return bool(tree.turns) and bool(tree.turns[-1].tools)


def _plain(role: Role) -> Role:
    """The role without the numbers of equal names."""
    return tuple(re.sub(r"#\d+$", "", part) for part in role)


def _speakers(tree: Tree) -> list[Role]:
    counts = Counter(_plain(role) for role in tree.nodes if tree.spans[role].kind == LLM)
    return [role for role, count in counts.items() if count > 1]


def _folded(tree: Tree, role: Role) -> Tree:
    """The tree whose last node is the model's, or as it is where something else than its tools follows it."""
    start = tree.nodes.index(role) if role in tree.nodes else len(tree.nodes)
    turns: list[Turn] = []
    for each in tree.nodes[start:]:
        span = tree.spans[each]
        if span.kind == LLM and _plain(each) == role:
            turns.append(Turn(span, ()))
        elif span.kind != LLM and turns:
            turns[-1] = Turn(turns[-1].model, (*turns[-1].tools, span))
        else:
            return tree
    if not turns or "" in map(told, turns[:-1]):
        return tree
    return replace(tree, nodes=tree.nodes[: start + 1], turns=tuple(turns))
