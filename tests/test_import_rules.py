"""The one import rule, and that importing the library neither loads torch nor touches a device."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sysdpo_jax"
# Small modules that import nothing of the library, and that every part may import.
BOTTOM = {
    "columns",
    "io",
    "locks",
    "processes",
    "errors",
    "importing",
    "keys",
    "resumable_jsonl",
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
    "batch": {"encoding", "graph"},
    "manifest": set(),
    "plates": {"components"},
    "nodes": {"components"},
    "encoding": {"components", "nodes"},
    "graph": {"models", "decoding", "components", "nodes", "plates", "encoding"},
    "objectives": {"batch", "graph", "components.base"},
    "data": {"components", "batch", "graph", "manifest"},
    "training": {"models", "components", "parallel", "batch", "graph", "manifest", "objectives", "data"},
    "pretrained": {"models", "decoding", "diffusion", "components", "manifest"},
    "evaluation": {"components", "graph", "data"},
    "runs": {"components", "parallel", "batch", "graph", "manifest", "objectives", "data", "training", "evaluation"},
    "report": {"components", "graph", "evaluation"},
    "recipes": {"*"},
    "cli": {"*"},
} | {part: set() for part in BOTTOM}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def violations(part, modules):
    allowed = {f"sysdpo_jax.{name}" for name in ALLOWED[part] | BOTTOM | {part}}
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


def test_importing_loads_no_torch_and_starts_no_device():
    code = (
        "import sys, sysdpo_jax; from jax._src import xla_bridge; "
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules; "
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
