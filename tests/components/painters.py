"""A small painter whose encoders and autoencoder are frozen, and which notes what they encode."""

from dataclasses import fields, is_dataclass
from typing import ClassVar

import jax
import numpy as np

from sysdpo_jax import Diffusion, FrozenText, LatentCodec, TextEncoder
from sysdpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from tests.components.stubs import Affine, Embedding, word_tokenizer

VAE = AutoencoderKL(
    AutoencoderConfig(block_out_channels=(8,), layers_per_block=1, latent_channels=2, norm_num_groups=2)
)

# Of equal components one program each: run operation by operation, the autoencoder is a hundred of them.
encode = jax.jit(lambda node, params, features: node.encode(params, features), static_argnums=0)
log_prob = jax.jit(lambda node, params, features, key: node.log_prob(params, features, key), static_argnums=0)


class Counting(TextEncoder):
    """Notes how many rows each call encodes."""

    calls: ClassVar[list[int]] = []

    def encode(self, params, features):
        jax.debug.callback(lambda rows: self.calls.append(int(rows)), features["tokens"].shape[0])
        return super().encode(params, features)


class CountingCodec(LatentCodec):
    calls: ClassVar[list[int]] = []

    def encode(self, params, pixels):
        jax.debug.callback(lambda rows: self.calls.append(int(rows)), pixels.shape[0])
        return super().encode(params, pixels)


def painter(frozen=True, **settings):
    text = Counting(Embedding(), word_tokenizer(), 5)
    defaults = {
        "denoiser": Affine(),
        "text": FrozenText(text) if frozen else text,
        "codec": CountingCodec(VAE, ((4, 6),), 2),
        "num_steps": 2,
    }
    return Diffusion(**(defaults | settings))


def images(number):
    return list(np.random.default_rng(3).integers(0, 256, (number, 4, 6, 3), np.uint8))


def encoded_since():
    """Rows of each call of the text encoder and of the autoencoder since this was asked last."""
    jax.effects_barrier()
    made = [*Counting.calls], [*CountingCodec.calls]
    Counting.calls.clear()
    CountingCodec.calls.clear()
    return made


def arrays_in(value, path, seen=None):
    """The places of arrays in the fields of dataclasses, at any depth."""
    seen = set() if seen is None else seen
    if isinstance(value, np.ndarray | jax.Array):
        yield path
    elif id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            parts = [(f"{path}[{key!r}]", part) for key, part in value.items()]
        elif isinstance(value, list | tuple | set | frozenset):
            parts = [(f"{path}[{place}]", part) for place, part in enumerate(value)]
        else:
            own = [(f.name, getattr(value, f.name, None)) for f in fields(value)] if is_dataclass(value) else []
            parts = [(f"{path}.{name}", part) for name, part in own]
        for name, part in parts:
            yield from arrays_in(part, name, seen)
