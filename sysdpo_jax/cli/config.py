"""The configuration of a run: a YAML file, of which every field is also a flag."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

import tyro
import yaml
from pydantic import Field, TypeAdapter, ValidationError, with_config

from sysdpo_jax.data.rollouts import Pairs
from sysdpo_jax.errors import ConfigError
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.io import write_whole
from sysdpo_jax.typing import STRICT, Natural, Positive


@with_config(STRICT)
@dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors, see `sysdpo_jax.LoRA`. targets: named sets or regular expressions of dense layers."""

    rank: Positive = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention",)


@with_config(STRICT)
@dataclass(frozen=True)
class ComponentConfig:
    """A model with parameters: a Hugging Face checkpoint, or a component of your own.

    checkpoint: a folder, a GGUF file or a name on the hub. factory: instead, "module:function" of a function or class
    that returns a component (its parameters are then fresh) or a pair (component, parameters).
    mode: train all weights, low-rank factors, or nothing. learning_rate: by default the schedule's.
    settings: keyword arguments of `pretrained.load` or of the factory: max_prompt_length, guidance_scale ... A mapping
    {call: "module:name", ...} stands for what that function or class returns for the rest of the mapping.
    """

    checkpoint: str | None = None
    factory: str | None = None
    mode: Literal["full", "lora", "frozen"] = "lora"
    lora: LoraConfig = LoraConfig()
    learning_rate: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@with_config(STRICT)
@dataclass(frozen=True)
class NodeConfig:
    """A value of the system. component: a name under `components`; or tool: "module:function" of the parents' values.

    parents, plate, weight: see `sysdpo_jax.Node`. prompt: of a language model, a text with its parents in braces,
    "Question: {question}"; by default its only parent. chat: the prompt is a user's message in the chat template.
    concurrency, retries, timeout, on_error: of a tool, see `sysdpo_jax.Tool`; they may change when a run goes on.
    """

    parents: tuple[str, ...] = ()
    component: str | None = None
    tool: str | None = None
    prompt: str | None = None
    chat: bool = False
    plate: Positive | None = None
    weight: float = 1.0
    concurrency: Positive = 1
    retries: Natural = 0
    timeout: Annotated[float, Field(gt=0)] | None = None
    on_error: Literal["stop", "skip"] = "stop"


# How a tool is called, which is no part of what the system is.
CALLS = ("concurrency", "retries", "timeout", "on_error")


@with_config(STRICT)
@dataclass(frozen=True)
class SystemConfig:
    """The graph. inputs: names of what a prompt holds. nodes, components: by name."""

    inputs: tuple[str, ...] = ()
    nodes: dict[str, NodeConfig] = field(default_factory=dict)
    components: dict[str, ComponentConfig] = field(default_factory=dict)


def as_dict(system: SystemConfig) -> dict[str, Any]:
    """What a system is: its fields, but for how tools are called."""
    nodes = {
        name: {field: value for field, value in asdict(node).items() if field not in CALLS}
        for name, node in system.nodes.items()
    }
    return asdict(system) | {"nodes": nodes}


@with_config(STRICT)
@dataclass(frozen=True)
class DataConfig:
    """Preferences: source, reader, split, on_error and ignore as `sysdpo_jax.load_preferences` takes them."""

    source: str = ""
    reader: str = "records"
    split: str = "train"
    on_error: Literal["stop", "skip"] = "stop"
    ignore: tuple[str, ...] = ()


@with_config(STRICT)
@dataclass(frozen=True)
class ObjectiveConfig:
    """kind: "direct" for records with intermediate values, "sampling" for records without, which it searches for.

    beta, loss, label_smoothing, sft (coefficients by node): see `DirectObjective`. intermediates, every: of the search,
    see `SearchedBatches`. chunk_size: intermediates that go through the models at once, None for all.
    """

    kind: Literal["direct", "sampling"] = "direct"
    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    sft: dict[str, float] = field(default_factory=dict)
    intermediates: Positive = 4
    every: Positive = 1
    chunk_size: Positive | None = None


@with_config(STRICT)
@dataclass(frozen=True)
class MeshConfig:
    """See `make_mesh`. fsdp: None takes the devices that the other two leave."""

    data: Positive = 1
    fsdp: Positive | None = None
    tensor: Positive = 1


@with_config(STRICT)
@dataclass(frozen=True)
class ScheduleConfig:
    """steps: updates in all. batch_size: pairs a step, of all processes together. accumulate: parts it is cut into.

    learning_rate: after `warmup` steps, from which a cosine falls to 0. AdamW with weight_decay. clip_norm: of each
    component's gradient.
    """

    steps: Positive = 1000
    batch_size: Positive = 16
    accumulate: Positive = 1
    learning_rate: float = 1e-5
    warmup: Natural = 100
    weight_decay: float = 0.0
    clip_norm: float = 1.0


@with_config(STRICT)
@dataclass(frozen=True)
class EvaluationConfig:
    """Runs of the whole system on held-out prompts, scored beside those of the system before training.

    prompts: JSON Lines of objects with the system's inputs, or a text file with a prompt a line; "" for no evaluation.
    ignore: fields of them that are left unread.
    scorer: "module:function", run -> number, higher is better; or judge. on_error: of a run without a score; "skip"
    leaves it and the run that it is compared with out, and counts them. every: steps. samples: runs a prompt.
    patience: evaluations without a better win rate after which training stops; None: never. shown: prompts in the
    report.
    """

    prompts: str = ""
    ignore: tuple[str, ...] = ()
    scorer: str = ""
    judge: JudgeConfig = JudgeConfig()
    on_error: Literal["stop", "skip"] = "stop"
    every: Positive = 100
    samples: Positive = 1
    batch_size: Positive = 16
    patience: Positive | None = None
    shown: Positive = 8


@with_config(STRICT)
@dataclass(frozen=True)
class OnlineConfig:
    """Rounds of `sysdpo online`, which makes its own preferences with the evaluation's scorer or judge; see
    docs/online.md.

    prompts: that the rounds make runs of, a file as for the evaluation. rounds: how many; it may grow when the run goes
    on. samples: runs of each prompt in a round. batch_size: of runs. group, pairs, min_margin: which runs of a prompt
    make a pair, see `sysdpo_jax.Rounds`. mix: share of earlier rounds' pairs. reference: of a round, the policy at its
    start (reset) or the first one (keep). epochs: passes over a round's pairs at most; a round has `schedule.steps`
    updates at most. stop_on: held-out figures that end the run where they fall below their best by more than their
    noise, or by more than `fall`; the first says which evaluation is the best. figures: further ones by name,
    "module:function" of a run.
    """

    prompts: str = ""
    rounds: Positive = 2
    samples: Positive = 8
    batch_size: Positive = 16
    group: Positive | None = None
    pairs: Pairs = "best_worst"
    min_margin: float = 0.0
    mix: float = 0.0
    reference: Literal["reset", "keep"] = "reset"
    epochs: Positive | None = 12
    stop_on: tuple[str, ...] = ("score",)
    fall: float | None = None
    figures: dict[str, str] = field(default_factory=dict)


@with_config(STRICT)
@dataclass(frozen=True)
class TrainConfig:
    """A run. Given again with the same directory it goes on from the newest checkpoint.

    directory: of checkpoints, metrics and report. init_from: folder of another run, from whose parameters this one
    starts, those of its newest or its best checkpoint (init_checkpoint), instead of from those of its components.
    dtype: of the computation; weights that are trained whole are kept in
    float32. remat: see `pretrained.load`. profile: steps (first, last) to trace. wandb: project of Weights & Biases,
    none by default. resume: False refuses a directory that holds a checkpoint. preempted_exit_code: after SIGTERM.
    compilation_cache: of compiled programs, "user", "none" or a folder. prepared_cache: of prepared preferences, "user"
    or a folder. dry_run: print what the run would be, and stop before it.
    """

    directory: str = ""
    init_from: str = ""
    init_checkpoint: Literal["newest", "best"] = "newest"
    system: SystemConfig = SystemConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    online: OnlineConfig = OnlineConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str | None = None
    seed: int = 0
    log_every: Positive = 10
    checkpoint_every: Positive = 100
    profile: tuple[int, int] | None = None
    wandb: str | None = None
    resume: bool = True
    preempted_exit_code: int = 0
    compilation_cache: str = "user"
    prepared_cache: str = "user"
    dry_run: bool = False


# What became of fields of earlier versions, by the last two names.
REPLACED: dict[tuple[int | str, ...], str] = {
    ("judge", "number"): "was replaced by judge.answer and judge.range: leave it out, and give answer: last_number "
    "where the last number of the judge's answer is the score"
}

C = TypeVar("C")


class _UniqueKeys(yaml.SafeLoader):
    """YAML without the same name twice in a mapping, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_config(path: str | Path, kind: type[C]) -> C:
    """The YAML file as a dataclass. Raises `ConfigError` naming the file and the field, with the nearest known name."""
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give the YAML file of the run") from None
    except (IsADirectoryError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no YAML file ({' '.join(str(error).split())}): fix it") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds no mapping of fields: begin with, for example, 'system:'")
    _leave_out_unused(values)
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, kind)}") from None


def _leave_out_unused(values: dict[str, Any]) -> None:
    """Earlier versions wrote judge.number into every config.yaml: where no judge is given it says nothing."""
    evaluation = values.get("evaluation")
    judge = evaluation.get("judge") if isinstance(evaluation, dict) else None
    if isinstance(judge, dict) and not any(judge.get(name) for name in ("url", "model", "template")):
        judge.pop("number", None)


def write_config(path: Path, config: Any) -> None:
    """Undo `read_config`; whole or not at all."""
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    write_whole(path, yaml.safe_dump(values, sort_keys=False))


def parse(arguments: Sequence[str], description: str | None) -> TrainConfig:
    """The file after --config, if it is given, with the values of any other flags in place of its own."""
    rest, path = list(arguments), None
    for place, word in enumerate(rest):
        if word == "--config" or word.startswith("--config="):
            if word == "--config" and place + 1 == len(rest):
                raise ConfigError("--config: give the YAML file of the run behind it")
            path = rest[place + 1] if word == "--config" else word.removeprefix("--config=")
            del rest[place : place + 1 + (word == "--config")]
            break
    default = TrainConfig() if path is None else read_config(path, TrainConfig)
    return _within_bounds(tyro.cli(TrainConfig, args=rest, default=default, description=description))


def parse_flags(kind: type[C], arguments: Sequence[str], description: str | None) -> C:
    """The configuration of a command without a file. Raises `ConfigError` for a value out of bounds."""
    return _within_bounds(tyro.cli(kind, args=arguments, description=description))


def _within_bounds(config: C) -> C:
    """Flags keep to the same bounds as a file."""
    adapter = TypeAdapter(type(config))
    try:
        return adapter.validate_python(adapter.dump_python(config))
    except ValidationError as error:
        raise ConfigError(_explain(error, type(config))) from None


def _explain(error: ValidationError, kind: type) -> str:
    """All that is wrong, each with its place; unknown names with the nearest known one."""
    said = []
    for each in error.errors(include_url=False):
        *place, last = each["loc"]
        if each["loc"][-2:] in REPLACED:
            said.append(f"{_dotted(each['loc'])} {REPLACED[each['loc'][-2:]]}")
        elif each["type"] == "unexpected_keyword_argument":
            known = _names_at(kind, place)
            near = get_close_matches(str(last), known, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            said.append(f"{_dotted(each['loc'])} is no field: {meant}")
        else:
            said.append(f"{_dotted(each['loc'])} is {each['input']!r}: {each['msg'][0].lower()}{each['msg'][1:]}")
    return "; ".join(said)


def _dotted(place: Sequence[int | str]) -> str:
    return ".".join(map(str, place))


def _names_at(kind: Any, place: Sequence[int | str]) -> list[str]:
    """The fields of the dataclass at a place below another one."""
    for name in place:
        if is_dataclass(kind):
            kind = get_type_hints(kind)[str(name)]
        else:
            kind = get_args(kind)[1]
    return [field.name for field in fields(kind)]
