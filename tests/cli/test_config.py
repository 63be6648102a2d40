"""Configurations of runs: read strictly, every field a flag, and the system that they describe."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

import sysdpo_jax as sj
from sysdpo_jax.components.chat_prompt import TextPrompt
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.graph import GraphError
from sysdpo_jax.pretrained import CheckpointError
from sysdpo_jax.recipes.captions import split_captions
from sysdpo_jax.runs.config import TrainConfig
from sysdpo_jax.runs.files import configure, read_config, recipes, write_config
from sysdpo_jax.runs.run import assemble
from sysdpo_jax.runs.system import _system, build_optimizer, build_system
from tests.pretrained.checkpoints import stable_diffusion_3, vae

ROUTED = """
system:
  inputs: [question]
  nodes:
    route: {component: router, parents: [question]}
    scale: {tool: "tests.cli.test_config:one_hot", parents: [route]}
    answer: {component: expert, parents: [scale], weight: 0.5}
  components:
    router: {factory: "sysdpo_jax:Categorical", mode: full, settings: {num_values: 3, parent_sizes: [4]}}
    expert: {factory: "sysdpo_jax:Gaussian", mode: frozen, settings: {size: 1, parent_size: 3}}
schedule: {learning_rate: 1e-3, steps: 7, warmup: 1}
"""


def one_hot(route):
    return [float(route == place) for place in range(3)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"

    def write(text):
        path.write_text(text)
        return path

    return write


def test_the_file_gives_the_values_and_flags_win(file):
    flags = ["--schedule.steps", "9", "--system.nodes.answer.weight", "2"]
    config = configure(TrainConfig, [str(file(ROUTED)), *flags])
    assert (config.schedule.steps, config.schedule.learning_rate) == (9, 1e-3)
    assert (config.system.nodes["answer"].weight, config.system.nodes["route"].weight) == (2.0, 1.0)
    for named in (["--config", str(file(ROUTED))], [f"--config={file(ROUTED)}"]):
        assert configure(TrainConfig, [*named, *flags]) == config
    # Behind a flag that takes several words it is none of them.
    assert configure(TrainConfig, ["--profile", "1", "2", "--config", str(file(ROUTED))]).profile == (1, 2)
    with pytest.raises(ConfigError, match="--config has no value"):
        configure(TrainConfig, ["--config", "--dry-run"])
    wider = configure(TrainConfig, [str(file(ROUTED)), "--system.components.router.settings.num-values", "5"])
    assert wider == read_config(file(ROUTED.replace("num_values: 3", "num_values: 5")))


def test_what_is_written_is_read_back(file, tmp_path):
    config = read_config(file(ROUTED))
    write_config(tmp_path / "written.yaml", config)
    assert read_config(tmp_path / "written.yaml") == config


@pytest.mark.parametrize("path", recipes().values(), ids=lambda path: path.stem)
def test_the_ready_configurations_are_valid(path):
    config = read_config(path)
    assert config.directory == str(Path("runs", path.stem).absolute())
    assert _system(config.system, lambda node, field, scope: sj.Tool(repr)).nodes


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "field": ("schedul: {}", "{}: schedul is no field: did you mean 'schedule'?"),
        "nested": (
            "system: {nodes: {answer: {parent: [x]}}}",
            "{}: system.nodes.answer.parent is no field: did you mean 'parents'?",
        ),
        "far": ("data: {zzz: 1}", "{}: data.zzz is no field: there are source, reader, split, on_error, ignore"),
        "type": (
            "schedule: {steps: many}",
            "{}: schedule.steps is 'many': give a whole number of at least 1",
        ),
        "choice": ("dtype: float16", "{}: dtype is 'float16': give 'float32' or 'bfloat16'"),
        "twice": (
            "system: {nodes: {a: {}, a: {}}}",
            "{}:1: this is no YAML ('a' stands there twice): fix it",
        ),
        "twice, below each other": (
            "seed: 1\nschedule:\n  steps: 1\n  warmup: 2\n  steps: 3\n",
            "{}:5: this is no YAML ('steps' stands there twice): fix it",
        ),
        "an open bracket": (
            "seed: 1\ndata: {ignore: [a}\n",
            "{}:2: this is no YAML (while parsing a flow sequence, expected ',' or ']', but got '}'): fix it",
        ),
        "a character": ("seed: 1\ndata: \0", "{}:2: this is no YAML (the character '\\x00'): fix it"),
        "no date": ("seed: 2026-02-30", "{}: this is no YAML (day is out of range for month): fix it"),
        "list": ("- 1", "{} holds no mapping of fields: begin with, for example, 'system:'"),
    }.values(),
)
def test_a_wrong_field_is_refused_with_its_place_and_the_nearest_right_one(file, text, message):
    path = file(text)
    with pytest.raises(ConfigError) as error:
        read_config(path)
    assert str(error.value) == message.replace("{}", str(path), 1)


PAINTER = """
system:
  inputs: [caption]
  nodes: {{image: {{component: painter, parents: [caption]}}}}
  components:
    painter:
      checkpoint: {pipeline}
      mode: frozen
      settings:
        guidance_scale: 0.0
        image_size: [16, 32]
        parts: {{text_encoder_3: null, vae: {vae}}}
"""


def test_parts_of_a_pipeline_are_settings(file, tmp_path):
    stable_diffusion_3().save_pretrained(tmp_path / "pipeline")
    vae(scaling_factor=0.5, use_quant_conv=False, use_post_quant_conv=False).save_pretrained(tmp_path / "vae")
    path = file(PAINTER.format(pipeline=tmp_path / "pipeline", vae=tmp_path / "vae"))
    system, _ = build_system(configure(TrainConfig, [str(path)]), sj.make_mesh())
    [node] = system.nodes
    assert node.component.codec.autoencoder.config.scaling_factor == 0.5
    assert node.component.text.text.encoder_3 is None
    assert (node.component.guidance_scale, node.component.codec.image_size) == (0.0, (16, 32))
    wrong = file(PAINTER.format(pipeline=tmp_path / "pipeline", vae="null"))
    with pytest.raises(CheckpointError, match="cannot do without vae; only text_encoder_3 with tokenizer_3"):
        build_system(configure(TrainConfig, [str(wrong)]), sj.make_mesh())


def test_the_system_is_the_one_described(file):
    config = read_config(file(ROUTED))
    system, params = build_system(config, sj.make_mesh())
    assert [node.name for node in system.nodes] == ["route", "scale", "answer"]
    assert {key: jax.tree.map(lambda x: x.shape, tree) for key, tree in params.items()}["router"] == {"logits": (4, 3)}
    assert build_optimizer(config).trained_keys == ("router",)
    [run] = system.sample(params, [{"question": 1}], jax.random.key(0))
    assert run["scale"] == one_hot(run["route"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    {
        "both": (
            "component: router,",
            "component: router, tool: 'a:b',",
            "system.nodes.route: give either a component",
        ),
        "unknown": ("component: router,", "component: writer,", "system.nodes.route.component 'writer' is not among"),
        "cycle": ("parents: [route]}", "parents: [question, answer]}", "cycle"),
        "parent": ("parents: [route]}", "parents: [rout]}", "'rout'"),
        "module": (
            "tests.cli.test_config:one_hot",
            "no_such:f",
            "system.nodes.scale.tool: the module 'no_such'",
        ),
        "name": ("test_config:one_hot", "test_config:two", "has no 'two': write module:name of something"),
        "path": (
            "tests.cli.test_config:one_hot",
            "split",
            "system.nodes.scale.tool is 'split': write module:name",
        ),
        "setting": (
            "num_values",
            "num_value",
            "settings.num_value is no setting of sysdpo_jax:Categorical: did you mean 'num_values'?",
        ),
        "lora": ("mode: full", "mode: lora", "system.components.router (mode lora): LoRA target 'attention' finds no"),
        "prompt": ("component: router,", "component: router, chat: true,", "only a language model takes a prompt"),
        "checkpoint": (
            'factory: "sysdpo_jax:Categorical", mode: full, settings: {num_values: 3, parent_sizes: [4]}',
            "checkpoint: no/such/folder/here",
            "there is no folder or file 'no/such/folder/here'",
        ),
        "a tool with a prompt": (
            "parents: [route]}",
            "parents: [route], chat: true}",
            "is a tool, which has no chat: leave that out",
        ),
        "warm-up": ("steps: 7, warmup: 1", "steps: 7", "schedule.warmup 100 must be below schedule.steps 7"),
        "unused": ("component: expert", "component: router", "system.components.expert is the component of no node"),
    }.values(),
)
def test_a_system_that_cannot_be_built_is_refused_with_the_field(file, old, new, message):
    assert old in ROUTED
    config = read_config(file(ROUTED.replace(old, new, 1)))
    with pytest.raises((ConfigError, GraphError, CheckpointError)) as error:
        assemble(config)
    assert message in str(error.value)


def test_a_template_takes_its_parents_by_name():
    template = TextPrompt("Question: {question}\nDraft: {draft}", ("question", "draft"))
    assert template("why", "so") == "Question: why\nDraft: so"
    chat = sj.ChatPrompt(template.prompt, template.parents)
    assert chat("why", "so") == [{"role": "user", "content": "Question: why\nDraft: so"}]
    assert hash(template) == hash(replace(template))


def test_messages_pass_through_chat_and_fit_in_no_text():
    messages = [{"role": "user", "content": "why"}]
    assert sj.ChatPrompt("{question}", ("question",))(messages) == messages
    assert TextPrompt("{question}", ("question",))(messages) == messages
    with pytest.raises(sj.RecordError, match=r"'question' is no text, which the prompt 'Q: \{question\}' needs"):
        sj.ChatPrompt("Q: {question}", ("question",))(messages)


def test_flags_keep_to_the_bounds_of_the_file(file):
    with pytest.raises(ConfigError, match=r"^--schedule\.batch-size is '0': give a whole number of at least 1$"):
        configure(TrainConfig, [str(file(ROUTED)), "--schedule.batch-size", "0"])


def test_captions_are_lines_without_their_marks():
    assert split_captions("1. a ball\n\n2) two balls\n- three\nfour") == ["a ball", "two balls", "three"]
    assert split_captions("a ball") == ["a ball", "", ""]


def test_the_file_of_a_run_is_of_the_folder_where_it_lies(file, tmp_path):
    """Also once the folder was moved: the command must not train anew where it was."""
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(file("directory: runs/before").read_text())
    assert read_config(moved / "config.yaml").directory == str(moved / "runs" / "before")
    (moved / "data.json").write_text("{}")
    assert read_config(moved / "config.yaml").directory == str(moved)
