"""Two minimisers that have nothing in common, and a loss that has nothing in common with the library's."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from experiments.exact.systems import ExactSystem
from sysdpo_jax.typing import Params


def lbfgs(loss: Callable[..., Array], steps: int, tolerance: float = 1e-9) -> Callable[..., Params]:
    """A compiled full-batch L-BFGS (start, *data) -> the params that minimise loss(params, *data).

    It stops when no entry of the gradient exceeds the tolerance, or after `steps` steps.
    """
    solver = optax.lbfgs()

    def minimise(start: Params, *data: Array) -> Params:
        def value_fn(params: Params) -> Array:
            return loss(params, *data)

        value_and_grad = optax.value_and_grad_from_state(value_fn)

        def step(carry: tuple[Params, optax.OptState]) -> tuple[Params, optax.OptState]:
            params, state = carry
            value, grad = value_and_grad(params, state=state)
            updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
            return optax.apply_updates(params, updates), state

        def unfinished(carry: tuple[Params, optax.OptState]) -> Array:
            count, grad = (optax.tree.get(carry[1], name) for name in ("count", "grad"))
            return (count == 0) | ((count < steps) & (optax.tree.norm(grad, ord=jnp.inf) > tolerance))

        return jax.lax.while_loop(unfinished, step, (start, solver.init(start)))[0]

    return jax.jit(minimise)


def independent_loss(
    exact: ExactSystem, rewards: Float[np.ndarray, "x s"], beta: float, reference: Params
) -> Callable[[Params], Array]:
    """The population loss from the joint distribution written by hand: no graph, no component, no objective of ours."""
    base = jnp.asarray(exact.log_prob(reference))
    prefers = jax.nn.sigmoid(rewards[:, :, None] - rewards[:, None, :])

    def loss(params: Params) -> Array:
        tables = {key: jax.nn.log_softmax(tree["logits"]) for key, tree in params.items()}
        ratio = exact.joint(tables).reshape(base.shape) - base
        margin = beta * (ratio[:, :, None] - ratio[:, None, :])
        return jnp.mean(prefers * jax.nn.softplus(-margin))

    return loss


def newton(loss: Callable[[Params], Array], start: Params, steps: int, tolerance: float = 1e-12) -> Params:
    """Newton's method with Levenberg's damping: exact Hessian, a step is taken only if the loss falls."""
    flat, unravel = ravel_pytree(start)
    value = jax.jit(lambda p: loss(unravel(p)))
    slope, curvature = jax.jit(jax.grad(value)), jax.jit(jax.hessian(value))
    point, damping = np.asarray(flat), 1e-3
    for _ in range(steps):
        gradient = np.asarray(slope(point))
        if np.abs(gradient).max() < tolerance:
            break
        hessian, best = np.asarray(curvature(point)), value(point)
        while damping < 1e12:
            # The logits have directions without effect and the loss is not convex: shift every eigenvalue above 0.
            shift = damping - min(0.0, np.linalg.eigvalsh(hessian)[0])
            trial = point - np.linalg.solve(hessian + shift * np.eye(len(point)), gradient)
            if value(trial) < best:
                point, damping = trial, damping / 5
                break
            damping *= 5
        else:
            break
    return unravel(jnp.asarray(point))
