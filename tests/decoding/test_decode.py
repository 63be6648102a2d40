"""Generation against transformers' generate (greedy) and exact next-token probabilities (sampling)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import PyTree

from sysdpo_jax.decoding import cached_model, sampling
from sysdpo_jax.decoding.decode import Generated, generate
from sysdpo_jax.decoding.draws import categorical, sample_token
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from tests.parity.convert import llama_params
from tests.parity.test_decoder import BASE, llama

PAD, NEW = 0, 10
TINY = dataclasses.replace(BASE, vocab_size=6, num_hidden_layers=1)
DRAWS = 20_000


@functools.cache
def model_and_params(config: DecoderConfig) -> tuple[Any, PyTree]:
    model = llama(config, seed=3)
    return model, llama_params(model)


def ragged_prompts(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Four right-padded prompts of different lengths, without the pad token inside."""
    lengths = np.array([7, 1, 4, 6])
    tokens = np.random.default_rng(seed).integers(1, BASE.vocab_size, (4, 7))
    return np.where(np.arange(7) < lengths[:, None], tokens, PAD), lengths


def greedy(stop_tokens: tuple[int, ...], max_new_tokens: int = NEW) -> Generated:
    prompts, lengths = ragged_prompts()
    return generate(
        Decoder(BASE),
        model_and_params(BASE)[1],
        prompts,
        lengths,
        jax.random.key(0),
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        pad_token=PAD,
        temperature=0.0,
    )


def transformers_greedy(stop_tokens: tuple[int, ...]) -> np.ndarray:
    """New tokens [4, <= NEW] of transformers' generate on the same prompts, padded on the left for it."""
    prompts, lengths = ragged_prompts()
    left = np.stack([np.roll(row, 7 - length) for row, length in zip(prompts, lengths, strict=True)])
    mask = np.arange(7) >= 7 - lengths[:, None]
    generated = model_and_params(BASE)[0].generate(
        torch.from_numpy(left),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        max_new_tokens=NEW,
        do_sample=False,
        pad_token_id=PAD,
        eos_token_id=list(stop_tokens) or None,
    )
    return generated[:, 7:].numpy()


def test_greedy_equals_transformers_for_ragged_prompts() -> None:
    made = greedy(stop_tokens=())
    np.testing.assert_array_equal(made.tokens, transformers_greedy(()))
    np.testing.assert_array_equal(made.lengths, [NEW] * 4)
    assert len(np.unique(made.tokens)) > 5


def test_stop_tokens() -> None:
    """Rows end after their stop token and hold pad tokens from there on, as with transformers' eos tokens."""
    free = np.asarray(greedy(stop_tokens=()).tokens)
    stops = int(free[0, 3]), int(free[2, 5])
    made = greedy(stop_tokens=stops)
    expected = transformers_greedy(stops)
    np.testing.assert_array_equal(made.tokens[:, : expected.shape[1]], expected)
    np.testing.assert_array_equal(made.tokens[:, expected.shape[1] :], PAD)
    for row, length, whole in zip(np.asarray(made.tokens), np.asarray(made.lengths), free, strict=True):
        hits = np.flatnonzero(np.isin(whole, stops))
        end = hits[0] + 1 if hits.size else NEW
        assert length == end
        np.testing.assert_array_equal(row, np.where(np.arange(NEW) < end, whole, PAD))
    assert 1 <= made.lengths.min() < made.lengths.max()


def test_rows_that_stop_at_once() -> None:
    every = tuple(range(BASE.vocab_size))
    made = greedy(stop_tokens=every)
    np.testing.assert_array_equal(made.lengths, 1)
    np.testing.assert_array_equal(made.tokens[:, 1:], PAD)
    single = greedy(stop_tokens=(), max_new_tokens=1)
    np.testing.assert_array_equal(single.tokens, made.tokens[:, :1])


def torch_probabilities(prefixes: list[list[int]], temperature: float) -> np.ndarray:
    """softmax(torch's next-token logits / temperature) after each prefix, in float64."""
    model, rows = model_and_params(TINY)[0], []
    for prefix in prefixes:
        with torch.no_grad():
            logits = model(torch.tensor([prefix])).logits[0, -1].double().numpy() / temperature
        rows.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    return np.array(rows)


def nucleus(probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of likeliest tokens that reaches top_p, renormalised: grown one token at a time."""
    kept, mass = np.zeros_like(probabilities), 0.0
    for token in np.argsort(-probabilities):
        kept[token] = probabilities[token]
        mass += probabilities[token]
        if mass >= top_p:
            break
    return kept / kept.sum()


def draw(temperature: float, top_p: float, seed: int) -> np.ndarray:
    """DRAWS continuations [DRAWS, 2] of the same prompt (2, 5), padded to length 3."""
    made = generate(
        Decoder(TINY),
        model_and_params(TINY)[1],
        np.tile([2, 5, 0], (DRAWS, 1)),
        np.full(DRAWS, 2),
        jax.random.key(seed),
        max_new_tokens=2,
        stop_tokens=(),
        pad_token=0,
        temperature=temperature,
        top_p=top_p,
    )
    return np.asarray(made.tokens)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.5, 1.0), (2.5, 0.7), (0.6, 0.9), (2.0, 1e-6)])
def test_sampling_distribution(temperature: float, top_p: float) -> None:
    """Frequencies of the 36 pairs of tokens against p(first) p(second | first).

    Bound: 5 standard errors of a frequency of DRAWS draws (36 x 5 comparisons: chance about 1e-4), nothing
    outside the nucleus; the seed is fixed.
    """
    first = nucleus(torch_probabilities([[2, 5]], temperature)[0], top_p)
    after = torch_probabilities([[2, 5, token] for token in range(6)], temperature)
    expected = first[:, None] * np.stack([nucleus(row, top_p) for row in after])
    tokens = draw(temperature, top_p, seed=11)
    counts = np.zeros((6, 6))
    np.add.at(counts, (tokens[:, 0], tokens[:, 1]), 1)
    bound = 5 * np.sqrt(expected * (1 - expected) / DRAWS)
    assert np.all(np.abs(counts / DRAWS - expected) <= bound + 1e-6)
    if top_p < 1:
        assert (expected == 0).any()


@pytest.mark.parametrize(("top_p", "kept"), [(0.5, {0}), (0.51, {0, 1}), (0.8, {0, 1, 2}), (1.0, {0, 1, 2, 3})])
def test_nucleus_edges(top_p: float, kept: set[int]) -> None:
    """Probabilities 1/2, 1/4, 1/8, 1/8: a set that reaches top_p exactly is not enlarged."""
    logits = jnp.broadcast_to(jnp.log2(jnp.array([0.5, 0.25, 0.125, 0.125])), (400, 4))
    unit = jnp.float32(1 / np.log(2))
    tokens = sample_token(logits, jax.random.split(jax.random.key(0), len(logits)), unit, jnp.float32(top_p))
    assert set(np.asarray(tokens).tolist()) == kept


def test_same_key_same_tokens() -> None:
    first, again, other = (draw(1.5, 0.9, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def waiting(places: int | None, rows: slice = slice(None), temperature: float = 0.9, **layers: Any) -> Generated:
    """Nine prompts, of which `rows`, each with its own key; rows end at different times."""
    rng = np.random.default_rng(4)
    lengths = np.array([7, 1, 4, 6, 2, 3, 5, 7, 1])
    prompts = np.where(np.arange(7) < lengths[:, None], rng.integers(1, BASE.vocab_size, (9, 7)), PAD)
    return jax.device_get(
        generate(
            Decoder(dataclasses.replace(BASE, **layers)),
            model_and_params(BASE)[1],
            prompts[rows],
            lengths[rows],
            jax.random.split(jax.random.key(7), 9)[rows],
            max_new_tokens=NEW,
            stop_tokens=tuple(range(1, 20)),
            pad_token=PAD,
            temperature=temperature,
            places=places,
        )
    )


@pytest.mark.parametrize("window", [{}, {"sliding_window": 3}])
@pytest.mark.parametrize("places", [1, 2, 4, 8])
def test_rows_that_take_the_places_of_others_get_what_all_at_once_get(places: int, window: dict[str, int]) -> None:
    """The slots are a ring then, which has come round where the tokens of one place are more than its slots."""
    at_once, one_by_one = waiting(None, **window), waiting(places, **window)
    np.testing.assert_array_equal(one_by_one.tokens, at_once.tokens)
    np.testing.assert_array_equal(one_by_one.lengths, at_once.lengths)
    assert len(np.unique(at_once.lengths)) > 3
    assert at_once.lengths.sum() > 7 + NEW


def test_slots_that_come_in_stages_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two loops of 4 and 5 more slots."""
    whole = waiting(None)
    monkeypatch.setattr(sampling, "STAGE", 2)
    monkeypatch.setattr(cached_model, "MULTIPLE", 1)
    assert sampling._stages(7, 7 + NEW - 1) == (11, 16)
    jax.clear_caches()
    staged = waiting(None)
    np.testing.assert_array_equal(staged.tokens, whole.tokens)
    np.testing.assert_array_equal(staged.lengths, whole.lengths)
    np.testing.assert_array_equal(greedy(stop_tokens=()).tokens, transformers_greedy(()))
    jax.clear_caches()


def test_a_row_draws_the_same_whatever_is_beside_it() -> None:
    together = waiting(None)
    for rows in (slice(0, 1), slice(3, 5), slice(8, None)):
        apart = waiting(None, rows)
        np.testing.assert_array_equal(apart.tokens, together.tokens[rows])
        np.testing.assert_array_equal(apart.lengths, together.lengths[rows])


def test_greedy_rows_that_wait_equal_transformers() -> None:
    """Also where a prompt takes the place of one that has filled it to the last slot."""
    prompts, lengths = ragged_prompts()
    made = generate(
        Decoder(BASE),
        model_and_params(BASE)[1],
        prompts,
        lengths,
        jax.random.key(0),
        max_new_tokens=NEW,
        stop_tokens=(),
        pad_token=PAD,
        temperature=0.0,
        places=1,
    )
    np.testing.assert_array_equal(made.tokens, transformers_greedy(()))


def test_draws_are_of_the_softmax_over_more_than_one_block() -> None:
    """300 tokens, of which 40 have weight: within 5 standard errors of 40,000 draws, and nothing else is drawn."""
    rng = np.random.default_rng(0)
    logits = np.full(300, -np.inf, np.float32)
    some = rng.choice(300, 40, replace=False)
    logits[some] = 2 * rng.normal(size=40)
    keys = jax.random.split(jax.random.key(1), 40_000)
    drawn = np.asarray(jax.jit(categorical)(jnp.broadcast_to(logits, (len(keys), 300)), keys))
    expected = np.exp(logits.astype(np.float64))
    expected /= expected.sum()
    found = np.bincount(drawn, minlength=300) / len(keys)
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(keys)))
    assert found[expected == 0].sum() == 0


def test_one_compilation_per_shape() -> None:
    """New values of anything but the shapes and an equal decoder do not trace anew; a new shape does."""
    traces = []

    class Counting(Decoder):
        def extend(self, *args: Any, **kwargs: Any) -> Any:
            traces.append(1)
            return super().extend(*args, **kwargs)

    def call(seed: int, temperature: float, top_p: float, width: int = 7) -> None:
        prompts, lengths = ragged_prompts(seed)
        params = jax.tree.map(lambda x: x * (1 + seed), model_and_params(BASE)[1])
        generate(
            Counting(BASE),
            params,
            np.pad(prompts, ((0, 0), (0, width - 7))),
            lengths - (lengths > 1) * (seed > 0),
            jax.random.key(seed),
            max_new_tokens=3,
            stop_tokens=(5,),
            pad_token=PAD,
            temperature=temperature,
            top_p=top_p,
        )

    call(0, 1.0, 1.0)
    once = len(traces)
    call(1, 0.0, 1.0)
    call(2, 0.7, 0.9)
    assert len(traces) == once > 0
    call(0, 1.0, 1.0, width=9)
    assert len(traces) == 2 * once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "at least 1"),
        ({"max_new_tokens": 58}, "max_position_embeddings 64"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"places": 0}, "places 0 must be at least 1"),
        ({"prompt_lengths": np.array([7, 0, 4, 6])}, "start token"),
        ({"prompt_lengths": np.array([8, 1, 4, 6])}, r"\[1, 7\]"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    prompts, lengths = ragged_prompts()
    arguments: dict[str, Any] = {
        "prompt_lengths": lengths,
        "max_new_tokens": 3,
        "stop_tokens": (),
        "pad_token": 0,
    }
    with pytest.raises(ValueError, match=message):
        generate(Decoder(BASE), model_and_params(BASE)[1], prompts, key=jax.random.key(0), **(arguments | change))
