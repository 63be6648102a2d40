"""Two minimisers that have nothing in common, and losses that have nothing in common with the library's."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

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

    def loss(params: Params) -> Array:
        return _mean_loss(_joint(exact, params) - base, rewards, beta)

    return loss


def independent_outcome_loss(
    exact: ExactSystem, rewards: Float[np.ndarray, "x z"], beta: float, reference: Params
) -> Callable[[Params], Array]:
    """The same of outcomes: p(z | x) is the joint distribution times a matrix of which run ends in which z."""
    base = jnp.asarray(exact.outcome_log_prob(exact.log_prob(reference)))
    ends_in = jnp.asarray(exact.outcomes()[:, None] == np.arange(base.shape[1]), base.dtype)

    def loss(params: Params) -> Array:
        return _mean_loss(jnp.log(jnp.exp(_joint(exact, params)) @ ends_in) - base, rewards, beta)

    return loss


def _joint(exact: ExactSystem, params: Params) -> Float[Array, "x s"]:
    tables = {key: jax.nn.log_softmax(tree["logits"]) for key, tree in params.items()}
    return exact.joint(tables).reshape(exact.num_inputs, -1)


def _mean_loss(ratio: Float[Array, "x n"], rewards: Float[np.ndarray, "x n"], beta: float) -> Float[Array, ""]:
    prefers = jax.nn.sigmoid(rewards[:, :, None] - rewards[:, None, :])
    margin = beta * (ratio[:, :, None] - ratio[:, None, :])
    return jnp.mean(prefers * jax.nn.softplus(-margin))


def newton(loss: Callable[[Params], Array], steps: int, tolerance: float = 1e-12) -> Callable[[Params], Params]:
    """Newton's method with Levenberg's damping: exact Hessian, a step is taken only if the loss falls."""
    value = jax.jit(loss)
    slope, curvature = jax.jit(jax.grad(loss)), jax.jit(_hessian(loss))

    def minimise(start: Params) -> Params:
        flat, unravel = ravel_pytree(start)
        point, damping = np.asarray(flat), 1e-3

        def at(place: np.ndarray) -> Params:
            return unravel(jnp.asarray(place))

        for _ in range(steps):
            gradient = np.asarray(ravel_pytree(slope(at(point)))[0])
            if np.abs(gradient).max() < tolerance:
                break
            hessian, best = np.asarray(curvature(at(point))), value(at(point))
            # The logits have directions without effect and the loss is not convex: every eigenvalue is shifted above 0.
            floor = min(0.0, np.linalg.eigvalsh(hessian)[0])
            while damping < 1e12:
                trial = point - np.linalg.solve(hessian + (damping - floor) * np.eye(len(point)), gradient)
                if value(at(trial)) < best:
                    point, damping = trial, damping / 5
                    break
                damping *= 5
            else:
                break
        return at(point)

    return minimise


def lowest(
    solve: Callable[..., Params], loss: Callable[..., Array], starts: Sequence[Params], *data: Array | Params
) -> Params:
    """Of the minima that a solver finds from each start the one with the lowest loss."""
    value = jax.jit(loss)
    return min((solve(start, *data) for start in starts), key=lambda params: float(value(params, *data)))


def nearby(start: Params, count: int, spread: float, key: PRNGKeyArray) -> list[Params]:
    """The start and `count` others, every parameter displaced by normal noise of that standard deviation."""
    flat, unravel = ravel_pytree(start)
    return [start, *(unravel(flat + spread * jax.random.normal(k, flat.shape)) for k in jax.random.split(key, count))]


def _hessian(loss: Callable[[Params], Array]) -> Callable[[Params], Float[Array, "n n"]]:
    def matrix(params: Params) -> Array:
        flat, unravel = ravel_pytree(params)
        return jax.hessian(lambda point: loss(unravel(point)))(flat)

    return matrix
