"""The system that a configuration describes, with its parameters and their optimiser."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from string import Formatter
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

import sysdpo_jax as sj
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.keys import named_key
from sysdpo_jax.models.lora import LoRAError, merge_lora, strip_lora
from sysdpo_jax.runs.config import (
    CALLS,
    ComponentConfig,
    NodeConfig,
    ScheduleConfig,
    SystemConfig,
    TrainConfig,
    ValueConfig,
)
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import built, call, import_function, name_of, shown, user_code

Model = tuple[sj.Component, Params]


@dataclass(frozen=True)
class Template:
    """A prompt made of the parents' values. chat: as the message of a user, which the chat template frames."""

    text: str
    names: tuple[str, ...]
    chat: bool

    def __call__(self, *values: Any) -> Any:
        given = dict(zip(self.names, values, strict=True))
        messages = [name for name, value in given.items() if not isinstance(value, str | int | float)]
        if len(values) == 1 and messages and self.text == f"{{{self.names[0]}}}":
            # Messages as they are.
            return values[0]
        if messages:
            raise sj.RecordError(
                f"{messages[0]!r} is no text, which the prompt {self.text!r} needs: leave the prompt out, or give text"
            )
        prompt = self.text.format(**given)
        return [{"role": "user", "content": prompt}] if self.chat else prompt


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
        _system(system, lambda node, field: sj.Tool(repr))
    except sj.GraphError as error:
        raise sj.GraphError(f"system.nodes: {error}") from None
    models = {name: _model(name, component, config, mesh, origin) for name, component in system.components.items()}
    made = _system(system, lambda node, field: _component(field, node, models))
    return made, {name: params for name, (_, params) in models.items()}


def build_optimizer(config: TrainConfig) -> SystemOptimizer:
    """AdamW for every component that is trained; those with a learning rate of their own have it."""
    components = config.system.components
    return sj.make_optimizer({name: _optimizer(component, config.schedule) for name, component in components.items()})


def _check(system: SystemConfig) -> None:
    if not system.nodes:
        raise ConfigError(
            "system.nodes is empty: give --config my_run.yaml, or name the system's values and what each comes from"
        )
    values = dict(_values(system))
    for place, node in values.items():
        kinds = [node.component, node.tool, node.switch, (isinstance(node, NodeConfig) and node.body) or None]
        if sum(kind is not None for kind in kinds) != 1:
            raise ConfigError(f"{place}: give either a component, a tool, a switch or a body")
        if node.component is not None and node.component not in system.components:
            near = meant(node.component, system.components)
            raise ConfigError(f"{place}.component {node.component!r} is not among the components: {near}")
        _refuse_beside(node, place)
    used = {node.component for node in values.values()}
    for name, component in system.components.items():
        if name not in used:
            raise ConfigError(f"system.components.{name} is the component of no node: use it, or leave it out")
        if (component.checkpoint is None) == (component.factory is None):
            raise ConfigError(f"system.components.{name}: give either a checkpoint or a factory")


def _values(system: SystemConfig) -> Iterator[tuple[str, ValueConfig]]:
    """(place, node) of all nodes, those of loops' bodies among them."""
    for name, node in system.nodes.items():
        yield f"system.nodes.{name}", node
        yield from ((f"system.nodes.{name}.body.{inner}", own) for inner, own in node.body.items())


def _refuse_beside(node: ValueConfig, place: str) -> None:
    """Raise `ConfigError` for a field that says nothing of a node of this kind, or that the kind needs and lacks."""
    whole, default = isinstance(node, NodeConfig) and node.body, NodeConfig()
    kind, own = ("loop", ("body", "turns", "until")) if whole else ("switch", ("switch", "branches"))
    if node.switch is None and not whole:
        others = [name for name in ("branches", "turns", "until") if getattr(node, name, None) is not None]
        if others:
            raise ConfigError(
                f"{place}.{others[0]} is of a switch or a loop alone: leave it out, or give switch or body"
            )
        return
    given = [each.name for each in fields(node) if getattr(node, each.name) != getattr(default, each.name)]
    beside = [name for name in given if name not in own]
    if beside:
        raise ConfigError(f"{place} is a {kind}, which has no {', '.join(beside)}: leave that out")
    needed = "turns" if whole else "branches"
    if getattr(node, needed) is None:
        raise ConfigError(f"{place}.{needed} must be given, because it is a {kind}")
    if not whole and not isinstance(node.branches, Mapping):
        raise ConfigError(f"{place}.branches is {node.branches!r}: give a mapping of values of {node.switch} to nodes")


def _system(system: SystemConfig, component_of: Callable[[ValueConfig, str], sj.Component]) -> sj.CompoundSystem:
    """The graph. component_of: gives what a node's value comes from, with the node's place for errors."""

    def made(name: str, node: ValueConfig, field: str) -> sj.Node:
        try:
            if node.switch is not None:
                return sj.Node(name, sj.Switch(tuple(node.branches)), (node.switch, *node.branches.values()))
            if isinstance(node, NodeConfig) and node.body:
                body = tuple(made(inner, own, f"{field}.body.{inner}") for inner, own in node.body.items())
                until = None if node.until is None else import_function(node.until, f"{field}.until")
                return sj.Loop(name, body, node.turns or 1, until)
        except ValueError as error:
            known = isinstance(error, ConfigError | sj.GraphError)
            raise error if known else ConfigError(f"{field}: {error}") from None
        return sj.Node(name, component_of(node, field), node.parents, node.component, node.plate, node.weight)

    nodes = (made(name, node, f"system.nodes.{name}") for name, node in system.nodes.items())
    return sj.CompoundSystem(system.inputs, tuple(nodes))


def _component(field: str, node: ValueConfig, models: Mapping[str, Model]) -> sj.Component:
    """The node's component, with its prompt where it has one. field: the node's place."""
    if node.component is None:
        if node.prompt is not None or node.chat or node.weight != 1.0:
            raise ConfigError(f"{field} is a tool, which has no prompt, chat or weight: leave them out")
        calls = {name: getattr(node, name) for name in CALLS}
        return sj.Tool(import_function(node.tool or "", f"{field}.tool"), **calls)
    given = [name for name in CALLS if getattr(node, name) != getattr(NodeConfig(), name)]
    if given:
        raise ConfigError(f"{field} is no tool, which alone has {', '.join(given)}: leave that out")
    component = models[node.component][0]
    if node.prompt is None and not node.chat:
        return component
    if not isinstance(component, sj.LanguageModel):
        raise ConfigError(f"{field}: only a language model takes a prompt or chat, not a {type(component).__name__}")
    if node.prompt is None and len(node.parents) != 1:
        raise ConfigError(f"{field} has {len(node.parents)} parents: give a prompt that joins them")
    text = f"{{{node.parents[0]}}}" if node.prompt is None else node.prompt
    try:
        wanted = {part for _, part, _, _ in Formatter().parse(text) if part is not None}
    except ValueError as error:
        raise ConfigError(f"{field}.prompt {text!r} is no template ({error}): write braces as {{{{ and }}}}") from None
    if not wanted or not wanted <= set(node.parents):
        raise ConfigError(
            f"{field}.prompt {text!r} must name parents in braces ({', '.join(node.parents)}): it names "
            f"{', '.join(map(repr, sorted(wanted))) or 'none'}"
        )
    return replace(component, prompt=Template(text, node.parents, node.chat))


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
