"""`load` and `save`: whole components from and to Hugging Face's folders."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.components import Component, Diffusion, FlowMatching, LanguageModel
from sysdpo_jax.io import replacing
from sysdpo_jax.pretrained.adapters import trained_beside, whole_modules, write_diffusers_adapter, write_peft_adapter
from sysdpo_jax.pretrained.base import CheckpointError
from sysdpo_jax.pretrained.language import decoder_naming, load_language_model, save_language_model
from sysdpo_jax.pretrained.params import Shardings, check_params
from sysdpo_jax.pretrained.pipelines import denoiser_part, load_pipeline, save_pipeline
from sysdpo_jax.pretrained.refusals import no_checkpoint, refuse_adapter, refuse_file, refuse_part
from sysdpo_jax.pretrained.sources import locate
from sysdpo_jax.pretrained.tensors import DTYPES
from sysdpo_jax.static import tuples
from sysdpo_jax.typing import Params


def load(
    path_or_hub_id: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str | None = "auto",
    shardings: Shardings | None = None,
    revision: str | None = None,
    variant: str | None = None,
    **settings: Any,
) -> tuple[Component, Params]:
    """Make a component and its parameters from a Hugging Face checkpoint.

    A decoder's folder (config.json) or GGUF file gives a `LanguageModel`; a pipeline's folder (model_index.json) gives
    a `Diffusion` or `FlowMatching` whose autoencoder and text encoders are frozen entries of the parameters.

    Args:
        path_or_hub_id: Local folder or file, or the name of a repository.
        dtype: Of the computation.
        param_dtype: Of the parameters, by default as they are stored; train whole models in float32.
        remat: What the backward pass computes again: None for nothing, "full" for all but the inputs of layers, "whole"
            for all but the inputs of the model, or a policy of `models/remat.py`; "auto" takes the fastest of them that
            fits the devices' memory.
        shardings: Function from abstract parameters to their shardings, for example `functools.partial(tree_shardings,
            mesh)`; by default all are on the first device. Each device's block is read by itself: no host holds a whole
            model that it does not keep.
        revision: Of the repository.
        variant: Of the weights' file names, such as "fp16"; parts that lack it are read from their plain files.
        settings: Fields of the component (max_new_tokens, guidance_scale ...); for pipelines also `train_text=True`,
            which makes the text encoders part of what is trained, and `parts`, folders or repositories that take the
            place of the pipeline's own parts, by their names in model_index.json, such as {"vae": "path"}; where a path
            is a whole pipeline it stands for its part of that name. {"text_encoder_3": None} leaves T5 out. Lists stand
            for tuples.

    Returns:
        The component and its parameters.

    Raises:
        CheckpointError: For a checkpoint that is incomplete, of an unknown kind or pickled, whose parts do not fit each
            other or beside which an adapter lies, naming the remedy.
        ValueError: For a dtype that does not exist.
    """
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value not in (*DTYPES.values(), None):
            raise ValueError(f"{name}={value!r} is none of {', '.join(sorted(DTYPES.values()))}")
    # Settings that come from JSON or YAML have lists where a component, which is static, has tuples.
    settings = {name: tuples(value) for name, value in settings.items()}
    parts = settings.get("parts") or {}
    path = locate(path_or_hub_id, revision, variant, without=parts if isinstance(parts, Mapping) else ())
    refuse_file(path)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "shardings": shardings}
    if path.is_dir():
        refuse_adapter(path)
        if (path / "model_index.json").exists():
            return load_pipeline(path, variant=variant, **options, **settings)
        if (path / "config.json").exists():
            refuse_part(path)
        else:
            ggufs = sorted(path.glob("*.gguf"))
            if len(ggufs) > 1:
                raise CheckpointError(f"{path} holds no config.json and {len(ggufs)} GGUF files: pass the one you mean")
            if not ggufs:
                raise no_checkpoint(path)
            path = ggufs[0]
    return load_language_model(path, variant=variant, **options, **settings)


def save(path: str | Path, component: Component, params: Params) -> None:
    """Write a component as `load` reads it, in the layout of transformers or diffusers and in the parameters' dtype.

    LoRA factors are merged into their kernels, one layer at a time; `save_adapter` writes them apart. What was read and
    is not trained goes out unchanged: configurations with all their keys, sampling settings of a
    generation_config.json, the tokenizer's files, a pipeline's scheduler file. What of it the component contradicts,
    because it was changed after loading, is written anew. Nothing half-written is left behind.

    Args:
        path: A folder that does not exist or is empty.
        component: From `load`.
        params: Its parameters.

    Raises:
        FileExistsError: When `path` is anything else.
        CheckpointError: For a component that has no Hugging Face form and for parameters that are not its own.
    """
    component = _writable(component, params)
    with new_folder(path) as folder:
        if isinstance(component, LanguageModel):
            save_language_model(folder, component, params)
        else:
            save_pipeline(folder, component, params)


def save_adapter(path: str | Path, component: Component, params: Params, base_model: str | None = None) -> None:
    """Write the LoRA factors alone: PEFT's layout for a language model, diffusers' for a denoiser.

    What was trained beside the factors is found by comparing with the files that the component was loaded from, which
    must still be there. Embeddings and the head of a language model that does not tie them are written whole, where
    PEFT has a place for them. A component that was not loaded cannot be compared, and a warning says so.

    Args:
        path: a new or empty folder.
        component: a language model or a text-to-image component.
        params: its parameters, LoRA's factors among them.
        base_model: folder or repository of the model they belong to, noted in PEFT's configuration.

    Raises:
        CheckpointError: as `save` does, for parameters without LoRA, and for what was trained that an adapter has no
            place for, by name: `save` writes it.
    """
    component = _writable(component, params)
    others = [key for key in params if key != "denoiser" and key not in component.frozen]
    others = [] if isinstance(component, LanguageModel) else others
    if others:
        raise CheckpointError(
            f"only a denoiser's factors can be saved apart, not those of {', '.join(others)}: use save"
        )
    with new_folder(path) as folder:
        if isinstance(component, LanguageModel):
            naming = decoder_naming(component.decoder.config)
            whole = trained_beside(component, params, naming, whole_modules(component, params))
            write_peft_adapter(folder, params, naming, base_model, whole)
        else:
            name, part = denoiser_part(component)
            naming = part.naming(component.denoiser.config)  # type: ignore[attr-defined]
            trained_beside(component, params["denoiser"], naming, frozenset())
            write_diffusers_adapter(folder, params["denoiser"], naming, name)


def _writable(component: Component, params: Params) -> LanguageModel | Diffusion | FlowMatching:
    """The component. Raises `CheckpointError` when it has no Hugging Face form or the parameters are not its own."""
    if not isinstance(component, LanguageModel | Diffusion | FlowMatching):
        raise CheckpointError(f"a {type(component).__name__} has no Hugging Face form: use a run's checkpoints")
    check_params(component, params)
    return component


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside `path` that takes its place at the end, or disappears on an error.

    Raises `FileExistsError` when `path` exists and is not an empty folder.
    """
    path = Path(path)
    if jax.process_count() > 1:
        raise CheckpointError(
            "checkpoints are written by one process: restore the run's checkpoint in one, and save there"
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists: choose another folder, or empty it first")
    with replacing(path) as folder:
        folder.mkdir()
        yield folder
