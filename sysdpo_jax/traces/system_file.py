"""The proposed configuration as text, with what a reader should know beside it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sysdpo_jax.traces.choices import Choice
from sysdpo_jax.traces.flow import Template, slots, written
from sysdpo_jax.traces.graph import RECORDED, NodeProposal
from sysdpo_jax.traces.spans import Span
from sysdpo_jax.traces.tokens import Tokens

STEPS, BATCH, WIDTH = 100, 8, 110
FINISHED = "sysdpo_jax.traces.tools:finished"


class _Dumper(yaml.SafeDumper):
    """Texts of several lines in one, with \\n for their ends, as the documentation writes prompts."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _text)


def system_text(
    title: str,
    inputs: Sequence[str],
    nodes: Sequence[NodeProposal],
    spans: Mapping[str, Sequence[Span]],
    choices: Mapping[str, Choice],
    tokens: Mapping[str, Tokens],
    pairs: int,
) -> str:
    """The YAML file. spans, choices, tokens: of the models' nodes."""
    lines = [
        *(f"# {line}".rstrip() for line in title.splitlines()),
        "system:",
        _dump({"inputs": [*inputs]}, 2),
        "  nodes:",
    ]
    components: dict[str, Any] = {}
    for node in nodes:
        body: dict[str, Any] = {}
        for each in node.body or (node,):
            choice = choices.get(each.name) if each.role is not None else None
            where = f"{each.name}: " if node.body else ""
            lines += [f"    # {where}{said}" for said in _about(each, choice, spans.get(each.name, ()))]
            if choice is None or choice.how == "tool":
                body[each.name] = {"tool": each.tool or RECORDED, "parents": [*each.parents]}
                continue
            prompt, setting = _prompt(each)
            body[each.name] = {"component": each.name, "parents": [*each.parents], **prompt}
            component = _component(choice, spans[each.name], tokens[each.name], setting)
            components[each.name] = _as_role(component, components)
        fields = {"turns": node.turns, "until": FINISHED, "body": body} if node.body else body[node.name]
        lines.append(_dump({node.name: fields}, 4))
    lines += ["  components:", _dump(components, 4)]
    batch = min(BATCH, pairs)
    rest = {
        "data": {"source": "preferences.jsonl"},
        "objective": {"kind": "direct", "beta": 0.1},
        "schedule": {"steps": STEPS, "batch_size": batch, "learning_rate": 1e-5, "warmup": STEPS // 10},
    }
    return "\n".join([*lines, _dump(rest, 0), ""])


def _about(node: NodeProposal, choice: Choice | None, spans: Sequence[Span]) -> list[str]:
    said = [" / ".join(node.role)] if node.role is not None else []
    if choice is not None and choice.how == "tool":
        said.append(f"The answers of {spans[0].model or 'a model'} as they were recorded.")
    elif node.tool == RECORDED or (choice is None and node.tool is None):
        said.append("Values of the records alone: name a function of your own to sample the system.")
    return [*said, f"({node.why})"] if node.why else said


def _prompt(node: NodeProposal) -> tuple[dict[str, Any], Any]:
    """The fields of a node that say its prompt, or the component's setting where there are several messages."""
    if node.template is None:
        return {}, None
    template: Template = node.template
    system = {}
    if template[0][0] == "system" and len(template) > 1 and not slots(template[:1]):
        system, template = {"system": "".join(map(str, template[0][1]))}, template[1:]
    (role, pieces), *more = template
    if not more and role in ("", "user") and slots(template):
        return {**({"chat": True} if role else {}), **system, "prompt": written(pieces)}, None
    messages = [f"{role}: {written(pieces)}" for role, pieces in node.template]
    call = {"call": "sysdpo_jax.traces.tools:messages", "parents": [*node.parents], "messages": messages}
    return {}, call


def _component(choice: Choice, spans: Sequence[Span], tokens: Tokens, prompt: Any) -> dict[str, Any]:
    local = Path(choice.checkpoint).expanduser()
    settings: dict[str, Any] = {"max_prompt_length": tokens.prompt_room, "max_new_tokens": tokens.room}
    for name in ("temperature", "top_p"):
        known = {span.settings.get(name) for span in spans}
        value = next(iter(known))
        if len(known) == 1 and isinstance(value, int | float) and not isinstance(value, bool):
            settings[name] = float(value)
    if prompt is not None:
        settings["prompt"] = prompt
    mode = "lora" if choice.how == "train" else "frozen"
    where = os.path.abspath(local) if local.exists() else choice.checkpoint
    return {"checkpoint": where, "mode": mode, "settings": settings}


def _as_role(component: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """The component, on the weights of one of the others where that has the same: they are in memory once then."""
    for name, other in others.items():
        # What a role does not set is as its base has it.
        fits = other.get("mode") == "lora" and other["settings"].keys() <= component["settings"].keys()
        if fits and other["checkpoint"] == component["checkpoint"]:
            mode = {} if component["mode"] == "lora" else {"mode": component["mode"]}
            return {"base": name, **mode, "settings": component["settings"]}
    return component


def _dump(value: Any, indent: int) -> str:
    settings = {"sort_keys": False, "allow_unicode": True, "default_flow_style": None, "width": WIDTH}
    text = yaml.dump(value, Dumper=_Dumper, **settings)
    return "\n".join(" " * indent + line if line else line for line in text.rstrip("\n").split("\n"))
