"""A compound system as inline SVG: layers from left to right, each node one layer after the last of its parents.

Boxes with square corners are inputs, round ones components, hexagons tools; a plate is a stack of boxes. An edge over
several layers passes between the boxes of those that it crosses (the layered drawing of Sugiyama, Tagawa and Toda 1981,
with one sweep of barycentres).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.report.markup import Markup, element

# What takes room in a layer: a box, by its name, or an edge that crosses it (parent, child, layer).
Slot = str | tuple[str, str, int]
# An edge from box to box: its parent, the layers it crosses, its child.
Route = list[Slot]

MARGIN = 16.0
LINE = 17.0
PADDING = 12.0
CHARACTER = 7.4
LAYER_GAP = 56.0
SLOT_GAP = 22.0
PASSAGE = 12.0
STACK = 5.0
COPIES_SHOWN = 3


@dataclass(frozen=True)
class Box:
    """What a box shows: its first line is the name."""

    lines: tuple[str, ...]
    kind: str
    copies: int
    parents: tuple[str, ...] = ()

    @property
    def width(self) -> float:
        return max(map(len, self.lines)) * CHARACTER + 2 * PADDING

    @property
    def height(self) -> float:
        return len(self.lines) * LINE + PADDING


@dataclass(frozen=True)
class Place:
    """Left and right edge and vertical middle."""

    left: float
    right: float
    middle: float


def draw_system(system: CompoundSystem) -> Markup:
    """The graph as an <svg>; every input and node is one <g class="node" data-name=...>."""
    boxes = _boxes(system)
    depth = _depth(boxes)
    routes = [_route(parent, name, depth) for name, box in boxes.items() for parent in box.parents]
    layers = _layers(depth, routes)
    places, width, height = _places(boxes, layers)
    return element(
        "svg",
        element("title", "The nodes of the system and their parents"),
        element("defs", _arrow_head()),
        *(_edge([places[slot] for slot in route]) for route in routes),
        *(_node(name, box, places[name]) for name, box in boxes.items()),
        viewBox=f"0 0 {width:g} {height:g}",
        width=f"{width:g}",
        role="img",
        class_="graph",
    )


def _boxes(system: CompoundSystem) -> dict[str, Box]:
    """Inputs first, then nodes after their parents."""
    keys = [node.params_key for node in system.nodes if not node.deterministic]
    inputs = {name: Box((name, "input"), "input", 1) for name in system.inputs}
    return inputs | {node.name: _box(node, keys) for node in system.nodes}


def _box(node: Node, keys: Sequence[str]) -> Box:
    lines = [f"{node.name} x{node.plate}" if node.plate else node.name, type(node.component).__name__]
    if not node.deterministic and (node.params_key != node.name or keys.count(node.params_key) > 1):
        lines.append(f"params {node.params_key}")
    if node.weight != 1:
        lines.append(f"weight {node.weight:g}")
    kind = "tool" if node.deterministic else "component"
    return Box(tuple(lines), kind, min(node.plate or 1, COPIES_SHOWN), node.parents)


def _depth(boxes: Mapping[str, Box]) -> dict[str, int]:
    """The layer of each box: 0 without parents."""
    depth: dict[str, int] = {}
    for name, box in boxes.items():
        depth[name] = max((depth[parent] + 1 for parent in box.parents), default=0)
    return depth


def _route(parent: str, child: str, depth: Mapping[str, int]) -> Route:
    return [parent, *((parent, child, layer) for layer in range(depth[parent] + 1, depth[child])), child]


def _layers(depth: Mapping[str, int], routes: Sequence[Route]) -> list[list[Slot]]:
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


def _places(boxes: Mapping[str, Box], layers: Sequence[Sequence[Slot]]) -> tuple[dict[Slot, Place], float, float]:
    """Where each slot is, and the width and height of the drawing. Layers are centred on one line."""

    def room(slot: Slot) -> float:
        return boxes[slot].height if isinstance(slot, str) else PASSAGE

    heights = [sum(map(room, slots)) + SLOT_GAP * (len(slots) - 1) for slots in layers]
    places: dict[Slot, Place] = {}
    left = MARGIN
    for slots, total in zip(layers, heights, strict=True):
        width = max(boxes[slot].width for slot in slots if isinstance(slot, str))
        top = MARGIN + (max(heights) - total) / 2
        for slot in slots:
            places[slot] = Place(left, left + width, top + room(slot) / 2)
            top += room(slot) + SLOT_GAP
        left += width + LAYER_GAP
    return places, left - LAYER_GAP + MARGIN, max(heights) + 2 * MARGIN


def _edge(places: Sequence[Place]) -> Markup:
    """A curve between layers, straight across those in between."""
    first = places[0]
    path = f"M{first.right:g} {first.middle:g}"
    for before, place in pairwise(places):
        half = (before.right + place.left) / 2
        path += f"C{half:g} {before.middle:g} {half:g} {place.middle:g} {place.left:g} {place.middle:g}"
        path += f"H{place.right:g}" if place is not places[-1] else ""
    return element("path", d=path, class_="edge", marker_end="url(#arrow)")


def _node(name: str, box: Box, place: Place) -> Markup:
    shapes = [_outline(box, place, STACK * copy) for copy in reversed(range(box.copies))]
    middle = (place.left + place.right) / 2
    top = place.middle - LINE * len(box.lines) / 2
    lines = [
        element("text", line, x=f"{middle:g}", y=f"{top + LINE * number + 13:g}", class_=f"line{min(number, 1)}")
        for number, line in enumerate(box.lines)
    ]
    return element("g", *shapes, *lines, class_=f"node {box.kind}", data_name=name)


def _outline(box: Box, place: Place, shift: float) -> Markup:
    """The box, moved to the upper right for a copy that lies behind."""
    left, top = place.left + shift, place.middle - box.height / 2 - shift
    right, bottom, middle = place.right + shift, top + box.height, place.middle - shift
    if box.kind == "tool":
        bevel = PADDING - 2
        corners = ((left, middle), (left + bevel, top), (right - bevel, top), (right, middle),
                   (right - bevel, bottom), (left + bevel, bottom))  # fmt: skip
        return element("polygon", points=" ".join(f"{x:g},{y:g}" for x, y in corners))
    corner = 0.0 if box.kind == "input" else PADDING
    return element(
        "rect", x=f"{left:g}", y=f"{top:g}", width=f"{right - left:g}", height=f"{box.height:g}", rx=f"{corner:g}"
    )


def _arrow_head() -> Markup:
    tip = element("path", d="M0 0L8 4L0 8z", class_="tip")
    return element("marker", tip, id="arrow", refX=8, refY=4, markerWidth=8, markerHeight=8, orient="auto")
