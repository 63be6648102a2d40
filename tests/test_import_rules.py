"""The one import rule, and that importing the library neither loads torch nor touches a device."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sysdpo_jax"
# Small modules that import nothing of the library, and that every part may import.
BOTTOM = {
    "endpoint",
    "io",
    "manifest",
    "processes",
    "errors",
    "flags",
    "keys",
    "row_files",
    "static",
    "threads",
    "trees",
    "typing",
    "user_code",
    "values",
}
# What each part may import of the library, beside itself and the modules of `BOTTOM`; * is all of it.
ALLOWED = {
    "models": set(),
    "decoding": {"models"},
    "diffusion": {"models"},
    "components": {"models", "decoding", "diffusion"},
    "parallel": {"models"},
    "nodes": {"components", "models.lora"},
    "control_flow": {"components", "nodes"},
    "structure": {"components", "nodes", "control_flow"},
    "running": {"components", "nodes", "control_flow", "structure"},
    "graph": {"components", "nodes", "running"},
    "batch": {"components.routed", "graph"},
    "roles": {"models", "components", "parallel", "graph"},
    "objectives": {"batch", "graph", "roles", "components.base", "components.routed"},
    "data": {"components", "batch", "graph", "nodes", "structure"},
    "training": {"models", "components", "parallel", "batch", "graph", "objectives", "data"},
    "pretrained": {"models", "decoding", "diffusion", "components"},
    "serving": {"models", "decoding", "components", "graph", "pretrained"},
    "traces": {"components", "data", "pretrained"},
    "evaluation": {"components", "graph", "data"},
    "report": {"components", "graph", "evaluation"},
    "runs": {
        *("models", "components", "parallel", "graph", "objectives", "data", "training", "pretrained"),
        *("serving", "evaluation", "report"),
    },
    "annotation": {"components", "data", "evaluation", "runs"},
    "recipes": {"models", "components", "runs"},
    "cli": {"*"},
    "__main__": {"cli"},
} | {part: set() for part in BOTTOM}


ABOVE = {"runs", "recipes", "cli"}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def violations(part, modules):
    allowed = {f"sysdpo_jax.{name}" for name in ALLOWED[part] | BOTTOM | {part}}
    # Parts above all that the package itself exports use it as others do: `import sysdpo_jax as sj`.
    modules = [name for name in modules if name != "sysdpo_jax" or part not in ABOVE]
    for module in modules:
        top = module.split(".")[0]
        inside = "*" in ALLOWED[part] or any(module == name or module.startswith(name + ".") for name in allowed)
        if top in ("experiments", "torch", "diffusers") or (top == "sysdpo_jax" and not inside):
            yield module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        return
    assert list(violations(part, imports(path))) == []


def test_the_rule_catches_an_upward_import():
    assert list(violations("models", ["sysdpo_jax.graph", "jax"])) == ["sysdpo_jax.graph"]
    assert list(violations("objectives", ["sysdpo_jax.components.base"])) == []
    assert list(violations("objectives", ["sysdpo_jax.components.diffusion"])) == ["sysdpo_jax.components.diffusion"]
    assert list(violations("data", ["experiments.progressive"])) == ["experiments.progressive"]


EXPERIMENTS = PACKAGE.parent / "experiments"


def private(tree):
    """What a module imports of the library beside its public API.

    Public is what the package and its parts export, and the small modules beside those parts.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.startswith("sysdpo_jax."))
        if not isinstance(node, ast.ImportFrom) or node.module.split(".")[0] != "sysdpo_jax":
            continue
        module = import_module(node.module)
        exported = getattr(module, "__all__", None)
        deep = exported is None and node.module.count(".") > 1
        for name in (each.name for each in node.names):
            if deep or name.startswith("_") or (exported is not None and name not in exported):
                yield f"{node.module}.{name}"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.rglob("*.py")), ids=lambda p: str(p.relative_to(EXPERIMENTS)))
def test_experiments_use_the_public_api_alone(path):
    assert list(private(ast.parse(path.read_text(encoding="utf-8")))) == []


def test_the_rule_of_experiments_catches_what_is_private():
    text = """
import sysdpo_jax.training.step
from sysdpo_jax import Trainer, graph_of_mine
from sysdpo_jax.training import read_metrics
from sysdpo_jax.training.metrics import read_metrics
from sysdpo_jax.typing import Params
"""
    assert list(private(ast.parse(text))) == [
        "sysdpo_jax.training.step",
        "sysdpo_jax.graph_of_mine",
        "sysdpo_jax.training.metrics.read_metrics",
    ]


def test_importing_loads_no_torch_and_starts_no_device():
    code = (
        "import sys, sysdpo_jax; from jax._src import xla_bridge; "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
