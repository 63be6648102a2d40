"""Supervised training of one component from scratch, and the optimiser of an alignment."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from sysdpo_jax import Component, ComponentOptimizer
from sysdpo_jax.typing import Features, Params

# Steps between two movements of the progress bar.
REPORT_EVERY = 25


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
