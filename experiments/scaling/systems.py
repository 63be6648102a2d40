"""The systems that experiments/compile_tpu.py compiles, with their optimisers and batches, all by shape alone.

Models, components and prepared features of published models are made without weights, tokenizers or data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

import sysdpo_jax as sj
from experiments.common.command import read_table
from sysdpo_jax.models import Decoder, DecoderConfig, UNet2DCondition, UNetConfig
from sysdpo_jax.objectives import Objective
from sysdpo_jax.training import SystemOptimizer
from sysdpo_jax.typing import Features, Params

SHAPES = Path(__file__).with_name("shapes.yaml")
DECODERS, UNETS = read_table(SHAPES, "decoders", DecoderConfig), read_table(SHAPES, "unets", UNetConfig)
PIXELS_PER_LATENT = 8
TEXT_TOKENS, SIZE_IDS = 77, 6
Dtype = Literal["bfloat16", "float32"]
LORA = sj.LoRA(rank=16, alpha=32.0, targets="attention")


@dataclass(frozen=True)
class EncodedText:
    """Conditioning that comes encoded, as of `FrozenText`; rows: shapes of its arrays without their batch axis.

    sized: whether the denoiser is told how its image was cut out.

    Its features are made by shape, so that `prepare` has nothing to do; it raises NotImplementedError.
    """

    rows: tuple[tuple[int, ...], ...]
    sized: bool = False

    def init(self, key: PRNGKeyArray) -> Params:
        return {}

    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct((1, *row), jnp.float32) for row in self.rows)

    def prepare(self, captions: Sequence[str | None]) -> dict[str, Features]:
        raise NotImplementedError("EncodedText: these features come from their shapes, not from captions")

    def encode(self, params: Params, features: dict[str, Features]) -> tuple[Array, ...]:
        return tuple(features["encoded"])


def encoded_text(config: UNetConfig) -> EncodedText:
    """That of a U-Net: the caption's tokens and, for SDXL, the pooled text, then the frames."""
    text = (TEXT_TOKENS, config.cross_attention_dim)
    if config.addition_embed_type is None:
        return EncodedText((text,))
    sizes = SIZE_IDS * (config.addition_time_embed_dim or 0)
    return EncodedText((text, ((config.projection_class_embeddings_input_dim or 0) - sizes,)), sized=True)


def writer(config: DecoderConfig, prompt: int, new: int) -> sj.LanguageModel:
    """A language model that can only be given features. prompt, new: their room in tokens."""
    return sj.LanguageModel(Decoder(config), SimpleNamespace(eos_token_id=1, pad_token_id=0), prompt, new)


def painter(config: UNetConfig, pixels: int) -> sj.Diffusion:
    """An epsilon diffusion model of square images, of whose codec only the latents' shape is known."""
    side = pixels // PIXELS_PER_LATENT
    return sj.Diffusion(UNet2DCondition(config), encoded_text(config), sj.PixelCodec((side, side, config.in_channels)))


def text_features(component: sj.LanguageModel, *leading: int) -> dict[str, Any]:
    """Shapes of what `prepare` makes of texts; leading: the batch and, where there is one, the plate."""
    length = component.max_prompt_length + component.max_new_tokens
    count = jax.ShapeDtypeStruct(leading, jnp.int32)
    return {
        "tokens": jax.ShapeDtypeStruct((*leading, length), jnp.int32),
        "prompt_lengths": count,
        "lengths": count,
        "completion": jax.ShapeDtypeStruct((*leading, component.max_new_tokens), jnp.bool_),
        # A prompt is the same for all runs of a preference.
        "shared": jax.ShapeDtypeStruct((*leading, component.max_prompt_length), jnp.bool_),
        "truncated": jax.ShapeDtypeStruct(leading, jnp.float32),
        "retokenized": jax.ShapeDtypeStruct(leading, jnp.float32),
    }


def image_features(component: sj.Diffusion | sj.FlowMatching, *leading: int) -> dict[str, Any]:
    """Shapes of what `prepare` makes of images and captions."""
    encoded = tuple(jax.ShapeDtypeStruct((*leading, *s.shape[1:]), s.dtype) for s in component.text.shapes())
    return {
        "latents": jax.ShapeDtypeStruct((*leading, *component.codec.latent_shape), jnp.float32),
        "text": {"encoded": encoded, "truncated": jax.ShapeDtypeStruct(leading, jnp.float32)},
        **({"frames": jax.ShapeDtypeStruct((*leading, SIZE_IDS), jnp.float32)} if component.text.sized else {}),
    }


@dataclass(frozen=True)
class Config:
    """What to compile.

    system: a name in experiments/scaling/systems.py. topology: generation and sides, v5e:4x4. mode: train all weights
    of all models, or LoRA factors (rank 16, attention). data, fsdp, tensor: the mesh; fsdp is by default what the
    others leave. batch: pairs in a step, by default one for each chip or, with tensor, for each group of them.
    accumulate: parts the batch is cut into. sequence: tokens of prompt and completion, half each. image_size: pixels a
    side, by default the model's own. intermediates: of SysDPO-Sampling. param_dtype: of the weights, of which those
    that are trained have float32 master weights; state_dtype: of the optimiser's moments. attention, remat: see
    DecoderConfig. level: the compiler's effort; "default" is what a run uses.
    """

    system: str = "smollm2-135m+sd15"
    topology: str = "v5e:2x2"
    mode: Literal["full", "lora"] = "full"
    data: int = 1
    fsdp: int | None = None
    tensor: int = 1
    batch: int | None = None
    accumulate: int = 1
    sequence: int = 1024
    image_size: int | None = None
    intermediates: int = 4
    param_dtype: Dtype = "bfloat16"
    state_dtype: Dtype = "float32"
    attention: str = "flash"
    remat: str = "auto"
    level: Literal["O0", "O1", "default"] = "O1"

    def model(self, shape: Any) -> Any:
        """A model's configuration with how it computes and keeps what it does."""
        computing = {name: getattr(self, name) for name in ("param_dtype", "attention", "remat")}
        return replace(shape, dtype="bfloat16", **computing)

    def writer(self, shape: DecoderConfig) -> sj.LanguageModel:
        """A language model of this shape."""
        return writer(self.model(shape), self.sequence // 2, self.sequence - self.sequence // 2)


@dataclass(frozen=True)
class Example:
    """A system with what its step takes. batch: pairs in a step -> the shapes of a batch."""

    system: sj.CompoundSystem
    objective: Objective
    batch: Callable[[int], Any]


def captions_of(answer: str) -> list[str]:
    """The lines of an answer, each a caption."""
    return answer.splitlines()


def with_draft(question: str, draft: str) -> str:
    """The prompt of the model that answers after another one's draft."""
    return f"{question}\n{draft}"


def written_and_painted(decoder: DecoderConfig, unet: UNetConfig, config: Config, pixels: int) -> Example:
    """A language model whose answer is the caption of an image, with SysDPO-Direct; text encoders run beforehand."""
    language, image = config.writer(decoder), painter(config.model(unet), pixels)
    system = sj.CompoundSystem(
        ("request",),
        (
            sj.Node("answer", language, ("request",), params="writer"),
            sj.Node("caption", sj.Tool(captions_of), ("answer",), plate=1),
            sj.Node("image", image, ("caption",), params="painter", plate=1),
        ),
    )

    def batch(pairs: int) -> sj.PairBatch:
        side = {
            "answer": text_features(language, pairs),
            "caption": jax.ShapeDtypeStruct((pairs, 1, 0), jnp.float32),
            "image": image_features(image, pairs, 1),
        }
        return sj.PairBatch(side, side)

    return Example(system, sj.DirectObjective(), batch)


def drafted_and_answered(decoder: DecoderConfig, config: Config, _: int) -> Example:
    """One language model drafts and another one answers, with SysDPO-Sampling, one intermediate at a time."""
    language, number = config.writer(decoder), config.intermediates
    answering = sj.Node("answer", replace(language, prompt=with_draft), ("question", "draft"))
    system = sj.CompoundSystem(("question",), (sj.Node("draft", language, ("question",)), answering))

    def batch(pairs: int) -> sj.SampledBatch:
        texts = text_features(language, pairs, number)
        valid: Any = jax.ShapeDtypeStruct((pairs, number), jnp.bool_)
        staleness: Any = jax.ShapeDtypeStruct((pairs,), jnp.int32)
        return sj.SampledBatch({"draft": texts}, sj.PairBatch({"answer": texts}, {"answer": texts}), valid, staleness)

    return Example(system, sj.SamplingObjective(chunk_size=1), batch)


def in_roles(decoder: DecoderConfig, number: int, config: Config, _: int) -> Example:
    """One language model in several roles, each of which reads what the one before it wrote, with SysDPO-Direct."""
    language = config.writer(decoder)
    names = [f"role_{i + 1}" for i in range(number)]
    system = sj.CompoundSystem(
        ("question",),
        tuple(
            sj.Node(name, language, (parent,), base="base")
            for name, parent in zip(names, ("question", *names[:-1]), strict=True)
        ),
    )

    def batch(pairs: int) -> sj.PairBatch:
        side = {name: text_features(language, pairs) for name in names}
        return sj.PairBatch(side, side)

    return Example(system, sj.DirectObjective(), batch)


# {name: (pixels of its images, what makes it of a configuration and of pixels)}
SYSTEMS: dict[str, tuple[int, Callable[[Config, int], Example]]] = {
    "smollm2-135m+sd15": (512, partial(written_and_painted, DECODERS["smollm2-135m"], UNETS["sd15"])),
    "qwen1.5-1.8b-x2": (0, partial(drafted_and_answered, DECODERS["qwen1.5-1.8b"])),
    "llama3-8b+sdxl": (1024, partial(written_and_painted, DECODERS["llama-3-8b"], UNETS["sdxl"])),
    "llama3-8b-role": (0, partial(in_roles, DECODERS["llama-3-8b"], 1)),
    "llama3-8b-roles": (0, partial(in_roles, DECODERS["llama-3-8b"], 3)),
}


def fine_tuning(config: Config, system: sj.CompoundSystem, params: Params) -> tuple[Params, SystemOptimizer]:
    """Parameters to train and their optimiser, AdamW for every component.

    params: shapes, `{params_key: tree}`. Weights of less than 32 bits that are trained get master weights; LoRA's
    factors are kept in float32 beside them. A base has none of its own. Raises SystemExit for roles in mode full.
    """
    bases = {node.params_key: node.base for node in system.nodes if node.base is not None}
    if bases and config.mode == "full":
        raise SystemExit(f"{config.system} has roles, which share their weights: give --mode lora")
    if config.mode == "full":
        component = sj.ComponentOptimizer(optax.adamw(1e-6), master_weights=True, state_dtype=config.state_dtype)
        return params, sj.make_optimizer(dict.fromkeys(params, component))
    component = sj.ComponentOptimizer(optax.adamw(1e-5), trainable=sj.LORA_PARAMS, state_dtype=config.state_dtype)
    made, optimizers = {**params}, dict.fromkeys(params, component)
    for key, tree in params.items():
        if key in bases.values():
            optimizers[key] = sj.FROZEN
            continue
        function = sj.lora_factors if key in bases else sj.add_lora
        shapes = partial(function, lora=LORA, key=jax.random.key(0))
        made[key] = jax.eval_shape(shapes, params[bases[key]] if key in bases else tree)
    return made, sj.make_optimizer(optimizers)
