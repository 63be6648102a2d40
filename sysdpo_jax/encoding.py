"""What the frozen parts of a system's components make of what `prepare` gave: `CompoundSystem.encode`."""

from collections.abc import Iterable, Mapping, Sequence

from sysdpo_jax.components.encoding import encode_together
from sysdpo_jax.nodes import GraphError, Node, users_part
from sysdpo_jax.typing import Features, Params


def frozen_entries(nodes: Iterable[Node], params: Params) -> Params:
    """Of `{params_key: tree}` the entries that are never trained; without the trees that have none."""
    found: dict[str, Params] = {}
    for node in nodes:
        for name in node.component.frozen:
            found.setdefault(node.params_key, {})[name] = params[node.params_key][name]
    return found


def encode_sides(
    nodes: Iterable[Node], params: Params, sides: Sequence[Mapping[str, Features]]
) -> list[dict[str, Features]]:
    """The encoded features of each of several `{node: features}`, see `CompoundSystem.encode`."""
    made: list[dict[str, Features]] = [dict(side) for side in sides]
    for node in nodes:
        places = [place for place, side in enumerate(sides) if node.component.frozen and node.name in side]
        if places:
            with users_part(node, "encode", GraphError):
                features = [sides[place][node.name] for place in places]
                encoded = encode_together(node.component, params[node.params_key], features)
            for place, entry in zip(places, encoded, strict=True):
                made[place][node.name] = entry
    return made
