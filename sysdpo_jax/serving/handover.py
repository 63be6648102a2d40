"""Handing parameters to a server: an adapter, or whole weights, in a folder that both can read."""

import logging
import os
import shutil
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.manifest import digest, fingerprints
from sysdpo_jax.models.lora import is_lora
from sysdpo_jax.pretrained import save, save_adapter
from sysdpo_jax.serving.engines import Sampled, Settings
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
    adapter of the parameters before is removed, and so are whole weights as soon as the server has them. What a server
    has of a process is known of that process alone, and named after it: another one hands over what it needs itself.

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
    _leaves: list[weakref.ref[Any]] = field(default_factory=list)

    def ask(
        self, model: LanguageModel, params: Params, prompts: Sequence[tuple[list[int], int]], settings: Settings
    ) -> list[Sampled]:
        """A text for each prompt and seed, sampled with these parameters. Raises `ServingError`."""
        if jax.process_count() > 1:
            raise ServingError("a server samples for one process: start one, on as many devices as it has")
        name = self._given(model, params) if self.trained else None
        try:
            return self.server.ask(name, prompts, settings)
        except ServingError as error:
            # A server that was started again has no adapter, and names the one that it was asked for.
            if name is None or name not in str(error):
                raise
            logger.warning("%s has no %s any more, and gets it again", self.server.shown, name)
        self._hand_over_adapter(model, params, name)
        return self.server.ask(name, prompts, settings)

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
        # Arrays never change: the same ones are the same parameters, as long as they are there.
        leaves = list(flat.values())
        same = len(leaves) == len(self._leaves) and all(a is b() for a, b in zip(leaves, self._leaves, strict=True))
        if same and self._holds is not None:
            name = self._holds
        else:
            given = {path: leaf for path, leaf in flat.items() if is_lora(path)} if adapter else flat
            name = f"{self.name}-{digest(fingerprints(given))[:16]}-{os.getpid()}"
        if adapter and name != self._holds:
            self._hand_over_adapter(model, params, name)
        if not adapter and name != _WEIGHTS.get(self.server.url):
            self._hand_over_weights(model, params, name)
        self._holds, self._leaves = name, list(map(weakref.ref, leaves))
        return name if adapter else None

    def _hand_over_adapter(self, model: LanguageModel, params: Params, name: str) -> None:
        """The server reads the folder again where it needs the room in between."""
        save_adapter(self._cleared(name), model, params, self.server.model)
        self.server.load_adapter(name, self._folder_of(name))
        logger.info("%s has %s", self.server.shown, name)
        before = self._holds
        if before not in (None, name):
            self.server.unload_adapter(str(before))
            shutil.rmtree(self._folder_of(str(before)), ignore_errors=True)

    def _hand_over_weights(self, model: LanguageModel, params: Params, name: str) -> None:
        if self.server.keeps_tied_heads and model.decoder.config.tie_word_embeddings:
            raise ServingError(
                f"{self.server.shown} keeps the old head of a model with tied embeddings when it loads whole weights: "
                "train with LoRA (mode lora), or without the server"
            )
        folder = self._cleared(name)
        try:
            save(folder, model, params)
            self.server.load_weights(name, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        _WEIGHTS[self.server.url] = name
        logger.info("%s has %s", self.server.shown, name)

    def _folder_of(self, name: str) -> Path:
        return (self.folder / name).absolute()

    def _cleared(self, name: str) -> Path:
        """The folder for these parameters, without what a killed process of that number may have left there."""
        folder = self._folder_of(name)
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        return folder
