"""Decoder checkpoints as LanguageModel components, and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.components import LanguageModel
from sysdpo_jax.components.source import Source
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.pretrained.base import ConfigReader, check_settings, read_json
from sysdpo_jax.pretrained.decoders import find_family
from sysdpo_jax.pretrained.gguf import read_gguf
from sysdpo_jax.pretrained.handing_on import NOWHERE, recalled, remember, write_like
from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.params import Shardings, TensorSource, load_params, stored_tensors, widest_dtype
from sysdpo_jax.pretrained.tensors import Safetensors, write_safetensors
from sysdpo_jax.pretrained.tokenizer_files import FILES, check_vocabulary, read_tokenizer, write_tokenizer
from sysdpo_jax.typing import Params

# Room for prompt and completion when the caller says nothing: the lengths of TRL's DPO recipes.
DEFAULT_PROMPT, DEFAULT_NEW = 512, 512


def load_language_model(
    path: Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str | None = "auto",
    shardings: Shardings | None = None,
    variant: str | None = None,
    **settings: Any,
) -> tuple[LanguageModel, Params]:
    """Make a LanguageModel and its parameters from a folder of config.json and safetensors, or from a GGUF file.

    Args:
        path: The folder or the file.
        dtype: As for `load`.
        param_dtype: As for `load`.
        remat: As for `load`.
        shardings: As for `load`.
        variant: As for `load`.
        settings: Fields of LanguageModel, such as a tokenizer in place of the checkpoint's; by default prompts and
            completions have room for 512 tokens each, or half of max_position_embeddings, and sampling also stops at
            the ends that generation_config.json lists, or config.json where that names none.

    Returns:
        The component and its parameters.

    Raises:
        CheckpointError: For a model that is not known or would be computed wrongly, files that are missing or damaged
            (the tokenizer's too, unless one is passed), and tensors that do not fit.
    """
    check_settings(LanguageModel, settings, {"decoder", "source"})
    tensors: TensorSource
    tokenizer = settings.pop("tokenizer", None)
    own_tokenizer = tokenizer is None
    if path.is_file():
        values, tensors, tokenizer = read_gguf(path, tokenizer)
        source, generation = Source(path.absolute()), {}
        where = str(path)
    else:
        where = str(path / "config.json")
        values, tensors = read_json(path / "config.json"), Safetensors(path, "model", variant)
        generation = read_json(file) if (file := path / "generation_config.json").exists() else {}
        source = remember(path, variant, ("config.json", "generation_config.json", *FILES))
        tokenizer = read_tokenizer(path, " or pass tokenizer=...") if tokenizer is None else tokenizer
    config = find_family(values.get("model_type", "(none)"), where).read(ConfigReader(values, where))
    config = replace(config, dtype=dtype, remat=remat, param_dtype=param_dtype or config.param_dtype)
    half = config.max_position_embeddings // 2
    defaults: dict[str, Any] = {
        "max_prompt_length": min(DEFAULT_PROMPT, half),
        "max_new_tokens": min(DEFAULT_NEW, half),
        "stop_tokens": _ends(generation, values, tokenizer),
    }
    # Settings are checked before the weights are read, which may take minutes.
    component = LanguageModel(Decoder(config), tokenizer, **defaults | settings, source=source)
    if own_tokenizer:
        check_vocabulary(tokenizer, config.vocab_size, str(path))
    abstract = jax.eval_shape(lambda: component.init(jax.random.key(0)))
    return component, load_params(abstract, tensors, decoder_naming(config), param_dtype, shardings)


def save_language_model(folder: Path, component: LanguageModel, params: Params) -> None:
    """config.json, generation_config.json, tokenizer and safetensors, as transformers lays them out.

    Of the files that the component was read from all is kept that it does not contradict.
    """
    config, tokenizer, source = component.decoder.config, component.tokenizer, component.source or NOWHERE
    read, generation = recalled(source, "config.json"), recalled(source, "generation_config.json")
    as_read = write_tokenizer(folder, tokenizer, source)
    ends, pad = (tokenizer.eos_token_id, *component.stop_tokens), tokenizer.pad_token_id
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        "pad_token_id": pad,
    }
    # The files' own ids are right as long as tokenizer and ends are those that were read with them.
    changed = {} if as_read and component.stop_tokens == _ends(generation, read, tokenizer) else special
    written = special | find_family(config.model_type, "the component").write(config, read) | changed
    if not 0 <= (written["pad_token_id"] or 0) < config.vocab_size:
        # transformers makes no model with a padding token beyond its vocabulary.
        written["pad_token_id"] = None
    # The first is what transformers 5 reads, the second what older versions and vLLM read.
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), widest_dtype(params))
    write_like(folder, "config.json", written | dtypes, source)
    write_like(folder, "generation_config.json", special | generation | changed, source)
    write_safetensors(folder, "model", stored_tensors(params, decoder_naming(config)))


def base_tensors(component: LanguageModel, source: Source) -> TensorSource:
    """The weights that the component was loaded with."""
    if source.path.is_file():
        return read_gguf(source.path, component.tokenizer).tensors
    return Safetensors(source.path, "model", source.variant)


def decoder_naming(config: DecoderConfig) -> Naming:
    """Everything but the head lies below "model."; tied embeddings may be stored twice."""
    copies = (("lm_head.weight", "model.embed_tokens.weight"),) if config.tie_word_embeddings else ()
    # Buffers of rotary frequencies in checkpoints of 2023.
    ignored = r"\.rotary_emb\.inv_freq$"
    return Naming(rename=((r"^(?!lm_head)", "model."),), stacked="layers", copies=copies, ignored=ignored)


def _ends(generation: dict[str, Any], config: dict[str, Any], tokenizer: Any) -> tuple[int, ...]:
    """The ends that the first of two files naming any lists, without the tokenizer's own."""
    ends = generation.get("eos_token_id")
    if ends is None:
        ends = config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return tuple(end for end in listed if end != tokenizer.eos_token_id)
