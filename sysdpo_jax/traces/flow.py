"""Where the text of a prompt comes from: the templates that make it of the request and of earlier values."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple


class Slot(NamedTuple):
    """The place of a variable's text."""

    name: str


# Of each message its role ("" for a text that is no message), and its pieces.
Template = tuple[tuple[str, tuple[str | Slot, ...]], ...]
# Of a prompt the role and text of each message.
Contents = tuple[tuple[str, str], ...]
# Candidates that are tried.
TRIED = 8


@dataclass
class Variable:
    """What a template may have a place for, in every trace: an input, a node's value, or something made of one.

    texts: one a trace; of a retriever whose documents no prompt has shown yet None. documents: its own.
    """

    name: str
    texts: list[str] | None
    documents: list[tuple[str, ...]] | None = None
    # What else must be a node before this can be a parent.
    made_by: Any = field(default=None)


def contents_of(prompt: Any) -> Contents | None:
    """The messages of a prompt as texts; None for one with more than texts in it."""
    if isinstance(prompt, str):
        return (("", prompt),)
    if not isinstance(prompt, list) or any(set(message) != {"role", "content"} for message in prompt):
        return None
    return tuple((message["role"], message["content"]) for message in prompt)


def find_template(prompts: Sequence[Contents | None], variables: Sequence[Variable]) -> tuple[Template | None, str]:
    """The template that makes every one of the prompts of the variables' texts, or why there is none.

    Of all variables whose texts occur in every prompt as many as possible have a place in it, longer texts first.
    """
    contents = [prompt for prompt in prompts if prompt is not None]
    if len(contents) < len(prompts):
        return None, "its prompt holds tools or calls of them"
    if len({tuple(role for role, _ in prompt) for prompt in contents}) > 1:
        return None, "its prompts have different numbers of messages, or other roles"
    _show_documents(contents, variables)
    found = [variable for variable in variables if variable.texts is not None and _occurs(variable.texts, contents)]
    found.sort(key=lambda variable: -sum(map(len, variable.texts or ())))
    best, count = None, 0
    for number in range(len(found), 0, -1):
        for candidate, made in _candidates(contents, found[:number]):
            if made == len(contents):
                return candidate, ""
            best, count = (candidate, made) if made > count else (best, count)
    if best is None:
        return None, "its prompt holds nothing of the request or of earlier values"
    return None, f"one template makes {count} of its {len(contents)} prompts, and none makes all"


def slots(template: Template) -> set[str]:
    """The names of the variables that a template has a place for."""
    return {piece.name for _, pieces in template for piece in pieces if isinstance(piece, Slot)}


def written(pieces: Sequence[str | Slot]) -> str:
    """A message's pieces as `str.format` reads them."""
    return "".join(
        f"{{{piece.name}}}" if isinstance(piece, Slot) else piece.replace("{", "{{").replace("}", "}}")
        for piece in pieces
    )


def region(text: str, documents: Sequence[str]) -> str | None:
    """The part of a text from the first of its documents to the last; None where they are not there in their order."""
    first = end = -1
    for document in documents:
        place = text.find(document, max(end, 0))
        if place < 0 or not document:
            return None
        first, end = place if first < 0 else first, place + len(document)
    return text[first:end] if documents else ""


def _show_documents(contents: Sequence[Contents], variables: Sequence[Variable]) -> None:
    """The value of a retriever is its documents as the first prompt that has them in every trace puts them."""
    for variable in variables:
        if variable.texts is not None or variable.documents is None:
            continue
        found = []
        for prompt, documents in zip(contents, variable.documents, strict=True):
            regions = [region(text, documents) for _, text in prompt]
            found.append(next((one for one in regions if one is not None), None))
        if all(one is not None for one in found):
            variable.texts = [one or "" for one in found]


def _occurs(texts: Sequence[str], contents: Sequence[Contents]) -> bool:
    """Whether each text, some of which says something, is in its prompt."""
    pairs = zip(texts, contents, strict=True)
    return any(texts) and all(any(text in part for _, part in prompt) for text, prompt in pairs)


def _candidates(contents: Sequence[Contents], variables: Sequence[Variable]) -> Iterator[tuple[Template, int]]:
    """The most frequent templates that the single prompts suggest, and how many prompts each makes."""
    suggested: Counter[Template] = Counter()
    for row, prompt in enumerate(contents):
        longest = sorted(variables, key=partial(_length, row))
        suggested[tuple((role, _split(text, longest, row)) for role, text in prompt)] += 1
    named = {variable.name: variable.texts or [] for variable in variables}
    for template, _ in suggested.most_common(TRIED):
        if slots(template):
            yield template, sum(_made(template, named, row) == prompt for row, prompt in enumerate(contents))


def _length(row: int, variable: Variable) -> int:
    """Less for longer texts."""
    return -len((variable.texts or [])[row])


def _split(text: str, variables: Sequence[Variable], row: int) -> tuple[str | Slot, ...]:
    pieces: list[str | Slot] = [text]
    for variable in variables:
        value = (variable.texts or [])[row]
        cut: list[str | Slot] = []
        for piece in pieces:
            if isinstance(piece, Slot) or not value:
                cut.append(piece)
                continue
            for place, part in enumerate(piece.split(value)):
                cut += [Slot(variable.name), part] if place else [part]
        pieces = [piece for piece in cut if piece != ""]
    return tuple(pieces)


def _made(template: Template, texts: dict[str, list[str]], row: int) -> Contents:
    return tuple(
        (role, "".join(texts[piece.name][row] if isinstance(piece, Slot) else piece for piece in pieces))
        for role, pieces in template
    )
