"""A program of the OpenAI client: it looks passages up, drafts an answer and improves it.

example:
  python -m experiments.traces.openai_program --folder traces
"""

import json
from typing import Any

from openai import OpenAI
from openinference.instrumentation import OITracer, TraceConfig
from openinference.instrumentation.openai import OpenAIInstrumentor

from experiments.traces.recorder import provider_of, read_flags
from experiments.traces.world import QUESTIONS, quality, retrieve

DRAFT = "Answer the question with the help of these facts.\nFacts:\n{facts}\nQuestion: {question}"
ANSWER = "Question: {question}\nDraft: {draft}\nShorten the draft to one short sentence."


def main() -> None:
    """Ask every question several times."""
    given = read_flags(len(QUESTIONS))
    provider = provider_of(given.folder, "openai")
    OpenAIInstrumentor().instrument(tracer_provider=provider)
    tracer = OITracer(provider.get_tracer("openai_program"), TraceConfig())
    client = OpenAI(base_url=given.url, api_key="none", timeout=300)
    for number, (question, wanted) in enumerate(QUESTIONS[: given.questions]):
        for sample in range(given.samples):
            seed = 100 * number + sample
            with tracer.start_as_current_span("ask", openinference_span_kind="chain") as span:
                span.set_attribute("input.value", json.dumps({"question": question}))
                span.set_attribute("input.mime_type", "application/json")
                answer = _ask(tracer, client, given.model, question, seed)
                span.set_output(answer)
                span.set_attribute("trace.annotations.0.annotation.name", "quality")
                span.set_attribute("trace.annotations.0.annotation.score", quality(answer, wanted))
                span.set_attribute("trace.annotations.0.annotation.annotator_kind", "CODE")
    provider.shutdown()


def _ask(tracer: OITracer, client: OpenAI, model: str, question: str, seed: int) -> str:
    with tracer.start_as_current_span("search", openinference_span_kind="retriever") as span:
        span.set_input(question)
        facts = retrieve(question)
        for place, fact in enumerate(facts):
            span.set_attribute(f"retrieval.documents.{place}.document.content", fact)
    made: dict[str, str] = {}
    for name, template in (("draft", DRAFT), ("answer", ANSWER)):
        with tracer.start_as_current_span(name, openinference_span_kind="chain"):
            prompt = template.format(question=question, facts="\n".join(facts), draft=made.get("draft"))
            made[name] = _complete(client, model, prompt, seed)
    return made["answer"]


def _complete(client: OpenAI, model: str, prompt: str, seed: int) -> str:
    made: Any = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0.8,
        max_tokens=40,
        seed=seed,
        # Of vLLM: the answer has the ids of its tokens and those of the prompt.
        extra_body={"return_token_ids": True},
    )
    return str(made.choices[0].message.content)


if __name__ == "__main__":
    main()
