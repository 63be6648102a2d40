"""The Diffusion component against the public Diffusion-DPO recipe, diffusers' schedules and formulas in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from sysdpo_jax import Diffusion, PixelCodec, RecordError, TextEncoder
from sysdpo_jax.components.text import check_truncation
from sysdpo_jax.components.text_to_image import _stratified
from sysdpo_jax.diffusion.samplers import DDIM
from sysdpo_jax.diffusion.schedules import NoiseSchedule
from sysdpo_jax.diffusion.weightings import ELBO, Constant, MinSNR
from sysdpo_jax.keys import row_keys
from tests.components.stubs import Affine, Embedding, affine_by_hand, word_tokenizer

KEY = jax.random.key(0)
TYPES = ("epsilon", "v_prediction", "sample")
TEXTS = ("a red ball", "the small cube", "", "a large green cube on", "ball", "a cube")


def component(**settings):
    defaults = {"codec": PixelCodec((4, 6, 3)), "text": TextEncoder(Embedding(), word_tokenizer(), 5), "num_steps": 8}
    return Diffusion(denoiser=Affine(), **(defaults | settings))


def two_models(node):
    return node.init(jax.random.key(1)), node.init(jax.random.key(2))


def images(rows, shape=(4, 6, 3)):
    return list(np.random.default_rng(3).uniform(size=(rows, *shape)).astype(np.float32))


def features_of(node, rows=6):
    return node.prepare(images(rows), {"caption": [TEXTS[i % 6] for i in range(rows)]})


@pytest.fixture
def drawn(monkeypatch):
    """The noise, the times and the network inputs of every `corrupt` that follows."""
    record = []
    corrupt = Diffusion.corrupt

    def recording(self, clean, noise, u):
        made = corrupt(self, clean, noise, u)
        record.append((np.asarray(noise), np.asarray(made.time), np.asarray(made.noisy)))
        return made

    monkeypatch.setattr(Diffusion, "corrupt", recording)
    return record


def squared_errors(params, features, noise, time, prediction_type):
    """MEAN squared error of each row: the noising and the targets are diffusers', the model is NumPy's."""
    theirs = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    args = torch.tensor(features["latents"]), torch.tensor(noise), torch.tensor(time).long()
    noisy = theirs.add_noise(*args).numpy()
    targets = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: theirs.get_velocity(*args).numpy(),
        "sample": lambda: features["latents"],
    }
    prediction = affine_by_hand(params, noisy, time, features["text"]["tokens"])
    return ((prediction - targets[prediction_type]()) ** 2).mean((1, 2, 3))


def weight_by_hand(weighting, time, prediction_type, size):
    """T * omega from the SNR in float64, on the z_0 error, then carried over to the prediction type."""
    squared = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    snr = squared / (1 - squared)
    carried = {"epsilon": 1 / snr, "v_prediction": 1 / (snr + 1), "sample": np.ones(1000)}[prediction_type]
    on_clean = {
        Constant(5000.0): 5000.0 / carried,
        MinSNR(5000.0, 5.0): 5000.0 * np.minimum(snr, 5.0),
        ELBO(): 1000 * size * np.append(0.0, snr[:-1] - snr[1:]),
    }[weighting]
    return (on_clean * carried)[time]


@pytest.mark.parametrize("weighting", [Constant(5000.0), MinSNR(5000.0, 5.0), ELBO()], ids=["constant", "snr", "elbo"])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_log_ratio_is_the_diffusion_dpo_formula(prediction_type, weighting, drawn):
    """-0.5 * weight * (policy error - reference error), the public code's logit when the weight is its 5000.

    2e-5 of the larger of the two terms: float32 against float64, noising in float32 on both sides; ELBO also has a
    difference of neighbouring SNRs, which float32 logarithms give to 2e-3.
    """
    node = component(prediction_type=prediction_type, weighting=weighting)
    policy, reference = two_models(node)
    features = features_of(node)
    ours = [node.log_prob(params, features, KEY) for params in (policy, reference)]
    noise, time, _ = drawn[0]
    np.testing.assert_array_equal(noise, drawn[1][0])
    np.testing.assert_array_equal(time, drawn[1][1])
    errors = [squared_errors(p, features, noise, time, prediction_type) for p in (policy, reference)]
    terms = [0.5 * weight_by_hand(weighting, time, prediction_type, 72) * error for error in errors]
    scale = np.maximum(*terms) * (2e-3 if weighting == ELBO() else 2e-5)
    assert (np.abs((ours[0] - ours[1]) - (terms[1] - terms[0])) <= scale).all()
    assert np.abs(terms[0] - terms[1]).max() > 100


def test_the_constant_recipe_to_one_in_a_million(drawn):
    """The same noisy latents on both sides, so only the reduction and the weight differ: 1e-6 of the weight."""
    node = component(weighting=Constant(5000.0))
    policy, reference = two_models(node)
    features = features_of(node)
    ours = node.log_prob(policy, features, KEY) - node.log_prob(reference, features, KEY)
    noise, time, noisy = drawn[0]
    tokens = features["text"]["tokens"]
    model_diff, ref_diff = (
        ((affine_by_hand(p, noisy, time, tokens) - noise) ** 2).mean((1, 2, 3)) for p in (policy, reference)
    )
    np.testing.assert_allclose(ours, -0.5 * 5000 * (model_diff - ref_diff), rtol=0, atol=1e-6 * 5000)


def test_the_metric_is_the_error_behind_the_log_probability():
    node = component(weighting=Constant(5000.0))
    log_prob, metrics = node.log_prob_with_metrics(node.init(KEY), features_of(node), KEY)
    np.testing.assert_allclose(log_prob, -2500.0 * metrics["mse"], rtol=1e-6)


def test_equal_models_have_log_ratio_zero_and_the_key_decides_the_noise():
    node = component()
    params, features = node.init(KEY), features_of(node)
    first, again, other = (node.log_prob(params, features, jax.random.key(seed)) for seed in (4, 4, 5))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).all()
    copied = jax.tree.map(lambda x: x + 0, params)
    np.testing.assert_array_equal(node.log_prob(copied, features, jax.random.key(4)) - first, 0.0)


def test_times_are_uniform_over_the_range(drawn):
    """6000 draws in 5 values of t: every count within 5 standard errors, nothing outside."""
    node = component(timesteps=(10, 15))
    features = jax.tree.map(lambda x: x[:1].repeat(6000, axis=0), features_of(node))
    node.log_prob(node.init(KEY), features, KEY)
    values, counts = np.unique(drawn[0][1], return_counts=True)
    np.testing.assert_array_equal(values, range(10, 15))
    assert (np.abs(counts - 1200) < 5 * np.sqrt(6000 * 0.2 * 0.8)).all()


def test_every_time_is_reached(drawn):
    """Both ends of the schedule are among 40,000 draws (a given t is missed with probability exp(-40))."""
    node = component()
    noise = jnp.zeros((40_000, 1, 1, 1))
    made = node.corrupt(noise, noise, _stratified(row_keys(KEY, 40_000), 1))
    assert made.time.min() == 0
    assert made.time.max() == 999


@pytest.mark.parametrize("strata", [2, 3])
def test_strata_spread_the_times_of_a_group(strata, drawn):
    """Times of a group lie T / strata apart, up to rounding down to an integer, and groups differ."""
    node = component(strata=strata)
    node.log_prob(node.init(KEY), features_of(node), KEY)
    groups = np.sort(drawn[0][1].reshape(-1, strata), axis=1)
    assert (np.abs(np.diff(groups, axis=1) - 1000 / strata) <= 1).all()
    assert len(np.unique(groups[:, 0])) == len(groups)
    with pytest.raises(ValueError, match="6 rows do not divide into groups of strata=4"):
        component(strata=4).log_prob(node.init(KEY), features_of(node), KEY)


def test_each_row_of_a_group_is_uniform_alone():
    """5000 groups of 3: the mean of every row's u within 5 standard errors of 1/2."""
    u = np.asarray(_stratified(row_keys(KEY, 15_000), 3)).reshape(-1, 3)
    assert (np.abs(u.mean(0) - 0.5) < 5 / np.sqrt(12 * 5000)).all()
    assert u.min() >= 0
    assert u.max() < 1


def test_caption_dropout_uses_the_empty_caption_at_its_share():
    """4000 rows: each has the error of its caption or of the empty one, and the share is within 5 standard errors."""
    node = component(caption_dropout=0.2)
    features = jax.tree.map(lambda x: x[:1].repeat(4000, axis=0), features_of(node))
    params = node.init(KEY)
    dropped = np.asarray(node.log_prob(params, features, KEY))
    kept, empty = (
        np.asarray(dataclasses.replace(node, caption_dropout=0.0).log_prob(params, given, KEY))
        for given in (features, features | {"text": features["null"]})
    )
    assert (np.abs(kept - empty) > 1e-6 * np.abs(kept)).mean() > 0.99
    is_empty = np.abs(dropped - empty) < np.abs(dropped - kept)
    np.testing.assert_allclose(dropped, np.where(is_empty, empty, kept), rtol=1e-6)
    assert abs(is_empty.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 4000)
    np.testing.assert_array_equal(features["null"]["tokens"], 0)


def test_prepare_gives_latents_and_padded_tokens():
    node = component()
    features = features_of(node, rows=2)
    np.testing.assert_array_equal(features["text"]["tokens"], [[4, 5, 7, 0, 0], [12, 9, 8, 0, 0]])
    np.testing.assert_allclose(features["latents"], 2 * np.array(images(2)) - 1, atol=1e-6)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_sample_is_guided_ddim_from_the_keys_noise(prediction_type):
    """The sampler itself is compared with diffusers in tests/diffusion; here the caption, the guidance, the codec."""
    node = component(prediction_type=prediction_type, guidance_scale=3.0, sampler=DDIM(clip=1.0))
    params, captions = node.init(KEY), ["a red ball", "the cube"]
    made = node.sample(params, {"caption": captions}, KEY)
    features = node.prepare(made, {"caption": captions})
    nothing = np.zeros((2, 5), np.int32)

    def predict(z, t):
        cond, empty = (affine_by_hand(params, z, t, tokens) for tokens in (features["text"]["tokens"], nothing))
        return jnp.asarray(empty + 3.0 * (cond - empty), jnp.float32)

    with jax.disable_jit():
        noise = jax.random.normal(KEY, (2, 4, 6, 3))
        latents = DDIM(clip=1.0)(predict, noise, NoiseSchedule(), prediction_type, 8, KEY)
    np.testing.assert_allclose(np.stack(made), np.clip((latents + 1) / 2, 0, 1), atol=1e-4)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5])
def test_without_guidance_the_picture_is_that_of_the_caption(scale):
    """The same as at 1, where it is the conditional prediction by definition, and another for another caption."""
    params = component().init(KEY)
    made, plain = (
        np.stack(component(guidance_scale=s).sample(params, {"x": ["a red ball", "the cube"]}, KEY))
        for s in (scale, 1.0)
    )
    np.testing.assert_array_equal(made, plain)
    other = component(guidance_scale=scale).sample(params, {"x": ["the cube", "the cube"]}, KEY)
    assert np.abs(made[0] - other[0]).max() > 0.01


@pytest.mark.parametrize(
    ("image", "caption", "message"),
    [
        (np.zeros((4, 4, 3)), "a ball", r"image in row 1 has shape \(4, 4, 3\), expected \(4, 6, 3\)"),
        (np.full((4, 6, 3), 255.0), "a ball", r"image in row 1 has values outside \[0, 1\]"),
        (np.full((4, 6, 3), np.nan), "a ball", r"image in row 1 has values outside \[0, 1\]"),
        (np.zeros((4, 6, 3)), "a a a a a a", "caption in row 1 has 6 tokens, more than the 5 of the text encoder"),
        (np.zeros((4, 6, 3)), 7, "'caption' in row 1 must be a string .*, not int"),
    ],
)
def test_bad_records_are_refused(image, caption, message):
    with pytest.raises(RecordError, match=message):
        component().prepare([images(1)[0], image], {"caption": ["a", caption]})


def test_two_parents_are_refused():
    with pytest.raises(RecordError, match="exactly one caption, got the parents caption, style"):
        component().prepare(images(1), {"caption": ["a"], "style": ["a"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": (0, 1001)}, r"timesteps \(0, 1001\) must lie within \(0, 1000\)"),
        ({"timesteps": (5, 5)}, "must lie within"),
        ({"caption_dropout": 1.0}, r"caption_dropout must lie in \[0, 1\), got 1\.0"),
        ({"num_steps": 0}, "num_steps 0 and strata 1 must be at least 1"),
        ({"negative_prompt": "a cube"}, "a negative_prompt is only read with guidance"),
        ({"negative_prompt": "a cube", "guidance_scale": 0.0}, "a negative_prompt is only read with guidance"),
        ({"guidance_scale": float("nan")}, r"guidance_scale nan must be a finite number \(at most 1: no guidance\)"),
        ({"guidance_scale": float("inf")}, "guidance_scale inf must be a finite number"),
        ({"schedule": NoiseSchedule(rescale_betas_zero_snr=True)}, "an epsilon model says nothing of z_0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        component(**settings)


def test_captions_know_no_other_truncation():
    with pytest.raises(ValueError, match="truncation 'keep_end' of captions is none of error, keep_start"):
        check_truncation("keep_end")


def test_patches_are_space_to_depth_and_back():
    codec = PixelCodec((4, 6, 3), patch=2)
    pictures = images(2)
    features, frames = codec.prepare(pictures)
    latents = features["latents"]
    np.testing.assert_array_equal(frames, [[4, 6, 0, 0, 4, 6]] * 2)
    assert latents.shape == (2, *codec.latent_shape) == (2, 2, 3, 12)
    np.testing.assert_allclose(latents[1, 1, 2, 9:], 2 * pictures[1][3, 5] - 1, atol=1e-6)
    np.testing.assert_allclose(codec.decode({}, latents), pictures, atol=1e-6)
    with pytest.raises(ValueError, match="patch 4 must divide"):
        PixelCodec((4, 6, 3), patch=4)
