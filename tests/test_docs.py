"""Every command of the documentation runs: in its order, in an empty folder, with small models for those on the hub."""

import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from experiments.own.config import TrainConfig, read_config
from sysdpo_jax.training import read_metrics
from tests.pretrained.checkpoints import write_decoder

ROOT = Path(__file__).parents[1]
PAGES = ("quickstart.md", "bring_your_own.md", "choosing.md", "scaling.md", "troubleshooting.md")
COMMAND = re.compile(r"^    python -m (experiments\.\w+) (.*)$", re.MULTILINE)


def commands(page):
    text = (ROOT / "docs" / page).read_text().replace("\\\n", " ")
    return [(module, shlex.split(flags)) for module, flags in COMMAND.findall(text)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the repository's experiments, whose quickstart takes a small model."""
    shutil.copytree(ROOT / "experiments", tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    write_decoder(tmp_path / "small", "llama", num_hidden_layers=1, max_position_embeddings=256)
    path = tmp_path / "experiments" / "configs" / "quickstart.yaml"
    hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub in path.read_text()
    text = path.read_text().replace(hub, "small")
    for old, new in (("steps: 20", "steps: 2"), ("warmup: 2", "warmup: 1"), ("every: 10", "every: 1")):
        assert old in text
        text = text.replace(old, new)
    # The small model's tokenizer has no chat template.
    path.write_text(text.replace(", chat: true", ""))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_quickstart_leads_to_a_report_and_models(place):
    found = commands("quickstart.md")
    assert [module.rpartition(".")[2] for module, _ in found] == [
        "rollout", "score", "make_pairs", "train", "train", "export",
    ]  # fmt: skip
    for module, flags in found:
        import_module(module).main(flags)
    assert (place / "runs" / "quickstart" / "report.html").exists()
    assert (place / "runs" / "quickstart_aligned" / "refiner" / "README.md").exists()
    rows = read_metrics(place / "runs" / "quickstart" / "metrics.jsonl")
    assert {row["step"] for row in rows if "eval/win_rate" in row} == {0, 1, 2}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_the_pages_name_are_there(page):
    text = (ROOT / "docs" / page).read_text()
    linked = [ROOT / "docs" / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = [ROOT / path for path in re.findall(r"`((?:experiments|sysdpo_jax|tests|docs)/[\w./]+)`", text)]
    assert all(path.exists() for path in [*linked, *named])


@pytest.mark.parametrize("page", PAGES)
def test_configurations_that_the_pages_name_are_valid(page):
    for module, flags in commands(page):
        if "--config" in flags and flags[flags.index("--config") + 1].startswith("experiments/"):
            assert module == "experiments.train"
            assert read_config(ROOT / flags[flags.index("--config") + 1], TrainConfig).system.nodes


def test_metrics_of_the_troubleshooting_page_exist(place):
    """The columns that it names are written, by the run of the quickstart or by name in the code."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    named = {name for name in re.findall(r"`([a-z_]+/[a-z_/<>*]+)`", text) if not name.startswith("experiments")}
    code = "".join(path.read_text() for path in (ROOT / "sysdpo_jax").rglob("*.py"))
    for name in named:
        prefix = name.split("<")[0].rstrip("*")
        assert prefix.rstrip("/") in code or prefix.split("/")[0] + '"' in code, name
