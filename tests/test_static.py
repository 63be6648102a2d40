"""Lists from JSON and YAML in what must be hashable: tuples, or an error that names the field."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    Diffusion,
    DirectObjective,
    GraphError,
    LoRA,
    Node,
    PixelCodec,
    TextEncoder,
    Tool,
)
from sysdpo_jax.static import hold_tuples, unhashable
from sysdpo_jax.user_code import built
from tests.components.stubs import Affine, Embedding, word_tokenizer
from tests.components.test_language_model import component

PAINTER = Diffusion(
    denoiser=Affine(), text=TextEncoder(Embedding(), word_tokenizer(), 5), codec=PixelCodec((4, 6, 3)), timesteps=(2, 7)
)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (lambda: component(stop_tokens=(2, 3)), "stop_tokens"),
        (lambda: Categorical(3, (2, 4)), "parent_sizes"),
        (lambda: PixelCodec((4, 6, 3)), "image_shape"),
        (lambda: Diffusion(PAINTER.denoiser, PAINTER.text, PAINTER.codec, timesteps=(2, 7)), "timesteps"),
        (lambda: LoRA(2, 4.0, ("attention", "mlp")), "targets"),
        (lambda: DirectObjective(sft=(("a", 0.1), ("b", 0.2))), "sft"),
    ],
)
def test_lists_in_settings_become_tuples(made, name):
    whole, instance = made(), made()
    value = getattr(whole, name)
    # Set afterwards: the tests' type checks would stop the constructor before it runs.
    listed = [list(item) if isinstance(item, tuple) else item for item in value]
    object.__setattr__(instance, name, listed)
    instance.__post_init__()
    assert getattr(instance, name) == value
    assert hash(instance) == hash(whole)


@dataclass(frozen=True)
class Inner:
    sizes: Any = ()


@dataclass(frozen=True)
class Own(Tool):
    inner: Inner = Inner()
    weights: Any = field(default=None, compare=False)


@pytest.mark.parametrize(
    ("sizes", "what"),
    [([1], ", a list"), ({"a": 1}, ", a dict"), (np.zeros(2), ", a ndarray"), ((1, [1]), r"\[1\], a list")],
)
def test_a_component_that_cannot_be_hashed_names_its_field(sizes, what):
    nodes = (Node("y", Categorical(2, (2,)), ("x",)), Node("z", Own(abs, inner=Inner(sizes)), ("y",)))
    with pytest.raises(GraphError, match=f"'z' cannot be hashed because of Own.inner.sizes{what}: a system is"):
        CompoundSystem(("x",), nodes)


def test_what_is_not_compared_may_be_anything():
    assert unhashable(Own(abs, weights=[np.zeros(2)]), "Own") is None
    CompoundSystem(("x",), (Node("y", Own(abs, weights=[1]), ("x",)),))


def test_hold_tuples_leaves_other_values_alone():
    kept = Inner({"a": [1]})
    hold_tuples(kept)
    assert kept.sizes == {"a": [1]}


def test_lists_of_settings_are_tuples_at_every_depth():
    table = {"call": "sysdpo_jax:Categorical", "num_values": 3, "parent_sizes": [2, 4]}
    made = built({"a": [1, [2, 3]], "table": table}, "settings")
    assert made == {"a": (1, (2, 3)), "table": Categorical(3, (2, 4))}


def test_lists_inside_tuples_become_tuples_too():
    made = Inner(sizes=([2], 3))
    hold_tuples(made)
    assert made.sizes == ((2,), 3)
    assert unhashable((1, ([2],)), "place") == "place[1][0], a list"
