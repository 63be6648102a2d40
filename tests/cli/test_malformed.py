"""Forty ways to give a command something it cannot use: one line with the remedy, code 1, and nothing half-written."""

import errno
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

import sysdpo_jax as sj
from sysdpo_jax.cli import train
from sysdpo_jax.cli.main import dispatch
from tests.pretrained.checkpoints import stable_diffusion_1, write_decoder

ROW = {
    "inputs": {"request": "a red"},
    "chosen": {"caption": "a red ball", "image": "good.png"},
    "rejected": {"caption": "the cube", "image": "bad.png"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_decoder(folder / "writer", "llama", num_hidden_layers=1)
    stable_diffusion_1().save_pretrained(folder / "painter")
    return folder


@pytest.fixture
def place(models, tmp_path):
    """A folder with all that a run needs, to be spoiled."""
    for name in ("writer", "painter"):
        (tmp_path / name).symlink_to(models / name)
    for name, grey in (("good.png", 200), ("bad.png", 30)):
        Image.new("RGB", (16, 16), (grey, grey, 90)).save(tmp_path / name)
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(ROW)}\n" for _ in range(8)))
    (tmp_path / "prompts.txt").write_text("a red\n")
    settings = {"max_prompt_length": 8, "max_new_tokens": 8}
    config = {
        "directory": str(tmp_path / "run"),
        "system": {
            "inputs": ["request"],
            "nodes": {
                "caption": {"component": "writer", "parents": ["request"]},
                "image": {"component": "painter", "parents": ["caption"]},
            },
            "components": {
                "writer": {"checkpoint": str(tmp_path / "writer"), "settings": settings},
                "painter": {"checkpoint": str(tmp_path / "painter")},
            },
        },
        "data": {"source": str(tmp_path / "pairs.jsonl")},
        "schedule": {"batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


LOADED = {}


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch):
    """Models are read once for all tests, as long as their files and settings are the same."""
    load = sj.pretrained.load

    def cached(path, shardings, **settings):
        files = [(file.name, file.stat().st_size) for file in sorted(Path(path).rglob("*.*"))]
        key = repr((os.path.realpath(path), files, sorted(settings.items())))
        if key not in LOADED:
            LOADED[key] = load(path, shardings=shardings, **settings)
        return LOADED[key]

    monkeypatch.setattr(sj.pretrained, "load", cached)


def rewrite(place, change):
    """Change the configuration's mapping in place."""
    config = yaml.safe_load((place / "run.yaml").read_text())
    change(config)
    (place / "run.yaml").write_text(yaml.safe_dump(config))


def without_models(place):
    """The same graph of tables, with preferences for it."""
    table = {"factory": "sysdpo_jax:Categorical", "mode": "full"}
    table["settings"] = {"num_values": 2, "parent_sizes": [2]}
    rewrite(place, set_("system", "components", {"writer": table, "painter": table}))
    row = {"inputs": {"request": 1}, "chosen": {"caption": 1, "image": 1}, "rejected": {"caption": 0, "image": 0}}
    (place / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 8)


def third_row(place, change):
    """Change the third row of the preferences in place."""
    rows = [json.loads(json.dumps(ROW)) for _ in range(8)]
    change(rows[2])
    (place / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def own_copy(models, place, name):
    """The model's folder, to be spoiled without harm to the other tests."""
    (place / name).unlink()
    return shutil.copytree(models / name, place / name)


def set_(*path):
    """rewrite's change: put the last of `path` where the others lead."""
    *places, last, value = path

    def change(config):
        for name in places:
            config = config[name]
        config[last] = value

    return change


def swapped(config):
    one, other = config["system"]["components"].values()
    one["checkpoint"], other["checkpoint"] = other["checkpoint"], one["checkpoint"]


# {what is wrong: (what spoils the folder, what the line says)}
CONFIGURATIONS = {
    "an unknown field": (set_("schedul", {}), "schedul is no field: did you mean 'schedule'?"),
    "a field of another type": (set_("schedule", "steps", "many"), "schedule.steps is 'many'"),
    "an unknown choice": (set_("system", "components", "writer", "mode", "all"), "give 'full' or 'lora' or 'frozen'"),
    "no nodes": (set_("system", "nodes", {}), "system.nodes is empty"),
    "a cycle": (set_("system", "nodes", "caption", "parents", ["request", "image"]), "cycle"),
    "an unknown parent": (set_("system", "nodes", "image", "parents", ["captoin"]), "did you mean 'caption'?"),
    "an unknown component": (set_("system", "nodes", "image", "component", "panter"), "'panter' is not among"),
    "an unread input": (set_("system", "inputs", ["request", "style"]), "'style'"),
    "no checkpoint": (set_("system", "components", "writer", "checkpoint", "./no/such/place"), "there is no folder"),
    "swapped checkpoints": (swapped, "has no setting 'max_new_tokens'"),
    "a wrong setting": (
        set_("system", "components", "writer", "settings", "max_new_token", 8),
        "did you mean 'max_new_tokens'?",
    ),
    "too long a context": (
        set_("system", "components", "writer", "settings", "max_new_tokens", 800),
        "exceed the decoder's 64 positions: lower them",
    ),
    "a prompt of no parent": (set_("system", "nodes", "caption", "prompt", "Say {what}"), "it names 'what'"),
    "a prompt with an open brace": (set_("system", "nodes", "caption", "prompt", "Say {request"), "is no template"),
    "a rank of nothing": (set_("system", "components", "writer", "lora", {"rank": 0}), "lora.rank is 0"),
    "layers that are not there": (
        set_("system", "components", "writer", "lora", {"targets": ["q_porj"]}),
        "'q_porj' finds no dense",
    ),
    "a policy that there is not": (set_("remat", "fulll"), "remat: unknown policy 'fulll': did you mean 'full'?"),
    "a seed of less than nothing": (set_("seed", -1), "seed is -1: give a whole number of at least 0"),
    "a weight the wrong way round": (
        set_("system", "nodes", "caption", "weight", -1),
        "system.nodes.caption.weight is -1: give a number of at least 0",
    ),
    "a cache of none": (set_("prepared_cache", "none"), "prepared_cache is 'none': give user or a folder"),
    "an unknown loss": (set_("objective", {"loss": "hinges"}), "unknown loss 'hinges': did you mean 'hinge'?"),
    "a beta of nothing": (set_("objective", {"beta": 0}), "objective.beta is 0"),
    "more in a batch than there is": (set_("schedule", "batch_size", 9), "8 rows do not fill one batch of 9"),
    "no data": (set_("data", "source", ""), "data.source is empty"),
    "data that is not there": (set_("data", "source", "no.jsonl"), "no.jsonl does not exist"),
    "an unknown reader": (set_("data", "reader", "tlr"), "data.reader: unknown reader 'tlr': did you mean 'trl'?"),
    "a reader that is not there": (set_("data", "reader", "math:squareroot"), "data.reader: math has no 'squareroot'"),
    "a reader of other rows": (set_("data", "reader", "pick_a_pic"), "pairs.jsonl, row 1: "),
    "everything frozen": (
        lambda c: [each.update(mode="frozen") for each in c["system"]["components"].values()],
        "every component is frozen",
    ),
    "half an evaluation": (
        set_("evaluation", {"prompts": "prompts.txt"}),
        "give either evaluation.scorer or evaluation.judge.url",
    ),
    "a scorer that is not there": (
        set_("evaluation", {"prompts": "prompts.txt", "scorer": "no_such_module:score"}),
        "evaluation.scorer: the module 'no_such_module' cannot be imported",
    ),
    "a judge of a field that is gone": (
        set_("evaluation", {"prompts": "prompts.txt", "judge": {"url": "http://localhost:1", "number": "[0-9]+"}}),
        "evaluation.judge.number is no field",
    ),
    "parts that the batch does not have": (
        set_("schedule", {"batch_size": 4, "accumulate": 3}),
        "4 rows cannot be cut into 3 equal parts",
    ),
    "an unknown node's term": (
        set_("objective", {"sft": {"captoin": 0.1}}),
        "sft names the node 'captoin', which is not a trained node: caption, image are",
    ),
    "an unknown node's term in a search": (
        lambda c: c.update(objective={"kind": "sampling", "sft": {"captoin": 0.1}}),
        "sft names the node 'captoin'",
    ),
    "a mesh of more devices": (set_("mesh", {"data": 64}), "64"),
}  # fmt: skip
# What is found where the step is traced, which of a U-Net takes seconds.
OF_THE_STEP = (
    "more in a batch than there is",
    "parts that the batch does not have",
    "an unknown node's term",
    "an unknown node's term in a search",
)
ROWS = {
    "a missing field": (lambda row: row.pop("rejected"), "row 3: the field 'rejected' must be an object"),
    "a missing value": (lambda row: row["chosen"].pop("image"), "row 3: chosen lacks the field 'image'"),
    "an unknown node": (lambda row: row["chosen"].update(imag="x"), "field 'imag' is no name of the system"),
    "a value of another type": (lambda row: row["chosen"].update(caption=7), "the completion must be a string"),
    "an empty input": (lambda row: row["inputs"].update(request=""), "row 3: inputs, field 'request' is empty"),
    "a text too long": (lambda row: row["chosen"].update(caption="a red ball " * 9), "raise max_new_tokens"),
    "an image that is not there": (lambda row: row["chosen"].update(image="no.png"), "there is no file"),
    "an image that is none": (lambda row: row["chosen"].update(image="pairs.jsonl"), "cannot be read"),
    "some intermediates": (lambda row: row["rejected"].pop("caption"), "row 3: rejected lacks the intermediate"),
}  # fmt: skip


def fails(capsys, message, command, *arguments):
    """The command ends with code 1 and one line that holds the message."""
    with pytest.raises(SystemExit) as stop:
        dispatch([command, *map(str, arguments)])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 1
    assert len(said) == 1
    assert message in said[0]
    return said[0]


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def train_fails(capsys, place, message):
    before = files(place)
    fails(capsys, message, "train", place / "run.yaml")
    assert files(place) == before


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations(place, capsys, monkeypatch, name):
    change, message = CONFIGURATIONS[name]
    monkeypatch.chdir(place)
    if name in OF_THE_STEP:
        without_models(place)
    rewrite(place, change)
    train_fails(capsys, place, message)


@pytest.mark.parametrize(("change", "message"), ROWS.values(), ids=ROWS)
def test_rows(place, capsys, change, message):
    third_row(place, change)
    train_fails(capsys, place, message)


def test_a_line_that_is_no_json(place, capsys):
    with (place / "pairs.jsonl").open("a") as file:
        file.write("{'inputs'")
    train_fails(capsys, place, "pairs.jsonl, row 9: not valid JSON")


def test_ids_that_are_there_twice(place, capsys):
    third_row(place, lambda row: None)
    lines = [json.dumps(ROW | {"id": "same"})] * 2
    (place / "pairs.jsonl").write_text("\n".join(lines))
    train_fails(capsys, place, "row 2: the id 'same' is that of row 1 too")


def test_a_truncated_table(place, capsys):
    whole = place / "pairs.parquet"
    datasets.Dataset.from_list([{"caption": "a", "label_0": 1.0}] * 20).to_parquet(str(whole))
    whole.write_bytes(whole.read_bytes()[:-50])
    rewrite(place, set_("data", "source", str(whole)))
    train_fails(capsys, place, "pairs.parquet cannot be read")


def test_a_tokenizer_of_another_model(models, place, capsys):
    """Its vocabulary has words beyond the decoder's."""
    folder = own_copy(models, place, "writer")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ball"] = 5000
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    train_fails(capsys, place, "tokens beyond the model's vocab_size=14")


def test_weights_that_are_damaged(models, place, capsys):
    weights = own_copy(models, place, "writer") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    train_fails(capsys, place, "model.safetensors")


def test_a_score_that_is_not_a_number(place, capsys):
    run = {"id": "0-0", "inputs": {"request": "a"}, "outputs": {"caption": "b"}}
    (place / "runs.jsonl").write_text(json.dumps(run) + "\n")
    (place / "scores.jsonl").write_text('{"id": "0-0", "score": NaN}\n')
    before = files(place)
    flags = ["--runs", place / "runs.jsonl", "--scores", place / "scores.jsonl", "--output", place / "pairs2.jsonl"]
    fails(capsys, "the score of '0-0' is nan: give a finite number", "pairs", *flags)
    flags = ["--runs", place / "runs.jsonl", "--scorer", "builtins:len", "--output", place / "nowhere.jsonl"]
    fails(capsys, "give either --scorer or --judge.url", "score", *flags, "--judge.url", "http://localhost:1")
    assert files(place) == before


def test_prompts_without_the_input(place, capsys):
    (place / "prompts.jsonl").write_text('{"question": "a"}\n')
    flags = [
        "--system",
        place / "run.yaml",
        "--prompts",
        place / "prompts.jsonl",
        "--output",
        place / "out" / "runs.jsonl",
    ]
    fails(capsys, "prompt 1 lacks the input 'request': add the field", "rollout", *flags)
    assert not (place / "out" / "runs.jsonl").exists()


def test_a_folder_that_holds_no_run(place, capsys):
    fails(
        capsys,
        "is no folder of a run (config.yaml is missing)",
        "export",
        "--directory",
        place / "run",
        "--output",
        place / "aligned",
    )
    assert not (place / "aligned").exists()


def test_a_full_disk(place, capsys, monkeypatch):
    """What the operating system says when a write finds no room."""

    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sysdpo_jax.cli.report.write_config", full)
    without_models(place)
    fails(capsys, "No space left on device", "train", place / "run.yaml")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(place, capsys):
    (place / "locked").mkdir(mode=0o500)
    rewrite(place, set_("directory", str(place / "locked" / "run")))
    train_fails(capsys, place, "Permission denied")


def test_a_directory_that_is_a_file(place, capsys):
    (place / "run").write_text("")
    train_fails(capsys, place, "run")


def test_there_are_forty():
    others = [
        name for name in globals() if name.startswith("test_") and "configurations" not in name and "rows" not in name
    ]
    assert len(CONFIGURATIONS) + len(ROWS) + len(others) - 1 >= 40


JUDGE = {"url": "http://localhost:1", "model": "m", "template": "question.txt"}
# Nothing of these depends on the models.
EVALUATIONS = {
    "no template": ({"judge": JUDGE | {"template": "no.txt"}}, "no.txt does not exist"),
    "no address": ({"judge": JUDGE | {"url": "localhost:1"}}, "judge.url is 'localhost:1': begin it with http://"),
    "no model": ({"judge": JUDGE | {"model": ""}}, "evaluation.judge: a judge needs url, model and template"),
    "both": ({"judge": JUDGE, "scorer": "builtins:len"}, "give either evaluation.scorer or evaluation.judge.url"),
    "an unknown value": ({"judge": JUDGE | {"template": "other.txt"}}, "{picture} is no value of the system"),
    "a scorer alone": ({"scorer": "builtins:len", "prompts": ""}, "evaluation.prompts is empty: give the held-out"),
    "ignored fields alone": ({"ignore": ["id"], "prompts": ""}, "or leave evaluation.ignore out"),
}


@pytest.mark.parametrize(("evaluation", "message"), EVALUATIONS.values(), ids=EVALUATIONS)
def test_evaluations_are_refused_before_the_models_are_loaded(place, capsys, monkeypatch, evaluation, message):
    monkeypatch.chdir(place)
    (place / "question.txt").write_text("How good is {caption}?")
    (place / "other.txt").write_text("How good is {picture}?")
    rewrite(place, set_("evaluation", {"prompts": "prompts.txt"} | evaluation))
    monkeypatch.setattr(train, "assemble", lambda config: pytest.fail("the models are loaded"))
    train_fails(capsys, place, message)
