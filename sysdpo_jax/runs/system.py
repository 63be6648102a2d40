"""The system that a configuration describes, with its parameters and their optimiser."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray

import sysdpo_jax as sj
from sysdpo_jax.components.chat_prompt import TextPrompt
from sysdpo_jax.errors import ConfigError, meant
from sysdpo_jax.keys import named_key
from sysdpo_jax.models.lora import LoRAError, is_lora, merge_lora, on_base, strip_lora
from sysdpo_jax.runs.config import ScheduleConfig, TrainConfig
from sysdpo_jax.runs.system_config import (
    ASKING,
    CALLS,
    CHATTING,
    ComponentConfig,
    NodeConfig,
    RemoteConfig,
    SystemConfig,
    ValueConfig,
)
from sysdpo_jax.static import tuples
from sysdpo_jax.training.optimizer import SystemOptimizer
from sysdpo_jax.trees import by_path
from sysdpo_jax.typing import Params
from sysdpo_jax.user_code import built, call, import_function, import_object, name_of, shown, user_code

Model = tuple[sj.Component, Params]


class Scope(NamedTuple):
    """Whose turns a node is of: the name of the loop, the node's own in it, and the nodes of its body."""

    loop: str
    node: str
    body: Mapping[str, ValueConfig]


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
        _system(system, lambda node, field, scope: sj.Tool(repr))
    except sj.GraphError as error:
        raise sj.GraphError(f"system.nodes: {error}") from None
    models: dict[str, Model] = {}
    # Bases before their roles.
    for name, component in sorted(system.components.items(), key=lambda item: item[1].base is not None):
        models[name] = _model(name, component, config, mesh, origin, models)
    made = _system(system, lambda node, field, scope: _component(field, node, models, scope))
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
        whole = (isinstance(node, NodeConfig) and node.body) or None
        kinds = [node.component, node.tool, None if node.remote == RemoteConfig() else node.remote, node.switch, whole]
        if sum(kind is not None for kind in kinds) != 1:
            raise ConfigError(f"{place}: give either a component, a tool, a remote model, a switch or a body")
        if node.component is not None and node.component not in system.components:
            near = meant(node.component, system.components)
            raise ConfigError(f"{place}.component {node.component!r} is not among the components: {near}")
        _refuse_beside(node, place)
        chooser = values.get(f"{place.rpartition('.')[0]}.{node.switch}", system.nodes.get(node.switch or ""))
        _refuse_booleans(node, chooser, place)
    used = {node.component for node in values.values()}
    roles: dict[str, list[str]] = {}
    for name, component in system.components.items():
        if [component.checkpoint, component.factory, component.base].count(None) != 2:
            raise ConfigError(f"system.components.{name}: give either a checkpoint, a factory or a base")
        if component.base is not None:
            _check_role(name, component, system)
            roles.setdefault(component.base, []).append(name)
    for name, component in system.components.items():
        field = f"system.components.{name}"
        if name not in used and name not in roles:
            raise ConfigError(f"{field} is the component of no node: use it, or leave it out")
        if name not in used and component.mode != "frozen":
            raise ConfigError(f"{field} is the base of roles and the component of no node: give it mode frozen")
        if name in roles and component.mode == "full":
            raise ConfigError(
                f"{field} has mode full, but {', '.join(roles[name])} share its weights: give it mode lora or frozen"
            )


def _check_role(name: str, role: ComponentConfig, system: SystemConfig) -> None:
    field, base = f"system.components.{name}", role.base or ""
    if base not in system.components:
        near = meant(base, system.components)
        raise ConfigError(f"{field}.base {base!r} is not among the components: {near}")
    if system.components[base].base is not None:
        raise ConfigError(f"{field}.base {base!r} is a role itself, without weights of its own: name one that has them")
    if role.mode == "full":
        raise ConfigError(f"{field} has mode full, but its weights are those of {base!r}: give it mode lora or frozen")


def _values(system: SystemConfig) -> Iterator[tuple[str, ValueConfig]]:
    """(place, node) of all nodes, those of loops' bodies among them."""
    for name, node in system.nodes.items():
        yield f"system.nodes.{name}", node
        yield from ((f"system.nodes.{name}.body.{inner}", own) for inner, own in node.body.items())


def _refuse_beside(node: ValueConfig, place: str) -> None:
    """Raise `ConfigError` for a field that says nothing of a node of this kind, or that the kind needs and lacks."""
    whole = isinstance(node, NodeConfig) and node.body
    kind, own = ("loop", ("body", "turns", "until")) if whole else ("switch", ("switch", "branches"))
    if node.switch is None and not whole:
        others = [name for name in ("branches", "turns", "until") if getattr(node, name, None) is not None]
        if others:
            raise ConfigError(
                f"{place}.{others[0]} is of a switch or a loop alone: leave it out, or give switch or body"
            )
        return
    beside = _given(node, [each.name for each in fields(node) if each.name not in own])
    if beside:
        raise ConfigError(f"{place} is a {kind}, which has no {', '.join(beside)}: leave that out")
    needed = "turns" if whole else "branches"
    if getattr(node, needed) is None:
        raise ConfigError(f"{place}.{needed} must be given, because it is a {kind}")
    if not whole and not isinstance(node.branches, Mapping):
        raise ConfigError(f"{place}.branches is {node.branches!r}: give a mapping of values of {node.switch} to nodes")


def _refuse_booleans(switch: ValueConfig, chooser: ValueConfig | None, place: str) -> None:
    """Raise `ConfigError` for booleans as the cases of what a model says: inputs, tools and choices may be booleans."""
    by_model = chooser is not None and (chooser.component is not None or chooser.remote != RemoteConfig())
    if by_model and any(isinstance(case, bool) for case in switch.branches or ()):
        raise ConfigError(
            f"{place}.branches has a boolean, which the model of {switch.switch!r} does not say: quote it for a text, "
            "because YAML reads yes, no, on and off without quotes as true and false"
        )


def _system(
    system: SystemConfig, component_of: Callable[[ValueConfig, str, Scope | None], sj.Component]
) -> sj.CompoundSystem:
    """The graph. component_of: gives what a node's value comes from, with the node's place for errors and its loop."""

    def made(name: str, node: ValueConfig, field: str, scope: Scope | None = None) -> sj.Node:
        try:
            if node.switch is not None:
                return sj.Node(name, sj.Switch(tuple(node.branches)), (node.switch, *node.branches.values()))
            if isinstance(node, NodeConfig) and node.body:
                body = tuple(
                    made(inner, own, f"{field}.body.{inner}", Scope(name, inner, node.body))
                    for inner, own in node.body.items()
                )
                until = None if node.until is None else import_function(node.until, f"{field}.until")
                return sj.Loop(name, body, node.turns or 1, until)
        except ValueError as error:
            known = isinstance(error, ConfigError | sj.GraphError)
            raise error if known else ConfigError(f"{field}: {error}") from None
        component, model = component_of(node, field, scope), system.components.get(node.component or "")
        base = None if model is None else model.base
        return sj.Node(name, component, node.parents, node.component, node.plate, node.weight, base)

    nodes = (made(name, node, f"system.nodes.{name}") for name, node in system.nodes.items())
    return sj.CompoundSystem(system.inputs, tuple(nodes))


def _component(field: str, node: ValueConfig, models: Mapping[str, Model], scope: Scope | None = None) -> sj.Component:
    """The node's component, with its prompt where it has one. field: the node's place."""
    if node.remote != RemoteConfig():
        return _remote(field, node, scope)
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
    return replace(component, prompt=_prompt(field, node, scope))


def _remote(field: str, node: ValueConfig, scope: Scope | None) -> sj.RemoteModel:
    given = _given(node, ("weight", *CALLS))
    if given:
        raise ConfigError(f"{field} is a remote model, which has no {', '.join(given)} beside its own: leave that out")
    asked = _given(node, ("prompt", "chat", *CHATTING)) or len(node.parents) != 1
    try:
        return sj.RemoteModel(**vars(node.remote), prompt=_prompt(field, node, scope) if asked else None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{field}.remote: {error}") from None


def _given(node: ValueConfig, names: Sequence[str]) -> list[str]:
    """Which of the fields are not as they are by default."""
    return [name for name in names if getattr(node, name) != getattr(NodeConfig(), name)]


def _prompt(field: str, node: ValueConfig, scope: Scope | None) -> TextPrompt | sj.ChatPrompt:
    turns = scope.loop if scope is not None and scope.loop in node.parents else None
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
        if scope is None or turns is None:
            return sj.ChatPrompt(text, node.parents, role=node.observations, system=node.system, tools=tools)
        told = _observed(scope.node, scope.body)
        return sj.ChatPrompt(text, node.parents, turns, scope.node, told, node.observations, node.system, tools)
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None


def _observed(speaker: str, body: Mapping[str, ValueConfig]) -> tuple[str, ...]:
    """The nodes of a body whose values tools gave, but for what the speaker has read by then.

    A choice among tools stands for these, which not every turn runs.
    """
    tools = {name for name, node in body.items() if node.tool is not None}
    choices = {name: set(node.branches.values()) for name, node in body.items() if node.switch is not None}
    chosen = set().union(*choices.values())
    found = (tools - chosen) | {name for name, branches in choices.items() if branches <= tools}
    return tuple(name for name in body if name in found - _ancestors(speaker, body))


def _ancestors(name: str, body: Mapping[str, ValueConfig]) -> set[str]:
    """What a node of a body reads within it, directly or through others."""
    read = {name}
    for _ in body:
        read |= {parent for each in read for parent in body[each].parents if parent in body}
    return read - {name}


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


def _model(
    name: str, config: ComponentConfig, run: TrainConfig, mesh: Mesh, origin: Origin | None, models: Mapping[str, Model]
) -> Model:
    """models: those of the bases."""
    field = f"system.components.{name}"
    settings = built(config.settings, f"{field}.settings")
    key = named_key(jax.random.key(run.seed), name)
    if config.base is not None:
        component, params = _role(models[config.base][0], settings, field), dict[str, Any]()
    elif config.checkpoint is None:
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
        is_base = any(other.base == name for other in run.system.components.values())
        params, has_factors = _started(name, config, params, origin, is_base)
    if config.mode == "lora" and not has_factors:
        lora = sj.LoRA(config.lora.rank, config.lora.alpha, config.lora.targets)
        try:
            if config.base is not None:
                return component, sj.lora_factors(models[config.base][1], lora, key)
            params = sj.add_lora(params, lora, key)
        except LoRAError as error:
            if config.base is not None:
                raise ConfigError(f"{field} (a role of {config.base}): {error}") from error
            raise ConfigError(f"{field} (mode lora): {error}; or train it in mode full") from error
    return component, params


def _role(base: Any, settings: Mapping[str, Any], field: str) -> sj.Component:
    """The base's component with other settings."""
    try:
        made: sj.Component = replace(base, **{name: tuples(value) for name, value in settings.items()})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{field}.settings: {error}") from error
    return made


def _started(name: str, config: ComponentConfig, params: Params, origin: Origin, is_base: bool) -> tuple[Params, bool]:
    """The component's parameters in the run `origin`, and whether they hold the LoRA factors that it goes on with.

    Factors of the same settings are kept, others are merged into the weights. params: the component's own, whose shapes
    those of the run must have. Weights that roles share (is_base) take nothing up: their factors are kept, whatever the
    mode. A role of that run may become a model of its own. Raises `ConfigError` naming what does not fit.
    """
    if name not in origin.params:
        known = ", ".join(origin.params)
        raise ConfigError(
            f"init_from {origin.folder} has no component {name!r} (it has {known}): give components the same names"
        )
    before, found = origin.components[name], origin.params[name]
    if config.base not in (None, before.base):
        raise ConfigError(
            f"init_from {origin.folder}: the component {name!r} has the base {before.base!r} there and {config.base!r} "
            "here: give it the same one"
        )
    if before.base is not None and config.base is None:
        found = on_base(origin.params[before.base], found)
    keeps = before.mode == config.mode == "lora" and before.lora == config.lora
    if config.base is None and not is_base:
        found = found if keeps else merge_lora(found)
    elif config.mode == "lora" and not keeps and any(map(is_lora, by_path(found))):
        raise ConfigError(
            f"init_from {origin.folder}: the component {name!r} has LoRA factors of other settings there, which cannot "
            "be merged into weights that roles share: give it the same lora"
        )
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
