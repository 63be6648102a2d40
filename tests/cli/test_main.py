"""The command `sysdpo`: its help, its completions, its recipes, and what it says of words that it does not know."""

import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sysdpo_jax.cli import command_line, import_traces, main
from sysdpo_jax.cli.main import COMMANDS, dispatch
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.flags import fields_of, from_mapping, parse_flags, to_mapping
from sysdpo_jax.runs.config import ScheduleConfig, TrainConfig
from sysdpo_jax.runs.files import configure, read_config, recipes
from tests.cli.test_runs import failure

LINES, COLUMNS = 40, 100


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_one_screen_has_an_example_and_says_what_every_flag_is(capsys, name):
    dispatch([name, "--help"])
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= LINES
    assert f"sysdpo {name}" in text.partition("example")[2]
    shown = text.partition("options:\n")[2].partition("\n\n")[0]
    assert max(map(len, shown.splitlines()), default=0) <= COLUMNS
    assert all(field.help for field in fields_of(main.command_module(name).Config))


def test_all_flags_are_listed_where_the_help_says_so(capsys):
    dispatch(["train", "--help"])
    few = capsys.readouterr().out
    assert "sysdpo train --help.all" in few
    dispatch(["train", "--help.all"])
    every = capsys.readouterr().out
    for field in fields_of(TrainConfig):
        assert f"--{field.name.replace('_', '-')} " in every
    assert "--system.components.NAME.checkpoint" in every
    assert "--mesh.fsdp" not in few


def test_without_a_command_the_commands_are_listed(capsys):
    dispatch([])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert len(text.splitlines()) <= LINES


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_complete_commands_and_flags(capsys, shell):
    dispatch(["--print_completion", shell])
    script = capsys.readouterr().out
    assert "--schedule.steps" in script
    assert all(name in script for name in COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


WRONG = {
    "a command": (["trian"], "'trian' is no command: did you mean 'train'?"),
    "a recipe": (["train", "quikstart"], "'quikstart' is no recipe: did you mean 'quickstart'?"),
    "a recipe to print": (["recipes", "zzz"], "'zzz' is no recipe: there are agent, llama3_sdxl, pictures, quickstart"),
    "a file": (["train", "no/such.yaml"], "no/such.yaml does not exist"),
    "nothing to train": (["train", "--dry-run"], "give the file of one run, or the name of a recipe"),
    "two files": (["train", "a.yaml", "b.yaml"], "a.yaml and b.yaml are given"),
    "a name without its group": (["train", "quickstart", "--steps", "3"], "did you mean '--schedule.steps'?"),
    "half a path": (
        ["train", "quickstart", "--components.drafter.mode", "full"],
        "did you mean '--system.components.drafter.mode'?",
    ),
    "a rate that would train backwards": (
        ["train", "quickstart", "--schedule.learning-rate", "-0.1"],
        "--schedule.learning-rate is '-0.1': give",
    ),
    "a group": (["train", "quickstart", "--schedul.steps", "3"], "is no flag: did you mean '--schedule.steps'?"),
    "a field": (["train", "quickstart", "--schedule.step", "3"], "did you mean '--schedule.steps'?"),
    "a node": (["train", "quickstart", "--system.nodes.anser.prompt", "x"], "'--system.nodes.answer.prompt'?"),
    "a bound": (["train", "quickstart", "--schedule.steps", "0"], "--schedule.steps is '0': give a whole number of"),
    "a choice": (["train", "quickstart", "--objective.kind", "both"], "give 'direct' or 'sampling'"),
    "no value": (["train", "quickstart", "--schedule.steps"], "--schedule.steps has no value: give a whole number"),
    "beyond a field": (["train", "quickstart", "--seed.x", "1"], "--seed.x is no flag"),
    "no flag of rollout": (["rollout", "--sistem", "x"], "--sistem is no flag: did you mean '--system'?"),
    "flags that are needed": (["rollout", "--system", "x"], "--prompts and --output must be given"),
    "a word": (["rollout", "x"], "'x' belongs to no flag"),
    "a shell": (["--print_completion", "fish"], "give bash or zsh"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_what_is_not_known_is_answered_in_one_line(capsys, words, message):
    assert message in failure(capsys, dispatch, words)


@dataclass(frozen=True)
class Flags:
    numbers: tuple[int, ...] = (0,)
    pair: tuple[int, int] | None = None
    path: Path = Path("x")
    on: bool = False
    rate: float = 1.0
    text: str | None = None
    schedule: ScheduleConfig = ScheduleConfig()


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (["--numbers", "1", "2"], {"numbers": (1, 2)}),
        (["--numbers", "[3, 4]"], {"numbers": (3, 4)}),
        (["--numbers=5"], {"numbers": (5,)}),
        (["--pair", "1", "2"], {"pair": (1, 2)}),
        (["--pair", "null"], {}),
        (["--on"], {"on": True}),
        (["--on", "false"], {}),
        (["--rate=1e-3", "--path", "a/b"], {"rate": 1e-3, "path": Path("a/b")}),
        (["--rate", "-1"], {"rate": -1.0}),
        (["--text", "{x}: [y]"], {"text": "{x}: [y]"}),
        (["--schedule.batch-size", "2"], {"schedule": ScheduleConfig(batch_size=2)}),
    ],
)
def test_flags_have_the_forms_that_their_types_suggest(words, change):
    made = parse_flags(Flags, words)
    assert made == replace(Flags(), **change)
    assert from_mapping(Flags, json.loads(json.dumps(to_mapping(made)))) == made


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"numbers": [1, "a"]}, "numbers is [1, 'a']: give a list, each a whole number"),
        ({"pair": [1]}, "pair is [1]: give a list of 2 values, a whole number, a whole number or null"),
        ({"on": 1}, "on is 1: give true or false"),
        ({"path": None}, "path is null: give a path"),
        ({"schedule": 3}, "schedule is 3: give a mapping of steps"),
        ({"schedule": {"warmup": -1}}, "schedule.warmup is -1: give a whole number of at least 0"),
        ({"schedule": {"stps": 1}}, "schedule.stps is no field: did you mean 'steps'?"),
    ],
)
def test_values_of_other_types_are_refused_with_their_place(values, message):
    with pytest.raises(ConfigError) as error:
        from_mapping(Flags, values)
    assert str(error.value).startswith(message)


def test_paths_begin_at_the_file_and_those_of_flags_at_the_working_directory(tmp_path, monkeypatch):
    folder, here = tmp_path / "project", tmp_path / "here"
    (folder / "models" / "small").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    (folder / "run.yaml").write_text("""
data: {source: pairs.jsonl}
evaluation: {prompts: held.txt, judge: {template: ../question.txt}}
prepared_cache: cache
init_from: runs/first
online: {prompts: many.txt}
system:
  components:
    local: {checkpoint: models/small, settings: {parts: {vae: ./vae}, truncation: keep_start}}
    hub: {checkpoint: owner/model}
    file: {checkpoint: weights.gguf}
""")
    path = str(folder / "run.yaml")
    config = configure(
        TrainConfig, [path, "--evaluation.prompts", "mine.txt", "--system.components.hub.checkpoint", "./own"]
    )
    components = config.system.components
    assert config.data.source == str(folder / "pairs.jsonl")
    assert config.evaluation.judge.template == str(tmp_path / "question.txt")
    assert config.prepared_cache == str(folder / "cache")
    assert config.compilation_cache == "user"
    assert (config.init_from, config.online.prompts) == (str(folder / "runs" / "first"), str(folder / "many.txt"))
    assert components["local"].checkpoint == str(folder / "models" / "small")
    assert components["local"].settings == {"parts": {"vae": str(folder / "vae")}, "truncation": "keep_start"}
    assert components["file"].checkpoint == str(folder / "weights.gguf")
    assert read_config(path).system.components["hub"].checkpoint == "owner/model"
    assert (config.evaluation.prompts, components["hub"].checkpoint) == (str(here / "mine.txt"), str(here / "own"))
    assert config.directory == str(here / "runs" / "run")


def test_recipes_are_listed_with_a_line_each_and_printed_to_be_edited(capsys, tmp_path):
    dispatch(["recipes"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(recipes())
    for name, path in recipes().items():
        dispatch(["recipes", name])
        copy = tmp_path / f"{name}.yaml"
        copy.write_text(capsys.readouterr().out)
        assert read_config(copy) == read_config(path)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_ends_within_bounds_and_those_that_share_work_find_each_other(monkeypatch, capsys, name):
    entered = []

    @contextmanager
    def noted():
        entered.append("bounded")
        yield

    monkeypatch.setattr(main, "bounded_exit", noted)
    monkeypatch.setattr("sysdpo_jax.initialize", lambda: entered.append("initialized"))
    monkeypatch.setattr(main, "_run", lambda command, name, words: entered.append((name, words, command_line())))
    monkeypatch.setattr(sys, "argv", ["sysdpo", name, "x"])
    main.main()
    shared = ["initialized"] if name in ("train", "online", "rollout", "prepare") else []
    assert entered == ["bounded", *shared, (name, ["x"], f"sysdpo {name} x")]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--model", "a", "--model", "b"], ("a", "b")),
        (["--model", "a", "b", "--model=c"], ("a", "b", "c")),
        (["--model", "a", "--model", "[b, c]"], ("b", "c")),
        (["--model", "a", "--frozen", "x", "--model", "b"], ("a", "b")),
    ],
)
def test_a_flag_of_several_values_may_be_given_several_times(words, found):
    given = ["traces.jsonl", "--format", "otlp", "--output", "one", *words, "--output", "other"]
    made = parse_flags(import_traces.Config, given, "traces")
    assert made.model == found
    # Of one value the last one holds, as usual.
    assert made.output == Path("other")
