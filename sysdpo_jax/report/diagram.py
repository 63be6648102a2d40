"""A compound system in layers from left to right, each node one layer after the last of its parents.

graph.svg.jinja draws it. An edge over several layers passes between the boxes of those that it crosses (the layered
drawing of Sugiyama, Tagawa and Toda 1981, with one sweep of barycentres).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from sysdpo_jax.components.control import Switch
from sysdpo_jax.graph import CompoundSystem, Node

# What takes room in a layer: a box, by its name, or an edge that crosses it (parent, child, layer).
Slot = str | tuple[str, str, int]

# In units of the drawing.
CHARACTER = 7.4
PADDING = 12
LAYER_GAP = 56
ROW = 82
COPIES_SHOWN = 3


@dataclass(frozen=True)
class Box:
    """What a box shows: its first line is the name."""

    lines: tuple[str, ...]
    kind: str
    copies: int = 1
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Left edge, width and vertical middle."""

    left: int
    width: int
    middle: float

    @property
    def right(self) -> int:
        return self.left + self.width


@dataclass(frozen=True)
class Diagram:
    """Boxes and where they are. edges: the places that each passes, from a parent to a child."""

    boxes: Mapping[str, Box]
    places: Mapping[str, Place]
    edges: tuple[tuple[Place, ...], ...]
    width: int
    height: int


def diagram(system: CompoundSystem) -> Diagram:
    """The inputs first, then nodes after their parents."""
    keys = [node.params_key for node in system.nodes if node.has_params]
    boxes = {name: Box((name, "input"), "input") for name in system.inputs}
    boxes |= {node.name: _box(node, keys) for node in system.nodes}
    depth: dict[str, int] = {}
    for name, box in boxes.items():
        depth[name] = max((depth[parent] + 1 for parent in box.parents), default=0)
    routes: list[list[Slot]] = [
        [parent, *((parent, name, layer) for layer in range(depth[parent] + 1, depth[name])), name]
        for name, box in boxes.items()
        for parent in box.parents
    ]
    layers = _layers(depth, routes)
    longest = [
        max(len(line) for slot in slots if isinstance(slot, str) for line in boxes[slot].lines) for slots in layers
    ]
    widths = [round(CHARACTER * characters) + 2 * PADDING for characters in longest]
    lefts = list(accumulate((width + LAYER_GAP for width in widths), initial=0))
    height = ROW * max(map(len, layers))
    places = {
        slot: Place(left, width, height / 2 + ROW * (number - (len(slots) - 1) / 2))
        for slots, left, width in zip(layers, lefts, widths, strict=False)
        for number, slot in enumerate(slots)
    }
    edges = tuple(tuple(places[slot] for slot in route) for route in routes)
    return Diagram(boxes, {name: places[name] for name in boxes}, edges, lefts[-1] - LAYER_GAP, height)


def _box(node: Node, keys: Sequence[str]) -> Box:
    lines = [f"{node.name} x{node.plate}" if node.plate else node.name, type(node.component).__name__]
    if node.has_params and (node.params_key != node.name or keys.count(node.params_key) > 1):
        lines.append(f"params {node.params_key}")
    if isinstance(node.component, Switch):
        lines.append(f"on {node.parents[0]}")
    if node.loop is not None:
        lines.append(f"each turn of {node.loop}")
    if node.base is not None:
        lines.append(f"on {node.base}")
    if node.weight != 1:
        lines.append(f"weight {node.weight:g}")
    # What the earlier turns gave comes from further right.
    before = tuple(parent for parent in node.parents if parent != node.loop)
    kind = "tool" if node.deterministic else "component"
    return Box(tuple(lines), kind, min(node.plate or 1, COPIES_SHOWN), before)


def _layers(depth: Mapping[str, int], routes: Sequence[Sequence[Slot]]) -> list[list[Slot]]:
    """The slots of each layer from top to bottom, ordered by the mean height of what they are joined to on the left."""
    layers: list[list[Slot]] = [[] for _ in range(max(depth.values()) + 1)]
    left: dict[Slot, list[Slot]] = {name: [] for name in depth}
    for name, layer in depth.items():
        layers[layer].append(name)
    for route in routes:
        for before, slot in pairwise(route):
            left.setdefault(slot, []).append(before)
            if isinstance(slot, tuple):
                layers[slot[2]].append(slot)
    height: dict[Slot, float] = {}
    for slots in layers:
        wanted = {slot: sum(height[s] for s in left[slot]) / max(len(left[slot]), 1) for slot in slots}
        slots.sort(key=wanted.__getitem__)
        height |= {slot: (number + 0.5) / len(slots) for number, slot in enumerate(slots)}
    return layers
