"""A LangGraph program: it looks passages up, drafts an answer and improves it.

example:
  pip install langgraph langchain-openai openinference-instrumentation-langchain
  python -m experiments.traces.langgraph_program --folder traces
  sysdpo import traces/langgraph.spans.jsonl --format openinference --scores traces/langgraph.scores.jsonl ...

The scores lie in a file of their own, by the traces' ids, as a program has them that scores its runs afterwards.
"""

import json
from typing import Any, TypedDict

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openinference.instrumentation.langchain import LangChainInstrumentor

from experiments.traces.recorder import provider_of, read_flags
from experiments.traces.world import QUESTIONS, quality, retrieve


class Passages(BaseRetriever):
    """Those that share words with the query."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [Document(page_content=text) for text in retrieve(query)]


class Found(TypedDict, total=False):
    """What the program knows so far."""

    question: str
    facts: list[str]
    draft: str
    answer: str


DRAFT = ChatPromptTemplate.from_messages(
    [("system", "Answer with the help of the facts."), ("user", "Facts:\n{facts}\nQuestion: {question}")]
)
ANSWER = ChatPromptTemplate.from_messages([("user", "Question: {question}\nDraft: {draft}\nShorten the draft.")])


def program(llm: ChatOpenAI) -> Any:
    """search -> write -> finish"""
    passages = Passages()

    def search(state: Found) -> Found:
        return {"facts": [found.page_content for found in passages.invoke(state["question"])]}

    def write(state: Found) -> Found:
        chain = DRAFT | llm | StrOutputParser()
        return {"draft": chain.invoke({"facts": "\n".join(state["facts"]), "question": state["question"]})}

    def finish(state: Found) -> Found:
        return {"answer": str(llm.invoke(ANSWER.invoke(dict(state))).content).strip()}

    graph: Any = StateGraph(Found)
    graph.add_node("search", search)
    graph.add_node("write", write)
    graph.add_node("finish", finish)
    for one, other in ((START, "search"), ("search", "write"), ("write", "finish"), ("finish", END)):
        graph.add_edge(one, other)
    return graph.compile()


def main() -> None:
    """Ask every question several times."""
    given = read_flags(len(QUESTIONS))
    provider = provider_of(given.folder, "langgraph")
    LangChainInstrumentor().instrument(tracer_provider=provider)
    app = program(ChatOpenAI(model=given.model, base_url=given.url, api_key="none", temperature=0.8, max_tokens=40))
    scores = [
        quality(app.invoke({"question": question})["answer"], wanted)
        for question, wanted in QUESTIONS[: given.questions]
        for _ in range(given.samples)
    ]
    provider.shutdown()
    lines = (given.folder / "langgraph.spans.jsonl").read_text(encoding="utf-8").splitlines()
    traces = dict.fromkeys(json.loads(line)["context"]["trace_id"].removeprefix("0x") for line in lines)
    rows = [{"trace_id": trace, "score": score} for trace, score in zip(traces, scores, strict=True)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (given.folder / "langgraph.scores.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
