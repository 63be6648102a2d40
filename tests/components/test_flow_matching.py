"""The FlowMatching component against its formula in NumPy, with the same noise and times."""

import jax
import numpy as np
import pytest

from sysdpo_jax import FlowMatching, PixelCodec, TextEncoder
from tests.components.stubs import Affine, Embedding, affine_by_hand, word_tokenizer

KEY = jax.random.key(0)
CAPTIONS = ["a red ball", "the small cube", ""]


def component(**settings):
    defaults = {"codec": PixelCodec((4, 6, 3)), "text": TextEncoder(Embedding(), word_tokenizer(), 5), "num_steps": 4}
    return FlowMatching(denoiser=Affine(), **(defaults | settings))


def features_of(node):
    pictures = np.random.default_rng(3).uniform(size=(3, 4, 6, 3)).astype(np.float32)
    return node.prepare(list(pictures), {"caption": CAPTIONS})


@pytest.fixture
def drawn(monkeypatch):
    """Noise and times of every `corrupt` that follows."""
    record = []
    corrupt = FlowMatching.corrupt

    def recording(self, clean, noise, u):
        record.append((np.asarray(noise, np.float64), np.asarray(u, np.float64)))
        return corrupt(self, clean, noise, u)

    monkeypatch.setattr(FlowMatching, "corrupt", recording)
    return record


def test_log_ratio_is_the_weighted_difference_of_velocity_errors(drawn):
    """2e-5 of the larger term: float32 against float64."""
    node = component(scale=3000.0)
    policy, reference = node.init(jax.random.key(1)), node.init(jax.random.key(2))
    features = features_of(node)
    ours = node.log_prob(policy, features, KEY) - node.log_prob(reference, features, KEY)
    (noise, t), (again, same) = drawn
    np.testing.assert_array_equal(noise, again)
    np.testing.assert_array_equal(t, same)
    clean, rows = np.asarray(features["latents"], np.float64), t[:, None, None, None]
    noisy = (1 - rows) * clean + rows * noise
    errors = [
        ((affine_by_hand(p, noisy, 1000 * t, features["text"]["tokens"]) - (noise - clean)) ** 2).mean((1, 2, 3))
        for p in (policy, reference)
    ]
    expected = -0.5 * 3000 * (errors[0] - errors[1])
    assert (np.abs(ours - expected) <= 2e-5 * 1500 * np.maximum(*errors)).all()
    assert np.abs(expected).max() > 100


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_sample_integrates_the_velocity_of_the_caption(scale):
    """Four Euler steps in float64 NumPy from the key's noise; 1e-4 for float32 over four steps.

    A scale of at most 1 is no guidance.
    """
    node = component(guidance_scale=scale)
    params = node.init(KEY)
    features = features_of(node)
    made = node.sample(params, {"caption": CAPTIONS}, KEY)
    z = np.asarray(jax.random.normal(KEY, (3, 4, 6, 3)), np.float64)
    for step in range(4):
        time = np.full(3, 1000 * (1 - step / 4))
        given = features["text"]["tokens"], np.zeros((3, 5), int)
        cond, null = (affine_by_hand(params, z, time, tokens) for tokens in given)
        z = z - (null + max(scale, 1.0) * (cond - null)) / 4
    np.testing.assert_allclose(np.stack(made), np.clip((z + 1) / 2, 0, 1), atol=1e-4)
