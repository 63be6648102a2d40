"""Token ids that a language model made as texts that remember them, and back."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sysdpo_jax.values import End, SampledText

# In front of ids whose text is wanted: decoders drop the space that the first token of a text begins with.
ANCHOR = "a"


class TokenizerFacts(NamedTuple):
    """What is known of a tokenizer with so many tokens.

    fingerprint: the same for tokenizers whose ids mean the same tokens, in every process and every version of
    transformers. It is made of all tokens and their ids, added ones included, and of nothing else: how a text is cut
    into tokens does not change what ids that a model made mean.
    added: the ids of all tokens that are found in a text before it is split; special: of the special ones among them.
    anchor, before: the ids of `ANCHOR`, and what they read as.
    marks_spaces: whether a space before a word changes its tokens: of a tokenizer that splits texts at spaces it does
    not.
    """

    size: int
    fingerprint: str
    added: frozenset[int]
    special: frozenset[int]
    anchor: tuple[int, ...]
    before: str
    marks_spaces: bool


_known: WeakKeyDictionary[Any, TokenizerFacts] = WeakKeyDictionary()


def facts_of(tokenizer: Any) -> TokenizerFacts:
    """What is known of the tokenizer with the tokens that it has now, for some may have been added since."""
    facts = _known.get(tokenizer)
    if facts is None or facts.size != len(tokenizer):
        facts = _known[tokenizer] = _found(tokenizer)
    return facts


def sampled_texts(tokenizer: Any, rows: Sequence[Sequence[int]], ends: Sequence[int]) -> list[SampledText]:
    """What a model made, without the end of sequence, padding and start of sequence, but with all other special tokens.

    ends: the tokens at which sampling stops; what does not end with one was cut.
    """
    if not rows:
        # Of no rows transformers gives one text.
        return []
    made = facts_of(tokenizer).fingerprint
    eos = tokenizer.eos_token_id
    how: list[End] = ["end" if row[-1] == eos else "stop" if row[-1] in ends else "cut" for row in rows]
    kept = [_shown(tokenizer, row, end) for row, end in zip(rows, how, strict=True)]
    texts = zip(_decoded(tokenizer, kept), rows, how, strict=True)
    return [SampledText(text, row, end, made) for text, row, end in texts]


def own_tokens(tokenizer: Any, text: SampledText) -> list[int] | None:
    """The ids that the text remembers where they are this tokenizer's and say that text, which may have been edited."""
    if text.tokenizer != facts_of(tokenizer).fingerprint:
        return None
    [said] = _decoded(tokenizer, [_shown(tokenizer, text.tokens, text.end)])
    return list(text.tokens) if said == text else None


def _shown(tokenizer: Any, tokens: Sequence[int], end: End) -> list[int]:
    """The tokens that belong to the text. A word that stops does; a token that is added to close a turn does not."""
    ended = end != "cut" and tokens[-1] in (*facts_of(tokenizer).added, tokenizer.eos_token_id)
    hidden = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return [token for token in (tokens[:-1] if ended else tokens) if token not in hidden]


def _decoded(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """The texts of ids within a text: a space that the first token begins with is kept where it changes the tokens."""
    facts = facts_of(tokenizer)
    anchored = [[*facts.anchor, *row] if facts.marks_spaces else [*row] for row in rows]
    texts = tokenizer.batch_decode(anchored, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [text.removeprefix(facts.before) if facts.marks_spaces else text for text in texts]


def _found(tokenizer: Any) -> TokenizerFacts:
    digest = hashlib.sha256()
    for token, place in sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])):
        digest.update(f"{place}\0{token}\0".encode("utf-8", "surrogatepass"))
    added = tokenizer.added_tokens_decoder
    special = {place for place, token in added.items() if token.special} | set(tokenizer.all_special_ids)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    anchor = ids(ANCHOR)
    before = tokenizer.decode(list(anchor), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    marks = ids(f"\n{ANCHOR}") != ids(f"\n {ANCHOR}")
    found = frozenset(added) | frozenset(special), frozenset(special), anchor, before, marks
    return TokenizerFacts(len(tokenizer), digest.hexdigest()[:32], *found)
