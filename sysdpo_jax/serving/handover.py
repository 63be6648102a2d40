"""Handing parameters to a server: an adapter, or whole weights, in a folder that both can read."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.manifest import digest, fingerprints
from sysdpo_jax.models.lora import is_lora
from sysdpo_jax.pretrained import save, save_adapter
from sysdpo_jax.serving.engines import Completion, Question
from sysdpo_jax.serving.server import Server, ServingError
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params

logger = logging.getLogger(__name__)


class Gap(NamedTuple):
    """How far a server's log-probabilities are from the trainer's, in nats.

    mean: A token. worst: Of any token. tokens: That were compared.
    """

    mean: float
    worst: float
    tokens: int


# By the addresses of servers, the whole weights that this process gave them last.
_WEIGHTS: dict[str, str] = {}


@dataclass
class Handover:
    """Gives a server the parameters of one model whenever they are others than those it has, and asks it.

    Parameters with LoRA factors go as an adapter, which the server loads beside its model, others as whole weights. The
    folder and the adapter of the parameters before are removed. What a server has of a process is known of that process
    alone, and named after it: another one hands over what it needs itself.

    Args:
        server: Is asked.
        folder: For what is handed over; the server reads the same path.
        name: Of the model in names of adapters and folders.
        trained: Whether the parameters may be others than those of the model that the server began with.
    """

    server: Server
    folder: Path
    name: str
    trained: bool = True
    gaps: list[Gap] = field(default_factory=list)
    _holds: str | None = None
    _leaves: list[Any] = field(default_factory=list)

    def ask(
        self, model: LanguageModel, params: Params, prompts: Sequence[tuple[list[int], int]], question: Question
    ) -> list[Completion]:
        """A text for each prompt and seed, sampled with these parameters. Raises `ServingError`."""
        if jax.process_count() > 1:
            raise ServingError("a server samples for one process: start one, on as many devices as it has")
        return self.server.ask(self._given(model, params) if self.trained else None, prompts, question)

    def note(self, mean: float, worst: float, tokens: int) -> None:
        """Keep how far log-probabilities were apart."""
        self.gaps.append(Gap(mean, worst, tokens))
        logger.info("%s: %.3g nats a token from the model on %d tokens", self.server.shown, mean, tokens)

    @property
    def gap(self) -> Gap:
        """Over all that was sampled so far."""
        tokens = sum(gap.tokens for gap in self.gaps)
        mean = sum(gap.mean * gap.tokens for gap in self.gaps) / max(1, tokens)
        return Gap(mean, max((gap.worst for gap in self.gaps), default=0.0), tokens)

    def _given(self, model: LanguageModel, params: Params) -> str | None:
        """The adapter with these parameters, None for whole weights; they are handed over where the server has others.

        Other models may have given the server their whole weights in between.
        """
        flat = by_path(params)
        adapter = any(map(is_lora, flat))
        # Arrays never change: the same ones are the same parameters. They are held, so that no other takes their place.
        leaves = list(flat.values())
        same = len(leaves) == len(self._leaves) and all(a is b for a, b in zip(leaves, self._leaves, strict=True))
        if same and self._holds is not None:
            name = self._holds
        else:
            given = {path: leaf for path, leaf in flat.items() if is_lora(path)} if adapter else flat
            name = f"{self.name}-{digest(fingerprints(given))[:16]}-{os.getpid()}"
        if name != self._holds or not (adapter or _WEIGHTS.get(self.server.url) == name):
            self._hand_over(model, params, name, adapter)
        self._leaves = leaves
        return name if adapter else None

    def _hand_over(self, model: LanguageModel, params: Params, name: str, adapter: bool) -> None:
        if not adapter and self.server.keeps_tied_heads and model.decoder.config.tie_word_embeddings:
            raise ServingError(
                f"{self.server.shown} keeps the old head of a model with tied embeddings when it loads whole weights: "
                "train with LoRA (mode lora), or without the server"
            )
        path, before = (self.folder / name).absolute(), self._holds
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if adapter:
            save_adapter(path, model, params, self.server.model)
            self.server.load_adapter(name, path)
        else:
            save(path, model, params)
            self.server.load_weights(name, path)
            _WEIGHTS[self.server.url] = name
        self._holds = name
        logger.info("%s has %s", self.server.shown, name)
        if before not in (None, name):
            if adapter:
                self.server.unload_adapter(str(before))
            shutil.rmtree(self.folder / str(before), ignore_errors=True)
