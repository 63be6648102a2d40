"""Features of other sizes have the same log-probabilities, whatever axes lie before their rows."""

import dataclasses

import jax
import numpy as np
import pytest

from sysdpo_jax import LanguageModel
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer
from tests.parity.test_decoder_families import VARIANTS

KEY = jax.random.key(0)
CONFIG = DecoderConfig(len(SPECIAL) + len(WORDS), 16, 24, 2, 2, 1, max_position_embeddings=32)
PROMPTS = ["a red", "the small cube on the", "ball", "a"]
ANSWERS = ["ball", "a large green ball", "", "on the left"]
log_prob = jax.jit(LanguageModel.log_prob, static_argnums=0)


def model(config: DecoderConfig = CONFIG) -> LanguageModel:
    return LanguageModel(Decoder(config), word_tokenizer(), 12, 9)


@pytest.fixture(scope="module")
def features():
    return model().prepare(ANSWERS, {"x": PROMPTS})


def test_sizes_and_padding(features):
    node = model()
    found = node.sizes(features)
    assert {name: size.tolist() for name, size in found.items()} == {"prompt": [2, 5, 1, 1], "completion": [2, 5, 1, 4]}
    assert node.padding(features) == pytest.approx(1 - 21 / (4 * 21))
    assert node.padding(node.resize(features, {"prompt": 5, "completion": 5})) == pytest.approx(1 - 21 / 40)
    assert node.sizes(jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), features))["prompt"].shape == (2, 2)


# As it was, as narrow as can be, a multiple of 8 in all and in each, and parts that overlap when added.
SIZES = ((12, 8), (5, 5), (8, 8), (6, 7), (11, 5))


@pytest.mark.parametrize(("family", "all_sizes"), [("plain", SIZES), ("gemma3", ((5, 5), (8, 8)))])
def test_log_probabilities_do_not_change_with_the_size(family, all_sizes, features):
    """1e-6 of the whole ones: the same sums, over rows that end elsewhere. A window sees no padding behind a row.

    Gemma 3 has layers with and without a window.
    """
    config = CONFIG
    if family != "plain":
        config = dataclasses.replace(VARIANTS[family], vocab_size=CONFIG.vocab_size)
    node = model(config)
    params = jax.jit(node.init)(KEY)
    whole = log_prob(node, params, features, KEY)
    for sizes in all_sizes:
        made = node.resize(features, dict(zip(("prompt", "completion"), sizes, strict=True)))
        assert made["tokens"].shape == (4, sum(sizes))
        assert made["completion"].shape == (4, sizes[1])
        np.testing.assert_allclose(log_prob(node, params, made, KEY), whole, rtol=1e-6, atol=1e-6)
        for name in ("prompt_lengths", "lengths", "truncated", "retokenized"):
            np.testing.assert_array_equal(made[name], features[name])


def test_no_size_is_wider_than_the_model(features):
    """Sizes are rounded up, and a decoder has only so many positions."""
    node = model()
    made = node.resize(features, {"prompt": 10**6, "completion": 10**6})
    jax.tree.map(np.testing.assert_array_equal, made, features)


@pytest.mark.parametrize("axes", [(4,), (2, 2), (2, 1, 2)])
def test_axes_before_the_rows_stay(axes, features):
    folded = jax.tree.map(lambda x: x.reshape(*axes, *x.shape[1:]), features)
    sizes = {"prompt": 6, "completion": 5}
    made, wanted = model().resize(folded, sizes), model().resize(features, sizes)
    for name, value in wanted.items():
        np.testing.assert_array_equal(made[name], value.reshape(*axes, *value.shape[1:]))
    back = model().resize(made, {"prompt": 12, "completion": 9})
    jax.tree.map(np.testing.assert_array_equal, back, folded)


def test_rows_that_do_not_fit_are_refused(features):
    with pytest.raises(ValueError, match="a prompt has 5 tokens, more than the 4 of its new size"):
        model().resize(features, {"prompt": 4, "completion": 9})
    with pytest.raises(ValueError, match="a completion has 5 tokens, more than the 4 of its new size"):
        model().resize(features, {"prompt": 12, "completion": 4})


def test_equal_sizes_are_traced_once(features):
    traces = []

    @jax.jit
    def run(params, batch):
        traces.append(1)
        return model().log_prob(params, batch, KEY)

    params = jax.jit(model().init)(KEY)
    other = model().prepare(ANSWERS[::-1], {"x": PROMPTS[::-1]})
    for sizes in ({"prompt": 6, "completion": 5}, {"prompt": 8, "completion": 8}):
        run(params, model().resize(features, sizes))
        run(params, model().resize(other, sizes))
    assert len(traces) == 2


def test_no_rows():
    node = model()
    empty = node.prepare([], {"x": []})
    assert node.resize(empty, {"prompt": 3, "completion": 2})["tokens"].shape == (0, 5)
    assert node.padding(empty) == 0
