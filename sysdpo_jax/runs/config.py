"""The configuration of a run: a YAML file, of which every field is also a flag."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sysdpo_jax.data.rollouts import Pairs
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.typing import AboveZero, Natural, NotNegative, Positive

# Of a run's checkpoints.
Which = Literal["newest", "best"]


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors, see `sysdpo_jax.LoRA`.

    Args:
        rank: Of the factors.
        alpha: Their product is scaled by alpha / rank.
        targets: Named sets or regular expressions of dense layers.
    """

    rank: Positive = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention",)


@dataclass(frozen=True)
class ComponentConfig:
    """A model with parameters: a Hugging Face checkpoint, or a component of your own.

    Args:
        checkpoint: A folder, a GGUF file or a name on the hub.
        factory: Instead, "module:function" of a function or class that returns a component (its parameters are then
            fresh) or a pair (component, parameters).
        mode: Train all weights, low-rank factors, or nothing.
        lora: The factors of mode lora.
        learning_rate: By default the schedule's.
        settings: Keyword arguments of `pretrained.load` or of the factory: max_prompt_length, guidance_scale ... A
            mapping {call: "module:name", ...} stands for what that returns for the rest of it.
    """

    checkpoint: str | None = None
    factory: str | None = None
    mode: Literal["full", "lora", "frozen"] = "lora"
    lora: LoraConfig = LoraConfig()
    learning_rate: AboveZero | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeConfig:
    """A value of the system: of a component, or of a tool.

    How a tool is called (concurrency, retries, timeout, on_error) may change when a run goes on.

    Args:
        parents: Inputs and nodes, in the order in which prompt and tool take them.
        component: A name under `components`.
        tool: Instead, "module:function" of the parents' values.
        prompt: Of a language model, a text with its parents in braces; by default its only parent.
        chat: The prompt is a user's message in the chat template.
        plate: How many values each parent's list holds, see `sysdpo_jax.Node`.
        weight: Of the node's log-ratio.
        concurrency: Calls of a tool at a time.
        retries: Further tries of a call of a tool that failed.
        timeout: Seconds after which a try of a tool has failed.
        on_error: Of a tool: stop, or skip the run or record that it fails on.
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
    timeout: AboveZero | None = None
    on_error: Literal["stop", "skip"] = "stop"


# How a tool is called, which is no part of what the system is.
CALLS = ("concurrency", "retries", "timeout", "on_error")


@dataclass(frozen=True)
class SystemConfig:
    """The graph.

    Args:
        inputs: Names of what a prompt holds.
        nodes: The values of the system by name.
        components: The models with parameters by name, which nodes may share.
    """

    inputs: tuple[str, ...] = ()
    nodes: dict[str, NodeConfig] = field(default_factory=dict)
    components: dict[str, ComponentConfig] = field(default_factory=dict)


def as_dict(system: SystemConfig, without: Sequence[str] = CALLS) -> dict[str, Any]:
    """What a system is: its fields, but for some of its nodes and components, by default how tools are called."""
    whole = asdict(system)
    for part in (*whole["nodes"].values(), *whole["components"].values()):
        for name in without:
            part.pop(name, None)
    return whole


@dataclass(frozen=True)
class DataConfig:
    """Preferences, see `sysdpo_jax.load_preferences`.

    Args:
        source: A JSONL or Parquet file of preferences, a folder, or a data set of the hub.
        reader: The form of its rows: records, trl, pick_a_pic, ranked or ranked_all, or "module:function" of a row and
            the system, which returns its records.
        split: Of a data set of the hub or a folder.
        on_error: Of a row with an error: stop, or skip and count it.
        ignore: Fields of rows that are left unread.
    """

    source: str = ""
    reader: str = "records"
    split: str = "train"
    on_error: Literal["stop", "skip"] = "stop"
    ignore: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised, see `DirectObjective` and `SearchedBatches`.

    Args:
        kind: "direct" for records with intermediate values, "sampling" for records without, which it searches for.
        beta: How closely the system keeps to what it was.
        loss: A name in sysdpo_jax/objectives/losses.py.
        label_smoothing: The share of preferences that are taken to be wrong.
        sft: Coefficients of -log p of the chosen value, by node.
        intermediates: Of sampling: how many of a record.
        every: Of sampling: steps after which they are drawn anew.
        chunk_size: Of sampling: how many of them go through the models at once, null for all.
    """

    kind: Literal["direct", "sampling"] = "direct"
    beta: float = 0.1
    loss: str = "sigmoid"
    label_smoothing: float = 0.0
    sft: dict[str, float] = field(default_factory=dict)
    intermediates: Positive = 4
    every: Positive = 1
    chunk_size: Positive | None = None


@dataclass(frozen=True)
class MeshConfig:
    """The devices, see `make_mesh`.

    Args:
        data: Copies of the models.
        fsdp: Parts that they are cut into; null takes the devices that the other two leave.
        tensor: Parts that each layer is cut into.
    """

    data: Positive = 1
    fsdp: Positive | None = None
    tensor: Positive = 1


@dataclass(frozen=True)
class ScheduleConfig:
    """How long and how fast.

    Args:
        steps: Updates in all; of online rounds, in each.
        batch_size: Pairs a step, of all processes together.
        accumulate: Parts that a batch is cut into.
        learning_rate: AdamW's after `warmup` steps, from which a cosine falls to 0.
        warmup: Steps.
        weight_decay: AdamW's.
        clip_norm: Of each component's gradient; null for no clipping.
    """

    steps: Positive = 1000
    batch_size: Positive = 16
    accumulate: Positive = 1
    learning_rate: AboveZero = 1e-5
    warmup: Natural = 100
    weight_decay: NotNegative = 0.0
    clip_norm: AboveZero | None = 1.0


@dataclass(frozen=True)
class EvaluationConfig:
    """Runs of the whole system on held-out prompts, scored beside those of the system before training.

    Args:
        prompts: JSON Lines of objects with the system's inputs, or a text file with a prompt a line.
        ignore: Fields of them that are left unread.
        scorer: "module:function", run -> number, higher is better; or judge.
        judge: Instead of a scorer, a model behind HTTP.
        on_error: Of a run without a score: stop, or skip it and the run that it is compared with, and count them.
        every: Steps.
        samples: Runs a prompt.
        batch_size: Runs at a time.
        patience: Evaluations without a better win rate after which training stops; null: never.
        shown: Prompts in the report.
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


@dataclass(frozen=True)
class OnlineConfig:
    """Rounds of `sysdpo online`, which makes its own preferences with the evaluation's scorer or judge.

    Args:
        prompts: That the rounds make runs of, a file as for the evaluation.
        rounds: How many; it may grow when the run goes on.
        samples: Runs of each prompt in a round.
        batch_size: Runs at a time.
        group: Runs of a prompt among which a pair is made; null for all of them.
        pairs: Of a group, the best and the worst, or all pairs.
        min_margin: Smallest difference of scores that makes a pair.
        mix: Share of earlier rounds' pairs in a round.
        reference: The policy at the start of the round (reset), or the first one (keep).
        epochs: Passes over a round's pairs at most; a round has `schedule.steps` updates at most.
        stop_on: Held-out figures whose fall ends the rounds; the first says which evaluation is the best.
        fall: How far they may fall, whatever the noise.
        figures: Further held-out figures by name, "module:function" of a run.
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


def _free(default: Any) -> Any:
    """A field that may change when a run goes on: where it lies, how it is watched, the machine, what is looked at."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True)
class TrainConfig:
    """A run. Given again with the same directory it goes on from the newest checkpoint.

    Args:
        directory: Of checkpoints, metrics and report; by default runs/NAME after the file's name.
        init_from: The folder of another run, from whose parameters this one starts.
        init_checkpoint: Which of that run's checkpoints.
        system: The graph and its models.
        data: The preferences.
        objective: What is minimised.
        schedule: How long and how fast.
        mesh: The devices.
        evaluation: On held-out prompts.
        online: Rounds of preferences that the run makes itself.
        dtype: Of the computation; weights that are trained whole are kept in float32.
        remat: "full" computes again in the backward pass what does not fit, see `pretrained.load`.
        seed: Of all that is random.
        log_every: Steps between rows of metrics.jsonl.
        checkpoint_every: Steps.
        profile: Steps, first and last, to trace.
        wandb: A project of Weights & Biases.
        resume: false refuses a directory that holds a checkpoint.
        preempted_exit_code: After SIGTERM.
        compilation_cache: Of compiled programs: user, none or a folder.
        prepared_cache: Of prepared preferences: user or a folder.
        dry_run: Print what the run would be, and stop before it.
    """

    directory: str = _free("")
    init_from: str = ""
    init_checkpoint: Which = "newest"
    system: SystemConfig = SystemConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    mesh: MeshConfig = _free(MeshConfig())
    evaluation: EvaluationConfig = _free(EvaluationConfig())
    online: OnlineConfig = OnlineConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str | None = _free(None)
    seed: int = 0
    log_every: Positive = _free(10)
    checkpoint_every: Positive = _free(100)
    profile: tuple[int, int] | None = _free(None)
    wandb: str | None = _free(None)
    resume: bool = _free(True)
    preempted_exit_code: int = _free(0)
    compilation_cache: str = _free("user")
    prepared_cache: str = _free("user")
    dry_run: bool = _free(False)
