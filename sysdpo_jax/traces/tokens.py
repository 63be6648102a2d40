"""The tokens of recorded texts: those that a trace has, and whether the others would be the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sysdpo_jax.components.base import RecordError
from sysdpo_jax.components.prompts import closing, prompt_ids, tokenized
from sysdpo_jax.components.sampled_text import sampled_texts
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.gguf import read_gguf
from sysdpo_jax.pretrained.sources import locate
from sysdpo_jax.pretrained.tokenizer_files import read_tokenizer
from sysdpo_jax.traces.spans import Span

# Rooms for texts are whole multiples of it.
ROOM = 16


@dataclass(frozen=True)
class Tokens:
    """A node's answers with their tokens where the trace has them, and what was compared.

    ids: answers with ids that say the text; others: with ids that say another text, which are not used. same, drifted:
    answers without ids whose number of tokens is as recorded, give or take the end, or not; unknown: without a number.
    prompts_same, prompts_drifted: prompts whose ids, or whose number of them, are as recorded, or not.
    """

    values: tuple[str, ...]
    prompt_room: int
    room: int
    ids: int = 0
    others: int = 0
    same: int = 0
    drifted: int = 0
    unknown: int = 0
    prompts_same: int = 0
    prompts_drifted: int = 0

    def __str__(self) -> str:
        counted = (
            (self.ids, "answers with the ids of the trace"),
            (self.others, "answers whose ids say another text, tokenized anew"),
            (self.same, "answers without ids, of as many tokens as recorded"),
            (self.drifted, "answers without ids that drifted: another number of tokens than recorded"),
            (self.unknown, "answers without ids or a number of tokens, unchecked"),
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
        made = tokenized(tokenizer, (prompt_ids(tokenizer, span.prompt, row) for row, span in enumerate(spans)))
    except RecordError as error:
        raise ConfigError(f"the prompts of {name} do not fit its model: {error}") from None
    asked = [prompt.ids for prompt in made]
    end = closing(tokenizer) if getattr(tokenizer, "chat_template", None) else None
    ends = [tokenizer.eos_token_id, *(end.ends if end is not None else ())]
    counts = dict.fromkeys(("ids", "others", "same", "drifted", "unknown", "prompts_same", "prompts_drifted"), 0)
    values, sizes = list[str](), list[int]()
    for span, prompt in zip(spans, asked, strict=True):
        text = span.answer or ""
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        known = span.counts[0] if span.prompt_tokens is None else list(span.prompt_tokens)
        if known is not None:
            is_same = known == (prompt if span.prompt_tokens is not None else len(prompt))
            counts["prompts_same" if is_same else "prompts_drifted"] += 1
        sizes.append(max(len(own) + 1, len(span.tokens or ())))
        if span.tokens is None:
            drift = None if span.counts[1] is None else span.counts[1] - len(own)
            counts["unknown" if drift is None else "same" if drift in (0, 1) else "drifted"] += 1
        elif max(span.tokens) < len(tokenizer):
            [said] = sampled_texts(tokenizer, [span.tokens], ends)
            counts["ids" if said == text else "others"] += 1
            text = said if said == text else text
        else:
            counts["others"] += 1
        values.append(text)
    return Tokens(tuple(values), _room(max(map(len, asked))), _room(max(sizes)), **counts)


def _room(size: int) -> int:
    return -(-size // ROOM) * ROOM
