"""The models that make up a pipeline, one folder each: what they are called, how they are read and written."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sysdpo_jax.components.source import Source
from sysdpo_jax.models.autoencoder import AutoencoderKL
from sysdpo_jax.models.clip import CLIPTextEncoder
from sysdpo_jax.models.mmdit import MMDiT
from sysdpo_jax.models.t5 import T5Encoder
from sysdpo_jax.models.unet import UNet2DCondition
from sysdpo_jax.pretrained import autoencoder, clip, mmdit, t5, unet
from sysdpo_jax.pretrained.base import ConfigReader, read_json
from sysdpo_jax.pretrained.fields import with_ours
from sysdpo_jax.pretrained.handing_on import handed_on, recalled, write_like
from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.params import Shardings, load_params, stored_tensors, widest_dtype
from sysdpo_jax.pretrained.refusals import refuse_adapter
from sysdpo_jax.pretrained.tensors import Safetensors, weight_files, write_safetensors
from sysdpo_jax.typing import Params

# What diffusers calls the weight files of its models.
WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Part:
    """A kind of model. Everything but the module is a function of its configuration.

    package, cls: what model_index.json calls it. stem: of its weight files. read, write: config.json to our
    configuration and back. naming: of its tensors. example: inputs for the module's `init`.
    """

    package: str
    stem: str
    module: Callable[[Any], Any]
    cls: Callable[[Any], str]
    read: Callable[[ConfigReader], Any]
    write: Callable[[Any], dict[str, Any]]
    naming: Callable[[Any], Naming]
    example: Callable[[Any], tuple[Any, ...]]


@dataclass(frozen=True)
class Stored:
    """A part as it lies in a folder: its configuration, read, and its weights, not read yet. variant: as for `load`."""

    part: Part
    folder: Path
    config: Any
    variant: str | None

    def load(
        self, dtype: str, param_dtype: str | None, shardings: Shardings | None = None, **changes: Any
    ) -> tuple[Any, Params]:
        """Module and parameters; dtype and param_dtype as for `load`. changes: other fields of our configuration."""
        source = part_tensors(self.folder, self.part, self.variant)
        module = self.part.module(replace(self.config, dtype=dtype, **changes))
        naming = self.part.naming(self.config)
        return module, load_params(abstract_params(self.part, module), source, naming, param_dtype, shardings)


def read_part(folder: Path, part: Part, variant: str | None) -> Stored:
    """Raises `CheckpointError` for a configuration that is not of this kind of part, and for an adapter beside it."""
    refuse_adapter(folder)
    file = folder / "config.json"
    return Stored(part, folder, part.read(ConfigReader(read_json(file), str(file))), variant)


def has_variant(folder: Path, part: Part, variant: str | None) -> bool:
    """Whether a part's folder has weights of that variant."""
    return any(path.exists() for path in weight_files(folder, part.stem, variant))


def part_tensors(folder: Path, part: Part, variant: str | None) -> Safetensors:
    """The weights in a part's folder. A pipeline need not have every part in every variant."""
    return Safetensors(folder, part.stem, variant if has_variant(folder, part, variant) else None)


@functools.cache
def abstract_params(part: Part, module: Any) -> Params:
    """Shapes and types of a part's parameters; nothing is computed. Tracing takes a second: equal parts share it."""
    inputs = part.example(module.config)
    return jax.eval_shape(lambda key: module.init(key, *inputs), jax.random.key(0))["params"]


def write_part(
    folder: Path, part: Part, module: Any, params: Params, source: Source | None, ids: Mapping[str, int | None]
) -> list[str]:
    """Write a part's config.json and weights; returns its entry in model_index.json.

    source: the folder that the part was read from. ids: token ids for a config.json that does not name them.
    """
    folder.mkdir()

    def read(values: Mapping[str, Any]) -> Any:
        return with_ours(part.read(ConfigReader(values, "the config.json to be written")), module.config)

    values = {**ids, **handed_on(recalled(source, "config.json"), part.write(module.config), module.config, read)}
    # Those of transformers' models say the precision of the file beside them.
    precision = widest_dtype(params)
    values |= {name: precision for name in ("dtype", "torch_dtype") if name in values}
    write_like(folder, "config.json", values, source)
    write_safetensors(folder, part.stem, stored_tensors(params, part.naming(module.config)))
    return [part.package, part.cls(module.config)]


def _tokens(config: Any) -> tuple[Any, ...]:
    return (jnp.zeros((1, 2), jnp.int32),)


def _pixels(config: Any) -> tuple[Any, ...]:
    side = 2 ** len(config.block_out_channels)
    return (jnp.zeros((1, side, side, config.in_channels)),)


def _for_unet(config: Any) -> tuple[Any, ...]:
    inputs = (*_latents(config), jnp.zeros((1, 1, config.cross_attention_dim)))
    if config.addition_embed_type is None:
        return inputs
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return (*inputs, jnp.zeros((1, pooled)), jnp.zeros((1, 6)))


def _for_mmdit(config: Any) -> tuple[Any, ...]:
    text, pooled = jnp.zeros((1, 1, config.joint_attention_dim)), jnp.zeros((1, config.pooled_projection_dim))
    return (*_latents(config), text, pooled)


def _latents(config: Any) -> tuple[Any, ...]:
    return jnp.zeros((1, 16, 16, config.in_channels)), jnp.zeros(1)


CLIP = Part(
    "transformers",
    "model",
    CLIPTextEncoder,
    lambda config: clip.PROJECTED if config.with_projection else clip.PLAIN,
    clip.read,
    clip.write,
    clip.naming,
    _tokens,
)
T5 = Part("transformers", "model", T5Encoder, lambda config: "T5EncoderModel", t5.read, t5.write, t5.naming, _tokens)
VAE = Part(
    "diffusers",
    WEIGHTS,
    AutoencoderKL,
    lambda config: autoencoder.CLASS,
    autoencoder.read,
    autoencoder.write,
    autoencoder.naming,
    _pixels,
)
UNET = Part(
    "diffusers", WEIGHTS, UNet2DCondition, lambda config: unet.CLASS, unet.read, unet.write, unet.naming, _for_unet
)
MMDIT = Part("diffusers", WEIGHTS, MMDiT, lambda config: mmdit.CLASS, mmdit.read, mmdit.write, mmdit.naming, _for_mmdit)
