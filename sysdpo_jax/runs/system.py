"""The system that a configuration describes, with its parameters and their optimiser."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

import sysdpo_jax as sj
from sysdpo_jax.components.chat_prompt import TextPrompt
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.keys import named_key
from sysdpo_jax.models.lora import LoRAError, merge_lora, strip_lora
from sysdpo_jax.runs.config import (
    ASKING,
    CALLS,
    CHATTING,
    ComponentConfig,
    NodeConfig,
    ScheduleConfig,
    SystemConfig,
    TrainConfig,
)
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import built, call, import_function, import_object, name_of, shown, user_code

Model = tuple[sj.Component, Params]


@dataclass(frozen=True)
class Origin:
    """The run that another one starts from. components: of its configuration; params: at `step`."""

    folder: str
    components: Mapping[str, ComponentConfig]
    params: Params
    step: int


def build_system(config: TrainConfig, mesh: Mesh, origin: Origin | None = None) -> tuple[sj.CompoundSystem, Params]:
    """The system and its parameters on the mesh, LoRA factors included.

    origin: the run whose parameters take the place of the components' own.
    Raises `ConfigError` naming the field, `GraphError`, and `CheckpointError` for a checkpoint that cannot be read.
    """
    system = config.system
    _check(system)
    # The graph first: its errors should not wait for weights to be read.
    try:
        sj.CompoundSystem(system.inputs, tuple(_node(name, node, sj.Tool(repr)) for name, node in system.nodes.items()))
    except sj.GraphError as error:
        raise sj.GraphError(f"system.nodes: {error}") from None
    models = {name: _model(name, component, config, mesh, origin) for name, component in system.components.items()}
    nodes = [_node(name, node, _component(name, node, models)) for name, node in system.nodes.items()]
    return sj.CompoundSystem(system.inputs, tuple(nodes)), {name: params for name, (_, params) in models.items()}


def build_optimizer(config: TrainConfig) -> SystemOptimizer:
    """AdamW for every component that is trained; those with a learning rate of their own have it."""
    components = config.system.components
    return sj.make_optimizer({name: _optimizer(component, config.schedule) for name, component in components.items()})


def _check(system: SystemConfig) -> None:
    if not system.nodes:
        raise ConfigError(
            "system.nodes is empty: give --config my_run.yaml, or name the system's values and what each comes from"
        )
    for name, node in system.nodes.items():
        if (node.component is None) == (node.tool is None):
            raise ConfigError(f"system.nodes.{name}: give either a component or a tool")
        if node.component is not None and node.component not in system.components:
            near = meant(node.component, system.components)
            raise ConfigError(f"system.nodes.{name}.component {node.component!r} is not among the components: {near}")
    used = {node.component for node in system.nodes.values()}
    for name, component in system.components.items():
        if name not in used:
            raise ConfigError(f"system.components.{name} is the component of no node: use it, or leave it out")
        if (component.checkpoint is None) == (component.factory is None):
            raise ConfigError(f"system.components.{name}: give either a checkpoint or a factory")


def _node(name: str, node: NodeConfig, component: sj.Component) -> sj.Node:
    return sj.Node(name, component, node.parents, node.component, node.plate, node.weight)


def _component(
    name: str, node: NodeConfig, models: Mapping[str, Model], loop: tuple[str, Mapping[str, NodeConfig]] | None = None
) -> sj.Component:
    """The node's component, with its prompt where it has one. loop: whose turns it is of, and their nodes."""
    field = f"system.nodes.{name}"
    if node.component is None:
        given = _given(node, ASKING)
        if given:
            raise ConfigError(f"{field} is a tool, which has no {', '.join(given)}: leave that out")
        calls = {name: getattr(node, name) for name in CALLS}
        return sj.Tool(import_function(node.tool or "", f"{field}.tool"), **calls)
    given = _given(node, CALLS)
    if given:
        raise ConfigError(f"{field} is no tool, which alone has {', '.join(given)}: leave that out")
    component = models[node.component][0]
    if not _given(node, ("prompt", "chat", *CHATTING)):
        return component
    if not isinstance(component, sj.LanguageModel):
        raise ConfigError(f"{field}: only a language model takes a prompt or chat, not a {type(component).__name__}")
    return replace(component, prompt=_prompt(name, node, field, loop))


def _given(node: NodeConfig, names: Sequence[str]) -> list[str]:
    """Which of the fields are not as they are by default."""
    return [name for name in names if getattr(node, name) != getattr(NodeConfig(), name)]


def _prompt(
    name: str, node: NodeConfig, field: str, loop: tuple[str, Mapping[str, NodeConfig]] | None
) -> TextPrompt | sj.ChatPrompt:
    turns = loop[0] if loop is not None and loop[0] in node.parents else None
    asked = [parent for parent in node.parents if not (node.chat and parent == turns)]
    given = _given(node, CHATTING)
    if given and not node.chat:
        raise ConfigError(f"{field}.{given[0]} is of a chat: add chat: true, or leave it out")
    if node.prompt is None and len(asked) != 1:
        raise ConfigError(f"{field} has {len(asked)} parents: give a prompt that joins them")
    text = f"{{{asked[0]}}}" if node.prompt is None else node.prompt
    try:
        if not node.chat:
            return TextPrompt(text, node.parents)
        tools = _schemas(node.tools, f"{field}.tools")
        if loop is None or turns is None:
            return sj.ChatPrompt(text, node.parents, role=node.observations, system=node.system, tools=tools)
        told = tuple(other for other, its in loop[1].items() if its.tool is not None)
        return sj.ChatPrompt(text, node.parents, turns, name, told, node.observations, node.system, tools)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None


def _schemas(tools: str | Sequence[Mapping[str, Any]], field: str) -> Any:
    """Schemas of functions themselves, of a file, or of a module."""
    if not isinstance(tools, str):
        return tools
    if not tools.endswith(".json"):
        return import_object(tools, field)
    try:
        return json.loads(Path(tools).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field}: {tools} cannot be read ({error}): give a file with a list of schemas") from None


def _model(name: str, config: ComponentConfig, run: TrainConfig, mesh: Mesh, origin: Origin | None) -> Model:
    field = f"system.components.{name}"
    settings = built(config.settings, f"{field}.settings")
    key = named_key(jax.random.key(run.seed), name)
    if config.checkpoint is None:
        component, params = _of_factory(config.factory or "", settings, field, key)
    else:
        precision = {"dtype": run.dtype, "param_dtype": "float32" if config.mode == "full" else run.dtype}
        common = {**precision, "remat": run.remat, "shardings": partial(sj.tree_shardings, mesh)}
        try:
            component, params = sj.pretrained.load(config.checkpoint, **(common | settings))
        except TypeError as error:
            # A setting that the component does not have.
            raise ConfigError(f"{field}.settings: {error}") from error
    has_factors = False
    if origin is not None:
        params, has_factors = _started(name, config, params, origin)
    if config.mode == "lora" and not has_factors:
        lora = sj.LoRA(config.lora.rank, config.lora.alpha, config.lora.targets)
        try:
            params = sj.add_lora(params, lora, key)
        except LoRAError as error:
            raise ConfigError(f"{field} (mode lora): {error}; or train it in mode full") from error
    return component, params


def _started(name: str, config: ComponentConfig, params: Params, origin: Origin) -> tuple[Params, bool]:
    """The component's parameters in the run `origin`, and whether they hold the LoRA factors that it goes on with.

    Factors of the same settings are kept, others are merged into the weights. params: the component's own, whose shapes
    those of the run must have. Raises `ConfigError` naming what does not fit.
    """
    if name not in origin.params:
        known = ", ".join(origin.params)
        raise ConfigError(
            f"init_from {origin.folder} has no component {name!r} (it has {known}): give components the same names"
        )
    before, found = origin.components[name], origin.params[name]
    keeps = before.mode == config.mode == "lora" and before.lora == config.lora
    if not keeps:
        found = merge_lora(found)
    theirs, own = by_path(strip_lora(found)), by_path(params)
    for path in {**own, **theirs}:
        shapes = [None if path not in tree else tree[path].shape for tree in (theirs, own)]
        if shapes[0] != shapes[1]:
            said = ["nothing" if shape is None else f"shape {list(shape)}" for shape in shapes]
            raise ConfigError(
                f"init_from {origin.folder}: {path} of component {name!r} is {said[0]} there and {said[1]} here: start "
                "from a run of the same model"
            )
    kinds = {path: leaf.dtype for path, leaf in own.items()}
    cast = {path: leaf.astype(kinds.get(path, leaf.dtype)) for path, leaf in by_path(found).items()}
    return jax.tree.unflatten(jax.tree.structure(found), [cast[path] for path in by_path(found)]), keeps


def _of_factory(factory: str, settings: Mapping[str, Any], field: str, key: PRNGKeyArray) -> Model:
    """What a factory returns, with fresh parameters where it gives none."""
    made = call(factory, settings, f"{field}.settings", f"{field}.factory")
    pair = isinstance(made, tuple) and len(made) == 2
    component, params = made if pair else (made, None)
    if not isinstance(component, sj.Component) or isinstance(component, type) or (pair and params is None):
        raise ConfigError(
            f"{field}.factory: {factory} returned {shown({'value': made})}: return a component, or a pair of a "
            "component and its parameters"
        )
    if not pair:
        with user_code(f"{field}.factory: {name_of(type(component))}.init", ConfigError):
            params = component.init(key)
    return component, params


def _optimizer(component: ComponentConfig, schedule: ScheduleConfig) -> sj.ComponentOptimizer:
    if component.mode == "frozen":
        return sj.FROZEN
    peak = schedule.learning_rate if component.learning_rate is None else component.learning_rate
    if schedule.warmup >= schedule.steps:
        raise ConfigError(f"schedule.warmup {schedule.warmup} must be below schedule.steps {schedule.steps}: lower it")
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, schedule.warmup, schedule.steps)
    adamw = optax.adamw(rate, weight_decay=schedule.weight_decay)
    trainable = sj.LORA_PARAMS if component.mode == "lora" else ".*"
    return sj.ComponentOptimizer(adamw, clip_norm=schedule.clip_norm, trainable=trainable)
