"""Files of a trained component: those of Hugging Face where it has such a form."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from safetensors.numpy import save_file

import sysdpo_jax as sj
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.checkpoint import new_folder
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import name_of, user_code


@runtime_checkable
class Saves(Protocol):
    """A component that writes its own files."""

    def save(self, path: Path, params: Params) -> None:
        """Write the component into the new folder `path`."""
        ...


def write_component(
    folder: Path, component: sj.Component, params: Params, adapter: bool, base_model: str | None
) -> str | None:
    """Write into a new folder; the library that loads it, None for none.

    adapter: LoRA factors alone, where they can be. Raises `FileExistsError` where the folder holds something, and what
    saving raises.
    """
    if isinstance(component, sj.LanguageModel | sj.Diffusion | sj.FlowMatching):
        text = isinstance(component, sj.LanguageModel)
        if adapter:
            sj.pretrained.save_adapter(folder, component, params, base_model)
            return "peft" if text else "diffusers"
        sj.pretrained.save(folder, component, params)
        return "transformers" if text else "diffusers"
    with new_folder(folder) as made:
        if isinstance(component, Saves):
            with user_code(f"{name_of(type(component))}.save", CheckpointError, (CheckpointError,)):
                component.save(made, params)
        else:
            # safetensors writes the memory of an array as it lies.
            arrays = {path: np.ascontiguousarray(jax.device_get(leaf)) for path, leaf in by_path(params).items()}
            save_file(arrays, made / "parameters.safetensors")
    return None
