"""Tokenizers: read and checked, handed on as they were read or, where they were changed or made here, written anew.

transformers 5 writes tokenizers that only version 5 reads (a class of its own, a list of extra special tokens), also
those that it read from files that every version reads. What is written anew is put in the form that 4.57 reads too.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from sysdpo_jax.components.source import Source
from sysdpo_jax.manifest import tokenizer_state
from sysdpo_jax.pretrained.base import CheckpointError, read_json, write_json
from sysdpo_jax.pretrained.handing_on import write_files

# What a folder may hold of a tokenizer, for any version and any backend.
# fmt: off
FILES = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece*.model", "tekken.json", "*.tiktoken", "chat_template.*",
    "additional_chat_templates/*.jinja",
)
# fmt: on
# What holds the tokens; one of them is in every folder with a tokenizer.
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
# transformers' model_max_length of a tokenizer whose files state none is 1e30.
UNSTATED = 10**20


def read_tokenizer(path: Path, otherwise: str = "") -> Any:
    """The tokenizer in a folder. Raises `CheckpointError` where there is none or it cannot be read.

    otherwise: what else can be done then.
    """
    from transformers import AutoTokenizer

    remedy = f"fetch the tokenizer's files ({' or '.join(VOCABULARIES)}, and what lies beside){otherwise}"
    # transformers makes an empty tokenizer of some families, without a word.
    if not any((path / name).exists() for name in VOCABULARIES):
        raise CheckpointError(f"{path} holds no tokenizer: {remedy}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {path} cannot be read ({error}): {remedy}") from error


def caption_length(clips: Iterable[tuple[Path, Any, Any]]) -> int:
    """The tokens that captions are padded to for CLIP, as its tokenizers state, by default all that it has room for.

    clips: folder of the tokenizer, tokenizer and its text encoder's configuration. Raises `CheckpointError` where an
    encoder has no room for them, and where they are not the same number for all.
    """
    lengths = {}
    for folder, tokenizer, encoder in clips:
        stated, positions = tokenizer.model_max_length, encoder.max_position_embeddings
        if positions < stated < UNSTATED:
            raise CheckpointError(
                f"{folder}/tokenizer_config.json has model_max_length={stated}, but its text encoder has "
                f"max_position_embeddings={positions}: take the tokenizer of that encoder, or lower model_max_length"
            )
        lengths[folder] = int(min(stated, positions))
    if len(set(lengths.values())) > 1:
        listed = " but ".join(f"{folder} of {length}" for folder, length in lengths.items())
        raise CheckpointError(
            f"the tokenizers of a pipeline have one model_max_length: that of {listed}: set them to the same number"
        )
    return next(iter(lengths.values()))


def check_vocabulary(tokenizer: Any, vocabulary: int, where: str) -> None:
    """Raise `CheckpointError` where the tokenizer is of another model, one with more tokens.

    Added tokens beyond the vocabulary are let through: some checkpoints have such tokens and never use them (one for
    images in Gemma 3, a padding token), and a text in which one occurs is refused by its row.
    """
    beyond = {token: place for token, place in tokenizer.get_vocab().items() if place >= vocabulary}
    ordinary = sorted(beyond.keys() - {str(token) for token in tokenizer.added_tokens_decoder.values()})
    if ordinary:
        raise CheckpointError(
            f"the tokenizer in {where} has {len(ordinary)} tokens beyond the model's vocab_size={vocabulary}, such as "
            f"{ordinary[0]!r}: it is another model's; fetch the one that belongs to these weights"
        )


def write_tokenizer(folder: Path, tokenizer: Any, source: Source) -> bool:
    """Write a tokenizer's files; whether they are those of the source.

    source: the folder that the tokenizer may come from. Its files are handed on if they still read as this tokenizer:
    not if tokens were added or the chat template was changed since, or if another tokenizer took its place.
    """
    # A tokenizer's class may depend on the configuration beside it, so all files are read, and only its own handed on.
    own = tuple(file for file in source.files if any(PurePosixPath(file[0]).match(pattern) for pattern in FILES))
    as_read = bool(own) and _reads_as(tokenizer, source.files)
    if as_read:
        write_files(folder, own)
    else:
        tokenizer.save_pretrained(folder)
    _as_every_version_reads(folder)
    return as_read


def _reads_as(tokenizer: Any, files: tuple[tuple[str, bytes], ...]) -> bool:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as made:
        write_files(Path(made), files)
        try:
            again = AutoTokenizer.from_pretrained(made)
        # Whatever transformers says of files that it cannot read: a tokenizer was passed in their place then.
        except Exception:
            return False
        return tokenizer_state(again) == tokenizer_state(tokenizer)


def _as_every_version_reads(folder: Path) -> None:
    """Put what transformers 5 wrote, here or in the source, into the words of 4.57, which version 5 reads as well."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.exists() else {}
    # Version 5 alone names the backend. tokenizer.json holds the whole tokenizer; without it the class is needed.
    if "backend" not in config or not (folder / "tokenizer.json").exists():
        return
    del config["backend"]
    # Any other class would add what it takes for its model's defaults, such as a beginning of sequence.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = extra
    write_json(file, config)
