"""The system of a configuration: its graph, its models, and how tools and remote models are called."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from sysdpo_jax.typing import AboveZero, Natural, NotNegative, Positive


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank factors, see `sysdpo_jax.LoRA`.

    Args:
        rank: Rank of the factors.
        alpha: The factors' product is scaled by alpha / rank.
        targets: Named sets or regular expressions of dense layers.
    """

    rank: Positive = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ("attention",)


@dataclass(frozen=True)
class ComponentConfig:
    """A model with parameters: a Hugging Face checkpoint, or a component of your own.

    Args:
        checkpoint: Model to load: a folder, a GGUF file or a name on the hub.
        factory: Instead of a checkpoint, "module:function": a function or class that returns a component (with fresh
            parameters) or a pair (component, parameters).
        base: Instead of both, the name of the component whose weights this one, a role, shares: it has factors alone.
        mode: What to train: all weights (full), low-rank factors (lora) or nothing (frozen).
        lora: Low-rank factors of mode lora.
        learning_rate: Learning rate of this component; the schedule's by default.
        settings: Keyword arguments of `pretrained.load` or of the factory: max_prompt_length, guidance_scale ... A
            mapping {call: "module:name", ...} stands for what that returns for the rest of it. Of a role those in which
            its component differs from its base's.
    """

    checkpoint: str | None = None
    factory: str | None = None
    base: str | None = None
    mode: Literal["full", "lora", "frozen"] = "lora"
    lora: LoraConfig = LoraConfig()
    learning_rate: AboveZero | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RemoteConfig:
    """A model behind a server that speaks OpenAI's API, see `sysdpo_jax.RemoteModel`.

    How it is asked (from `key` on) may change when a run goes on.

    Args:
        url: Address of the server, such as https://api.openai.com/v1.
        model: Name of the model on that server.
        kind: "chat" and "completion" give a text, "image" a picture.
        max_tokens: Largest number of tokens of an answer; null for the server's.
        temperature: Temperature of the samples; null for the server's.
        settings: Further fields of the request, as the server knows them.
        key: Name of the environment variable that holds the API key.
        concurrency: Requests at the same time, of each process.
        retries: Further attempts after a failed request, within ten minutes.
        timeout: Seconds that a whole request may take.
        max_calls: Answers of the model that the cache may hold; null for any number.
        max_total_tokens: Tokens that they may cost together; null for any number.
        cache: Where answers are kept: user or a file.
        on_error: What a request that fails for good does: stop everything, or skip that run.
    """

    url: str = ""
    model: str = ""
    kind: Literal["chat", "completion", "image"] = "chat"
    max_tokens: Positive | None = None
    temperature: NotNegative | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    key: str = "OPENAI_API_KEY"
    concurrency: Positive = 8
    retries: Natural = 8
    timeout: AboveZero = 300.0
    max_calls: Positive | None = None
    max_total_tokens: Positive | None = None
    cache: str = "user"
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class ValueConfig:
    """A value of the system: of a component, of a tool, of a remote model, or a choice among others.

    How a tool is called (concurrency, retries, timeout, on_error) may change when a run goes on.

    Args:
        parents: Names of inputs and nodes, in the order in which the prompt or tool takes their values.
        component: Name of the component, as under `components`.
        tool: Instead of a component, "module:function", called with the parents' values.
        remote: Instead of a component, a model behind a server.
        switch: Instead of a component, the input or node that chooses among the branches.
        branches: Branches of a switch, {value that chooses: node}; it has no parents beside these.
        prompt: Prompt of a language model, with parents in braces; the only parent by default.
        chat: Whether the prompt is a user's message in the chat template. In a loop whose name is among the parents
            what the node said in earlier turns, and what their tools answered, follows as messages.
        system: Text of the system's message of a chat.
        tools: JSON schemas of functions for the chat template, the name of a .json file with them, or "module:name".
        observations: Role of the messages in which a chat's model reads what tools answered.
        plate: Number of values in each parent's list, see `sysdpo_jax.Node`.
        weight: Weight of the node's log-ratio in the system's.
        concurrency: Calls of the tool at the same time.
        retries: Further attempts after a call of the tool failed.
        timeout: Seconds that one attempt of the tool may take.
        on_error: What a tool that fails for good does: stop everything, or skip that run or record.
    """

    parents: tuple[str, ...] = ()
    component: str | None = None
    tool: str | None = None
    remote: RemoteConfig = RemoteConfig()
    switch: str | None = None
    branches: Any = None
    prompt: str | None = None
    chat: bool = False
    system: str | None = None
    tools: str | tuple[dict[str, Any], ...] = ()
    observations: Literal["tool", "user"] = "tool"
    plate: Positive | None = None
    weight: NotNegative = 1.0
    concurrency: Positive = 1
    retries: Natural = 0
    timeout: AboveZero | None = None
    on_error: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True)
class NodeConfig(ValueConfig):
    """A value of the system; with a body, a loop.

    Args:
        body: Nodes of each turn of a loop, by name, see `sysdpo_jax.Loop`.
        turns: Largest number of turns of a loop.
        until: "module:function", called with a turn of a loop: whether it is the last one.
    """

    body: dict[str, ValueConfig] = field(default_factory=dict)
    turns: Positive | None = None
    until: str | None = None


# What only a model's node has.
ASKING = ("prompt", "chat", "system", "tools", "observations", "weight")
# Those of them that are of a chat.
CHATTING = ("system", "tools", "observations")
# How a tool is called, which is no part of what the system is.
CALLS = ("concurrency", "retries", "timeout", "on_error")
# The same of a remote model.
ASKS = (*CALLS, "key", "max_calls", "max_total_tokens", "cache")


@dataclass(frozen=True)
class SystemConfig:
    """The graph.

    Args:
        inputs: Names of the values that a prompt holds.
        nodes: Nodes of the graph, by name.
        components: Models with parameters, by name; several nodes may share one.
    """

    inputs: tuple[str, ...] = ()
    nodes: dict[str, NodeConfig] = field(default_factory=dict)
    components: dict[str, ComponentConfig] = field(default_factory=dict)


def as_dict(system: SystemConfig, without: Sequence[str] = CALLS) -> dict[str, Any]:
    """The fields of a system, but for those of nodes and components in `without`: by default how tools are called."""
    whole = asdict(system)
    inner = [part for node in whole["nodes"].values() for part in node["body"].values()]
    for part in (*whole["nodes"].values(), *inner, *whole["components"].values()):
        for name in without:
            part.pop(name, None)
        remote = part.pop("remote", {})
        if remote and remote != asdict(RemoteConfig()):
            part["remote"] = {name: value for name, value in remote.items() if name not in ASKS}
        if isinstance(part.get("branches"), dict):
            # JSON would make texts of the values that choose.
            part["branches"] = list(part["branches"].items())
    return whole
