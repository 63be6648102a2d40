"""What a judge answers: the text of a chat completion, and the score that the text states."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from sysdpo_jax.endpoint import Again, NoCompletionError
from sysdpo_jax.errors import ConfigError, ScoreError

# What servers say of an answer that has not come to its end.
CUT = ("length", "max_tokens", "model_length")
FILTERED = ("content_filter",)
BROKEN = ("error", "abort")

# Around the reasoning that some models write before their answer. Their chat templates may have opened it already.
THINKING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\]", re.IGNORECASE)

PLAIN = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
# The whole of a line: "7", "Score: 7.5", "The final score is 7 out of 10."
LINE = re.compile(
    rf"(?:(?:(?:the|my|final|overall|total) )*(?:score|rating|grade)(?: ?(?:is|:|=))* ?)?"
    rf"({PLAIN})(?: ?(?:/|out of|of) ?({PLAIN}))?\.?",
    re.IGNORECASE,
)
LONGEST_LINE = 100
# What an answer is to have, as `JudgeConfig.answer` says.
EXPECTED = {
    "stated": 'a JSON object {"score": number}, or a last line such as "Score: 7"',
    "last_number": "a number",
}
# Markdown's signs, but not between digits, where they would be taken for something else: "4*5".
MARKDOWN = re.compile(r"(?<![0-9*_`#])[*_`#]+|(?<![*_`#])[*_`#]++(?![0-9])")
# Any number of a text. What it is out of is taken with it: "8/10", "**8** out of **10**". A sign after a digit is a
# dash: "3-4".
ANY_NUMBER = re.compile(
    r"((?:(?<![\w.,])[-+])?(?<![\w.,])(?:[0-9]+(?:[.,][0-9]+)*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
    r"(?:[\s*_]*(?:/|(?:out\s+)?of)[\s*_]*[0-9][0-9.,]*)?"
)
# Objects as lists of (name, value): a name that is there twice is seen. Texts may hold ends of lines.
DECODER = json.JSONDecoder(object_pairs_hook=list, parse_int=float, strict=False)


def text_of(completion: dict[str, Any]) -> str:
    """The text of the first choice.

    Raises `Again` where there is none by a fault of the server, `ScoreError` for an answer that was cut or has no text,
    and `NoCompletionError`.
    """
    try:
        if not completion["choices"]:
            raise _again("the judge's answer has no choices", "the answer was empty")
        choice = completion["choices"][0]
        ended, message = str(choice.get("finish_reason") or "").lower(), choice["message"]
        text = _joined(message.get("content"))
        refusal, reasoned = message.get("refusal"), message.get("reasoning_content") or message.get("reasoning")
    except (LookupError, TypeError, AttributeError):
        raise NoCompletionError from None
    if ended in BROKEN:
        raise _again(f"the server broke the answer off (finish_reason {ended!r})", "the answer was broken off")
    if ended in CUT:
        raise ScoreError(
            f"the judge's answer was cut (finish_reason {ended!r}; it ends with {_end(text)}): raise judge.max_tokens, "
            "or the server's limit, or ask for a shorter answer",
            "the answer was cut",
        )
    if ended in FILTERED or (refusal and not text):
        said = f": {_end(refusal)}" if refusal else f" (finish_reason {ended!r})"
        raise ScoreError(f"the judge's answer was withheld{said}; leave the run out", "the answer was withheld")
    if not text.strip() and reasoned:
        raise ScoreError(
            "the judge's answer has reasoning and no text: raise judge.max_tokens, or the server's limit",
            "the reasoning has no end",
        )
    return text


def _joined(content: Any) -> str:
    """The text of a content that is a text, parts, or nothing."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") in ("text", "output_text"))
    if content is not None and not isinstance(content, str):
        raise TypeError
    return content or ""


def _again(message: str, reason: str) -> Again:
    return Again(message, final=ScoreError(f"{message}: try later", reason))


@dataclass(frozen=True)
class Form:
    """How a score is asked for and found. answer, low, high: see `JudgeConfig`, `range` is (low, high)."""

    answer: Literal["stated", "last_number"]
    low: float
    high: float

    def __post_init__(self) -> None:
        if not -1e300 < self.low < self.high < 1e300:
            raise ConfigError(f"judge.range is {self.low} {self.high}: give the lowest score, then the highest one")

    @property
    def request(self) -> str:
        """What ends the question."""
        if self.answer == "last_number":
            return ""
        return (
            f"\n\nThe score is a number from {self.low:g} to {self.high:g}. End your answer with a line that is a JSON "
            'object with the score and nothing else, like {"score": ' + f"{self.low:g}" + "}."
        )

    def score(self, text: str) -> float:
        """The score that an answer states.

        Raises `ScoreError` for reasoning without an end, an answer without a score or with several, and one out of
        range.
        """
        answer = _without_thinking(text).replace("\N{MINUS SIGN}", "-")
        score = self._stated(answer) if self.answer == "stated" else _last_number(answer)
        if score is None:
            raise ScoreError(
                f"the judge's answer has no score; it ends with {_end(answer)}, expected is {EXPECTED[self.answer]}: "
                "fix the template, or see judge.answer",
                "the answer had no score",
            )
        if not self.low <= score <= self.high:
            raise ScoreError(
                f"the judge's score is {score:g}, outside of {self.low:g} to {self.high:g}: fix the template or "
                "judge.range",
                "the score was out of range",
            )
        return score

    def _stated(self, answer: str) -> float | None:
        """In JSON objects and in a last line that is a score, which must all agree."""
        found = [value for pairs in _objects(answer) for name, value in pairs if name == "score"]
        lines = (MARKDOWN.sub("", line) for line in reversed(answer.splitlines()))
        last = next((line for line in lines if line.strip()), "")
        numbers = {value if isinstance(value, float) else self._number(value) for value in found}
        # What the last line says may take an object before it back.
        if _as_line(last):
            numbers.add(self._number(last))
        return numbers.pop() if len(numbers) == 1 else None

    def _number(self, line: Any) -> float | None:
        """Of a line that is a score and nothing else; what it is out of must be the end of the range."""
        match = _as_line(line) if isinstance(line, str) else None
        if match is None or (match[2] is not None and float(match[2]) != self.high):
            return None
        return float(match[1])


def _as_line(line: str) -> re.Match[str] | None:
    return LINE.fullmatch(" ".join(line.split())) if len(line) <= LONGEST_LINE else None


def _without_thinking(text: str) -> str:
    tags = list(THINKING.finditer(text))
    if tags and "/" not in tags[-1].group():
        raise ScoreError(
            f"the judge's reasoning has no end; the answer ends with {_end(text)}: raise judge.max_tokens, or the "
            "limit of the server",
            "the reasoning has no end",
        )
    return text[tags[-1].end() :] if tags else text


def _objects(text: str) -> Iterator[list[tuple[str, Any]]]:
    """The JSON objects of a text, those within others left out."""
    place = text.find("{")
    while place >= 0:
        try:
            pairs, end = DECODER.raw_decode(text, place)
        except RecursionError:
            return
        except ValueError:
            end = place + 1
        else:
            yield pairs
        place = text.find("{", end)


def _last_number(text: str) -> float | None:
    """Commas part thousands where they can, "1,000", and are decimal points elsewhere, "8,5"."""
    found = [match[1] for match in ANY_NUMBER.finditer(text)]
    if not found:
        return None
    thousands = re.fullmatch(r"[-+]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?", found[-1])
    try:
        return float(found[-1].replace(",", "" if thousands else "."))
    except ValueError:
        return None


def _end(text: object) -> str:
    return repr(str(text)[-200:])
