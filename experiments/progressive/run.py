"""All phases of one seed. A phase whose output exists is not repeated: a run that was stopped goes on where it was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from experiments.common.fit import FitConfig, fit
from experiments.common.phases import Phases
from experiments.common.runs import best_of, reported_rollout
from experiments.progressive import judge, pretrain
from experiments.progressive.align import AlignConfig, align, align_in_rounds, image_part, language_part
from experiments.progressive.system import IMAGE, LANGUAGE, ModelConfig, build, diffusion, language_model
from experiments.progressive.world import ADVERBS, ARTICLES, CAPTIONS, Caption, Request, World, well_formed
from sysdpo_jax import PreferenceRecord, load_preferences, make_pairs, rollout
from sysdpo_jax.evaluation import order_consistency, preference_score
from sysdpo_jax.io import read_arrays, write_arrays
from sysdpo_jax.keys import named_key
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


@dataclass(frozen=True)
class RunConfig:
    """One seed's run. test_samples: runs of each held-out request; best_of: the N of best-of-n."""

    world: World = World()
    models: ModelConfig = ModelConfig()
    faults: pretrain.Faults = pretrain.Faults()
    language: FitConfig = FitConfig(steps=800, learning_rate=3e-3)
    image: FitConfig = FitConfig(steps=1500, learning_rate=4e-3, ema_decay=0.995)
    align: AlignConfig = AlignConfig()
    evaluate_on: Literal["validation", "test"] = "test"
    test_samples: int = 48
    best_of: int = 4
    local_samples: int = 32
    batch_runs: int = 256


class SeedRun:
    """One seed in a folder of its own. `run` returns {method: columns of its figures}, one row a held-out run."""

    def __init__(self, config: RunConfig, seed: int, folder: Path, board: Board):
        self.config, self.seed, self.folder = config, seed, folder
        self._phases = Phases(folder, f"seed {seed}", board)
        self.system = build(config.models, config.align.timesteps, config.align.image_weight)
        self.requests = config.world.split(seed)
        self._key = jax.random.key(seed)

    @property
    def seconds(self) -> dict[str, float]:
        """{phase: seconds it took}, phases of earlier starts included."""
        return self._phases.seconds

    def run(self) -> dict[str, dict[str, np.ndarray]]:
        before = self.pretrained()
        sysdpo = self.in_rounds("sysdpo", before, 1)
        # Those of the first round: all methods that need pairs on whole runs have the same ones.
        pairs = load_preferences(self.folder / ROUNDS / "round-1" / "preferences.jsonl", self.system)
        language = self._align("lm_only", before, pairs, (LANGUAGE,))
        image = self._align("diffusion_only", before, pairs, (IMAGE,))
        policies = {
            "before": before,
            "lm_only": language,
            "diffusion_only": image,
            # With the other component frozen the system loss is a component's own: these two are that row's halves.
            "separate_system": {LANGUAGE: language[LANGUAGE], IMAGE: image[IMAGE]},
            "separate_local": self._separate_local(before),
            "sysdpo": sysdpo,
            "sysdpo_online": self.in_rounds("sysdpo_online", before, self.config.align.online_rounds + 1),
        }
        figures = {name: self.evaluate(name, params) for name, params in policies.items()}
        figures["best_of_n"] = self._best_of_n(before, figures["before"])
        return {name: figures[name] for name in METHODS}

    def pretrained(self) -> Params:
        """Both models before alignment, with their faults."""
        return {LANGUAGE: self._pretrain_language(), IMAGE: self._pretrain_images()}

    def in_rounds(self, name: str, before: Params, number: int) -> Params:
        """The system after so many online rounds, of which the best on validation requests counts.

        A later call with more rounds goes on where one with fewer ended.
        """
        config, folder = self.config.align, self.folder / ROUNDS
        progress = self._phases.progress(name)

        def make(report: Report) -> Params:
            made = align_in_rounds(self.system, before, self.requests, config, number, folder, self.seed, progress)
            return made.params

        return self._phases.params(name, None, make)

    def _pretrain_language(self) -> Params:
        config = self.config
        component = language_model(config.models)

        def make(report: Report) -> Params:
            made, asked = pretrain.answers(self.requests["train"], config.faults, config.language.examples, self.seed)
            features = component.prepare(made, {"request": asked})
            return fit(component, features, config.language, self._named("language"), report)

        return self._phases.params("pretrain_lm", config.language.steps, make)

    def _pretrain_images(self) -> Params:
        config = self.config
        component = diffusion(config.models)

        def make(report: Report) -> Params:
            images, captions = pretrain.pictures(config.world, config.faults, config.image.examples, self.seed)
            features = component.prepare(list(images), {"caption": captions})
            return fit(component, features, config.image, self._named("image"), report)

        return self._phases.params("pretrain_images", config.image.steps, make)

    def _align(self, name: str, params: Params, pairs: Sequence[PreferenceRecord], trained: Sequence[str]) -> Params:
        config, key = self.config.align, self._named("align")
        progress = self._phases.progress(name)

        def make(report: Report) -> Params:
            return align(self.system, params, pairs, trained, config, self.folder / name, key, progress)

        return self._phases.params(name, None, make)

    def _separate_local(self, before: Params) -> Params:
        """Each component on preferences about its own output: captions by their adverbs, pictures by their captions."""
        return {LANGUAGE: self._local_language(before), IMAGE: self._local_images(before)}

    def _local_language(self, before: Params) -> Params:
        config, key = self.config.align, self._named("local language")
        system, params = language_part(self.system), {LANGUAGE: before[LANGUAGE]}
        inputs = [{"request": request.text} for request in self.requests["train"]]
        asked = [request for request in self.requests["train"] for _ in range(config.samples)]

        def make(report: Report) -> Params:
            records = rollout(system, params, inputs, key, config.samples, self.config.batch_runs)
            scores = np.array(
                [judge.answer_score(r, record["answer"]) for r, record in zip(asked, records, strict=True)]
            )
            pairs = make_pairs(system, records, scores, config.group, config.min_margin)
            progress = self._phases.progress("separate_local")
            folder = self.folder / "separate_local_lm"
            return align(system, params, pairs, (LANGUAGE,), config, folder, key, progress)

        return self._phases.params("separate_local_lm", None, make)[LANGUAGE]

    def _local_images(self, before: Params) -> Params:
        config, key = self.config.align, self._named("local images")
        system, params = image_part(self.system), {IMAGE: before[IMAGE]}
        subjects = sorted({(request.attribute, request.object) for request in self.requests["train"]})
        captions = [Caption(a, adverb, *subject) for subject in subjects for adverb in ADVERBS for a in ARTICLES]
        asked = [caption for caption in captions for _ in range(self.config.local_samples)]

        def make(report: Report) -> Params:
            inputs = [{"caption": caption.text} for caption in captions]
            batch = CAPTIONS * self.config.batch_runs
            records = rollout(system, params, inputs, key, self.config.local_samples, batch)
            measured = judge.measure(np.asarray([record["image"] for record in records]))
            scores = np.array([-abs(measured[c.attribute][row] - c.value) for row, c in enumerate(asked)])
            pairs = make_pairs(system, records, scores, config.group // 2)
            progress = self._phases.progress("separate_local")
            folder = self.folder / "separate_local_unet"
            return align(system, params, pairs, (IMAGE,), config, folder, key, progress, rows_per_pair=CAPTIONS)

        return self._phases.params("separate_local_unet", None, make)[IMAGE]

    def evaluate(self, name: str, params: Params, repeat: int = 0) -> dict[str, np.ndarray]:
        """Figures of held-out runs. The key depends on the repeat alone: every method draws the same noise."""
        requests, samples = self.requests[self.config.evaluate_on], self.config.test_samples
        label = f"evaluate_{name}" if repeat == 0 else f"evaluate_{name}_{repeat}"

        def make(report: Report) -> dict[str, np.ndarray]:
            key = jax.random.fold_in(self._named("evaluate"), repeat)
            records = self._rollout(params, requests, samples, key, report)
            asked = [request for request in requests for _ in range(samples)]
            return self._figures(params, asked, records)

        return self._phases.run(
            label, self.folder / f"{label}.npz", len(requests) * samples, make, read_arrays, write_arrays
        )

    def _figures(self, params: Params, asked: Sequence[Request], records: Sequence[Record]) -> dict[str, np.ndarray]:
        grades = judge.grades(asked, records)
        formed = [well_formed(request, record["answer"]) for request, record in zip(asked, records, strict=True)]
        language = language_part(self.system)
        features = language.prepare([{n: record[n] for n in ("request", "answer")} for record in records])
        log_prob = language.log_prob({LANGUAGE: params[LANGUAGE]}, features, self._key)["answer"]
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

    def _best_of_n(self, before: Params, first: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """For every held-out run the best of N runs of the unaligned system, by the judge itself."""
        runs = [first, *(self.evaluate("before", before, repeat) for repeat in range(1, self.config.best_of))]
        return best_of(runs) | {"fidelity": np.mean([run["fidelity"] for run in runs])}

    def _rollout(
        self, params: Params, requests: Sequence[Request], samples: int, key: PRNGKeyArray, report: Report
    ) -> list[dict[str, Any]]:
        inputs = [{"request": request.text} for request in requests]
        return reported_rollout(self.system, params, inputs, key, samples, self.config.batch_runs, report)

    def _named(self, name: str) -> PRNGKeyArray:
        return named_key(self._key, name)
