"""Frozen encoders and autoencoders: entries of the parameters, which `encode` and `sample` alone read."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from sysdpo_jax import CompoundSystem, Diffusion, GraphError, LatentCodec, Node, Tool, bucket_sizes, rollout
from sysdpo_jax.components.base import Component, Raw
from sysdpo_jax.graph import encode_sides
from sysdpo_jax.models.lora import LoRA, add_lora
from tests.components.drawn import drawn
from tests.components.painters import (
    VAE,
    CountingCodec,
    arrays_in,
    encode,
    encoded_since,
    images,
    log_prob,
    painter,
)

KEY = jax.random.key(0)


def test_no_field_holds_an_array_and_other_weights_are_the_same_component():
    node, params = painter(), drawn(painter().init)
    assert list(arrays_in(node, "painter")) == []
    # The same walk finds one that is hidden.
    hiding = replace(node)
    object.__setattr__(hiding, "source", {"a": [params["denoiser"]["mix"]]})
    assert list(arrays_in(hiding, "p")) == ["p.source['a'][0]"]
    assert set(params) == {"denoiser", "codec", "text"}
    assert set(params["text"]) == {"text_encoder"}
    assert node.frozen == ("codec", "text")
    assert painter(frozen=False).frozen == ("codec",)
    assert painter() == node
    assert hash(painter()) == hash(node)


def test_encode_gives_the_models_own_latents_and_states_and_leaves_what_is_encoded():
    node = painter(caption_dropout=0.5)
    params, captions = drawn(node.init), ["a red ball", "cube", "a red ball"]
    raw = node.prepare(images(3), {"caption": captions})
    assert {name: leaf.dtype for name, leaf in (("pixels", raw["pixels"]), ("ids", raw["captions"]["tokens"]))} == {
        "pixels": np.uint8,
        "ids": np.int32,
    }
    system = CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    assert system.encodes == ("image",)
    made = system.encode({"image": params}, {"image": raw})["image"]
    pixels = 2 * (raw["pixels"].astype(np.float32) / 255) - 1
    mean, _ = jax.jit(VAE.apply, static_argnames="method")({"params": params["codec"]}, pixels, method="encode")
    np.testing.assert_allclose(made["latents"], 0.18215 * np.asarray(mean), rtol=1e-5, atol=1e-6)
    table = np.asarray(params["text"]["text_encoder"]["table"]["embedding"])
    np.testing.assert_array_equal(made["text"]["encoded"][0], table[raw["captions"]["tokens"]])
    np.testing.assert_array_equal(made["null"]["encoded"][0], table[np.zeros((3, 5), int)])
    assert {type(leaf) for leaf in jax.tree.leaves(made)} == {np.ndarray}
    assert made["null"]["encoded"][0].strides[0] == raw["null_captions"]["tokens"].strides[0] == 0
    # Jittable, and of encoded features the identity: the very arrays.
    jitted = encode(node, params, raw)
    assert jax.tree.structure(jitted) == jax.tree.structure(made)
    again = system.encode(system.frozen_params({"image": params}), {"image": made})["image"]
    assert all(x is y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True))
    with pytest.raises(ValueError, match=r"hold pixels, captions, null_captions.* CompoundSystem\.encode"):
        node.log_prob(params, raw, KEY)
    assert np.isfinite(log_prob(node, params, made, KEY)).all()


@pytest.mark.parametrize("leading", [(6,), (3, 2), (1, 3, 2)])
def test_equal_images_and_captions_are_encoded_once_whatever_axes_they_have(leading):
    """Six rows, two images, three captions: two images of one slice, three texts and a row of padding."""
    node = painter(caption_dropout=0.5)
    params, first, second = drawn(node.init), *images(2)
    captions = ["a", "ball", "cube", "a", "ball", "cube"]
    raw = node.prepare([first, first.copy(), first, second, second, second.copy()], {"caption": captions})
    shaped = jax.tree.map(lambda x: x.reshape(*leading, *x.shape[1:]), raw)
    system = CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    encoded_since()
    made = system.encode({"image": params}, {"image": shaped})["image"]
    # The empty caption of all rows is one row.
    assert encoded_since() == ([4, 1], [2])
    assert made["latents"].shape == (*leading, 4, 6, 2)
    assert made["text"]["encoded"][0].shape == (*leading, 5, 4)
    assert made["text"]["truncated"].shape == leading
    one_by_one = [encode(node, params, jax.tree.map(lambda x, row=row: x[row : row + 1], raw)) for row in range(6)]
    flat = jax.tree.map(lambda x: x.reshape(6, *x.shape[len(leading) :]), made)
    for row, expected in enumerate(one_by_one):
        for x, y in zip(jax.tree.leaves(flat), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x[row], y[0], rtol=1e-5, atol=1e-6)


def test_slices_are_of_few_sizes_and_no_rows_are_none():
    node = painter()
    params, system = drawn(node.init), CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    raw = node.prepare(images(5), {"caption": ["a"] * 5})
    encoded_since()
    system.encode({"image": params}, {"image": raw})
    assert encoded_since() == ([1], [2, 2, 1])
    nothing = system.encode({"image": params}, {"image": jax.tree.map(lambda x: x[:0], raw)})["image"]
    assert nothing["latents"].shape == (0, 4, 6, 2)
    assert nothing["text"]["encoded"][0].shape == (0, 5, 4)


def test_systems_with_other_weights_share_what_is_compiled():
    """The same jitted functions, traced once: counted by the cache of the one that samples."""
    node = painter(num_steps=3)
    system = CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    pictures = []
    sampler = Diffusion._sample
    before = sampler._cache_size()
    for seed in (1, 2):
        other = CompoundSystem(("caption",), (Node("image", painter(num_steps=3), ("caption",)),))
        assert other == system
        [run] = other.sample({"image": drawn(node.init, seed)}, [{"caption": "a ball"}], KEY)
        pictures.append(run["image"])
    assert sampler._cache_size() == before + 1
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3


def test_a_rollout_compiles_its_sampler_once_and_encodes_a_caption_once_a_batch():
    """Three batches of four pictures, the last one not full: guided, so that there is a null condition too."""
    node = painter(num_steps=4, guidance_scale=2.0)
    system = CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    params, asked = {"image": drawn(node.init)}, [{"caption": text} for text in ("a ball", "cube", "a red ball")]
    before = Diffusion._sample._cache_size()
    encoded_since()
    rollout(system, params, asked, KEY, samples=3, batch_size=4)
    assert Diffusion._sample._cache_size() == before + 1
    # Captions of the batch, then its null condition: two captions in the first and second, one in the last.
    assert encoded_since()[0] == [2, 1, 2, 1, 1, 1]


def test_sampling_decodes_with_the_parameters_codec_and_reads_the_frozen_states():
    """Trained and frozen conditioners sample the same; another autoencoder gives another picture."""
    params, asked = drawn(painter().init), {"caption": ["a red ball", "cube"]}
    settings = {"guidance_scale": 2.0}
    frozen, trained = (painter(kind, **settings).sample(params, asked, KEY) for kind in (True, False))
    np.testing.assert_allclose(np.stack(frozen), np.stack(trained), atol=1e-5)
    moved = params | {"codec": jax.tree.map(lambda x: x * 1.1, params["codec"])}
    assert np.abs(np.stack(painter(**settings).sample(moved, asked, KEY)) - np.stack(frozen)).max() > 1e-3


def test_targets_are_the_denoisers_unless_they_begin_with_text():
    kernel = {"kernel": np.zeros((2, 2), np.float32)}
    tree = {"denoiser": {"to_q": kernel}, "text": {"text_encoder": {"q_proj": kernel}}, "codec": {"to_q": kernel}}
    made = add_lora(tree, LoRA(1, 1.0, ("attention", "to_q")), KEY)
    assert "lora_a" in made["denoiser"]["to_q"]
    assert set(made["codec"]["to_q"]) == set(made["text"]["text_encoder"]["q_proj"]) == {"kernel"}
    made = add_lora(tree, LoRA(1, 1.0, "^text/.*q_proj"), KEY)
    assert "lora_a" in made["text"]["text_encoder"]["q_proj"]
    # Of another component such entries are like any other.
    assert "lora_a" in add_lora({"text": {"to_q": kernel}}, LoRA(1, 1.0), KEY)["text"]["to_q"]


class Broken(Component):
    """A user's component whose frozen part fails."""

    frozen = ("table",)

    def init(self, key):
        return {"table": {}}

    def raw(self, features):
        return {"ids": Raw(features["ids"].ndim, 4)} if "ids" in features else {}

    def encode(self, params, features):
        raise KeyError("a mistake")


def test_a_users_frozen_part_that_fails_is_named():
    system = CompoundSystem(("x",), (Node("y", Broken(), ("x",)), Node("z", Tool(repr), ("y",))))
    with pytest.raises(GraphError, match=r"node 'y': .*Broken\.encode"):
        system.encode({"y": {"table": {}}}, {"y": {"ids": np.arange(3)}})


SIZES = ((4, 4), (4, 8), (8, 4))


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(10, 10)], (4, 4)),
        ([(10, 14)], (4, 4)),
        ([(10, 15)], (4, 8)),
        # The mean of the logarithms: a wide one and a tall one are square together, whatever their pixels.
        ([(10, 40), (400, 100)], (4, 4)),
        ([(10, 40), (10, 30), (12, 10)], (4, 8)),
        ([(30, 10), (20, 10)], (8, 4)),
    ],
)
def test_the_images_of_a_call_get_the_nearest_of_several_sizes(shapes, size):
    """log(14/10) is nearer to 0 than to log(2), log(15/10) is not: sqrt(2) = 1.414 lies between them."""
    node = painter(codec=LatentCodec(VAE, SIZES))
    assert node.several_sizes
    assert not painter().several_sizes
    pictures = [np.full((*shape, 3), 90, np.uint8) for shape in shapes]
    features = node.prepare(pictures, {"caption": ["a"] * len(shapes)})
    assert features["pixels"].shape == (len(shapes), *size, 3)
    # Equal objects count as often as they come, and so do equal pictures.
    again = node.prepare([pictures[0], *[pictures[-1]] * 2], {"caption": ["a"] * 3})
    other = node.prepare([pictures[0], pictures[-1], pictures[-1].copy()], {"caption": ["a"] * 3})
    assert again["pixels"].shape == other["pixels"].shape


def test_features_of_every_size_have_a_log_probability_and_sampling_has_the_first():
    node = painter(codec=LatentCodec(VAE, SIZES))
    params = drawn(node.init)
    system = CompoundSystem(("caption",), (Node("image", node, ("caption",)),))
    for shape in ((9, 9), (9, 20), (20, 9)):
        raw = node.prepare([np.full((*shape, 3), 90, np.uint8)], {"caption": ["a"]})
        made = system.encode({"image": params}, {"image": raw})["image"]
        assert made["latents"].shape[1:3] == raw["pixels"].shape[1:3]
        assert node.units(made) == node.units(raw) == {"images": 1}
        assert np.isfinite(log_prob(node, params, made, KEY)).all()
    [image] = node.sample(params, {"caption": ["a"]}, KEY)
    assert image.shape == (4, 4, 3)


def test_bucket_sizes_are_sdxls():
    """Sizes of the table in appendix I of SDXL's paper: for each height the largest width."""
    sizes = bucket_sizes(1024, ratio=4.0)
    assert sizes[0] == (1024, 1024)
    assert {(512, 2048), (576, 1792), (640, 1600), (704, 1472), (768, 1344), (832, 1216), (896, 1152)} < set(sizes)
    assert all(h % 64 == 0 and w % 64 == 0 and h * w <= 1024**2 for h, w in sizes)
    assert all(1 / 2 <= h / w <= 2 for h, w in bucket_sizes(512))


@pytest.mark.parametrize("sizes", [(), ((4, 0),), (4, 4), ((4, 4, 3),)])
def test_bad_sizes_are_refused(sizes):
    with pytest.raises((ValueError, TypeError), match=r"sizes is empty|must be a \(height, width\)|Type-check"):
        LatentCodec(VAE, sizes)


def test_sides_of_other_sizes_are_encoded_apart_and_equal_ones_once():
    """Sides that were prepared by themselves may have sizes of their own; what both hold is encoded once."""
    node = painter(codec=CountingCodec(VAE, SIZES, 2))
    params = {"image": drawn(node.init)}
    nodes = (Node("image", node, ("caption",)),)
    wide, square = (
        {"image": node.prepare([np.full((*shape, 3), 90, np.uint8)] * 2, {"caption": ["a", "ball"]})}
        for shape in ((9, 20), (9, 9))
    )
    encoded_since()
    made = encode_sides(nodes, params, [wide, square, wide])
    assert encoded_since() == ([2], [1, 1])
    assert [side["image"]["latents"].shape for side in made] == [(2, 4, 8, 2), (2, 4, 4, 2), (2, 4, 8, 2)]
    [alone] = encode_sides(nodes, params, [square])
    for x, y in zip(jax.tree.leaves(made[1]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(x, y)
