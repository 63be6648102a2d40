"""Images given captions, by diffusion or flow matching; log-probabilities are Diffusion-DPO's surrogate (2311.12908).

`Diffusion` and `FlowMatching` say how a clean latent is corrupted and how noise becomes a latent; `TextToImage` has the
rest: text in, latents out, the surrogate in between.
Axes: B batch, h w c latent.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, PRNGKeyArray

from sysdpo_jax.components.base import Component, LogProbs, Metrics, Raw, RecordError
from sysdpo_jax.components.codec import Codec, LatentCodec, Latents, whole_frames
from sysdpo_jax.components.conversations import kind
from sysdpo_jax.components.encoding import encode_together
from sysdpo_jax.components.source import Source
from sysdpo_jax.components.text import FrozenText, TextConditioner
from sysdpo_jax.diffusion.samplers import DDIM, Denoiser, FlowEuler, Sampler, guided, guides
from sysdpo_jax.diffusion.schedules import NoiseSchedule, PredictionType, add_noise, expand, target
from sysdpo_jax.diffusion.weightings import Constant, Weighting
from sysdpo_jax.keys import row_keys
from sysdpo_jax.models.initial import fresh_params
from sysdpo_jax.models.remat import of_model
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Features, Keys, Params, Parents

# The captions' tokens, where frozen encoders read them, and the names of the states that they make.
RAW_TEXTS = {"captions": "text", "null_captions": "null"}


class Corrupted(NamedTuple):
    """A training example of a denoiser: its input, its time, the right answer and the weight T * omega of its error."""

    noisy: Array
    time: Array
    target: Array
    weight: Array


@dataclass(frozen=True)
class TextToImage(Component):
    """An image given one caption. Parameters are {"denoiser": .., "codec": .., "text": ..}, without those of a part
    that has none.

    Args:
        denoiser: Module (latents [B, h, w, c], time [B], *conditioning) -> prediction [B, h, w, c].
        text: Captions to the conditioning, see components/text.py; trained with the denoiser unless it is `FrozenText`.
        codec: Images (paths, bytes, PIL images, arrays) to latents and back.
        num_steps: Of the sampler.
        guidance_scale: Of the sampler; at most 1 means no guidance, one evaluation of the denoiser a step, as in
            diffusers.
        negative_prompt: What guidance leads away from; None is the null condition.
        caption_dropout: Share of rows whose caption is replaced by the null condition in `log_prob`, for guidance.
        strata: Rows come in groups of this many whose times are spread evenly (set it to the node's plate); 1:
            independent.
        source: The files that it was read from, which `pretrained.save` hands on.

    Raises:
        ValueError: For a value out of range, and a negative_prompt without guidance.
    """

    denoiser: nn.Module
    text: TextConditioner
    codec: Codec
    num_steps: int = 50
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    caption_dropout: float = 0.0
    strata: int = 1
    source: Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        hold_tuples(self)
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"caption_dropout must lie in [0, 1), got {self.caption_dropout}")
        if self.num_steps < 1 or self.strata < 1:
            raise ValueError(f"num_steps {self.num_steps} and strata {self.strata} must be at least 1")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale {self.guidance_scale} must be a finite number (at most 1: no guidance)")
        if self.negative_prompt is not None and not guides(self.guidance_scale):
            raise ValueError("a negative_prompt is only read with guidance: set guidance_scale above 1")

    @abstractmethod
    def corrupt(self, clean: Latents, noise: Latents, u: Float[Array, "batch"]) -> Corrupted:
        """Noise the latents.

        Args:
            clean: The latents.
            noise: Standard normal.
            u: In [0, 1), chooses each row's time.

        Returns:
            What the denoiser sees and should predict, and the weight of its error.
        """

    @abstractmethod
    def denoise(self, predict: Denoiser, noise: Latents, key: PRNGKeyArray) -> Latents:
        """Run the sampler from pure noise to clean latents.

        Args:
            predict: The denoiser with its conditioning.
            noise: Standard normal.
            key: Of samplers with noise of their own.

        Returns:
            The latents.
        """

    @property
    def prepared_by(self) -> Any:
        # Of a dropout there are features of no caption.
        return self.text, self.codec, self.caption_dropout > 0

    @property
    def several_sizes(self) -> bool:
        return isinstance(self.codec, LatentCodec) and self.codec.several_sizes

    @property
    def frozen(self) -> tuple[str, ...]:
        parts = {"codec": isinstance(self.codec, LatentCodec), "text": isinstance(self.text, FrozenText)}
        return tuple(name for name, frozen in parts.items() if frozen)

    def init(self, key: PRNGKeyArray) -> Params:
        text_key, image_key = jax.random.split(key)
        frames = [(1, 6)] if self.text.sized else []
        latents, time, *sizes = (
            jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(1, *self.codec.latent_shape), (1,), *frames]
        )
        params = {
            "denoiser": fresh_params(self.denoiser, image_key, latents, time, *self.text.shapes(), *sizes),
            "codec": self.codec.init(jax.random.fold_in(key, 2)) if isinstance(self.codec, LatentCodec) else {},
            "text": self.text.init(text_key),
        }
        return {name: tree for name, tree in params.items() if tree}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        """Images and their captions -> pixels or latents, and the captions' tokens.

        An image that comes several times (the same object, as with several intermediates) is read once.
        Raises `RecordError` for an image that cannot be read, a caption that is no string or is too long.
        """
        images, frames = self.codec.prepare(values)
        texts = {"text": self.text.prepare(_captions(parents))}
        if self.caption_dropout:
            # One row in memory, however many there are.
            spread = lambda x: np.broadcast_to(x, (len(values), *x.shape[1:]))  # noqa: E731
            texts["null"] = jax.tree.map(spread, self.text.prepare([None]))
        if isinstance(self.text, FrozenText):
            texts = {name: texts[encoded] for name, encoded in RAW_TEXTS.items() if encoded in texts}
        return {**images, **texts, **({"frames": frames.astype(np.float32)} if self.text.sized else {})}

    def raw(self, features: Features) -> Mapping[str, Raw]:
        found = {}
        if isinstance(self.codec, LatentCodec) and "pixels" in features:
            found["pixels"] = Raw(np.ndim(features["pixels"]) - 3, self.codec.batch_size)
        if isinstance(self.text, FrozenText):
            texts = [name for name in RAW_TEXTS if name in features]
            found |= {name: Raw(np.ndim(features[name]["truncated"]), self.text.batch_size) for name in texts}
        return found

    def encode(self, params: Params, features: Features) -> Features:
        """The latents of pixels, and the states of captions where the text encoders are frozen."""
        raw = {name: jax.tree.map(jnp.asarray, features[name]) for name in self.raw(features)}
        made = {name: entry for name, entry in features.items() if name not in raw}
        for name, entry in raw.items():
            if name in RAW_TEXTS:
                states = self.text.encode(params["text"], entry)
                made[RAW_TEXTS[name]] = {"encoded": states, "truncated": entry["truncated"]}
            elif isinstance(self.codec, LatentCodec):
                made["latents"] = self.codec.encode(params["codec"], entry)
        return made

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        return self.log_prob_with_metrics(params, features, key)[0]

    def log_prob_with_metrics(self, params: Params, features: Features, key: Keys) -> tuple[LogProbs, Metrics]:
        """-(T omega / 2) * mean squared error at one (t, eps) of each row, drawn from its key.

        Metrics: that error as "mse", and "truncated", 1 where the caption was cut.
        arXiv 2311.12908, equation 14; the expectation over (t, eps) outside -log sigmoid bounds the loss from above.

        Raises:
            ValueError: For features that are still to be encoded.
        """
        raw = self.raw(features)
        if raw:
            raise ValueError(
                f"the features hold {', '.join(raw)}, which the frozen parts have still to encode: call "
                "CompoundSystem.encode(params, features), or sysdpo_jax.encode_batch of a batch, before the step"
            )
        remat = getattr(getattr(self.denoiser, "config", None), "remat", None)
        return of_model(self._surrogates, remat)(params, jax.tree.map(jnp.asarray, features), key)

    def _surrogates(self, params: Params, features: Features, key: Keys) -> tuple[LogProbs, Metrics]:
        latents = features["latents"]
        rows = latents.shape[0]
        time_keys, noise_keys, drop_keys = jax.vmap(partial(jax.random.split, num=3), out_axes=1)(row_keys(key, rows))
        noise = jax.vmap(lambda row: jax.random.normal(row, latents.shape[1:], jnp.float32))(noise_keys)
        example = self.corrupt(latents, noise, _stratified(time_keys, self.strata))
        text = features["text"]
        if self.caption_dropout:
            drop = jax.vmap(lambda row: jax.random.bernoulli(row, self.caption_dropout))(drop_keys)
            text = jax.tree.map(
                lambda a, b: jnp.where(drop.reshape(rows, *(1,) * (a.ndim - 1)), b, a), text, features["null"]
            )
        conditioning = self._conditioning(params, text, features.get("frames"))
        prediction = self._predict(params, example.noisy, example.time, *conditioning)
        # Reduced in float32 whatever the model computes in: a rounding error here is multiplied by the weight.
        error = prediction.astype(jnp.float32) - example.target
        inner = tuple(range(1, error.ndim))
        # The weight goes inside the sum: a product outside it may fuse with the subtraction of the reference and be
        # rounded there once less than the reference's, and equal models would then differ.
        scale = expand(-0.5 * example.weight / error[0].size, error)
        metrics = {"mse": jnp.mean(error**2, axis=inner), "truncated": text["truncated"]}
        return jnp.sum(scale * error**2, axis=inner), metrics

    def units(self, features: Features) -> Mapping[str, int]:
        """The images."""
        images = features["latents"] if "latents" in features else features["pixels"]
        return {"images": math.prod(images.shape[:-3])}

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        """One image [height, width, channels] in [0, 1] for each caption, of the codec's first size."""
        captions = _captions(parents)
        wanted = len(captions)
        if key.ndim:
            # So many rows as happen to be there: filled up to a power of two, few shapes are compiled.
            places = np.minimum(np.arange(2 ** (wanted - 1).bit_length()), wanted - 1)
            captions, key = [captions[place] for place in places], key[places]
        frames = whole_frames(self.codec, len(captions)).astype(np.float32) if self.text.sized else None
        text = self._prepared_text(params, captions)
        negative = [self.negative_prompt] * len(captions)
        null = self._prepared_text(params, negative) if guides(self.guidance_scale) else None
        latents = np.asarray(self._sample(params, text, null, frames, key))
        return list(self.codec.decode(params.get("codec", {}), latents[:wanted]))

    def _prepared_text(self, params: Params, captions: Sequence[str | None]) -> Features:
        text = self.text.prepare(captions)
        if not isinstance(self.text, FrozenText):
            return text
        [made] = encode_together(self, params, [{"captions": text}])
        return made["text"]

    @partial(jax.jit, static_argnums=0)
    def _sample(
        self, params: Params, text: Features, null: Features | None, frames: Array | None, key: Keys
    ) -> Latents:
        if key.ndim:

            def alone(text: Features, null: Features | None, frames: Array | None, key: PRNGKeyArray) -> Array:
                row = jax.tree.map(lambda x: x[None], (text, null, frames))
                return self._sample(params, *row, key)[0]

            return jax.vmap(alone)(text, null, frames, key)
        conditioning = self._conditioning(params, text, frames)
        unconditional = None if null is None else self._conditioning(params, null, frames)
        noise = jax.random.normal(key, (conditioning[0].shape[0], *self.codec.latent_shape))
        predict = guided(partial(self._predict, params), conditioning, unconditional, self.guidance_scale)
        return self.denoise(predict, noise, jax.random.fold_in(key, 1))

    def _conditioning(self, params: Params, text: Features, frames: Array | None) -> tuple[Array, ...]:
        """What the denoiser is told, of captions whose states are there or whose encoders are trained."""
        states = text["encoded"] if "encoded" in text else self.text.encode(params["text"], text)
        return tuple(states) if frames is None else (*states, frames)

    def _predict(self, params: Params, latents: Array, time: Array, *conditioning: Array) -> Array:
        prediction: Any = self.denoiser.apply({"params": params["denoiser"]}, latents, time, *conditioning)
        return prediction


@dataclass(frozen=True, kw_only=True)
class Diffusion(TextToImage):
    """Discrete-time diffusion, trained at t ~ U{low, ..., high - 1} (arXiv 2311.12908, equation 14).

    log p(image | caption) ~= -(T omega / 2) * mean squared error of the prediction at one draw of (t, noise).

    Args:
        denoiser: Module (latents [B, h, w, c], time [B], *conditioning) -> prediction [B, h, w, c].
        text: Captions to the conditioning; trained with the denoiser unless it is `FrozenText`.
        codec: Images (paths, bytes, PIL images, arrays) to latents and back.
        num_steps: Of the sampler.
        guidance_scale: Of the sampler; at most 1 means no guidance.
        negative_prompt: What guidance leads away from; None is the null condition.
        caption_dropout: Share of rows whose caption is replaced by the null condition in `log_prob`, for guidance.
        strata: Rows come in groups of this many whose times are spread evenly (set it to the node's plate).
        source: The files that it was read from, which `pretrained.save` hands on.
        schedule: Of the noise.
        prediction_type: "epsilon", "v_prediction" or "sample".
        weighting: T * omega(lambda_t), see `sysdpo_jax.diffusion`.
        timesteps: The range (low, high) of t; (0, num_timesteps) by default. A narrower one departs from the paper.
        sampler: From noise to latents, see `sysdpo_jax.diffusion`.

    Raises:
        ValueError: For a value out of range, and an epsilon model that would be trained where the SNR is 0.
    """

    schedule: NoiseSchedule = NoiseSchedule()
    prediction_type: PredictionType = "epsilon"
    weighting: Weighting = Constant()
    timesteps: tuple[int, int] | None = None
    sampler: Sampler = DDIM()

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self._range
        if not 0 <= low < high <= self.schedule.num_timesteps:
            raise ValueError(f"timesteps {self.timesteps} must lie within (0, {self.schedule.num_timesteps})")
        if self.prediction_type not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"unknown prediction_type {self.prediction_type!r}: epsilon, v_prediction or sample")
        if self.prediction_type == "epsilon" and high == self.schedule.num_timesteps and self.schedule.snr()[-1] == 0:
            raise ValueError(
                "an epsilon model says nothing of z_0 where the SNR is 0: use v_prediction with "
                f"rescale_betas_zero_snr, or timesteps=(0, {high - 1})"
            )

    @property
    def _range(self) -> tuple[int, int]:
        return self.timesteps or (0, self.schedule.num_timesteps)

    def corrupt(self, clean: Latents, noise: Latents, u: Float[Array, "batch"]) -> Corrupted:
        low, high = self._range
        t = low + jnp.floor(u * (high - low)).astype(jnp.int32)
        alpha, sigma = self.schedule.alpha_sigma(t)
        answer = target(clean, noise, alpha, sigma, self.prediction_type)
        weight = self.weighting(self.schedule, t, self.prediction_type, clean[0].size)
        return Corrupted(add_noise(clean, noise, alpha, sigma), t, answer, weight)

    def denoise(self, predict: Denoiser, noise: Latents, key: PRNGKeyArray) -> Latents:
        return self.sampler(predict, noise, self.schedule, self.prediction_type, self.num_steps, key)


@dataclass(frozen=True, kw_only=True)
class FlowMatching(TextToImage):
    """z = (1 - sigma) z_0 + sigma eps with the velocity eps - z_0 as target (arXiv 2209.03003, equation 1).

    Args:
        denoiser: Module (latents [B, h, w, c], time [B], *conditioning) -> velocity [B, h, w, c].
        text: Captions to the conditioning; trained with the denoiser unless it is `FrozenText`.
        codec: Images (paths, bytes, PIL images, arrays) to latents and back.
        num_steps: Of the sampler.
        guidance_scale: Of the sampler; at most 1 means no guidance.
        negative_prompt: What guidance leads away from; None is the null condition.
        caption_dropout: Share of rows whose caption is replaced by the null condition in `log_prob`, for guidance.
        strata: Rows come in groups of this many whose times are spread evenly (set it to the node's plate).
        source: The files that it was read from, which `pretrained.save` hands on.
        sampler: Euler steps, and the schedule that gives the level sigma(u) at u ~ U[0, 1) in training too.
        scale: T * omega, the weight of the mean squared velocity error.
    """

    sampler: FlowEuler = FlowEuler()
    scale: float = 50_000.0

    def corrupt(self, clean: Latents, noise: Latents, u: Float[Array, "batch"]) -> Corrupted:
        level = self.sampler.schedule.sigma(u)
        t = expand(level, clean)
        return Corrupted((1 - t) * clean + t * noise, self._time(level), noise - clean, jnp.full(u.shape, self.scale))

    def denoise(self, predict: Denoiser, noise: Latents, key: PRNGKeyArray) -> Latents:
        return self.sampler(lambda z, level: predict(z, self._time(level)), noise, self.num_steps, key)

    def _time(self, level: Float[Array, "batch"]) -> Float[Array, "batch"]:
        """What the denoiser is told of the noise level."""
        return level * self.sampler.schedule.num_train_timesteps


def _captions(parents: Parents) -> list[str]:
    if len(parents) != 1:
        raise RecordError(f"an image node reads exactly one caption, got the parents {', '.join(parents) or 'none'}")
    [(name, captions)] = parents.items()
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise RecordError(f"{name!r} in row {row} must be a string (a caption), not {kind(caption)}")
    return list(captions)


def _stratified(keys: Key[Array, "batch"], strata: int) -> Float[Array, "batch"]:
    """Uniform numbers; the rows of a group share the start that its first row draws and lie 1/strata apart."""
    if len(keys) % strata:
        raise ValueError(f"{len(keys)} rows do not divide into groups of strata={strata}")
    start = jax.vmap(jax.random.uniform)(keys[::strata])[:, None]
    u = (start + jnp.arange(strata) / strata).reshape(-1) % 1.0
    return jnp.minimum(u, 1.0 - jnp.finfo(u.dtype).epsneg)
