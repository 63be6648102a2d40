"""Components: the generators a system is made of."""

from sysdpo_jax.components.base import Component, RecordError
from sysdpo_jax.components.categorical import Categorical
from sysdpo_jax.components.codec import Codec, PixelCodec
from sysdpo_jax.components.diffusion import Diffusion
from sysdpo_jax.components.flow_matching import FlowMatching
from sysdpo_jax.components.gaussian import Gaussian
from sysdpo_jax.components.language_model import LanguageModel
from sysdpo_jax.components.latent_codec import LatentCodec, bucket_sizes
from sysdpo_jax.components.stable_diffusion_text import SD3Text, SDXLText
from sysdpo_jax.components.text import FrozenText, TextConditioner, TextEncoder
from sysdpo_jax.components.tool import Tool

__all__ = [
    "Categorical",
    "Codec",
    "Component",
    "Diffusion",
    "FlowMatching",
    "FrozenText",
    "Gaussian",
    "LanguageModel",
    "LatentCodec",
    "PixelCodec",
    "RecordError",
    "SD3Text",
    "SDXLText",
    "TextConditioner",
    "TextEncoder",
    "Tool",
    "bucket_sizes",
]
