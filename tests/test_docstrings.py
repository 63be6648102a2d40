"""Docstrings of the public names are whole: every parameter in Args, Returns and Raises where there is something."""

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from importlib import import_module
from typing import NamedTuple

import pytest
from griffe import Docstring, DocstringSectionKind

import sysdpo_jax
from sysdpo_jax import components, diffusion

PACKAGES = (
    "sysdpo_jax",
    "sysdpo_jax.components",
    "sysdpo_jax.objectives",
    "sysdpo_jax.data",
    "sysdpo_jax.parallel",
    "sysdpo_jax.training",
    "sysdpo_jax.pretrained",
    "sysdpo_jax.decoding",
    "sysdpo_jax.diffusion",
    "sysdpo_jax.evaluation",
    "sysdpo_jax.report",
)
# What these say of their methods stands in the protocol that they keep without inheriting from it.
KEPT = {
    "PixelCodec": components.Codec,
    "LatentCodec": components.Codec,
    "TextEncoder": components.TextConditioner,
    "SDXLText": components.TextConditioner,
    "SD3Text": components.TextConditioner,
    "FrozenText": components.TextConditioner,
    **dict.fromkeys(("Constant", "MinSNR", "ELBO"), diffusion.Weighting),
    **dict.fromkeys(("DDIM", "DDPM", "PNDM", "DPMSolver", "Euler"), diffusion.Sampler),
}
NAMED = (DocstringSectionKind.parameters, DocstringSectionKind.attributes)
GIVEN = (DocstringSectionKind.returns, DocstringSectionKind.yields)


def public():
    """{qualified name: (object, the classes whose docstring may stand in for its own)}: each once."""
    found = {}
    for package in PACKAGES:
        module = import_module(package)
        for thing in (getattr(module, name) for name in module.__all__):
            if not inspect.isclass(thing) and not inspect.isfunction(thing):
                continue
            found[f"{thing.__module__}.{thing.__qualname__}"] = thing, ()
            for base in thing.__mro__ if inspect.isclass(thing) else ():
                above = [*base.__mro__[1:], *([KEPT[base.__name__]] if base.__name__ in KEPT else [])]
                if base.__module__.startswith("sysdpo_jax"):
                    for key, method in methods(base).items():
                        found[f"{base.__module__}.{base.__qualname__}.{key}"] = method, above
    return found


def methods(cls):
    """The public methods that the class writes itself, and `__call__`."""
    own = {key: value for key, value in vars(cls).items() if not key.startswith("_") or key == "__call__"}
    plain = {key: getattr(value, "__func__", value) for key, value in own.items()}
    return {key: value for key, value in plain.items() if inspect.isfunction(value)}


class Said(NamedTuple):
    """What a docstring names: arguments, whether there is a result, and errors."""

    named: set[str]
    gives: bool
    raised: set[str]


def said(docstring):
    parsed = Docstring(inspect.cleandoc(docstring or "")).parse("google", returns_named_value=False, warnings=False)
    items = lambda *kinds: [item for part in parsed if part.kind in kinds for item in part.value]  # noqa: E731
    raised = {item.annotation for item in items(DocstringSectionKind.raises)}
    return Said({item.name for item in items(*NAMED)}, bool(items(*GIVEN)), raised)


def raised_names(function):
    """The classes that the function's own body raises, as far as they are named there."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    waiting, found = list(tree.body[0].body), set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            found |= {name} if name[0].isupper() else set()
        waiting.extend(ast.iter_child_nodes(node))
    return found


def parameters(thing):
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def faults(thing, bases=()):
    """What the docstring lacks, or names in vain; an overriding method may leave to its base what the base says."""
    overridden = [vars(base).get(thing.__name__) for base in bases]
    texts = [thing.__doc__, *(method.__doc__ for method in overridden if inspect.isfunction(method))]
    if not any(texts):
        return ["no docstring"]
    own, whole = said(texts[0]), [said(text) for text in texts]
    raised = set().union(*(each.raised for each in whole))
    if inspect.isclass(thing):
        # A protocol is not made, and most errors are made of a message.
        if getattr(thing, "_is_protocol", False) or (issubclass(thing, Exception) and "__init__" not in vars(thing)):
            return []
        bodies = [vars(thing).get("__post_init__" if is_dataclass(thing) else "__init__")]
    else:
        bodies = [thing]
    named = set().union(*(each.named for each in whole))
    found = [f"without Args: {name}" for name in parameters(thing) if name not in named]
    found += [f"no parameter: {name}" for name in sorted(own.named - set(parameters(thing)))]
    if inspect.isfunction(thing):
        returned = inspect.signature(thing).return_annotation
        nothing = returned in (None, "None", inspect.Signature.empty)
        found += [] if nothing or any(each.gives for each in whole) else ["without Returns"]
    errors = set().union(*(raised_names(body) for body in bodies if inspect.isfunction(body)))
    return found + [f"without Raises: {name}" for name in sorted(errors - raised)]


@pytest.mark.parametrize("name", sorted(public()))
def test_public_docstrings_are_whole(name):
    assert faults(*public()[name]) == []


def half(number: int, strict: bool = False) -> float:
    """The half.

    Args:
        number: To be halved.
        precision: Of nothing.
    """
    if strict and number % 2:
        raise ValueError("odd")
    return number / 2


def test_what_a_docstring_lacks_is_found():
    assert faults(half) == [
        "without Args: strict",
        "no parameter: precision",
        "without Returns",
        "without Raises: ValueError",
    ]


def test_the_five_names_of_a_newcomer_stand_first():
    first = ["Node", "CompoundSystem", "load_preferences", "DirectObjective", "Trainer"]
    assert sysdpo_jax.__all__[:5] == first
    assert [line.split("`")[1] for line in sysdpo_jax.__doc__.splitlines() if line.startswith("- ")] == first
