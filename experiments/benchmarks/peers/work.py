"""What the sides are asked to do: shapes, data and counts. It loads neither JAX nor torch.

Names of a decoder's and a U-Net's fields are those of Hugging Face's configurations, which ours share.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from experiments.common.words import SPECIAL

Precision = Literal["float32", "bfloat16"]
Device = Literal["cpu", "gpu"]
BYTES: dict[Precision, int] = {"float32": 4, "bfloat16": 2}
# Of AdamW and Adafactor, and the norm that a decoder's gradients are clipped to.
LEARNING_RATE, CLIP = 1e-6, 1.0
# What every weight is in the probe of a U-Net, so that how a side lays them out has no part in the result.
FILLED_WITH = 0.02


def vocabulary(decoder: Mapping[str, Any]) -> list[str]:
    """A word for each of the decoder's tokens but the special ones."""
    return [f"w{number}" for number in range(len(SPECIAL), decoder["vocab_size"])]


def _widths(decoder: Mapping[str, Any]) -> tuple[int, int, int]:
    """Widths of the model, of the queries and of the keys."""
    width, heads = decoder["hidden_size"], decoder["num_attention_heads"]
    head = decoder.get("head_dim") or width // heads
    return width, heads * head, decoder["num_key_value_heads"] * head


def projections(decoder: Mapping[str, Any]) -> int:
    """Entries of the matrices of one of a Llama's layers."""
    width, queries, keys = _widths(decoder)
    return 2 * width * queries + 2 * width * keys + 3 * width * decoder["intermediate_size"]


@dataclass(frozen=True)
class TextDPO:
    """DPO steps of a Llama, with AdamW, over pairs of random words, once over all of them.

    prompt, completion: tokens, the end of a completion included. Where sigma is above 0 lengths are lognormal between
    `shortest` and `longest`, as those of real conversations are skewed, and these are medians, of a completion without
    its end. lora_rank: 0 trains all weights. shapes: that our batches have at most.
    same_weights: whether the peers load ours, and gradients are compared.
    """

    device: Device
    decoder: Mapping[str, Any]
    precision: Precision
    pairs: int
    prompt: int
    completion: int
    steps: int
    sigma: float = 0.0
    shortest: int = 4
    longest: int = 0
    lora_rank: int = 0
    shapes: int = 8
    same_weights: bool = False
    kind: str = "text_dpo"
    unit: str = "tokens"

    @property
    def room(self) -> tuple[int, int]:
        """The longest prompt and completion."""
        return (self.longest, self.longest + 1) if self.sigma else (self.prompt, self.completion)

    def lengths(self) -> np.ndarray:
        """Words of the prompt, the chosen and the rejected text of every row, [rows, 3]."""
        rows = self.pairs * self.steps
        exact = (self.prompt, self.completion - 1, self.completion - 1)
        if not self.sigma:
            return np.tile(exact, (rows, 1))
        medians = np.log((self.prompt, self.completion, self.completion))
        drawn = np.random.default_rng(0).lognormal(medians, self.sigma, (rows, 3))
        return np.clip(drawn, self.shortest, self.longest).astype(int)

    def rows(self) -> list[dict[str, str]]:
        """Pairs in TRL's format."""
        random, words, names = np.random.default_rng(1), vocabulary(self.decoder), ("prompt", "chosen", "rejected")

        def text(length: int) -> str:
            return " ".join(words[number] for number in random.integers(len(words), size=length))

        made = [dict(zip(names, map(text, row), strict=True)) for row in self.lengths().tolist()]
        # A space ends the prompt, so that its last word and the first of the answer are two.
        return [row | {"prompt": f"{row['prompt']} "} for row in made]

    @property
    def units_per_step(self) -> float:
        """Tokens of both sides of a mean step, each prompt counted twice; padding is none."""
        return float((self.lengths() * (2, 1, 1)).sum() + 2 * self.pairs * self.steps) / self.steps

    @property
    def flops_per_step(self) -> float:
        """Those that a mean step needs of the plain model, in matrix products, as `training.step_flops` counts them.

        A row is a prompt and one answer, by itself: no padding, nothing shared, nothing recomputed, every score of
        attention counted. Three forward passes for the policy, of which LoRA does two and its own thin products once
        more, and one for the reference. The head is counted for the tokens of completions.
        """
        width, queries, keys = _widths(self.decoder)
        prompts, *answers = self.lengths().T
        completions = np.concatenate(answers) + 1
        tokens = np.tile(prompts, 2) + completions
        layers = self.decoder["num_hidden_layers"]
        dense = 2 * layers * projections(self.decoder) * tokens.sum()
        scores = 4 * layers * queries * np.square(tokens.astype(float)).sum()
        head = 2 * width * self.decoder["vocab_size"] * completions.sum()
        thin = 2 * layers * self.lora_rank * (2 * (width + queries) + 2 * (width + keys)) * tokens.sum()
        one = dense + scores + head + thin
        return float(3 * one + thin if self.lora_rank else 4 * one) / self.steps


@dataclass(frozen=True)
class ImageDPO:
    """Diffusion-DPO steps of a U-Net on random latents and texts; both images of a pair share time and noise.

    latent: its sides, in latents; text: tokens of the conditioning. repeats of `steps` steps are timed.
    """

    device: Device
    unet: Mapping[str, Any]
    precision: Precision
    pairs: int
    latent: int
    text: int
    optimizer: Literal["adamw", "adafactor"]
    repeats: int
    steps: int
    kind: str = "image_dpo"
    unit: str = "images"

    @property
    def units_per_step(self) -> float:
        """Images of both sides."""
        return 2 * self.pairs

    def probe(self, channels: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Fixed latents, channels last, their time and their text, for a U-Net whose weights are all `FILLED_WITH`."""
        place = np.arange(self.latent**2 * channels, dtype=np.float32)
        latents = np.sin(place).reshape(1, self.latent, self.latent, channels)
        text = np.cos(np.arange(self.text * width, dtype=np.float32)).reshape(1, self.text, width)
        return latents, np.full(1, 500.0, np.float32), text


@dataclass(frozen=True)
class Decode:
    """Continuations of prompts that fill their batch, all of `new` tokens: nothing ends one.

    greedy: takes the likeliest token, else draws from all of them. same_weights: whether the peers load ours, and the
    first tokens of all rows are compared.
    """

    device: Device
    decoder: Mapping[str, Any]
    precision: Precision
    rows: int
    prompt: int
    new: int
    greedy: bool
    repeats: int
    same_weights: bool = False
    kind: str = "decode"
    unit: str = "new tokens"

    @property
    def units_per_step(self) -> float:
        """New tokens of all rows."""
        return self.rows * self.new

    def prompts(self) -> np.ndarray:
        """Token ids [rows, prompt], none of them special."""
        return np.random.default_rng(2).integers(
            len(SPECIAL), self.decoder["vocab_size"], (self.rows, self.prompt), np.int32
        )

    @property
    def bytes_read(self) -> float:
        """What must be read at least for all new tokens: weights and the keys and values so far, once a token."""
        width, _, keys = _widths(self.decoder)
        layers, size = self.decoder["num_hidden_layers"], BYTES[self.precision]
        weights = layers * projections(self.decoder) + width * self.decoder["vocab_size"]
        cached = 2 * layers * keys * self.rows * (self.prompt + (self.new - 1) / 2)
        return self.new * size * (weights + cached)


Work = TextDPO | ImageDPO | Decode
KINDS: dict[str, type[TextDPO] | type[ImageDPO] | type[Decode]] = {
    "text_dpo": TextDPO,
    "image_dpo": ImageDPO,
    "decode": Decode,
}


def as_json(work: Work) -> dict[str, Any]:
    """What `from_json` reads."""
    return asdict(work)


def from_json(values: Mapping[str, Any]) -> Any:
    """The work, in the process of a side."""
    return KINDS[values["kind"]](**values)
