"""A language model whose texts a server samples, with the very weights that are trained, held to what they compute.

The server computes log p(token) by other kernels, perhaps in another precision. Pairs are made of what it samples and
the loss is of what the trainer computes, so that a gap between the two (train-inference mismatch) is a bias that no
figure of training shows. It is measured in every call that samples, and a gap above a bound stops the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from sysdpo_jax.components.base import Component, LogProbs, batch_size
from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.components.sampled_text import sampled_texts
from sysdpo_jax.decoding import batches
from sysdpo_jax.graph import CompoundSystem
from sysdpo_jax.keys import row_keys
from sysdpo_jax.serving.engines import Sampled, Settings
from sysdpo_jax.serving.handover import Handover
from sysdpo_jax.serving.server import ServingError
from sysdpo_jax.typing import Features, Keys, Params, Parents
from sysdpo_jax.values import SampledText

# Texts of a call that are compared. All of them would be one more pass of the model over every text, and what makes a
# server differ (other weights, another precision) is the same in all.
COMPARED = 16
# Nats a token: bfloat16 on both sides is a fifth of it apart, another model at least some tenths.
MAX_GAP = 0.05


class MismatchError(ServingError):
    """A server's log-probabilities are not the trainer's: says how far apart they are, and the remedies."""


@dataclass(frozen=True)
class ServedModel(Component):
    """A language model that a server samples for; everything else is the model's own.

    Args:
        model: What is trained.
        handover: Gives the server the parameters, and asks it.
        max_gap: Largest mean difference between the server's and the model's own log-probabilities of the sampled
            tokens, in nats a token, of those texts of a call of `sample` that are compared.
    """

    model: LanguageModel
    handover: Handover = field(compare=False)
    max_gap: float = field(default=MAX_GAP, compare=False)

    @property
    def row_by_row(self) -> bool:
        return True

    def init(self, key: PRNGKeyArray) -> Params:
        return self.model.init(key)

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        return self.model.prepare(values, parents)

    @property
    def prepared_by(self) -> Any:
        return self.model.prepared_by

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        return self.model.log_prob(params, features, key)

    def candidates(self, params: Params, parents: Parents, number: int, key: PRNGKeyArray) -> list[list[Any]]:
        """Of the model itself: no server searches as it does."""
        return self.model.candidates(params, parents, number, key)

    def sample(self, params: Params, parents: Parents, key: PRNGKeyArray) -> list[Any]:
        """One `SampledText` for each row, with the tokens that the server made.

        Args:
            params: The model's, which are handed over where the server does not have them.
            parents: `{parent: values}`.
            key: Each row has a seed of its own from it.

        Returns:
            The texts.

        Raises:
            MismatchError: The server's log-probabilities are further from the model's than `max_gap`.
            ServingError: The server fails, or ends a text where the model does not.
        """
        if not batch_size(parents, "ServedModel"):
            return []
        prompts, lengths = self.model.prompt_tokens(parents)
        rows = [row[:length].tolist() for row, length in zip(prompts, lengths, strict=True)]
        seeds = np.asarray(jax.vmap(partial(jax.random.bits, dtype="uint32"))(row_keys(key, len(rows)))) >> 1
        settings = Settings(self.model.max_new_tokens, self.model.temperature, self.model.top_p, tuple(self.model.ends))
        made = self.handover.ask(
            self.model, params, [(row, int(seed)) for row, seed in zip(rows, seeds, strict=True)], settings
        )
        self._check_ends(made)
        texts = sampled_texts(self.model.tokenizer, [one.tokens for one in made], self.model.ends)
        # Spread over the call, in which the texts of a prompt are neighbours.
        number = min(len(made), COMPARED)
        some = [place * len(made) // number for place in range(number)]
        of_these = {name: [values[row] for row in some] for name, values in parents.items()}
        self._check_gap(params, of_these, [texts[row] for row in some], [made[row] for row in some])
        return list(texts)

    def _check_ends(self, made: Sequence[Sampled]) -> None:
        for one in made:
            if one.stopped and one.tokens[-1] not in self.model.ends:
                raise ServingError(
                    f"{self.handover.server.shown} ended a text at the token {one.tokens[-1]}, which is no end of "
                    f"the model ({', '.join(map(str, self.model.ends))}): give the model stop_tokens that hold it, or "
                    "start the server without the generation_config.json that names it"
                )

    def _check_gap(
        self, params: Params, parents: Parents, texts: Sequence[SampledText], made: Sequence[Sampled]
    ) -> None:
        """Compare, and note how far apart the two are. Raises `MismatchError`."""
        own, mask = self._own(params, parents, texts)
        counts = [len(one.log_probs) for one in made]
        if mask.sum(1).tolist() != counts:
            raise MismatchError(
                f"{self.handover.server.shown} says the log-probabilities of {sum(counts)} tokens, the texts have "
                f"{int(mask.sum())}: its tokenizer is not the model's; serve what `sysdpo export` wrote"
            )
        theirs = np.zeros(own.shape)
        for row, one in enumerate(made):
            theirs[row, : len(one.log_probs)] = one.log_probs
        gaps = np.abs(own - theirs)[mask]
        # An empty text has no token, and so no gap.
        gap, worst = (float(gaps.mean()), float(gaps.max())) if gaps.size else (0.0, 0.0)
        self.handover.note(gap, worst, gaps.size)
        if not gap <= self.max_gap:
            raise MismatchError(
                f"{self.handover.server.shown} and the model differ by {gap:.3g} nats a token on {gaps.size} tokens "
                f"(at most {worst:.3g}), above max_gap {self.max_gap:g}: serve the model that the run starts "
                "from in the precision of its dtype and without quantisation, or raise max_gap"
            )

    def _own(
        self, params: Params, parents: Parents, texts: Sequence[SampledText]
    ) -> tuple[Float[np.ndarray, "rows tokens"], np.ndarray]:
        """The model's log-probabilities of the tokens, and which there are."""
        # Loops and branches have fewer rows from call to call: copies of the last fill them up to a power of two.
        rows = np.minimum(np.arange(1 << (len(texts) - 1).bit_length()), len(texts) - 1)
        features = {name: part[rows] for name, part in self.model.prepare(texts, parents).items()}
        most = {"prompt": self.model.max_prompt_length, "completion": self.model.max_new_tokens}
        sizes = self.model.sizes(features)
        room = {name: batches.width(int(sizes[name].max(initial=1)), limit) for name, limit in most.items()}
        own, mask = _token_log_probs(self.model, params, self.model.resize(features, room))
        return np.asarray(own, np.float64)[: len(texts)], np.asarray(mask)[: len(texts)]


@partial(jax.jit, static_argnums=0)
def _token_log_probs(model: LanguageModel, params: Params, features: Features) -> tuple[Array, Array]:
    return model.token_log_probs(params, features)


def served(
    system: CompoundSystem, handovers: Mapping[str, Handover], max_gap: Mapping[str, float] = MappingProxyType({})
) -> CompoundSystem:
    """The system with language models that servers sample for: for rollouts and evaluation, not for training.

    Args:
        system: The graph.
        handovers: By the key of the parameters, which all nodes with that key share.
        max_gap: See `ServedModel`, by the same keys; its default where there is none.

    Returns:
        A system with the same parameters and the same distribution.

    Raises:
        ServingError: A key that is not of the system, or not of language models.
    """
    for name in handovers:
        kinds = {type(node.component) for node in system.nodes if node.params_key == name}
        if kinds != {LanguageModel}:
            found = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
            raise ServingError(f"a server samples for language models alone, and {name!r} is {found}: leave it out")
    nodes = [
        replace(node, component=ServedModel(node.component, handovers[key], max_gap.get(key, MAX_GAP)))
        if isinstance(node.component, LanguageModel) and (key := node.params_key) in handovers
        else node
        for node in system.nodes
    ]
    return replace(system, nodes=tuple(nodes))


def gaps_in(system: CompoundSystem) -> str:
    """How far servers are from the models that they sample for, as a line of progress says it; "" without servers."""
    models = {node.params_key: node.component for node in system.nodes if isinstance(node.component, ServedModel)}
    gaps = {name: model.handover.gap.mean for name, model in models.items() if model.handover.gaps}
    return ", ".join(f"server {mean:.2g} nats a token from {name}" for name, mean in gaps.items())
