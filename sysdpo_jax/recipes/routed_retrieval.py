"""A component and two tools of your own: a question, a retriever, a router and two language models.

    question -> passage (tool) ----------> answer (Routed: one of two language models)
    question -> kind (tool) -> route (Categorical) -^

sysdpo_jax/recipes/routed_retrieval.yaml puts them together; docs/bring_your_own.md explains them line by line.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

import sysdpo_jax as sj
from sysdpo_jax.components.chat_prompt import TextPrompt
from sysdpo_jax.typing import Features, Keys, Params, Parents

PASSAGES = (
    "a ball is round and often red",
    "a cube has six sides of the same size",
    "green things are often plants",
)


def retrieve(question: str) -> str:
    """The passage that shares the most words with the question; the first of several."""
    words = set(question.lower().split())
    return max(PASSAGES, key=lambda passage: len(words & set(passage.split())))


def kind_of(question: str) -> int:
    """What the router sees of a question: 0 for a short one, 1 for a long one."""
    return int(len(question.split()) > 3)


@dataclass(frozen=True)
class Routed(sj.Component):
    """A value of one of several components: p(value | route, parents) = p_route(value | parents).

    experts: components of the same kind of values. The node's first parent is the route, a number from 0.
    """

    experts: tuple[sj.Component, ...]

    def init(self, key: PRNGKeyArray) -> Params:
        keys = jax.random.split(key, len(self.experts))
        return {str(i): expert.init(keys[i]) for i, expert in enumerate(self.experts)}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        """The features of every row for every expert, and its route. Raises `RecordError` for an unknown route."""
        routes, rest = self._split(parents)
        experts = {str(i): expert.prepare(values, rest) for i, expert in enumerate(self.experts)}
        return {"route": routes, "experts": experts}

    def log_prob(self, params: Params, features: Features, key: Keys) -> Float[Array, "batch"]:
        """The chosen expert's. All of them are evaluated: a batch has one shape, whatever its routes."""
        every = [
            expert.log_prob(params[str(i)], features["experts"][str(i)], key) for i, expert in enumerate(self.experts)
        ]
        return jnp.take_along_axis(jnp.stack(every), features["route"][None], axis=0)[0]

    def sample(self, params: Params, parents: Parents, key: PRNGKeyArray) -> list[Any]:
        """Of each row the value that its expert draws."""
        routes, rest = self._split(parents)
        keys = jax.random.split(key, len(self.experts))
        drawn = [expert.sample(params[str(i)], rest, keys[i]) for i, expert in enumerate(self.experts)]
        return [drawn[route][row] for row, route in enumerate(routes)]

    def save(self, path: Path, params: Params) -> None:
        """What `sysdpo export` calls: a folder for each expert, which transformers loads."""
        for i, expert in enumerate(self.experts):
            sj.pretrained.save(path / str(i), expert, params[str(i)])

    def _split(self, parents: Parents) -> tuple[np.ndarray, Parents]:
        (name, routes), *rest = parents.items()
        for row, route in enumerate(routes):
            if route not in range(len(self.experts)):
                raise sj.RecordError(f"{name} in row {row} is {route!r}, not one of the {len(self.experts)} experts")
        return np.asarray(routes, np.int32), dict(rest)


def two_experts(checkpoints: tuple[str, str], **settings: Any) -> tuple[Routed, Params]:
    """The factory that the configuration names. settings: of both language models, see `pretrained.load`."""
    template = TextPrompt("{passage}\n{question}", ("question", "passage"))
    loaded = [sj.pretrained.load(path, prompt=template, **settings) for path in checkpoints]
    experts, params = zip(*loaded, strict=True)
    return Routed(experts), {str(i): tree for i, tree in enumerate(params)}
