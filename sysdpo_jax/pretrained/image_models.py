"""The models that text-to-image pipelines are made of, one folder each: configurations, names of tensors, files.

They are called and configured as in diffusers (denoisers, autoencoder) and transformers (text encoders).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sysdpo_jax.components.source import Source
from sysdpo_jax.models.autoencoder import AutoencoderConfig, AutoencoderKL
from sysdpo_jax.models.clip import CLIPTextConfig, CLIPTextEncoder
from sysdpo_jax.models.mmdit import MMDiT, MMDiTConfig
from sysdpo_jax.models.t5 import T5Config, T5Encoder
from sysdpo_jax.models.unet import UNet2DCondition, UNetConfig
from sysdpo_jax.pretrained.base import CLASSES, UNUSED, ConfigReader, express, read_json, read_model, with_ours
from sysdpo_jax.pretrained.handing_on import handed_on, recalled, write_like
from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.params import Shardings, load_params, stored_tensors, widest_dtype
from sysdpo_jax.pretrained.tensors import Safetensors, weight_files, write_safetensors
from sysdpo_jax.typing import Params


@dataclass(frozen=True)
class Part:
    """A kind of model; keys.yaml has its other keys.

    package: whose it is, "diffusers" or "transformers". classes: what config.json may call it, the first by default.
    module: what it is here. config: its dataclass, whose fields are keys of config.json.
    naming: of its tensors, by the configuration. example: inputs for the module's `init`, by the configuration.
    own: reads fields that have no key of their name, and checks and mends what the file says.
    states: the keys that say a configuration, beside the name of the class.
    """

    package: str
    classes: tuple[str, ...]
    module: type[Any]
    config: type[Any]
    naming: Callable[[Any], Naming]
    example: Callable[[Any], tuple[Any, ...]]
    own: Callable[[ConfigReader], dict[str, Any]] = lambda config: {}
    states: Callable[[Any], dict[str, Any]] = express

    @property
    def stem(self) -> str:
        """What the package calls its weight files."""
        return "model" if self.package == "transformers" else "diffusion_pytorch_model"

    def read(self, config: ConfigReader) -> Any:
        """The configuration that a config.json states. Raises `CheckpointError` for what the module cannot be."""
        if self.package == "diffusers":
            config.expect("_class_name", *self.classes)
        else:
            config.ignore(*UNUSED)
        config.expect_class(self.classes[0])
        return read_model(config, self.config, **self.own(config))

    def write(self, config: Any) -> dict[str, Any]:
        """config.json as the package writes it; whatever is left out has the package's default."""
        name = self.classes[0]
        named = {"_class_name": name} if self.package == "diffusers" else {"architectures": [name]}
        return {**named, **CLASSES[name].writes, **self.states(config)}


def _latents(config: Any) -> tuple[Any, ...]:
    """Latents and times."""
    return jnp.zeros((1, 16, 16, config.in_channels)), jnp.zeros(1)


def _read_unet(config: ConfigReader) -> dict[str, Any]:
    only_cross = config.take("only_cross_attention", False)
    if only_cross is True or (isinstance(only_cross, list) and any(only_cross)):
        raise config.refused("only_cross_attention", "only False")
    return {}


def _unet_naming(config: UNetConfig) -> Naming:
    return Naming(
        # In time_embedding and add_embedding the number is part of the name, not a place in a list.
        rename=((r"_embedding\.linear\.(\d)\.", r"_embedding.linear_\1."),),
        stacked="transformer_blocks",
        # The transformers' projections, which older models store as 1 x 1 convolutions.
        pointwise=None if config.use_linear_projection else r"\.proj_(in|out)\.weight$",
    )


def _unet_example(config: Any) -> tuple[Any, ...]:
    """Latents, times, a text's states and, where they are added, its summary and the sizes."""
    inputs = (*_latents(config), jnp.zeros((1, 1, config.cross_attention_dim)))
    if config.addition_embed_type is None:
        return inputs
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return (*inputs, jnp.zeros((1, pooled)), jnp.zeros((1, 6)))


# Of Stable Diffusion 1, 2 and XL.
UNET = Part(
    "diffusers",
    ("UNet2DConditionModel",),
    UNet2DCondition,
    UNetConfig,
    _unet_naming,
    _unet_example,
    own=_read_unet,
)


def _read_mmdit(config: ConfigReader) -> dict[str, Any]:
    # A null stands for as many as go in, as in diffusers.
    config.null_means("out_channels", config.read("in_channels", int, MMDiTConfig.in_channels))
    return {}


def _mmdit_example(config: MMDiTConfig) -> tuple[Any, ...]:
    """Latents, times, a text's states and its summary."""
    text, pooled = jnp.zeros((1, 1, config.joint_attention_dim)), jnp.zeros((1, config.pooled_projection_dim))
    return (*_latents(config), text, pooled)


# The transformer of Stable Diffusion 3 and 3.5.
MMDIT = Part(
    "diffusers",
    ("SD3Transformer2DModel",),
    MMDiT,
    MMDiTConfig,
    lambda config: Naming(rename=((r"\.linear\.(\d)\.", r".linear_\1."),)),
    _mmdit_example,
    own=_read_mmdit,
)

BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
# The attention's names in the first versions of diffusers.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _read_autoencoder(config: ConfigReader) -> dict[str, Any]:
    config.null_means("sample_size", AutoencoderConfig.sample_size)
    levels = len(config.read("block_out_channels", tuple[int, ...], AutoencoderConfig.block_out_channels))
    for name, kind in BLOCKS.items():
        if list(config.read(name, tuple[str, ...], [kind])) != [kind] * levels:
            raise config.refused(name, f"only {kind!r} for each of the {levels} block_out_channels")
    return {}


def _autoencoder_states(config: AutoencoderConfig) -> dict[str, Any]:
    blocks = {name: [kind] * len(config.block_out_channels) for name, kind in BLOCKS.items()}
    return blocks | express(config)


def _pixels(config: AutoencoderConfig) -> tuple[Any, ...]:
    side = 2 ** len(config.block_out_channels)
    return (jnp.zeros((1, side, side, config.in_channels)),)


VAE = Part(
    "diffusers",
    ("AutoencoderKL",),
    AutoencoderKL,
    AutoencoderConfig,
    lambda config: Naming(
        aliases=tuple((rf"\.attentions\.0\.{old}\.", f".attentions.0.{new}.") for old, new in OLD_ATTENTION.items())
    ),
    _pixels,
    own=_read_autoencoder,
    states=_autoencoder_states,
)

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


def _tokens(config: Any) -> tuple[Any, ...]:
    return (jnp.zeros((1, 2), jnp.int32),)


def _read_clip(config: ConfigReader) -> dict[str, Any]:
    classes = config.take("architectures")
    if classes not in ([PLAIN], [PROJECTED]):
        raise config.refused("architectures", f"only {PLAIN} or {PROJECTED}")
    return {"with_projection": classes == [PROJECTED]}


def _clip_states(config: CLIPTextConfig) -> dict[str, Any]:
    return {"architectures": [PROJECTED if config.with_projection else PLAIN], **express(config, "with_projection")}


CLIP = Part(
    "transformers",
    (PLAIN, PROJECTED),
    CLIPTextEncoder,
    CLIPTextConfig,
    lambda config: Naming(
        # Our tree leaves out the levels that hold nothing else. Written with "text_model.", which every version reads.
        rename=(
            (r"^(token|position)_embedding\.", r"text_model.embeddings.\1_embedding."),
            (r"^layers\.", "text_model.encoder.layers."),
            (r"^final_layer_norm\.", "text_model.final_layer_norm."),
        ),
        # transformers 5 writes a CLIPTextModel without it.
        aliases=((r"^(?!text_model\.|text_projection\.)", "text_model."),),
        # 0, 1, 2 ..., which older versions stored.
        ignored=r"^text_model\.embeddings\.position_ids$",
    ),
    _tokens,
    own=_read_clip,
    states=_clip_states,
)


def _read_t5(config: ConfigReader) -> dict[str, Any]:
    # Absent it would mean "relu", so the key is required.
    config.take("feed_forward_proj")
    return {}


# Version 1.1, the third text encoder of Stable Diffusion 3; also the encoder of a whole T5.
T5 = Part(
    "transformers",
    ("T5EncoderModel",),
    T5Encoder,
    T5Config,
    lambda config: Naming(
        rename=((r"\.wi\.(\d)\.", r".wi_\1."),),
        # Stored once or twice, under the name of the encoder's module.
        copies=(("encoder.embed_tokens.weight", "shared.weight"),),
        ignored=r"^(decoder|lm_head)\.",
    ),
    _tokens,
    own=_read_t5,
)

# By their names in model_index.json; a safety checker is none of them.
PARTS: dict[str, Part] = {
    "unet": UNET,
    "transformer": MMDIT,
    "vae": VAE,
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "text_encoder_3": T5,
}


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
    """Raises `CheckpointError` for a configuration that is not of this kind of part."""
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
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *part.example(module.config)))["params"]


def write_part(
    folder: Path, part: Part, module: Any, params: Params, source: Source, ids: Mapping[str, int | None]
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
    return [part.package, values["_class_name"] if part.package == "diffusers" else values["architectures"][0]]
