"""Online rounds as a command: components made by factories, more rounds later, a report, a run that starts from it."""

import json

import jax
import numpy as np
import pytest
import yaml

import sysdpo_jax as sj
from sysdpo_jax.cli.main import dispatch
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.files import configure
from sysdpo_jax.runs.run import assemble, restored
from sysdpo_jax.runs.runs_file import read_lines
from sysdpo_jax.training import read_metrics
from tests.cli.test_runs import failure

HERE = __name__


def router(outcomes=3):
    return sj.Categorical(outcomes, (4,))


def writer():
    return sj.Categorical(4, (3,))


def length(question):
    return len(question) % 4


def worth(run):
    return float(run["answer"] == run["kind"])


def route(run):
    return float(run["route"] == 0)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A system of two tables behind a tool, prompts, and the configuration."""
    folder = tmp_path_factory.mktemp("online")
    words = ("a", "to", "red", "ball", "cubes", "little")
    (folder / "prompts.txt").write_text("\n".join(words) + "\n")
    (folder / "held_out.txt").write_text("\n".join(f"{word} x" for word in words) + "\n")
    config = {
        "directory": str(folder / "run"),
        "system": {
            "inputs": ["question"],
            "nodes": {
                "kind": {"tool": f"{HERE}:length", "parents": ["question"]},
                "route": {"component": "router", "parents": ["kind"]},
                "answer": {"component": "writer", "parents": ["route"]},
            },
            "components": {
                "router": {"factory": f"{HERE}:router", "mode": "full"},
                "writer": {"factory": f"{HERE}:writer", "mode": "full"},
            },
        },
        "objective": {"beta": 0.5},
        "schedule": {"steps": 24, "batch_size": 8, "warmup": 2, "learning_rate": 0.2},
        "evaluation": {"prompts": str(folder / "held_out.txt"), "scorer": f"{HERE}:worth", "samples": 8},
        "online": {
            "prompts": str(folder / "prompts.txt"),
            "rounds": 1,
            "samples": 64,
            "group": 4,
            "mix": 0.25,
            "figures": {"route": f"{HERE}:route"},
        },
        "log_every": 1,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="module")
def trained(material):
    """One round, then one more by the same command."""
    dispatch(["online", "--config", str(material / "run.yaml")])
    dispatch(["online", "--config", str(material / "run.yaml"), "--rounds", "2"])
    return material


def flags(folder, *more):
    return ["--config", str(folder / "run.yaml"), *more]


def test_rounds_leave_one_run_with_one_report(trained):
    run = trained / "run"
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(len(steps)))
    results = json.loads((run / "results.json").read_text())
    assert [each["first"] for each in results["rounds"]] == [0, results["rounds"][0]["last"]]
    evaluated = [row["step"] for row in rows if "eval/score" in row]
    assert evaluated == [0, *(each["last"] for each in results["rounds"])]
    assert all("eval/route" in row for row in rows if "eval/score" in row)
    assert results["final"]["score"] > results["final"]["score_before"] + 0.1
    assert results["rounds"][1]["earlier"] > 0
    report = (run / "report.html").read_text()
    assert all(text in report for text in ("end of round 1", "round 2, steps", "of earlier rounds"))
    assert len(list(read_lines(run / "round-1" / "runs.jsonl"))) == 6 * 64


def test_the_report_of_rounds_is_written_again_as_it_was(trained):
    run = trained / "run"
    before = {name: (run / name).read_text() for name in ("report.html", "results.json", "data.json")}
    dispatch(["report", str(run)])
    assert {name: (run / name).read_text() for name in before} == before


def test_the_best_round_is_what_rollouts_and_exports_take(trained, tmp_path):
    run = trained / "run"
    best = json.loads((run / "results.json").read_text())["best_step"]
    common = ["--system", str(run), "--prompts", str(trained / "held_out.txt"), "--samples", "2"]
    dispatch(["rollout", *common, "--output", str(tmp_path / "runs.jsonl"), "--checkpoint", "best"])
    assert len(list(read_lines(tmp_path / "runs.jsonl"))) == 12
    dispatch(["export", "--directory", str(run), "--output", str(tmp_path / "aligned"), "--checkpoint", "best"])
    card = (tmp_path / "aligned" / "router" / "README.md").read_text()
    assert f"after {best} steps" in card
    assert "prompts of online rounds" in card


def test_a_run_starts_from_the_parameters_of_another(trained, tmp_path):
    """Components made by factories included; its first evaluation is that run's own figure."""
    config = configure(
        TrainConfig, flags(trained, "--directory", str(tmp_path / "next"), "--init-from", str(trained / "run"))
    )
    begun = assemble(config)
    theirs, step = restored(assemble(configure(TrainConfig, flags(trained))), "newest")
    assert begun.origin == {"init_step": step}
    for one, other in zip(jax.tree.leaves(begun.params), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)
    fresh = assemble(configure(TrainConfig, flags(trained))).params
    assert not np.array_equal(jax.tree.leaves(fresh)[0], jax.tree.leaves(theirs)[0])


def test_what_does_not_fit_the_other_run_is_named(trained, tmp_path, capsys):
    start = flags(trained, "--directory", str(tmp_path / "next"), "--init-from")
    config = yaml.safe_load((trained / "run.yaml").read_text())
    config["system"]["components"]["router"]["settings"] = {"outcomes": 5}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    other = ["--config", str(tmp_path / "run.yaml"), *start[2:]]
    said = failure(capsys, dispatch, ["online", *other, str(trained / "run")])
    assert "of component 'router' is shape [4, 3] there and shape [4, 5] here: start from a run of the same" in said
    config["system"]["components"]["guide"] = config["system"]["components"].pop("router")
    config["system"]["nodes"]["route"]["component"] = "guide"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    said = failure(capsys, dispatch, ["online", *other, str(trained / "run")])
    assert "has no component 'guide' (it has router, writer): give components the same names" in said
    assert "is no folder of a run" in failure(capsys, dispatch, ["online", *start, str(tmp_path)])
    assert not (tmp_path / "next").exists()


def test_settings_that_rounds_cannot_have_are_refused(trained, tmp_path, capsys):
    new = ("--directory", str(tmp_path / "new"))
    for more, said in (
        (("--online.mix", "1.0"), "mix 1 is no share below 1"),
        (("--online.stop-on", "grade"), "online.stop_on 'grade' is no held-out figure: choose among score, route"),
        (("--online.prompts", ""), "online.prompts is empty"),
        (("--evaluation.prompts", ""), "evaluation.prompts is empty"),
        (("--data.source", "x.jsonl"), "data.source is given"),
        (("--online.min-margin", "3"), "round 1: no two runs of a prompt differ by 3 or more"),
    ):
        assert said in failure(capsys, dispatch, ["online", *flags(trained, *new, *more)])
    said = failure(capsys, dispatch, ["train", *flags(trained)])
    assert "online.prompts is given" in said
    said = failure(capsys, dispatch, ["online", *flags(trained, "--schedule.learning-rate", "0.1")])
    assert "is of another run (schedule.learning_rate was 0.2, now 0.1)" in said


def test_an_online_configuration_is_its_defaults_for_other_runs():
    assert not TrainConfig().online.prompts
