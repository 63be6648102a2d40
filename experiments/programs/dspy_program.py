"""A DSPy program that writes a query, looks passages up by it, and answers a question from them.

Nothing here knows of tracing or of this library; docs/programs/dspy.md leads through its alignment.
"""

from typing import Any

import dspy

from experiments.programs.elements import retrieve


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


class Plain(dspy.Adapter):
    """Instructions and fields as a small model can follow them: its answer is the one output field."""

    def format(self, signature: Any, demos: Any, inputs: Any) -> list[dict[str, Any]]:
        """A system message with the instructions, and a user's message with the fields."""
        fields = [f"{name.capitalize()}: {_text(inputs[name])}" for name in signature.input_fields]
        user = {"role": "user", "content": "\n".join(fields)}
        return [{"role": "system", "content": signature.instructions}, user]

    def parse(self, signature: Any, completion: str) -> dict[str, Any]:
        """The whole text, without space around it."""
        return {name: completion.strip() for name in signature.output_fields}


def program(url: str, temperature: float = 0.8) -> Ask:
    """The program, whose two models a server has by the names search and answer."""
    given = {"api_base": url, "api_key": "none", "temperature": temperature, "max_tokens": 40, "cache": False}
    search, answer = (dspy.LM(f"openai/{name}", **given) for name in ("search", "answer"))
    dspy.configure(adapter=Plain(), rm=_look_up)
    return Ask(search, answer)


def _look_up(query: str, k: int, **_: Any) -> list[Any]:
    return [dspy.Example(long_text=text) for text in retrieve(query, k)]


def _text(value: Any) -> str:
    return "".join(f"\n- {item}" for item in value) if isinstance(value, list) else str(value)
