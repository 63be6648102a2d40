"""The tokens of recorded texts: those that a trace has, and whether the others would be the same."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.prompts import Prompt, closing, completion_ids, following, prompt_ids, tokenized
from sysdpo_jax.components.sampled_text import facts_of, own_tokens, sampled_texts
from sysdpo_jax.components.tool_calls import tool_calls
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.gguf import read_gguf
from sysdpo_jax.pretrained.sources import locate
from sysdpo_jax.pretrained.tokenizer_files import read_tokenizer
from sysdpo_jax.traces.spans import Span, texts
from sysdpo_jax.values import SampledText

# Rooms for texts are whole multiples of it.
ROOM = 16
# What servers say of an answer that they cut at its length, and what they are told of the length.
CUT = ("length", "max_tokens", "max_output_tokens", "max_length", "model_length", "token_limit")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens")


@dataclass(frozen=True)
class Tokens:
    """A node's answers with their tokens where the trace has them, and what was compared.

    ids: answers with ids that say the text; others: with ids that say another text, which are not used. same, drifted:
    answers without ids whose number of tokens is as recorded, give or take the end, or not; unknown: without a number.
    cut: answers that were cut at their length, which get no end. lost: the rows of those whose tokens do not say their
    text, so that they would get one.
    prompts_same, prompts_drifted: prompts whose ids, or whose number of them, are as recorded, or not.
    """

    values: tuple[Any, ...]
    prompt_room: int
    room: int
    ids: int = 0
    others: int = 0
    same: int = 0
    drifted: int = 0
    unknown: int = 0
    cut: int = 0
    lost: tuple[int, ...] = ()
    prompts_same: int = 0
    prompts_drifted: int = 0

    def __str__(self) -> str:
        counted = (
            (self.ids, "answers with the ids of the trace"),
            (self.others, "answers whose ids say another text, tokenized anew"),
            (self.same, "answers without ids, of as many tokens as recorded"),
            (self.drifted, "answers without ids that drifted: another number of tokens than recorded"),
            (self.unknown, "answers without ids or a number of tokens, unchecked"),
            (self.cut, "answers that were cut at their length, and get no end"),
            (len(self.lost), "answers that were cut, whose tokens do not say their text: their runs are in no pair"),
            (self.prompts_same, "prompts with the tokens that were recorded"),
            (self.prompts_drifted, "prompts that drifted: other tokens than recorded"),
        )
        return "; ".join(f"{count} {what}" for count, what in counted if count)


def tokenizer_of(checkpoint: str, name: str) -> Any:
    """The tokenizer of a folder, a GGUF file or a name on the hub. Raises `ConfigError` naming the node."""
    try:
        path = locate(checkpoint, None, None)
        ggufs = [path] if path.is_file() else sorted(Path(path).glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            return read_gguf(ggufs[0], None)[2]
        return read_tokenizer(path)
    except (CheckpointError, FileNotFoundError) as error:
        raise ConfigError(f"--model {name}={checkpoint}: {error}") from None


def with_tokens(tokenizer: Any, name: str, spans: Sequence[Span]) -> Tokens:
    """The answers of a node's spans. Raises `ConfigError` for prompts that the tokenizer's chat template refuses."""
    try:
        prompts = tokenized(tokenizer, (prompt_ids(tokenizer, span.prompt, row) for row, span in enumerate(spans)))
    except RecordError as error:
        raise ConfigError(f"the prompts of {name} do not fit its model: {error}") from None
    asked = [prompt.ids for prompt in prompts]
    end = closing(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    ends = [tokenizer.eos_token_id, *(end.ends if end is not None else ())]
    counts = dict.fromkeys(("ids", "others", "same", "drifted", "unknown", "prompts_same", "prompts_drifted"), 0)
    cut = [row for row, span in enumerate(spans) if was_cut(span)]
    known = [row for row, span in enumerate(spans) if span.tokens is not None and max(span.tokens) < len(tokenizer)]
    made = sampled_texts(tokenizer, [spans[row].tokens or () for row in known], ends) if known else []
    said = dict(zip(known, made, strict=True))
    kept = {row: text for row, text in said.items() if _says(text, spans[row].answer)}
    own = _own(tokenizer, spans, prompts, ends, name, kept)
    begun = dict(zip(cut, _without_end(tokenizer, [(prompts[row], spans[row].answer) for row in cut]), strict=True))
    lost = tuple(row for row, text in begun.items() if text is None and row not in kept)
    ended = {row: text for row, text in begun.items() if text is not None} | kept
    values = [ended.get(row, span.answer or "") for row, span in enumerate(spans)]
    for row, span in enumerate(spans):
        recorded = span.counts[0] if span.prompt_tokens is None else list(span.prompt_tokens)
        if recorded is not None:
            is_same = recorded == (asked[row] if span.prompt_tokens is not None else len(asked[row]))
            counts["prompts_same" if is_same else "prompts_drifted"] += 1
        if span.tokens is not None:
            counts["ids" if row in kept else "others"] += 1
        elif span.counts[1] is None:
            counts["unknown"] += 1
        else:
            more = span.counts[1] - len(own[row])
            counts["same" if more == 0 or (more == 1 and row not in begun) else "drifted"] += 1
    sizes = [max(len(ids) + 1, len(span.tokens or ())) for ids, span in zip(own, spans, strict=True)]
    counts["cut"] = len(cut) - len(lost)
    return Tokens(tuple(values), _room(max(map(len, asked))), _room(max(sizes)), lost=lost, **counts)


def was_cut(span: Span) -> bool:
    """Whether an answer ended for want of room: as its server says or, where it says nothing, by its length."""
    if span.finish:
        return span.finish.rpartition(".")[2].lower() in CUT
    limit = next((span.settings[name] for name in LIMITS if isinstance(span.settings.get(name), int | float)), None)
    return limit is not None and span.counts[1] is not None and span.counts[1] >= limit


def _own(
    tokenizer: Any,
    spans: Sequence[Span],
    prompts: Sequence[Prompt],
    ends: Sequence[int],
    name: str,
    kept: Collection[int],
) -> list[list[int]]:
    """The tokens of the answers without their ends; of calls of tools as the chat template writes them, unless kept."""
    made = list(tokenizer([texts(span.answer or "") for span in spans], add_special_tokens=False)["input_ids"])
    calls = [row for row, span in enumerate(spans) if isinstance(span.answer, list) and row not in kept]
    asked = (completion_ids(tokenizer, prompts[row], spans[row].answer, ends, sys.maxsize, row) for row in calls)
    try:
        for row, said in zip(calls, tokenized(tokenizer, asked), strict=True):
            made[row] = said.ids[:-1]
    except RecordError as error:
        raise ConfigError(f"calls of tools that {name} answered do not fit its model: {error}") from None
    return made


def _says(text: str, answer: Any) -> bool:
    """Whether the text of tokens is what the trace has: the same text, or the same calls of tools."""
    if not isinstance(answer, list):
        return text == (answer or "")
    try:
        return tool_calls(text) == tool_calls(answer)
    except RecordError:
        return False


def _without_end(tokenizer: Any, rows: Sequence[tuple[Prompt, Any]]) -> list[SampledText | None]:
    """The texts behind their prompts as what a model was cut in; None for one whose tokens do not say it, and calls."""
    plain = [(prompt, text if isinstance(text, str) else "") for prompt, text in rows]
    found = tokenized(tokenizer, (following(tokenizer, prompt, text) for prompt, text in plain))
    mark = facts_of(tokenizer).fingerprint
    made = [SampledText(text, ids, "cut", mark) for (_, text), (ids, _) in zip(plain, found, strict=True)]
    return [text if text.tokens and own_tokens(tokenizer, text) is not None else None for text in made]


def _room(size: int) -> int:
    return -(-size // ROOM) * ROOM
