"""The wheel: one package with all that it needs, whatever lies beside it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that the tree has no build folder."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "sysdpo_jax", folder / "sysdpo_jax", ignore=shutil.ignore_patterns("__pycache__"))
    # It must stay outside.
    (folder / "experiments").mkdir()
    (folder / "experiments" / "__init__.py").write_text("")
    for name in PARTS:
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(folder / "dist"), str(folder)], check=True)
    [built] = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_one_package_with_its_data_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [entry] = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"sysdpo_jax"}
    assert any(name.endswith("/LICENSE") for name in names)
    assert "sysdpo = sysdpo_jax.cli.main:main" in entry
    # Whatever is in the tree is in the wheel: sources, recipes with their data, templates, py.typed.
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "sysdpo_jax").rglob("*") if path.is_file()}
    assert {name for name in tree if "__pycache__" not in name} == {name for name in names if ".dist-info/" not in name}


@pytest.mark.slow
def test_a_fresh_environment_trains_dry_beside_another_package_called_experiments(wheel, tmp_path):
    """`pip install` with what setup.py asks for, from an index: minutes, and a gigabyte on disk."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise ImportError('this is the user\\'s own')\n")
    subprocess.run([sys.executable, "-m", "venv", "environment"], cwd=tmp_path, check=True)
    binaries = tmp_path / "environment" / "bin"
    subprocess.run([binaries / "python", "-m", "pip", "install", "--quiet", str(wheel)], cwd=tmp_path, check=True)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    offline = alone | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([binaries / "python", "-c", "import sysdpo_jax"], cwd=tmp_path, env=offline, check=True)
    command = [binaries / "sysdpo", "train", "quickstart", "--dry-run"]
    dry = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert dry.returncode == 0, dry.stderr
    assert "loss at step 0: 0.69" in dry.stdout
