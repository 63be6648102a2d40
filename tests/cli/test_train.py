"""From two folders of models and a file of preferences to aligned models and a report, by two commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml

from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.models.lora import merge_lora
from sysdpo_jax.runs.files import read_config
from sysdpo_jax.runs.run import assemble, load_system, restored
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.training import read_metrics
from sysdpo_jax.trees import by_path
from sysdpo_jax.values import from_json
from tests.cli.test_runs import failure
from tests.pretrained.checkpoints import write_decoder
from tests.test_io_locks import held

WORDS = ("a", "red", "green", "ball", "cube", "small", "large", "on", "the", "left")
STEPS = 4


def red(run):
    """The share of red among the answer's words."""
    words = run["answer"].split()
    return words.count("red") / max(len(words), 1)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Two small models, 200 preferences for red, prompts, and the configuration."""
    folder = tmp_path_factory.mktemp("material")
    for name in ("drafter", "refiner"):
        write_decoder(folder / name, "llama", num_hidden_layers=1)
    rng = np.random.default_rng(0)

    def text(*words):
        return " ".join([*words, *rng.choice(WORDS[2:], 3)])

    rows = [
        {
            "id": number,
            "inputs": {"question": text()},
            "chosen": {"draft": text(), "answer": text("red")},
            "rejected": {"draft": text(), "answer": text("the")},
        }
        for number in range(200)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "prompts.txt").write_text("".join(f"{text()}\n" for _ in range(6)))
    settings = {"max_prompt_length": 16, "max_new_tokens": 8}
    config = {
        "directory": str(folder / "run"),
        "system": {
            "inputs": ["question"],
            "nodes": {
                "draft": {"component": "drafter", "parents": ["question"]},
                "answer": {
                    "component": "refiner",
                    "parents": ["question", "draft"],
                    "prompt": "{question} the {draft} on",
                },
            },
            "components": {
                "drafter": {"checkpoint": str(folder / "drafter"), "lora": {"rank": 2}, "settings": settings},
                "refiner": {"checkpoint": str(folder / "refiner"), "mode": "full", "settings": settings},
            },
        },
        "data": {"source": str(folder / "pairs.jsonl")},
        "schedule": {"steps": STEPS, "batch_size": 8, "warmup": 1, "learning_rate": 1e-2},
        "evaluation": {"prompts": str(folder / "prompts.txt"), "scorer": f"{__name__}:red", "every": 2, "samples": 2},
        "log_every": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(material):
    dispatch(["train", str(material / "run.yaml")])
    return material


def test_training_leaves_figures_runs_and_a_report(trained):
    rows = read_metrics(trained / "run" / "metrics.jsonl")
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert list(losses) == list(range(STEPS))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5)  # policy and reference are the same
    evaluations = {row["step"]: row for row in rows if "eval/score" in row}
    assert list(evaluations) == [0, 2, 4]
    assert evaluations[0]["eval/win_rate"] == 0.5
    runs = list(read_lines(trained / "run" / "evaluation" / "runs-00000004.jsonl"))
    assert len(runs) == 12
    # What is logged is what was run: the mean of the scores of the runs on disk, each recomputed from its text.
    assert evaluations[4]["eval/score"] == pytest.approx(np.mean([red(from_json(run["outputs"])) for run in runs]))
    report = (trained / "run" / "report.html").read_text()
    assert all(word in report for word in ("Evaluations on held-out prompts", "drafter", "SysDPO-Direct", "before"))


def test_the_same_command_goes_on_and_another_configuration_is_refused(trained, capsys):
    """A finished run has nothing left to do."""
    before = read_metrics(trained / "run" / "metrics.jsonl")
    dispatch(["train", str(trained / "run.yaml"), "--log-every", "2"])
    after = read_metrics(trained / "run" / "metrics.jsonl")
    assert [row["step"] for row in after] == [row["step"] for row in before]
    said = failure(capsys, dispatch, ["train", str(trained / "run.yaml"), "--seed", "1"])
    assert "is of another run (seed was 0, now 1): choose another directory" in said


def test_a_refused_command_leaves_the_folder_as_it_is(trained, tmp_path, capsys):
    """Neither config.yaml nor the report says what a refused run wanted."""

    def kept(folder):
        return {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    run, flags = trained / "run", [str(trained / "run.yaml")]
    before = kept(run)
    assert "holds a checkpoint: resume" in failure(
        capsys, dispatch, ["train", *flags, "--resume", "false", "--log-every", "7"]
    )
    assert kept(run) == before
    with held("locked_folder", run) as process:
        assert f"is in use by process {process.pid} on host" in failure(capsys, dispatch, ["train", *flags])
        # Looking at it needs no lock.
        load_system(str(run), "newest")
    assert kept(run) == before
    # The weights on disk are no longer those that the run began with: config.yaml is gone, so that nothing else tells.
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "config.yaml").unlink()
    flags += ["--directory", str(tmp_path / "copy"), "--schedule.learning-rate", "0.5"]
    assert "config" in failure(capsys, dispatch, ["train", *flags])
    assert not (tmp_path / "copy" / "config.yaml").exists()
    # A new folder is not left behind.
    missing = ["--directory", str(tmp_path / "new" / "run"), "--schedule.batch-size", "1000"]
    assert "200 rows do not fill one batch" in failure(capsys, dispatch, ["train", *flags, *missing])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["direct", "sampling"])
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--schedule.accumulate", "3"], "8 rows cannot be cut into 3 equal parts"),
        (
            ["--objective.sft.nonode", "0.1"],
            "sft names the node 'nonode', which is not a trained node",
        ),
    ],
)
def test_what_a_step_would_refuse_leaves_no_folder(material, tmp_path, capsys, kind, flags, said):
    """Neither is the system evaluated first, so that the corrected command is a first one."""
    folder = tmp_path / "new" / "run"
    given = [str(material / "run.yaml"), "--directory", str(folder), "--objective.kind", kind, *flags]
    assert said in failure(capsys, dispatch, ["train", *given])
    assert not (tmp_path / "new").exists()


def test_the_folder_of_an_earlier_version_goes_on(trained, tmp_path, capsys):
    """Its config.yaml and data.json lack a field that came later."""
    run = tmp_path / "run"
    shutil.copytree(trained / "run", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    del config["data"]["ignore"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((run / "data.json").read_text())
    del about["ignore"]
    (run / "data.json").write_text(json.dumps(about))
    before = [row["step"] for row in read_metrics(run / "metrics.jsonl")]
    flags = [str(trained / "run.yaml"), "--directory", str(run)]
    dispatch(["train", *flags])
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == before
    # What stood for the default is still compared.
    said = failure(capsys, dispatch, ["train", *flags, "--data.ignore", "id"])
    assert "config.yaml is of another run (data.ignore was [], now ['id'])" in said
    (run / "config.yaml").unlink()
    (run / "data.json").write_text(json.dumps(about))
    said = failure(capsys, dispatch, ["train", *flags, "--data.ignore", "id"])
    assert "data.json is of another run (ignore was [], now ['id'])" in said


def test_exported_models_are_the_trained_ones(trained, tmp_path, capsys):
    """transformers loads them, and they are no longer what they were; the run's folder may have been moved since."""
    (trained / "run").rename(trained / "moved")
    try:
        dispatch(["export", "--directory", str(trained / "moved"), "--output", str(tmp_path / "aligned")])
    finally:
        (trained / "moved").rename(trained / "run")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "aligned" / name) for name in ("drafter", "refiner")]
    for name in ("drafter", "refiner"):
        folder = tmp_path / "aligned" / name
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        start = transformers.AutoModelForCausalLM.from_pretrained(trained / name).eval()
        tokens = transformers.AutoTokenizer.from_pretrained(folder)("a red ball", return_tensors="pt")
        with torch.no_grad():
            moved = (model(**tokens).logits - start(**tokens).logits).abs().max()
        assert moved > 1e-4
        card = (folder / "README.md").read_text()
        head = yaml.safe_load(card.split("---")[1])
        # The hub refuses what is no name of its own.
        assert "base_model" not in head
        assert str(trained / name) in card
        assert head["library_name"] == "transformers"
        assert "SHA-256" in card
        assert "| eval/win_rate |" in card


def test_adapters_are_exported_alone(trained, tmp_path):
    dispatch(["export", "--directory", str(trained / "run"), "--output", str(tmp_path / "aligned"), "--adapters"])
    assert (tmp_path / "aligned" / "drafter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "aligned" / "refiner" / "model.safetensors").exists()


def test_a_dry_run_shows_what_would_be_trained(material, tmp_path, capsys):
    dispatch(["train", str(material / "run.yaml"), "--directory", str(tmp_path / "run"), "--dry-run"])
    out = capsys.readouterr().out
    first = json.loads((material / "pairs.jsonl").read_text().splitlines()[0])
    assert "question --> draft" in out
    assert "MiB per device" in out
    [line] = [line for line in out.splitlines() if line.startswith("loss at step 0")]
    assert float(line.split(": ")[1].split()[0]) == pytest.approx(np.log(2), abs=1e-5)
    shown = [line for line in out.splitlines() if line.startswith("chosen answer: ")]
    assert len(shown) == 2
    assert all(" the " in line and "red" in line for line in shown)
    assert first
    assert not Path(tmp_path / "run").exists()


@pytest.mark.slow
def test_sampling_searches_for_the_drafts(material, tmp_path):
    """From the same records, whose drafts are left out."""
    flags = [str(material / "run.yaml"), "--directory", str(tmp_path / "run"), "--schedule.steps", "2"]
    flags += ["--objective.kind", "sampling", "--objective.intermediates", "2", "--evaluation.prompts", ""]
    dispatch(["train", *flags, "--evaluation.scorer", ""])
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]
    assert all(1 <= row["intermediates/distinct"] <= 2 for row in rows)
    dispatch(["export", "--directory", str(tmp_path / "run"), "--output", str(tmp_path / "aligned")])
    assert (tmp_path / "aligned" / "drafter" / "config.json").exists()


def test_a_trained_run_is_a_system_to_sample_from(trained, tmp_path):
    flags = ["--prompts", str(trained / "prompts.txt"), "--samples", "1", "--output", str(tmp_path / "runs.jsonl")]
    dispatch(["rollout", "--system", str(trained / "run"), *flags])
    assert len(list(read_lines(tmp_path / "runs.jsonl"))) == 6
    assert json.loads((tmp_path / "runs.jsonl.json").read_text())["system"].endswith(f" step {STEPS}")
    best = json.loads((trained / "run" / "results.json").read_text())["best_step"]
    loaded = load_system(str(trained / "run"), "best")
    assert loaded.identity.endswith(f" step {best}")
    assert load_system(str(trained / "run.yaml"), "newest").identity != loaded.identity


def test_runs_of_another_objective_are_not_mixed(trained, tmp_path, capsys):
    """Two folders whose configurations differ in beta alone: the weights do too."""
    other, output = tmp_path / "other", tmp_path / "runs.jsonl"
    flags = [str(trained / "run.yaml"), "--directory", str(other), "--objective.beta", "0.2"]
    dispatch(["train", *flags, "--evaluation.prompts", "", "--evaluation.scorer", ""])
    given = ["--prompts", str(trained / "prompts.txt"), "--samples", "1", "--output", str(output)]
    dispatch(["rollout", "--system", str(trained / "run"), *given])
    before = output.read_bytes()
    assert "system" in failure(capsys, dispatch, ["rollout", "--system", str(other), *given])
    assert output.read_bytes() == before
    # What may change when a run goes on does not make it another system.
    dispatch(["rollout", "--system", str(trained / "run"), *given])
    assert output.read_bytes() == before


def test_a_file_is_the_same_system_however_it_would_be_trained(material, tmp_path):
    def identity(change):
        config = yaml.safe_load((material / "run.yaml").read_text())
        change(config)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        return load_system(str(tmp_path / "run.yaml"), "newest").identity

    def trained_otherwise(config):
        config["system"]["components"]["drafter"] |= {"mode": "full", "lora": {"rank": 4}, "learning_rate": 1e-3}
        config["system"]["nodes"]["draft"]["weight"] = 0.5
        config["objective"] = {"beta": 0.3}

    def prompted_otherwise(config):
        config["system"]["nodes"]["answer"]["prompt"] = "{question} {draft}"

    same = identity(lambda config: None)
    assert identity(trained_otherwise) == same
    assert identity(prompted_otherwise) != same
    assert identity(lambda config: config.update(seed=1)) != same


def test_data_that_changed_under_a_run_are_refused(trained, capsys):
    """The same path with a row more; the run's own account of its data stays."""
    path, account = trained / "pairs.jsonl", trained / "run" / "data.json"
    rows, noted = path.read_text(), account.read_text()
    row = json.loads(rows.splitlines()[0]) | {"id": "new"}
    path.write_text(rows + json.dumps(row) + "\n")
    try:
        said = failure(capsys, dispatch, ["train", str(trained / "run.yaml")])
    finally:
        path.write_text(rows)
    assert "data.json is of another run (kept was 200, now 201; sha256 was" in said
    assert account.read_text() == noted


def test_a_finished_run_goes_on_with_more_steps(trained, tmp_path, capsys):
    """Not with fewer; what the learning rate does is said."""
    shutil.copytree(trained / "run", tmp_path / "run")
    flags = ["--config", str(trained / "run.yaml"), "--directory", str(tmp_path / "run")]
    said = failure(capsys, dispatch, ["train", *flags, "--schedule.steps", "3"])
    assert f"schedule.steps was {STEPS}, now 3: a run may be given more steps, not fewer" in said
    dispatch(["train", *flags, "--schedule.steps", "6"])
    assert f"schedule.steps grows from {STEPS} to 6, and the learning rate follows the cosine of 6" in (
        capsys.readouterr().err
    )
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(6))
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2, 4, 6]
    before = read_metrics(trained / "run" / "metrics.jsonl")
    assert [row["loss"] for row in rows if "loss" in row][:STEPS] == [row["loss"] for row in before if "loss" in row]


def started(folder, tmp_path, **components):
    """A run that starts from the trained one, with other settings of its components; its parameters."""
    config = yaml.safe_load((folder / "run.yaml").read_text())
    for name, settings in components.items():
        config["system"]["components"][name] |= settings
    config |= {"init_from": str(folder / "run"), "directory": str(tmp_path / "next")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return assemble(read_config(tmp_path / "run.yaml")).params


def test_a_run_starts_with_the_factors_of_another_or_with_them_merged(trained, tmp_path, capsys):
    whole = assemble(read_config(trained / "run" / "config.yaml"))
    theirs, _ = restored(whole, "newest")
    same = by_path(started(trained, tmp_path))
    for path, leaf in by_path(theirs).items():
        np.testing.assert_array_equal(same[path], leaf)
    merged = started(trained, tmp_path, drafter={"mode": "full"})["drafter"]
    wanted = by_path(merge_lora(theirs["drafter"]))
    for path, leaf in by_path(merged).items():
        np.testing.assert_array_equal(leaf, wanted[path])
    anew = by_path(started(trained, tmp_path, drafter={"lora": {"rank": 3}})["drafter"])
    factors = [leaf for path, leaf in anew.items() if path.endswith("lora_b")]
    assert factors
    assert all(np.abs(leaf).max() == 0 for leaf in factors)
    for path, leaf in wanted.items():
        np.testing.assert_array_equal(anew[path], leaf)
    # Another step of that run is another beginning.
    dispatch(["train", "--config", str(tmp_path / "run.yaml")])
    noted = tmp_path / "next" / "data.json"
    about = json.loads(noted.read_text())
    assert about["init_step"] == STEPS
    noted.write_text(json.dumps(about | {"init_step": 2}))
    said = failure(capsys, dispatch, ["train", "--config", str(tmp_path / "run.yaml")])
    assert f"is of another run (init_step was 2, now {STEPS})" in said
