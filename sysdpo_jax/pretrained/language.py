"""Decoder checkpoints as LanguageModel components, and back."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from sysdpo_jax.components import LanguageModel
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.pretrained.base import CheckpointError, ConfigReader, check_settings, read_json, write_json
from sysdpo_jax.pretrained.decoders import find_family
from sysdpo_jax.pretrained.fit import check_vocabulary
from sysdpo_jax.pretrained.gguf import read_gguf
from sysdpo_jax.pretrained.names import Naming
from sysdpo_jax.pretrained.params import Shardings, load_params, stored_tensors
from sysdpo_jax.pretrained.tensors import Safetensors, TensorSource, write_safetensors
from sysdpo_jax.typing import Params

# Room for prompt and completion when the caller says nothing: the lengths of TRL's DPO recipes.
DEFAULT_PROMPT, DEFAULT_NEW = 512, 512
# What holds a decoder's tokens; one of them is in every folder with a tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


def load_language_model(
    path: Path,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    remat: str | None = None,
    shardings: Shardings | None = None,
    variant: str | None = None,
    **settings: Any,
) -> tuple[LanguageModel, Params]:
    """A LanguageModel and its parameters from a folder of config.json and safetensors, or from a GGUF file.

    settings: fields of LanguageModel, such as a tokenizer in place of the checkpoint's; by default prompts and
    completions have room for 512 tokens each, or half of max_position_embeddings, and sampling also stops at the ends
    that generation_config.json lists, or config.json where that names none.
    Raises `CheckpointError` for a model that is not known or would be computed wrongly, files that are missing or
    damaged (the tokenizer's too, unless one is passed), and tensors that do not fit.
    """
    check_settings(LanguageModel, settings, {"decoder"})
    source: TensorSource
    tokenizer = settings.pop("tokenizer", None)
    own_tokenizer = tokenizer is None
    if path.is_file():
        values, source, tokenizer = read_gguf(path, tokenizer)
        generation: dict[str, Any] = {}
        where = str(path)
    else:
        where = str(path / "config.json")
        values, source = read_json(path / "config.json"), Safetensors(path, "model", variant)
        generation = read_json(file) if (file := path / "generation_config.json").exists() else {}
        tokenizer = read_tokenizer(path) if tokenizer is None else tokenizer
    config = find_family(values.get("model_type", "(none)"), where).read(ConfigReader(values, where))
    config = replace(config, dtype=dtype, remat=remat, param_dtype=param_dtype or config.param_dtype)
    half = config.max_position_embeddings // 2
    defaults: dict[str, Any] = {
        "max_prompt_length": min(DEFAULT_PROMPT, half),
        "max_new_tokens": min(DEFAULT_NEW, half),
        "stop_tokens": _ends(generation, values, tokenizer),
    }
    # Settings are checked before the weights are read, which may take minutes.
    component = LanguageModel(Decoder(config), tokenizer, **defaults | settings)
    if own_tokenizer:
        check_vocabulary(tokenizer, config.vocab_size, str(path))
    abstract = jax.eval_shape(component.init, jax.random.key(0))
    return component, load_params(abstract, source, decoder_naming(config), param_dtype, shardings)


def read_tokenizer(path: Path) -> Any:
    """The tokenizer in a folder. Raises `CheckpointError` where there is none or it cannot be read."""
    from transformers import AutoTokenizer

    remedy = f"fetch the tokenizer's files ({' or '.join(VOCABULARIES)}, and what lies beside) or pass tokenizer=..."
    # transformers makes an empty tokenizer of some families, without a word.
    if not any((path / name).exists() for name in VOCABULARIES):
        raise CheckpointError(f"{path} holds no tokenizer: {remedy}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be read ({error}): {remedy}") from error


def save_language_model(folder: Path, component: LanguageModel, params: Params) -> None:
    """config.json, generation_config.json, tokenizer and safetensors, as transformers lays them out."""
    config, tokenizer = component.decoder.config, component.tokenizer
    ends, pad = (tokenizer.eos_token_id, *component.stop_tokens), tokenizer.pad_token_id
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": ends[0] if len(ends) == 1 else list(ends),
        # transformers makes no model with a padding token beyond its vocabulary.
        "pad_token_id": pad if pad is not None and pad < config.vocab_size else None,
    }
    first = jax.tree.leaves(params)[0]
    written = find_family(config.model_type, "the component").write(config)
    # The first is what transformers 5 reads, the second what older versions and vLLM read.
    dtypes = dict.fromkeys(("dtype", "torch_dtype"), str(first.dtype))
    write_json(folder / "config.json", written | special | dtypes)
    write_json(folder / "generation_config.json", special)
    tokenizer.save_pretrained(folder)
    write_safetensors(folder, "model", stored_tensors(params, decoder_naming(config)))


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
