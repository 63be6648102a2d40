"""A DSPy program that writes a query, looks passages up by it, and answers a question from them.

Nothing here knows of tracing or of this library; docs/programs/dspy.md leads through its alignment.
"""

from typing import Any

import dspy

from experiments.programs.elements import retrieve
from experiments.traces.plain_adapter import Plain


class Search(dspy.Signature):
    """Write the words to look up in an encyclopedia for the question."""

    question: str = dspy.InputField()
    query: str = dspy.OutputField()


class Answer(dspy.Signature):
    """Answer the question with one word or number from the passages."""

    passages: list[str] = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Ask(dspy.Module):
    """search -> retrieve -> answer"""

    def __init__(self, search: dspy.LM, answer: dspy.LM):
        super().__init__()
        self.search = dspy.Predict(Search)
        self.search.set_lm(search)
        self.retrieve = dspy.Retrieve(k=2)
        self.answer = dspy.Predict(Answer)
        self.answer.set_lm(answer)

    def forward(self, question: str) -> Any:
        """What was looked up, what was found, and the answer."""
        query = self.search(question=question).query
        passages = self.retrieve(query).passages
        answer = self.answer(passages=passages, question=question).answer
        return dspy.Prediction(query=query, passages=passages, answer=answer)


def program(url: str, temperature: float = 0.8) -> Ask:
    """The program, whose two models a server has by the names search and answer."""
    given = {"api_base": url, "api_key": "none", "temperature": temperature, "max_tokens": 40, "cache": False}
    search, answer = (dspy.LM(f"openai/{name}", **given) for name in ("search", "answer"))
    dspy.configure(adapter=Plain(), rm=_look_up)
    return Ask(search, answer)


def _look_up(query: str, k: int, **_: Any) -> list[Any]:
    return [dspy.Example(long_text=text) for text in retrieve(query, k)]
