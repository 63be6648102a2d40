"""A DSPy program: it retrieves passages, drafts an answer and improves it.

example:
  python -m experiments.traces.dspy_program --folder traces

Its spans are written as those of the other program; dspy.jsonl has the same calls as DSPy's own objects tell them,
in the form that `sysdpo import --format dspy` reads.
"""

import json
from typing import Any

import dspy
from openinference.instrumentation import OITracer, TraceConfig
from openinference.instrumentation.dspy import DSPyInstrumentor

from experiments.traces.plain_adapter import Plain
from experiments.traces.recorder import provider_of, read_flags
from experiments.traces.world import QUESTIONS, quality, retrieve


class Draft(dspy.Signature):
    """Answer the question with the help of the passages."""

    passages: list[str] = dspy.InputField()
    question: str = dspy.InputField()
    draft: str = dspy.OutputField()


class Answer(dspy.Signature):
    """Shorten the draft to one short sentence."""

    question: str = dspy.InputField()
    draft: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Ask(dspy.Module):
    """retrieve -> draft -> answer"""

    def __init__(self) -> None:
        super().__init__()
        self.retrieve = dspy.Retrieve(k=2)
        self.draft = dspy.Predict(Draft)
        self.answer = dspy.Predict(Answer)

    def forward(self, question: str) -> Any:
        """The last prediction."""
        passages = self.retrieve(question).passages
        draft = self.draft(passages=passages, question=question).draft
        return self.answer(question=question, draft=draft)


def _look_up(query: str, k: int, **_: Any) -> list[Any]:
    return [dspy.Example(long_text=text) for text in retrieve(query, k)]


def main() -> None:
    """Ask every question several times."""
    given = read_flags(len(QUESTIONS))
    provider = provider_of(given.folder, "dspy")
    DSPyInstrumentor().instrument(tracer_provider=provider)
    tracer = OITracer(provider.get_tracer("dspy_program"), TraceConfig())
    lm = dspy.LM(
        f"openai/{given.model}", api_base=given.url, api_key="none", temperature=0.8, max_tokens=40, cache=False
    )
    dspy.configure(lm=lm, adapter=Plain(), rm=_look_up)
    program = Ask()
    with (given.folder / "dspy.jsonl").open("w", encoding="utf-8") as file:
        for question, wanted in QUESTIONS[: given.questions]:
            for _ in range(given.samples):
                lm.history.clear()
                with dspy.context(trace=[]), tracer.start_as_current_span("request") as span:
                    answer = program(question=question).answer
                    score = quality(answer, wanted)
                    span.set_attribute("openinference.span.kind", "CHAIN")
                    span.set_attribute("annotations.0.annotation.name", "quality")
                    span.set_attribute("annotations.0.annotation.score", score)
                    line = told(program, {"question": question}, {"answer": answer}, lm.history, dspy.settings.trace)
                file.write(json.dumps(line | {"scores": {"quality": score}}, default=str) + "\n")
    provider.shutdown()


def told(program: Any, inputs: Any, outputs: Any, history: Any, trace: Any) -> dict[str, Any]:
    """One call of the program: what went in and out, DSPy's trace by the predictors' names, and the LM's history."""
    names = {id(predictor): name for name, predictor in program.named_predictors()}
    steps = [
        {"predictor": names.get(id(predictor), type(predictor).__name__), "inputs": given, "outputs": dict(made)}
        for predictor, given, made in trace
    ]
    kept = ("uuid", "timestamp", "model", "prompt", "messages", "kwargs", "outputs", "usage")
    calls = [
        {name: call[name] for name in kept if name in call} | {"response": call["response"].model_dump()}
        for call in history
    ]
    return {"inputs": inputs, "outputs": outputs, "trace": steps, "history": calls}


if __name__ == "__main__":
    main()
