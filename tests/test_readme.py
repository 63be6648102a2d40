"""The README keeps its word: its example runs, its table is the run's, its map names every folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from experiments.progressive.report import results_table
from sysdpo_jax.evaluation import markdown_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RUN = ROOT / "docs" / "progressive_images"


def test_the_example_runs_as_it_stands_and_improves_the_system(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    before, after = (float(line) for line in done.stdout.split())
    # The mean of 2048 scores of spread about 1: its standard error is 0.03.
    assert after > before + 0.3


def test_the_table_is_that_of_the_run_whose_files_are_beside_it():
    results = json.loads((RUN / "results.json").read_text())
    assert markdown_table(results_table(results)) in README


def test_the_figures_hold_what_the_readme_claims():
    """Better than the start and than either component alone; the aligned system beats the best of four unaligned."""
    results = json.loads((RUN / "results.json").read_text())
    assert results["evaluated_on"] == "test"
    for other in ("before", "lm_only", "diffusion_only"):
        for figure in ("preference_score", "order_consistency"):
            gain = results["differences"][f"sysdpo - {other}"][figure]
            assert gain["n"] >= 512
            assert gain["value"] > 2 * gain["standard_error"], (other, figure)
    gain = results["differences"]["sysdpo_online - best_of_n"]
    assert gain["preference_score"]["value"] > 0
    assert gain["order_consistency"]["value"] > -2 * gain["order_consistency"]["standard_error"]


def test_the_map_names_every_folder_and_every_link_leads_somewhere():
    folders = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("sysdpo_jax/*/__init__.py")}
    assert folders <= set(re.findall(r"`(sysdpo_jax/\w+)/`", README))
    pages = [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"
