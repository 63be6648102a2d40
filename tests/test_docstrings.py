"""Docstrings of the public names are whole: every parameter in Args, Returns and Raises where there is something."""

import ast
import dataclasses
import inspect
import textwrap
from importlib import import_module

import pytest
from griffe import Docstring, DocstringSectionKind

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
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if inspect.ismodule(thing) or not (inspect.isclass(thing) or inspect.isfunction(thing)):
                continue
            full = f"{thing.__module__}.{thing.__qualname__}"
            found[full] = (thing, ())
            for base in thing.__mro__ if inspect.isclass(thing) else ():
                if base.__module__.startswith("sysdpo_jax"):
                    name, above = (
                        f"{base.__module__}.{base.__qualname__}",
                        (*base.__mro__[1:], *filter(None, [KEPT.get(base.__name__)])),
                    )
                    found |= {f"{name}.{key}": (method, above) for key, method in methods(base).items()}
    return found


def methods(cls):
    """The public methods that the class writes itself, and `__call__`."""
    own = {key: value for key, value in vars(cls).items() if not key.startswith("_") or key == "__call__"}
    plain = {key: getattr(value, "__func__", value) for key, value in own.items()}
    return {key: value for key, value in plain.items() if inspect.isfunction(value)}


def sections(docstring):
    """{kind: names or texts} of a Google-style docstring."""
    parsed = Docstring(inspect.cleandoc(docstring or "")).parse("google", returns_named_value=False, warnings=False)
    named = {name for part in parsed if part.kind in NAMED for name in (item.name for item in part.value)}
    raised = {item.annotation for part in parsed if part.kind is DocstringSectionKind.raises for item in part.value}
    return named, any(part.kind in GIVEN for part in parsed), raised


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
    try:
        names = inspect.signature(thing).parameters
    except ValueError:
        return []
    return [name for name in names if name not in ("self", "cls")]


def faults(thing, bases):
    """What the docstring lacks; an overriding method may leave to its base what the base says."""
    said = [base for base in bases if getattr(vars(base).get(getattr(thing, "__name__", "")), "__doc__", None)]
    if not thing.__doc__ and not said:
        return ["a docstring"]
    named, gives, raises = sections(thing.__doc__)
    for base in said:
        inherited = vars(base).get(getattr(thing, "__name__", ""))
        if inspect.isfunction(inherited) and inherited.__doc__:
            more, given, raised = sections(inherited.__doc__)
            named, gives, raises = named | more, gives or given, raises | raised
    if inspect.isclass(thing):
        if getattr(thing, "_is_protocol", False) or (issubclass(thing, Exception) and "__init__" not in vars(thing)):
            return []
        found = [f"Args: {name}" for name in parameters(thing) if name not in named]
        bodies = [vars(thing)[key] for key in ("__init__", "__post_init__") if key in vars(thing)]
        if dataclasses.is_dataclass(thing):
            bodies = [vars(thing)["__post_init__"]] if "__post_init__" in vars(thing) else []
        written = [body for body in bodies if inspect.isfunction(body)]
        return found + [f"Raises: {name}" for body in written for name in sorted(raised_names(body) - raises)]
    found = [f"Args: {name}" for name in parameters(thing) if name not in named]
    returned = inspect.signature(thing).return_annotation
    if returned not in (None, "None", inspect.Signature.empty) and not gives:
        found.append("Returns")
    return found + [f"Raises: {name}" for name in sorted(raised_names(thing) - raises)]


@pytest.mark.parametrize("name", sorted(public()))
def test_public_docstrings_are_whole(name):
    assert faults(*public()[name]) == []
