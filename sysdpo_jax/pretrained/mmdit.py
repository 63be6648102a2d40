"""Configurations of diffusers' SD3Transformer2DModel, the denoiser of Stable Diffusion 3 and 3.5, in and out."""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from sysdpo_jax.models.mmdit import POSITION_GRIDS, MMDiTConfig, position_table, position_waves
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader
from sysdpo_jax.pretrained.fields import build, express, whole
from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.tensors import TensorSource

TABLE = "pos_embed.pos_embed"
# Sines rounded to bfloat16 are off by at most 2^-9; tables of different grids differ by about 1.
TABLE_TOLERANCE = 4e-3
CLASS = "SD3Transformer2DModel"
# fmt: off
NUMBERS = (
    "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
    "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "pos_embed_max_size",
)
# fmt: on


def read(config: ConfigReader) -> MMDiTConfig:
    """The configuration that a config.json states, with the grid that diffusers gives a new model's positions.

    The file does not say how the positions of its weights were made: `find_positions` looks. Raises `CheckpointError`.
    """
    config.expect("_class_name", CLASS)
    default = MMDiTConfig()
    values: dict[str, Any] = {name: whole(config, name, getattr(default, name)) for name in NUMBERS}
    # A null stands for as many as go in, as in diffusers.
    channels = config.take("out_channels", default.out_channels)
    values["out_channels"] = values["in_channels"] if channels is None else channels
    # Files of Stable Diffusion 3 are older than these two.
    values["dual_attention_layers"] = tuple(config.take("dual_attention_layers", ()))
    values["qk_norm"] = config.take("qk_norm", None)
    return build(config, MMDiTConfig, values)


def write(config: MMDiTConfig) -> dict[str, Any]:
    """config.json as diffusers writes it. It has no word for position_grid, which goes with the weights."""
    return {"_class_name": CLASS, **express(config, "position_grid")}


def naming(config: MMDiTConfig) -> Naming:
    """The names of its tensors; the table of positions is one of them and follows from the configuration."""
    return Naming(rename=((r"\.linear\.(\d)\.", r".linear_\1."),), derived={TABLE: partial(position_table, config)})


def find_positions(config: MMDiTConfig, source: TensorSource) -> MMDiTConfig:
    """The configuration with the position_grid that made the table beside its weights.

    Unchanged when the source has no table, as a new model of diffusers starts. Raises `CheckpointError` for a table of
    another size or grid. Reads one row of patches at a time: the whole is up to a gigabyte.
    """
    if TABLE not in source.shapes:
        return config
    side, expected = config.pos_embed_max_size, (1, config.pos_embed_max_size**2, config.width)
    if source.shapes[TABLE] != expected:
        raise CheckpointError(
            f"{source.where}: {TABLE} is {list(source.shapes[TABLE])}, the configuration says {list(expected)}"
        )
    candidates = {grid: replace(config, position_grid=grid) for grid in POSITION_GRIDS}
    waves = {grid: position_waves(candidate) for grid, candidate in candidates.items()}
    for row in range(side):
        patches = slice(row * side, (row + 1) * side)
        stored = source.read(TABLE, (slice(0, 1), patches, slice(0, config.width)))[0].astype(np.float32)
        columns, rows = np.split(stored, 2, axis=-1)
        waves = {
            grid: wave
            for grid, wave in waves.items()
            if max(np.abs(columns - wave).max(), np.abs(rows - wave[row]).max()) <= TABLE_TOLERANCE
        }
    if not waves:
        raise CheckpointError(
            f"{source.where}: {TABLE} is none of the tables known here ({', '.join(POSITION_GRIDS)} for sample_size="
            f"{config.sample_size}): the model would be computed wrongly"
        )
    # Where the grids agree on every patch, as they do when s is 16 and the largest size, either is right.
    return config if config.position_grid in waves else candidates[next(iter(waves))]
