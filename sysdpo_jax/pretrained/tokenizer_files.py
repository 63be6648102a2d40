"""The files of a tokenizer: handed on as they were read or, for one that was changed or made here, written for all.

transformers 5 writes tokenizers that only version 5 reads (a class of its own, a list of extra special tokens), also
those that it read from files that every version reads. What is written anew is put in the form that 4.57 reads too.
"""

import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from sysdpo_jax.components.source import Source
from sysdpo_jax.manifest import tokenizer_state
from sysdpo_jax.pretrained.base import read_json, write_json
from sysdpo_jax.pretrained.handing_on import write_files

# What a folder may hold of a tokenizer, for any version and any backend.
# fmt: off
FILES = (
    "tokenizer*.json", "tokenizer.model*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "spiece.model", "sentencepiece*.model", "tekken.json", "*.tiktoken", "chat_template.*",
    "additional_chat_templates/*.jinja",
)
# fmt: on


def write_tokenizer(folder: Path, tokenizer: Any, source: Source | None) -> bool:
    """Write a tokenizer's files; whether they are those of the source.

    source: the folder that the tokenizer may come from. Its files are handed on if they still read as this tokenizer:
    not if tokens were added or the chat template was changed since, or if another tokenizer took its place.
    """
    files = () if source is None else source.files
    # A tokenizer's class may depend on the configuration beside it, so all files are read, and only its own handed on.
    own = tuple(file for file in files if any(PurePosixPath(file[0]).match(pattern) for pattern in FILES))
    as_read = bool(own) and _reads_as(tokenizer, files)
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
