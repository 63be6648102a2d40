"""The systems that experiments/compile_tpu.py compiles, with their optimisers and batches, all by shape alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from experiments.scaling.shapes import (
    LLAMA_3_8B,
    QWEN15_18B,
    SD15,
    SDXL,
    SMOLLM2_135M,
    image_features,
    painter,
    text_features,
    writer,
)
from sysdpo_jax import (
    LORA_PARAMS,
    ComponentOptimizer,
    CompoundSystem,
    DirectObjective,
    LoRA,
    Node,
    PairBatch,
    SampledBatch,
    SamplingObjective,
    Tool,
    add_lora,
    make_optimizer,
)
from sysdpo_jax.models import DecoderConfig, UNetConfig
from sysdpo_jax.objectives import Objective
from sysdpo_jax.training import SystemOptimizer
from sysdpo_jax.typing import Params

Dtype = Literal["bfloat16", "float32"]
LORA = LoRA(rank=16, alpha=32.0, targets="attention")


@dataclass(frozen=True)
class Size:
    """sequence: tokens of prompt and completion together, half each; image_size: pixels a side; intermediates: M."""

    sequence: int
    image_size: int
    intermediates: int


@dataclass(frozen=True)
class Computing:
    """How the models compute and keep what they do: fields of their configurations."""

    attention: str
    remat: str
    param_dtype: Dtype


@dataclass(frozen=True)
class Example:
    """A system with what its step takes. batch: pairs in a step -> the shapes of a batch."""

    system: CompoundSystem
    objective: Objective
    batch: Callable[[int], Any]


def captions_of(answer: str) -> list[str]:
    """The lines of an answer, each a caption."""
    return answer.splitlines()


def with_draft(question: str, draft: str) -> str:
    """The prompt of the model that answers after another one's draft."""
    return f"{question}\n{draft}"


def written_and_painted(decoder: DecoderConfig, unet: UNetConfig, size: Size, computing: Computing) -> Example:
    """A language model whose answer is the caption of an image, with SysDPO-Direct; text encoders run beforehand."""
    language = writer(_computing(decoder, computing), size.sequence // 2, size.sequence - size.sequence // 2)
    image = painter(_computing(unet, computing), size.image_size)
    system = CompoundSystem(
        ("request",),
        (
            Node("answer", language, ("request",), params="writer"),
            Node("caption", Tool(captions_of), ("answer",), plate=1),
            Node("image", image, ("caption",), params="painter", plate=1),
        ),
    )

    def batch(pairs: int) -> PairBatch:
        side = {
            "answer": text_features(language, pairs),
            "caption": jax.ShapeDtypeStruct((pairs, 1, 0), jnp.float32),
            "image": image_features(image, pairs, 1),
        }
        return PairBatch(side, side)

    return Example(system, DirectObjective(), batch)


def drafted_and_answered(decoder: DecoderConfig, size: Size, computing: Computing) -> Example:
    """One language model drafts and another one answers, with SysDPO-Sampling, one intermediate at a time."""
    language = writer(_computing(decoder, computing), size.sequence // 2, size.sequence - size.sequence // 2)
    system = CompoundSystem(
        ("question",),
        (
            Node("draft", language, ("question",)),
            Node("answer", replace(language, prompt=with_draft), ("question", "draft")),
        ),
    )

    def batch(pairs: int) -> SampledBatch:
        texts = text_features(language, pairs, size.intermediates)
        valid: Any = jax.ShapeDtypeStruct((pairs, size.intermediates), jnp.bool_)
        staleness: Any = jax.ShapeDtypeStruct((pairs,), jnp.int32)
        return SampledBatch({"draft": texts}, PairBatch({"answer": texts}, {"answer": texts}), valid, staleness)

    return Example(system, SamplingObjective(chunk_size=1), batch)


# {name: (its own image size, what makes it)}
SYSTEMS: dict[str, tuple[int, Callable[[Size, Computing], Example]]] = {
    "smollm2-135m+sd15": (512, partial(written_and_painted, SMOLLM2_135M, SD15)),
    "qwen1.5-1.8b-x2": (0, partial(drafted_and_answered, QWEN15_18B)),
    "llama3-8b+sdxl": (1024, partial(written_and_painted, LLAMA_3_8B, SDXL)),
}


def fine_tuning(mode: Literal["full", "lora"], params: Params, state_dtype: Dtype) -> tuple[Params, SystemOptimizer]:
    """Parameters to train and their optimiser, AdamW for every component.

    params: shapes, `{params_key: tree}`. Weights of less than 32 bits that are trained get master weights; LoRA's
    factors are kept in float32 beside them. state_dtype: of the moments.
    """
    if mode == "full":
        component = ComponentOptimizer(optax.adamw(1e-6), master_weights=True, state_dtype=state_dtype)
        return params, make_optimizer(dict.fromkeys(params, component))
    factors = {
        key: jax.eval_shape(partial(add_lora, lora=LORA), tree, key=jax.random.key(0)) for key, tree in params.items()
    }
    component = ComponentOptimizer(optax.adamw(1e-5), trainable=LORA_PARAMS, state_dtype=state_dtype)
    return factors, make_optimizer(dict.fromkeys(params, component))


def _computing(config: Any, computing: Computing) -> Any:
    return replace(
        config,
        dtype="bfloat16",
        param_dtype=computing.param_dtype,
        attention=computing.attention,
        remat=computing.remat,
    )
