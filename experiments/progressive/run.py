"""All phases of one seed. A phase whose output exists is not repeated: a run that was stopped goes on where it was."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sysdpo_jax as sj
from experiments.common import models, runs
from experiments.common.models import FitConfig, fit
from experiments.progressive import judge, world
from experiments.progressive.align import AlignConfig, image_part, language_part, objective_of, optimizer_of
from experiments.progressive.system import IMAGE, LANGUAGE, ModelConfig, build, diffusion, language_model
from experiments.progressive.world import ADVERBS, ARTICLES, CAPTIONS, Caption, Faults, Request, World, well_formed
from sysdpo_jax.evaluation import order_consistency, preference_score
from sysdpo_jax.training import Board, Report
from sysdpo_jax.typing import Params, Record

# The folder of the online rounds.
ROUNDS = "rounds"
METHODS = (
    "before",
    "best_of_n",
    "lm_only",
    "diffusion_only",
    "separate_system",
    "separate_local",
    "sysdpo",
    "sysdpo_online",
)
Pairs = Sequence[sj.PreferenceRecord]


@dataclass(frozen=True, kw_only=True)
class RunConfig(runs.HeldOutConfig):
    """One seed's run."""

    world: World = World()
    models: ModelConfig = ModelConfig()
    faults: Faults = Faults()
    language: FitConfig = FitConfig(steps=800, learning_rate=3e-3)
    image: FitConfig = FitConfig(steps=1500, learning_rate=4e-3, ema_decay=0.995)
    align: AlignConfig = AlignConfig()
    test_samples: int = 48
    local_samples: int = 32


class SeedRun(runs.SeedRun):
    """`run` returns {method: columns of its figures}, one row a held-out run."""

    config: RunConfig

    def __init__(self, config: runs.ExperimentConfig, seed: int, folder: Path, board: Board):
        run: Any = config.run
        super().__init__(config, build(run.models, run.align.timesteps, run.align.image_weight), seed, folder, board)
        self.requests = self.config.world.split(seed)

    def run(self) -> dict[str, dict[str, np.ndarray]]:
        before = self.pretrained()
        sysdpo = self.in_rounds("sysdpo", before, 1)
        # Those of the first round: all methods that need pairs on whole runs have the same ones.
        pairs = sj.load_preferences(self.folder / ROUNDS / "round-1" / "preferences.jsonl", self.system)
        language = self._align("lm_only", self.system, before, lambda: pairs, LANGUAGE)
        image = self._align("diffusion_only", self.system, before, lambda: pairs, IMAGE)
        policies = {
            "before": before,
            "lm_only": language,
            "diffusion_only": image,
            # With the other component frozen the system loss is a component's own: these two are that row's halves.
            "separate_system": {LANGUAGE: language[LANGUAGE], IMAGE: image[IMAGE]},
            # Each component on preferences about its own output.
            "separate_local": self._local_language(before) | self._local_images(before),
            "sysdpo": sysdpo,
            "sysdpo_online": self.in_rounds("sysdpo_online", before, self.config.align.online_rounds + 1),
        }
        figures = {name: self.evaluate(name, params) for name, params in policies.items()}
        figures["best_of_n"] = self.best_of_n("before", before)
        return {name: figures[name] for name in METHODS}

    def pretrained(self) -> Params:
        """Both models before alignment, with their faults."""
        config, train = self.config, self.requests["train"]
        writer, painter = language_model(config.models), diffusion(config.models)

        def language(report: Report) -> Params:
            made, asked = world.answers(train, config.faults, config.language.examples, self.seed)
            features = writer.prepare(made, {"request": asked})
            return fit(writer, features, config.language, self.key("language"), report)

        def images(report: Report) -> Params:
            made, captions = world.pictures(config.world, config.faults, config.image.examples, self.seed)
            features = painter.prepare(list(made), {"caption": captions})
            return fit(painter, features, config.image, self.key("image"), report)

        return {
            LANGUAGE: self.phases.params("pretrain_lm", config.language.steps, language),
            IMAGE: self.phases.params("pretrain_images", config.image.steps, images),
        }

    def in_rounds(self, name: str, before: Params, number: int) -> Params:
        """The system after so many online rounds, of which the best on validation requests counts.

        They end where the score or the order consistency of validation requests falls. A later call with more rounds
        goes on where one with fewer ended.
        """
        config, both = self.config.align, (LANGUAGE, IMAGE)
        same = ("sample_batch", "group", "min_margin", "steps", "epochs", "batch_size", "fall")
        rounds: dict[str, Any] = {name: getattr(config, name) for name in same}
        rounds |= {"samples": (config.samples, config.online_samples), "stop_on": ("score", "order")}

        def make(report: Report) -> Params:
            return sj.online(
                self._trainer(name, self.system, both, config.steps, self.folder / ROUNDS),
                before,
                self.inputs("train"),
                judge.score,
                sj.Rounds(number, **rounds),
                held_out=self.inputs("validation"),
                held_out_samples=config.held_out_samples,
                figures={"order": judge.in_order},
                optimizer=lambda steps: optimizer_of(self.system, both, config, steps),
                seed=self.seed,
            ).params

        return self.phases.params(name, None, make)

    def inputs(self, part: str) -> list[dict[str, str]]:
        """Of the requests of a split."""
        return [{"request": request.text} for request in self.requests[part]]

    def held_out(self) -> Sequence[Record]:
        return self.inputs(self.config.evaluate_on)

    def figures(self, params: Params, records: Sequence[Record]) -> dict[str, np.ndarray]:
        asked = [Request.parse(record["request"]) for record in records]
        grades = judge.grades(asked, records)
        formed = [well_formed(request, record["answer"]) for request, record in zip(asked, records, strict=True)]
        language = language_part(self.system)
        features = language.prepare([{n: record[n] for n in ("request", "answer")} for record in records])
        log_prob = language.log_prob({LANGUAGE: params[LANGUAGE]}, features, jax.random.key(self.seed))["answer"]
        return {
            "request": np.array([request.text for request in asked]),
            "answer": np.array([record["answer"] for record in records]),
            "score": preference_score(grades),
            "order": order_consistency(grades).astype(np.float64),
            "well_formed": np.array(formed, np.float64),
            "surprise": -np.asarray(log_prob, np.float64),
            "fidelity": np.array(judge.fidelity(records)),
            "images": np.asarray([record["images"] for record in records], np.float16),
        }

    def _trainer(
        self, name: str, system: sj.CompoundSystem, trained: Sequence[str], steps: int, folder: Path
    ) -> sj.Trainer:
        config, progress = self.config.align, self.phases.progress(name)
        optimizer, objective = optimizer_of(system, trained, config, steps), objective_of(trained, config)
        return sj.Trainer(system, objective, optimizer, folder, keep=1, progress=progress)

    def _align(
        self,
        name: str,
        system: sj.CompoundSystem,
        params: Params,
        pairs: Callable[[], Pairs],
        trained: str,
        key: str = "align",
        rows_per_pair: int = 1,
    ) -> Params:
        """Parameters after SysDPO-Direct on the pairs, with `params` as reference.

        trained: the parameter key that is trained, others are frozen. rows_per_pair: how many pairs take the place of
        one in a batch, where a pair is not a whole run.
        """

        def make(report: Report) -> Params:
            config, made = self.config.align, pairs()
            batch_size = config.batch_size * rows_per_pair
            steps = min(config.steps, config.epochs * (len(made) // batch_size))
            batches = partial(sj.epoch_batches, sj.prepare_pairs(system, made), batch_size)
            trainer = self._trainer(name, system, (trained,), steps, self.folder / name)
            return models.align(trainer, params, batches, steps, self.key(key))

        return self.phases.params(name, None, make)

    def _local_language(self, before: Params) -> Params:
        """Captions are preferred by their adverbs."""
        config, key = self.config.align, "local language"
        system, params = language_part(self.system), {LANGUAGE: before[LANGUAGE]}

        def pairs() -> Pairs:
            inputs, batch = self.inputs("train"), self.config.batch_runs
            records = sj.rollout(system, params, inputs, self.key(key), config.samples, batch)
            scores = [judge.answer_score(Request.parse(record["request"]), record["answer"]) for record in records]
            return sj.make_pairs(system, records, np.array(scores), config.group, config.min_margin)

        return self._align("separate_local_lm", system, params, pairs, LANGUAGE, key)

    def _local_images(self, before: Params) -> Params:
        """Pictures are preferred by their captions."""
        config, key = self.config, "local images"
        system, params = image_part(self.system), {IMAGE: before[IMAGE]}
        subjects = sorted({(request.attribute, request.object) for request in self.requests["train"]})
        captions = [Caption(a, adverb, *subject) for subject in subjects for adverb in ADVERBS for a in ARTICLES]
        asked = [caption for caption in captions for _ in range(config.local_samples)]

        def pairs() -> Pairs:
            inputs, batch = [{"caption": caption.text} for caption in captions], CAPTIONS * config.batch_runs
            records = sj.rollout(system, params, inputs, self.key(key), config.local_samples, batch)
            measured = judge.measure(np.asarray([record["image"] for record in records]))
            scores = np.array([-abs(measured[c.attribute][row] - c.value) for row, c in enumerate(asked)])
            return sj.make_pairs(system, records, scores, config.align.group // 2)

        return self._align("separate_local_unet", system, params, pairs, IMAGE, key, CAPTIONS)
