"""The configuration of a run: a YAML file, of which every field is also a flag."""

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from sysdpo_jax.data.rollouts import Pairs
from sysdpo_jax.evaluation.judge_config import JudgeConfig
from sysdpo_jax.runs.system_config import SystemConfig
from sysdpo_jax.typing import AboveZero, Natural, NotNegative, Positive

# Of a run's checkpoints.
Which = Literal["newest", "best"]


@dataclass(frozen=True)
class DataConfig:
    """Preferences, see `sysdpo_jax.load_preferences`.

    Args:
        source: Preferences: a JSONL, Parquet or JSON file, a folder, or a dataset on the hub.
        reader: Format of the rows: records, trl, pick_a_pic, ranked, ranked_all, label_studio, argilla, or
            "module:function" of a row and the system, which returns its records.
        split: Split to read, of a folder or a dataset on the hub.
        on_error: What to do with a row that cannot be used: stop, or skip and count it.
        ignore: Fields of the rows that may be left unread.
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
        kind: "direct" for records with intermediate values, "sampling" for records without, which are searched for.
        beta: How strongly the system is held to its reference.
        loss: Name of the loss: sigmoid, robust, ipo, hinge, exo_pair, apo_zero or apo_down.
        label_smoothing: Share of the preferences that is assumed to be wrong.
        sft: Coefficients of -log p of the chosen value, by node.
        intermediates: Number of intermediates of a record (sampling).
        every: Steps after which intermediates are drawn again (sampling).
        chunk_size: Intermediates that go through the models at once (sampling); null for all.
    """

    kind: Literal["direct", "sampling"] = "direct"
    beta: AboveZero = 0.1
    loss: str = "sigmoid"
    label_smoothing: NotNegative = 0.0
    sft: dict[str, float] = field(default_factory=dict)
    intermediates: Positive = 4
    every: Positive = 1
    chunk_size: Positive | None = None


@dataclass(frozen=True)
class MeshConfig:
    """The devices, see `make_mesh`.

    Args:
        data: Number of copies of the models.
        fsdp: Number of parts that each copy is cut into; null takes all devices that the other two leave.
        tensor: Number of parts that each layer is cut into.
    """

    data: Positive = 1
    fsdp: Positive | None = None
    tensor: Positive = 1


@dataclass(frozen=True)
class ScheduleConfig:
    """How long and how fast.

    Args:
        steps: Number of updates; in online rounds, of each round.
        batch_size: Pairs in a step, over all processes.
        accumulate: Number of parts that a batch is cut into, one after the other.
        learning_rate: AdamW's learning rate after the warmup; a cosine takes it to 0.
        warmup: Number of warmup steps.
        weight_decay: AdamW's weight decay.
        clip_norm: Largest norm of each component's gradient; null for no clipping.
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
        prompts: File of held-out prompts: JSON Lines with the system's inputs, or a text file with one prompt a line.
        ignore: Fields of the prompts that may be left unread.
        scorer: "module:function", called with a run; a higher number is better.
        judge: Instead of a scorer, a model behind HTTP.
        on_error: What to do with a run without a score: stop, or skip and count it, with the run it is compared with.
        every: Steps between evaluations.
        samples: Runs of each prompt.
        batch_size: Runs that are sampled together.
        patience: Evaluations without a better win rate before training stops; null for never.
        shown: Number of prompts that the report shows.
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
        prompts: File of the prompts that the rounds sample runs of, in the evaluation's formats.
        rounds: Number of rounds; it may grow when the run is resumed.
        samples: Runs of each prompt in a round.
        batch_size: Runs that are sampled together.
        group: Number of runs of a prompt among which pairs are made; null for all of them.
        pairs: Pairs of a group: the best against the worst, or all.
        min_margin: Smallest difference of scores that makes a pair.
        mix: Share of a round's pairs that comes from earlier rounds.
        reference: Reference of a round: the policy at its start (reset), or at the start of the first (keep).
        epochs: Largest number of passes over a round's pairs, within `schedule.steps` updates.
        stop_on: Held-out figures whose fall ends the rounds; the first one says which evaluation is the best.
        fall: Fall of such a figure that ends the rounds whatever the noise; null for none.
        figures: Further held-out figures, {name: "module:function"}, called with a run.
    """

    prompts: str = ""
    rounds: Positive = 2
    samples: Positive = 8
    batch_size: Positive = 16
    group: Positive | None = None
    pairs: Pairs = "best_worst"
    min_margin: NotNegative = 0.0
    mix: NotNegative = 0.0
    reference: Literal["reset", "keep"] = "reset"
    epochs: Positive | None = 12
    stop_on: tuple[str, ...] = ("score",)
    fall: AboveZero | None = None
    figures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ServeConfig:
    """A server that samples for a language model, see `sysdpo_jax.serving`.

    Args:
        url: Address of the server, such as http://127.0.0.1:8000.
        model: Name of the model that it began with.
        engine: Kind of the server: vllm or sglang.
        folder: Folder for adapters and weights, which the server reads too; the run's by default.
        max_gap: Largest mean difference of log-probabilities from the model's own, in nats a token.
        key: Name of the environment variable that holds the server's key, if it wants one.
        parallel: Requests at the same time.
        timeout: Seconds that a request may take.
        retries: Further attempts after a failed request, within ten minutes.
    """

    url: str = ""
    model: str = ""
    engine: Literal["vllm", "sglang"] = "vllm"
    folder: str = ""
    max_gap: AboveZero = 0.05
    key: str = "SERVER_API_KEY"
    parallel: Positive = 64
    timeout: AboveZero = 600.0
    retries: Natural = 8


def _free(default: Any = MISSING, factory: Any = MISSING) -> Any:
    """A field that may change when a run goes on: where it lies, how it is watched, the machine, what is looked at."""
    return field(default=default, default_factory=factory, metadata={"free": True})


@dataclass(frozen=True)
class TrainConfig:
    """A run. Given again with the same directory it goes on from the newest checkpoint.

    Args:
        directory: Folder for checkpoints, metrics and report; runs/NAME after the file's name by default.
        init_from: Folder of another run, from whose parameters this one starts.
        init_checkpoint: Checkpoint of that run to start from.
        system: The graph and its models.
        data: The preferences.
        objective: What is minimised.
        schedule: How long and how fast.
        mesh: The devices.
        evaluation: Evaluation on held-out prompts.
        online: Rounds, in which the run makes its own preferences.
        serve: Servers that sample for language models in evaluations, rounds and rollouts, by component.
        dtype: Precision of the computation; weights that are trained whole are kept in float32.
        remat: What the backward pass computes again to save memory: "auto" takes the fastest that fits; or null,
            "full", "whole" or a policy, see `pretrained.load`.
        seed: Seed of everything random.
        log_every: Steps between rows of metrics.jsonl.
        checkpoint_every: Steps between checkpoints.
        profile: First and last step to trace.
        wandb: Project of Weights & Biases.
        resume: Whether to resume from a checkpoint in the directory; false refuses such a directory.
        preempted_exit_code: Exit code after SIGTERM.
        compilation_cache: Where compiled programs are kept: user, none or a folder.
        prepared_cache: Where prepared preferences are kept: user or a folder.
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
    serve: dict[str, ServeConfig] = _free(factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: str | None = _free("auto")
    seed: Natural = 0
    log_every: Positive = _free(10)
    checkpoint_every: Positive = _free(100)
    profile: tuple[int, int] | None = _free(None)
    wandb: str | None = _free(None)
    resume: bool = _free(True)
    preempted_exit_code: int = _free(0)
    compilation_cache: str = _free("user")
    prepared_cache: str = _free("user")
    dry_run: bool = _free(False)
