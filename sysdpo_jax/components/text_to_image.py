"""What diffusion and flow-matching components share: text in, latents out, the surrogate log-probability in between.

A subclass says how a clean latent is corrupted and how noise becomes a latent; everything else is here.
Axes: B batch, S text tokens, h w c latent, D text width.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sysdpo_jax.components.base import Component, Metrics, RecordError
from sysdpo_jax.components.codec import Codec
from sysdpo_jax.generation.samplers import Denoiser, guided
from sysdpo_jax.generation.schedules import expand
from sysdpo_jax.typing import Features, Params, Parents


class Corrupted(NamedTuple):
    """A training example of a denoiser: its input, its time, the right answer and the weight T * omega of its error."""

    noisy: Array
    time: Array
    target: Array
    weight: Array


@dataclass(frozen=True)
class TextToImage(Component):
    """An image given one caption.

    denoiser: module (latents [B, h, w, c], time [B], text [B, S, D]) -> prediction [B, h, w, c].
    text_encoder: module (token ids [B, S]) -> [B, S, D]; trained with the denoiser.
    tokenizer: Hugging Face tokenizer with a padding token; captions are padded to text_length tokens.
    codec: images to latents and back. num_steps, guidance_scale: of the sampler.
    caption_dropout: share of rows whose caption is replaced by the empty one in `log_prob`, for guidance.
    strata: rows come in groups of this many whose times are spread evenly (set it to the node's plate); 1: independent.
    """

    denoiser: nn.Module
    text_encoder: nn.Module
    tokenizer: Any = field(compare=False, repr=False)
    codec: Codec
    text_length: int
    num_steps: int = 50
    guidance_scale: float = 1.0
    caption_dropout: float = 0.0
    strata: int = 1

    @abstractmethod
    def corrupt(
        self, clean: Float[Array, "batch h w c"], noise: Float[Array, "batch h w c"], u: Float[Array, "batch"]
    ) -> Corrupted:
        """Noise the latents; u in [0, 1) chooses each row's time."""

    @abstractmethod
    def denoise(self, predict: Denoiser, noise: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        """Run the sampler from pure noise to clean latents."""

    def init(self, key: PRNGKeyArray) -> Params:
        text_key, image_key = jax.random.split(key)
        tokens = jnp.zeros((1, self.text_length), jnp.int32)
        encoder = self.text_encoder.init(text_key, tokens)["params"]
        text = self.text_encoder.apply({"params": encoder}, tokens)
        latents = jnp.zeros((1, *self.codec.latent_shape))
        denoiser = self.denoiser.init(image_key, latents, jnp.zeros(1), text)["params"]
        return {"denoiser": denoiser, "text_encoder": encoder}

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        """Images [height, width, channels] in [0, 1] and their captions -> latents and token ids.

        Raises `RecordError` for an image the codec refuses, a caption that is no string or is too long.
        """
        return {
            "latents": self.codec.encode(values),
            "tokens": self._tokens(_captions(parents)),
            "null_tokens": self._tokens([""] * len(values)),
        }

    def log_prob(self, params: Params, features: Features, key: PRNGKeyArray) -> Float[Array, "batch"]:
        return self.log_prob_with_metrics(params, features, key)[0]

    def log_prob_with_metrics(
        self, params: Params, features: Features, key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch"], Metrics]:
        """-(T omega / 2) * mean squared error at one (t, eps) drawn from the key, and that error as "mse".

        arXiv 2311.12908, equation 14; the expectation over (t, eps) outside -log sigmoid bounds the loss from above.
        """
        time_key, noise_key, drop_key = jax.random.split(key, 3)
        features = jax.tree.map(jnp.asarray, features)
        latents = features["latents"]
        rows = latents.shape[0]
        noise = jax.random.normal(noise_key, latents.shape, jnp.float32)
        example = self.corrupt(latents, noise, _stratified(time_key, rows, self.strata))
        tokens = features["tokens"]
        if self.caption_dropout:
            drop = jax.random.bernoulli(drop_key, self.caption_dropout, (rows, 1))
            tokens = jnp.where(drop, features["null_tokens"], tokens)
        prediction = self._predict(params, example.noisy, example.time, self._encode(params, tokens))
        # Reduced in float32 whatever the model computes in: a rounding error here is multiplied by the weight.
        error = prediction.astype(jnp.float32) - example.target
        inner = tuple(range(1, error.ndim))
        # The weight goes inside the sum: a product outside it may fuse with the subtraction of the reference and be
        # rounded there once less than the reference's, and equal models would then differ.
        scale = expand(-0.5 * example.weight / error[0].size, error)
        return jnp.sum(scale * error**2, axis=inner), {"mse": jnp.mean(error**2, axis=inner)}

    def sample(self, params: Params, parents: Parents, key: PRNGKeyArray) -> list[Any]:
        """One image [height, width, channels] in [0, 1] for each caption."""
        captions = _captions(parents)
        latents = self._sample(params, self._tokens(captions), self._tokens([""] * len(captions)), key)
        return list(self.codec.decode(np.asarray(latents)))

    @partial(jax.jit, static_argnums=0)
    def _sample(
        self, params: Params, tokens: Int[Array, "batch text"], null_tokens: Int[Array, "batch text"], key: PRNGKeyArray
    ) -> Float[Array, "batch h w c"]:
        noise = jax.random.normal(key, (tokens.shape[0], *self.codec.latent_shape))
        text, null = self._encode(params, tokens), self._encode(params, null_tokens)
        predict = guided(partial(self._predict, params), text, null, self.guidance_scale)
        return self.denoise(predict, noise)

    def _encode(self, params: Params, tokens: Int[Array, "batch text"]) -> Float[Array, "batch text width"]:
        text: Any = self.text_encoder.apply({"params": params["text_encoder"]}, tokens)
        return text

    def _predict(self, params: Params, latents: Array, time: Array, text: Array) -> Array:
        prediction: Any = self.denoiser.apply({"params": params["denoiser"]}, latents, time, text)
        return prediction

    def _tokens(self, captions: Sequence[str]) -> Int[np.ndarray, "batch text"]:
        ids = self.tokenizer(list(captions), padding="max_length", max_length=self.text_length)["input_ids"]
        for row, tokens in enumerate(ids):
            if len(tokens) > self.text_length:
                raise RecordError(
                    f"caption in row {row} has {len(tokens)} tokens, more than text_length={self.text_length}: "
                    f"raise it or shorten {captions[row]!r}"
                )
        return np.asarray(ids, np.int32).reshape(len(captions), self.text_length)


def _captions(parents: Parents) -> list[str]:
    if len(parents) != 1:
        raise RecordError(f"an image node reads exactly one caption, got the parents {', '.join(parents) or 'none'}")
    [(name, captions)] = parents.items()
    for row, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise RecordError(f"{name!r} in row {row} must be a string (a caption), not {type(caption).__name__}")
    return list(captions)


def _stratified(key: PRNGKeyArray, rows: int, strata: int) -> Float[Array, "batch"]:
    """Uniform numbers; the rows of one group share a random start and lie 1/strata apart, so each is uniform alone."""
    if rows % strata:
        raise ValueError(f"{rows} rows do not divide into groups of strata={strata}")
    start = jax.random.uniform(key, (rows // strata, 1))
    u = (start + jnp.arange(strata) / strata).reshape(-1) % 1.0
    return jnp.minimum(u, 1.0 - jnp.finfo(u.dtype).epsneg)
