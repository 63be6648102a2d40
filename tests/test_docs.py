"""Every command of the documentation: those of a system of your own run, in their order, with small models and data."""

import json
import math
import re
import shlex
import shutil
import threading
import time
from dataclasses import fields, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from pathlib import Path

import diffusers
import jax
import optax
import pytest
import torch
import transformers
import yaml
from PIL import Image

import sysdpo_jax as sj
from experiments.common.models import smollm2_file
from experiments.programs import painter
from sysdpo_jax.cli import main
from sysdpo_jax.cli.main import COMMANDS, dispatch
from sysdpo_jax.data.formats import READERS
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.flags import parse_flags
from sysdpo_jax.runs.config import (
    DataConfig,
    EvaluationConfig,
    MeshConfig,
    ObjectiveConfig,
    OnlineConfig,
    ScheduleConfig,
    TrainConfig,
)
from sysdpo_jax.runs.files import RECIPES, configure, read_config, recipes
from sysdpo_jax.runs.system_config import ComponentConfig, NodeConfig
from sysdpo_jax.training import read_metrics
from tests.pretrained.checkpoints import stable_diffusion_1, stable_diffusion_xl, write_decoder
from tests.training.systems import CHAIN, pairs

pytestmark = pytest.mark.docs
ROOT = Path(__file__).parents[1]
DOCS = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
CONFIGS = sorted(recipes().values())
# At the begin of a line or of a piece of code.
COMMAND = re.compile(rf"(?:^ *|^# +|`|exec )sysdpo ({'|'.join(COMMANDS)}) ([^`\n\"]*)", re.MULTILINE)
MODULE = re.compile(r"python -m (experiments\.[\w.]+)")
TEXT_MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "Qwen/Qwen1.5-1.8B-Chat",
    "meta-llama/Meta-Llama-3-8B-Instruct",
)
IMAGE_MODELS = {
    "stabilityai/stable-diffusion-xl-base-1.0": stable_diffusion_xl,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": stable_diffusion_1,
}
# Steps of a run that shows that everything works.
SHORT = ((r"steps: \d+", "steps: 2"), (r"warmup: \d+", "warmup: 1"), (r"every: \d+", "every: 1"))
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def commands(path):
    """[[command, flag ...]] of a page or of the comments of a configuration."""
    text = re.sub(r"\\\n\s*", "", (ROOT / path).read_text())
    return [[name, *shlex.split(flags.split(" > ")[0], comments=True)] for name, flags in COMMAND.findall(text)]


class Judge(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": "8 of 10"}}]}).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def judge():
    server = HTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the recipes, which take a small language model and few steps, in the place of the packaged ones."""
    shutil.copytree(RECIPES, tmp_path / "recipes", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    monkeypatch.setattr("sysdpo_jax.runs.files.RECIPES", tmp_path / "recipes")
    write_decoder(tmp_path / "small", "llama", num_hidden_layers=1, max_position_embeddings=1024)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "small")
    for path in (tmp_path / "recipes").glob("*.yaml"):
        text = path.read_text()
        for hub in TEXT_MODELS:
            text = text.replace(hub, str(tmp_path / "small"))
        for old, new in SHORT:
            text = re.sub(old, new, text)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(found):
    for words in found:
        dispatch(words)


def quickstart(folder, judge, recipe="quickstart"):
    """The commands of the page, and what a user writes for them."""
    shutil.copy(RECIPES / "quickstart_prompts.txt", folder / "prompts.txt")
    shutil.copy(RECIPES / "quickstart_question.txt", folder / "question.txt")
    places = {"http://localhost:8000/v1": judge, "quickstart": recipe}
    return [[places.get(word, word) for word in words] for words in commands("docs/quickstart.md")]


def test_the_quickstart_leads_to_a_report_and_models(place, judge):
    found = quickstart(place, judge)
    names = ["train", "recipes", "rollout", "score", "pairs", "score", "train", "train", "export"]
    assert [name for name, *_ in found] == names
    run(found)
    judged = [json.loads(line) for line in (place / "judged.jsonl").read_text().splitlines()]
    assert {row["score"] for row in judged} == {8.0}
    assert (place / "runs/quickstart/report.html").exists()
    assert (place / "runs/my_first/report.html").exists()
    assert (place / "aligned/refiner/README.md").exists()
    rows = read_metrics(place / "runs/my_first/metrics.jsonl")
    assert {row["step"] for row in rows if "eval/win_rate" in row} == {0, 1, 2}
    results = json.loads((place / "runs/my_first/results.json").read_text())
    assert [row["step"] for row in results["evaluations"]] == [0, 1, 2]
    assert results["training"]["loss"] == [row["loss"] for row in rows if "loss" in row][-1]


@pytest.mark.slow
def test_the_quickstart_with_the_real_model_makes_answers_shorter(tmp_path, monkeypatch, judge):
    """As it stands, but for the weights, which come from a file. The win rate is 0.5 where nothing is learned."""
    path = tmp_path / "own.yaml"
    text = (RECIPES / "smollm2_x2.yaml").read_text().replace(TEXT_MODELS[0], str(smollm2_file()))
    path.write_text(text.replace("quickstart_held_out.txt", str(RECIPES / "quickstart_held_out.txt")))
    monkeypatch.chdir(tmp_path)
    # The first command trains on what comes with the small recipe.
    for words in quickstart(tmp_path, judge, str(path))[2:]:
        began = time.monotonic()
        dispatch(words)
        print(f"{words[0]} took {time.monotonic() - began:.0f} seconds")
    results = json.loads(Path("runs/my_first/results.json").read_text())
    assert max(row["eval/win_rate"] for row in results["evaluations"]) > 0.6


def test_the_worked_example_is_trained_and_exported(place, capsys):
    run(commands("docs/bring_your_own.md"))
    assert "chosen route" in capsys.readouterr().out
    assert (place / "aligned/router/parameters.safetensors").exists()
    for expert in ("0", "1"):
        transformers.AutoModelForCausalLM.from_pretrained(place / "aligned/experts" / expert)


def test_the_agent_is_aligned_and_exported(place):
    """A small model of random weights is never right: its runs are scored by their length."""
    path = place / "recipes/agent.yaml"
    text = path.read_text().replace("sysdpo_jax.recipes.agent:right", "letters:score")
    (place / "letters.py").write_text("def score(run):\n    return len(run['agent'][-1]['action'])\n")
    path.write_text(re.sub(r"samples: \d", "samples: 2", text))
    found = commands("docs/programs/agent.md")
    assert [name for name, *_ in found] == ["online", "export", "recipes"]
    run(found)
    rows = read_metrics(place / "runs/agent/metrics.jsonl")
    assert {row["step"] for row in rows if "eval/looked_up" in row} == {0, 1, 2}
    assert {row["retokenized/action/policy"] for row in rows if "loss" in row} == {0}
    transformers.AutoModelForCausalLM.from_pretrained(place / "aligned/model")


def test_the_dspy_program_is_aligned_and_exported(place, capsys):
    """Traces of four of its questions and a small model, in two steps."""
    (place / "traces").mkdir()
    shutil.copy(ROOT / "tests/traces/data/ask.spans.jsonl", place / "traces/dspy.spans.jsonl")
    (place / "small").rename(place / "smollm2")
    found = commands("docs/programs/dspy.md")
    assert [name for name, *_ in found] == ["import", "train", "export"]
    given, train = {"batch_size": "2", "steps": "2", "warmup": "1"}, found[1]
    for name, value in given.items():
        train[train.index(f"--schedule.{name}") + 1] = value
    run(found)
    assert "24 mapped, 0 refused by name" in capsys.readouterr().out
    for name in ("search", "answer"):
        assert json.loads((place / "aligned" / name / "adapter_config.json").read_text())["r"]
    rows = read_metrics(place / "runs/dspy/metrics.jsonl")
    assert {row["step"] for row in rows if "loss" in row} == {0, 1}


@pytest.mark.slow
def test_the_writer_and_the_painter_are_aligned_and_exported(place):
    """The painter of the page, which has learned nothing: its pictures are scored by their brightness."""
    path = place / "recipes/pictures.yaml"
    text = path.read_text().replace("sysdpo_jax.recipes.pictures:score", "bright:score")
    (place / "bright.py").write_text("def score(run):\n    return float(run['picture'].mean())\n")
    path.write_text(re.sub(r"min_margin: [\d.]+", "min_margin: 0", re.sub(r"samples: \d", "samples: 2", text)))
    page = (ROOT / "docs/programs/pictures.md").read_text()
    [folder] = re.findall(r"python -m experiments\.programs\.painter (\w+)", page)
    painter.main([folder, "--examples", "8", "--vae-steps", "1", "--steps", "1"])
    found = commands("docs/programs/pictures.md")
    assert [name for name, *_ in found] == ["online", "export", "recipes"]
    run(found)
    rows = read_metrics(place / "runs/pictures/metrics.jsonl")
    assert {row["step"] for row in rows if "eval/right" in row} == {0, 1, 2}
    transformers.AutoModelForCausalLM.from_pretrained(place / "aligned/writer")
    before, after = (
        diffusers.StableDiffusionPipeline.from_pretrained(place / name) for name in (folder, "aligned/painter")
    )
    assert not all(torch.equal(*each) for each in zip(before.unet.parameters(), after.unet.parameters(), strict=True))


def test_recorded_traces_lead_to_a_dry_run(place, capsys):
    shutil.copy(ROOT / "tests/traces/data/openai.spans.jsonl", place / "traces.jsonl")
    (place / "small").rename(place / "my_model")
    found = commands("docs/traces.md")
    assert [name for name, *_ in found] == ["import", "train"]
    run(found)
    said = capsys.readouterr().out
    assert "36 mapped, 0 refused by name" in said
    for name in ("draft", "answer"):
        assert f"mapped to the node {name} (trained)" in (place / "proposal/report.txt").read_text()
    assert "loss at step 0: 0.69" in said


@pytest.mark.slow
def test_the_chain_of_the_readme_with_a_configuration_of_ones_own(place, capsys):
    """The names in the commands stand for what a user has."""
    dispatch(["recipes", "quickstart"])
    (place / "my_run.yaml").write_text(capsys.readouterr().out)
    shutil.copy(RECIPES / "quickstart_prompts.txt", place / "prompts.txt")
    (place / "my_package").mkdir()
    (place / "my_package/judging.py").write_text("def score(run):\n    return len(run['answer'])\n")
    own = ("runs.jsonl", "my_run.yaml", "runs/my_run")
    chain = [words for words in commands("README.md") if any(name in words for name in own)]
    assert [name for name, *_ in chain] == ["rollout", "score", "pairs", "train", "train", "export"]
    run(chain)
    assert (place / "aligned/drafter/model.safetensors").exists()


@pytest.mark.parametrize("path", [*DOCS, *(path.relative_to(ROOT) for path in CONFIGS)], ids=str)
def test_commands_have_the_flags_that_the_pages_give(path, monkeypatch):
    """All of them: also those that need more than a test has. A file of the user's own has the fields of a recipe."""
    monkeypatch.chdir(ROOT)
    for name, *flags in commands(path):
        own = main.command_module(name)
        if issubclass(own.Config, TrainConfig):
            known = [word if not word.endswith(".yaml") else str(CONFIGS[0]) for word in flags]
            assert configure(own.Config, known)
        else:
            assert parse_flags(own.Config, flags, getattr(own, "POSITIONAL", ""))
    for module in MODULE.findall((ROOT / path).read_text()):
        assert find_spec(module)


@pytest.mark.parametrize(
    "path",
    # Of a U-Net and of beam search the compilation takes minutes; the quickstart is run above.
    [pytest.param(path, marks=pytest.mark.slow) for path in CONFIGS if path.stem != "quickstart"],
    ids=lambda path: path.stem,
)
def test_ready_configurations_run_dry(place, path, capsys):
    """With the smallest models of each family, and pairs of the form that the file asks for."""
    here = place / "recipes" / path.name
    text = here.read_text()
    for hub, make in IMAGE_MODELS.items():
        if hub in text:
            make().save_pretrained(place / "painter")
            here.write_text(text.replace(hub, str(place / "painter")))
    config = read_config(here)
    (place / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in _pairs(config, place)))
    own = ["--online.prompts", ""] if config.online.prompts else []
    # The likelihood of what won comes on top of ln 2.
    own += ["--objective.sft", "{}"] if config.objective.sft else []
    dispatch(["train", path.stem, "--dry-run", "--data.source", "pairs.jsonl", *own])
    assert "loss at step 0: 0.69" in capsys.readouterr().out


def _pairs(config, place):
    for name, grey in (("chosen", 200), ("rejected", 30)):
        Image.new("RGB", (64, 64), (grey, grey, 90)).save(place / f"{name}.png")
    values = {
        "draft": "a small cube",
        "answer": "a red ball\na green cube\na large ball",
        "caption": "a red ball",
        "route": 1,
        "agent": [{"action": "a red ball"}],
        "prompt": "a red ball",
    }
    for _ in range(config.schedule.batch_size):
        if config.data.reader == "trl":
            yield {"prompt": "a red ball", "chosen": "a green cube", "rejected": "the ball"}
            continue
        row = {"inputs": {config.system.inputs[0]: "a small red ball"}}
        for side in ("chosen", "rejected"):
            own = values | {"image": f"{side}.png", "picture": f"{side}.png", "images": [f"{side}.png"] * 3}
            nodes = (name for name, node in config.system.nodes.items() if node.component or node.body)
            row[side] = {name: own[name] for name in nodes}
        yield row


def test_the_page_of_the_configuration_has_every_field(tmp_path):
    """With its default, but for those that are examples."""
    text = (ROOT / "docs/configuration.md").read_text().split("```yaml")[1].split("```")[0]
    (tmp_path / "all.yaml").write_text(text)
    config = read_config(tmp_path / "all.yaml")
    given = yaml.safe_load(text)
    assert set(given) == {field.name for field in fields(TrainConfig)}
    for name, kind in (("data", DataConfig), ("objective", ObjectiveConfig), ("schedule", ScheduleConfig)):
        assert set(given[name]) == {field.name for field in fields(kind)}
        assert replace(getattr(config, name), **({"source": ""} if name == "data" else {})) == kind()
    assert set(given["online"]) == {field.name for field in fields(OnlineConfig)}
    assert set(given["mesh"]) == {field.name for field in fields(MeshConfig)}
    assert set(given["evaluation"]) == {field.name for field in fields(EvaluationConfig)}
    assert set(given["evaluation"]["judge"]) == {field.name for field in fields(JudgeConfig)}
    assert replace(config.evaluation, prompts="", scorer="") == EvaluationConfig()
    assert set(given["system"]["nodes"]["caption"]) == {field.name for field in fields(NodeConfig)}
    assert set(given["system"]["components"]["writer"]) == {field.name for field in fields(ComponentConfig)}
    rest = {name: getattr(config, name) for name in set(given) - {"directory", "system", "data", "evaluation"}}
    assert rest == {name: getattr(TrainConfig(), name) for name in rest}


def test_rows_of_the_page_of_data_are_read():
    """Each reader takes its row, and gives the record that the page describes."""
    text = (ROOT / "docs/data.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\{.*?\})` \|", text, re.MULTILINE))
    assert set(rows) == {"records", "trl", "pick_a_pic", "ranked", "label_studio", "argilla"}
    question, answer = sj.Categorical(2, (2,)), ("x",)
    system = sj.CompoundSystem(("x",), (sj.Node("z", question, answer),))
    made = {name: READERS[name](json.loads(row.replace(": bytes", ': "bytes"')), system) for name, row in rows.items()}
    assert made == {
        "records": [
            sj.PreferenceRecord(
                {"request": "a ball"},
                {"caption": "a red ball", "image": "good.png"},
                {"caption": "a ball", "image": "bad.png"},
            )
        ],
        "trl": [sj.PreferenceRecord({"x": "a ball"}, {"z": "a red ball"}, {"z": "a cube"})],
        "pick_a_pic": [sj.PreferenceRecord({"x": "a ball"}, {"z": "bytes"}, {"z": "bytes"})],
        "ranked": [sj.PreferenceRecord({"x": "a ball"}, {"z": "a red ball"}, {"z": "a cube"})],
        "label_studio": [sj.PreferenceRecord({"x": "a ball"}, {"z": "a red ball"}, {"z": "a cube"})],
        "argilla": [sj.PreferenceRecord({"x": "a ball"}, {"z": "a red ball"}, {"z": "a cube"})],
    }


@pytest.mark.parametrize("path", DOCS, ids=str)
def test_files_that_the_pages_name_are_there(path):
    text = (ROOT / path).read_text()
    linked = [(ROOT / path).parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    named = [ROOT / name for name in re.findall(r"`((?:experiments|sysdpo_jax|tests|docs)/[\w./]+)`", text)]
    assert [found for found in (*linked, *named) if not found.exists()] == []


def test_metrics_of_the_pages_exist():
    """The columns that they name are written by name in the code."""
    files = (path for package in ("sysdpo_jax", "experiments") for path in (ROOT / package).rglob("*.py"))
    code = "".join(path.read_text() for path in files)
    for page in ("troubleshooting.md", "metrics.md", "choosing.md"):
        text = (ROOT / "docs" / page).read_text()
        named = {name for name in re.findall(r"`([a-z_]+/[a-z_/<>*]+)`", text) if not name.startswith("experiments")}
        for name in named:
            # An evaluation names its figures without the prefix of their columns.
            prefix = name.split("<")[0].rstrip("*").removeprefix("eval/")
            assert prefix.rstrip("/") in code, name


def test_the_objective_of_the_documentation_trains():
    """At step 0 policy and reference are one: the term that it adds is 0, and its figure is logged."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bring_your_own.md").read_text(), re.DOTALL)
    names = {"__name__": "anchored"}
    exec(compile(code, "docs/bring_your_own.md", "exec"), names)
    objective = names["Anchored"](sj.DirectObjective(), 1.0)
    adam = sj.ComponentOptimizer(optax.adam(0.1))
    optimizer = sj.make_optimizer({"a": adam, "b": adam, "c": sj.FROZEN})
    state = sj.create_state(CHAIN, CHAIN.init(jax.random.key(0)), optimizer)
    step = sj.make_train_step(CHAIN, objective, optimizer, accumulate=2)
    figures = []
    for _ in range(2):
        state, metrics = step(state, pairs(8), jax.random.key(1))
        figures.append((float(metrics["loss"]), float(metrics["drift/chosen"])))
    assert figures[0] == pytest.approx((math.log(2), 0), abs=1e-6)
    assert figures[1][0] > figures[1][1] > 0
