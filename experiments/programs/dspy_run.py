"""Ask the DSPy program its questions, with every run traced by openinference's package and scored.

example:
  python -m experiments.programs.dspy_run traces --questions training

FOLDER/dspy.spans.jsonl is what `sysdpo import --format openinference` reads. FOLDER/runs.jsonl has a line for each run:
question, element, wanted, query, passages, answer, and its figures, see `measured`.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from openinference.instrumentation import OITracer, TraceConfig
from openinference.instrumentation.dspy import DSPyInstrumentor

from experiments.programs.dspy_program import program
from experiments.programs.elements import Question, f1, questions, words
from experiments.traces.recorder import provider_of


def measured(question: Question, passages: list[str], answer: str) -> dict[str, float]:
    """f1: the score; right: whether the answer has what is wanted; exact: and nothing else; found: the passages do."""
    score = f1(answer, question.wanted)
    right = question.wanted.lower() in words(answer)
    return {"f1": score, "right": right, "exact": score == 1, "found": question.passage in passages}


def main() -> None:
    """Ask every question several times."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", choices=("training", "held_out"), required=True)
    parser.add_argument("--url", default="http://localhost:8011/v1")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--number", type=int, help="so many of the questions")
    given = parser.parse_args()
    provider = provider_of(given.folder, "dspy")
    DSPyInstrumentor().instrument(tracer_provider=provider)
    tracer = OITracer(provider.get_tracer("dspy_run"), TraceConfig())
    asking = program(given.url, given.temperature)

    def run(question: Question) -> dict[str, Any]:
        with tracer.start_as_current_span("request") as span:
            made = asking(question=question.text)
            figures = measured(question, made.passages, made.answer)
            span.set_attribute("openinference.span.kind", "CHAIN")
            span.set_attribute("annotations.0.annotation.name", "f1")
            span.set_attribute("annotations.0.annotation.score", figures["f1"])
        return {"question": question.text, "element": question.element, "wanted": question.wanted, **made, **figures}

    asked = [each for each in questions(given.questions)[: given.number] for _ in range(given.samples)]
    with ThreadPoolExecutor(16) as pool, (given.folder / "runs.jsonl").open("w", encoding="utf-8") as file:
        for line in pool.map(run, asked):
            file.write(f"{json.dumps(line)}\n")
    provider.shutdown()


if __name__ == "__main__":
    main()
