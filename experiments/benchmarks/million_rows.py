"""`load_preferences` with a system: rows a second, bytes on disk, memory, and how soon a restart has its first batch.

    python -m experiments.benchmarks.million_rows > docs/benchmarks/million_rows.json

Two sources, written to a temporary folder. A JSON Lines file of a million questions with two answers, prepared for a
language model with a byte-level BPE tokenizer. And 10,000 preferences between pictures of 64 x 64 pixels, in PNG files,
for a small latent diffusion model whose text encoder and autoencoder are frozen: the pass encodes with them.

Memory is the most that the process holds of its own in the meantime (Linux's RssAnon, looked at every 20 ms), less what
it held before; pages of memory-mapped files are the system's. The pass has a part of 4096 rows in memory at most, and
of all rows what says where they are, how long, and in which batches: growth is to stay below MEMORY_MIB and
BYTES_A_ROW for each row, or nothing is printed. A few rows are read before, so that libraries and compiled programs
count neither as time nor as memory of the source.
"""

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import sysdpo_jax as sj
from experiments.common.command import made_by, parse
from sysdpo_jax.models import (
    AutoencoderConfig,
    AutoencoderKL,
    CLIPTextConfig,
    CLIPTextEncoder,
    Decoder,
    DecoderConfig,
    UNet2DCondition,
    UNetConfig,
)

VOCABULARY, PROMPT_TOKENS, ANSWER_TOKENS, CAPTION_TOKENS = 300, 32, 128, 16
SIDE = 64
# Of every model that reads text.
TINY: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
WORDS = ("the", "red", "ball", "on", "the", "left", "is", "larger", "than", "a", "small", "green", "cube") * 2
BATCH = 8
MEMORY_MIB, BYTES_A_ROW = 200, 256


@dataclass(frozen=True)
class Config:
    """rows: of the file of texts; images: preferences between pictures."""

    rows: int = 1_000_000
    images: int = 10_000


def tokenizer(padding: bool = False) -> Any:
    """Byte-level BPE, trained on the words of the rows."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<end>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([" ".join(WORDS), "question? a picture of"], trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="<end>", pad_token="<pad>" if padding else None
    )


def language_system() -> sj.CompoundSystem:
    """A question and an answer."""
    decoder = DecoderConfig(**TINY, num_hidden_layers=2, num_key_value_heads=2)
    model = sj.LanguageModel(Decoder(decoder), tokenizer(), PROMPT_TOKENS, ANSWER_TOKENS)
    return sj.CompoundSystem(("question",), (sj.Node("answer", model, ("question",)),))


def picture_system() -> sj.CompoundSystem:
    """A caption and a picture, drawn by latent diffusion with frozen encoders."""
    clip = CLIPTextConfig(**TINY, num_hidden_layers=1, max_position_embeddings=CAPTION_TOKENS)
    autoencoder = AutoencoderKL(
        AutoencoderConfig(block_out_channels=(16, 32, 32, 32), layers_per_block=1, norm_num_groups=8)
    )
    unet = UNetConfig(
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    painter = sj.Diffusion(
        UNet2DCondition(unet),
        sj.FrozenText(sj.TextEncoder(CLIPTextEncoder(clip), tokenizer(padding=True), CAPTION_TOKENS)),
        sj.LatentCodec(autoencoder, ((SIDE, SIDE),), batch_size=16),
    )
    return sj.CompoundSystem(("caption",), (sj.Node("image", painter, ("caption",)),))


def write_texts(path: Path, rows: int) -> None:
    """A question and two answers, of eighteen and of some forty words, a row."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            turned = " ".join(WORDS[number % 7 : number % 7 + 18])
            row = {
                "inputs": {"question": f"question {number}?"},
                "chosen": {"answer": f"{turned} {number}"},
                "rejected": {"answer": f"{number} {turned} {turned}"},
            }
            file.write(json.dumps(row) + "\n")


def write_pictures(path: Path, rows: int) -> None:
    """A caption and two pictures of their own a row."""
    random = np.random.default_rng(0)
    folder = path.with_suffix("")
    folder.mkdir()
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            names = {side: f"{folder.name}/{number}-{side}.png" for side in ("chosen", "rejected")}
            for name in names.values():
                # Coarse squares: what noise of pixels takes on disk no picture does.
                coarse = random.integers(0, 256, (SIDE // 8, SIDE // 8, 3), np.uint8)
                Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(path.parent / name)
            sides = {side: {"image": name} for side, name in names.items()}
            file.write(json.dumps({"inputs": {"caption": f"a picture of {number % 1000}"}, **sides}) + "\n")


def measure(system: sj.CompoundSystem, write: Callable[[Path, int], None], rows: int) -> dict[str, Any]:
    """Write, read with the system, restart, and look at records from the beginning, the middle and the end.

    Raises `RuntimeError` for a record that is not found, and where memory grew beyond its bound.
    """
    params = system.init(jax.random.key(0)) if system.encodes else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path, small, cache = folder / "preferences.jsonl", folder / "small.jsonl", folder / "cache"
        write(path, rows)
        write(small, min(rows, 2 * BATCH))
        _first_batch(system, sj.load_preferences(small, system, params=params, cache=folder / "small_cache"))
        before = _own()
        with _watched() as seen:
            seconds, preferences = _timed(lambda: sj.load_preferences(path, system, params=params, cache=cache))
            restart, again = _timed(lambda: sj.load_preferences(path, system, params=params, cache=cache))
            first_batch, _ = _timed(lambda: _first_batch(system, again))
        [asked] = system.inputs
        lines = path.read_text(encoding="utf-8").splitlines() if rows <= 1000 else None
        for row in (0, rows // 2, rows - 1):
            found = preferences[row].inputs[asked]
            if str(row % 1000 if asked == "caption" else row) not in found or (
                lines is not None and json.loads(lines[row])["inputs"][asked] != found
            ):
                raise RuntimeError(f"record {row} is {found!r}")
        growth, bound = (max(seen) - before) / 2**20, MEMORY_MIB + BYTES_A_ROW * rows / 2**20
        if growth > bound:
            raise RuntimeError(f"memory grew by {growth:.0f} MiB, more than its bound of {bound:.0f} MiB")
        return {
            "rows": len(preferences),
            "source_mib": _mib([path, *path.with_suffix("").glob("*.png")]),
            "disk_mib": _mib([file for file in cache.rglob("*") if file.is_file()]),
            "seconds": round(seconds, 1),
            "rows_per_second": round(rows / seconds),
            "memory_growth_mib": round(growth, 1),
            "memory_bound_mib": round(bound, 1),
            "restart_seconds": round(restart, 2),
            "first_batch_seconds": round(first_batch, 2),
        }


def _first_batch(system: sj.CompoundSystem, preferences: sj.Preferences) -> Any:
    return sj.preference_dataset(system, preferences, min(BATCH, len(preferences)), seed=0)[0]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    made = work()
    return time.monotonic() - began, made


def _mib(files: list[Path]) -> float:
    return round(sum(file.stat().st_size for file in files) / 2**20, 1)


def _own() -> int:
    """Bytes of memory that are this process's own."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


@contextmanager
def _watched() -> Iterator[list[int]]:
    """What `_own` is from time to time, as long as the block lasts."""
    seen, done = [_own()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(_own())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main(arguments: list[str]) -> None:
    """Print the figures as JSON."""
    config = parse(Config(), arguments, __doc__)
    result: dict[str, Any] = {"texts": measure(language_system(), write_texts, config.rows)}
    print(json.dumps(result), file=sys.stderr)
    result["images"] = measure(picture_system(), write_pictures, config.images)
    result["made_by"] = made_by("experiments.benchmarks.million_rows", arguments, note=", no accelerator used")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
