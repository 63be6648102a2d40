"""Fresh parameters of a module without its forward pass: only what each of them is made of is compiled and run.

The module's `init` is traced, and every parameter followed back to the key that it is drawn with. Draws of one kind and
shape, of stacked layers too, are one small program, however many parameters are made by it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jaxtyping import PRNGKeyArray

from sysdpo_jax.typing import Params

# Stacked layers' parameters differ in numbers that are folded into their keys. A program of them is given so many and
# is thus the same for all of one shape; numbers beyond are written in it.
GIVEN = 8

# {text: program}
_PROGRAMS: dict[str, Callable[..., Any]] = {}


def fresh_params(module: nn.Module, key: PRNGKeyArray, *inputs: jax.ShapeDtypeStruct) -> Params:
    """The parameters that `module.init(key, *inputs)` makes of inputs of zeros, without its forward pass.

    They are the same up to the last bit, in which those of `init` too depend on what is compiled together.

    Args:
        module: Whose parameters.
        key: Of the draws.
        inputs: Shapes of what the module is called with.

    Returns:
        The tree of the collection "params".
    """
    shapes = tuple((each.shape, str(each.dtype)) for each in inputs)
    traced = _init.trace(module, shapes, jax.ShapeDtypeStruct(key.shape, key.dtype))
    program: ClosedJaxpr = traced.jaxpr
    number = len(program.jaxpr.outvars)
    drawn = _part(program.jaxpr, [True] * number)
    # One after the other, so that no more than one of them is in transit.
    parts = (_part(drawn, [place == own for place in range(number)]) for own in range(number))
    leaves = [_evaluate(part, program.consts, [key], lambda written: written)[0] for part in parts]
    return jax.tree.unflatten(jax.tree.structure(traced.out_info), leaves)


@partial(jax.jit, static_argnums=(0, 1))
def _init(module: nn.Module, shapes: Sequence[tuple[tuple[int, ...], str]], key: PRNGKeyArray) -> Params:
    params: Params = module.init(key, *(jnp.zeros(shape, dtype) for shape, dtype in shapes))["params"]
    return params


def _part(program: Jaxpr, wanted: Sequence[bool]) -> Jaxpr:
    """What makes the wanted outputs, of all inputs."""
    return dce_jaxpr(program, wanted, instantiate=True)[0]


def _evaluate(
    program: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], number: Callable[[Any], Any]
) -> Sequence[Any]:
    """The program's outputs, equation by equation, as its author's code was written. number: as for `_layers`."""
    known = dict(zip((*program.constvars, *program.invars), (*consts, *inputs), strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else known[variable]

    for equation in program.eqns:
        name, values = equation.primitive.name, [read(variable) for variable in equation.invars]
        made: Sequence[Any]
        if name == "random_fold_in":
            made = [jax.random.fold_in(values[0], number(values[1]))]
        elif name == "scan" and not equation.params["num_carry"]:
            made = _layers(equation, values, number)
        elif "jaxpr" in equation.params and name != "scan" and _makes_keys(equation):
            inner = equation.params["jaxpr"]
            closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            made = _evaluate(closed.jaxpr, closed.consts, values, number)
        else:
            given = {
                variable: value
                for variable, value in zip(equation.invars, values, strict=True)
                if not isinstance(variable, Literal)
            }
            alone = program.replace(constvars=[], invars=list(given), outvars=equation.outvars, eqns=[equation])
            made = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*given.values())
        known |= zip(equation.outvars, made, strict=True)
    return [read(variable) for variable in program.outvars]


def _makes_keys(equation: JaxprEqn) -> bool:
    return any(
        inner.primitive.name == "random_fold_in" or _makes_keys(inner)
        for program in jaxprs_in_params(equation.params)
        for inner in program.eqns
    )


def _layers(equation: JaxprEqn, values: Sequence[Any], number: Callable[[Any], Any]) -> Sequence[Any]:
    """The outputs of a scan whose layers do not depend on each other, by a program that equal ones share.

    number: what is folded into a key in place of what is written in the program.
    """
    body: ClosedJaxpr = equation.params["jaxpr"]
    shared = equation.params["num_consts"]
    written: list[Any] = []

    def layers(values: Sequence[Any], given: Sequence[Any]) -> Sequence[Any]:
        written.clear()

        def of_place(value: Any) -> Any:
            written.append(value)
            return given[len(written) - 1] if len(written) <= len(given) else value

        def layer(_: None, own: Sequence[Any]) -> tuple[None, Sequence[Any]]:
            return None, _evaluate(body.jaxpr, body.consts, [*values[:shared], *own], of_place)

        return jax.lax.scan(layer, None, values[shared:], length=equation.params["length"])[1]

    shapes = [jax.ShapeDtypeStruct(jnp.shape(value), jnp.result_type(value)) for value in values]
    traced = jax.jit(layers).trace(shapes, [jax.ShapeDtypeStruct((), jnp.uint32)] * GIVEN)
    given = [number(value) for value in written[:GIVEN]]
    given += [jnp.uint32(0)] * (GIVEN - len(given))
    program: ClosedJaxpr = traced.jaxpr
    if program.consts or _holds_arrays(program.jaxpr):
        # Their values are not in the text.
        return jax.jit(layers)(values, given)
    run = _PROGRAMS.setdefault(str(program), jax.jit(jaxpr_as_fun(program)))
    made: Sequence[Any] = run(*values, *given)
    return made


def _holds_arrays(jaxpr: Jaxpr) -> bool:
    values = [value for equation in jaxpr.eqns for value in equation.invars]
    if any(isinstance(value, Literal) and np.ndim(value.val) for value in values):
        return True
    return any(_holds_arrays(inner) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params))
