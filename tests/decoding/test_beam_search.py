"""Beam search over table models against a plain search written with lists, and against full enumeration."""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax.decoding.beam_search import Beams, BeamSearch, beam_search, top_log_probs

PAD = -7
Sequence = tuple[int, ...]
# A model: the log-probabilities [V] of the token after a prefix, in float64.
Model = Callable[[Sequence], np.ndarray]


class PrefixTable:
    """Random next-token logits for every prefix shorter than `length`; a prefix is known by its number."""

    def __init__(self, vocab: int, length: int, seed: int, scale: float = 2.0) -> None:
        count = sum(vocab**size for size in range(length))
        self.vocab, self.length = vocab, length
        self.logits = np.random.default_rng(seed).normal(scale=scale, size=(count, vocab)).astype(np.float32)
        exact = self.logits.astype(np.float64)
        self.log_probs = exact - np.log(np.sum(np.exp(exact), axis=-1, keepdims=True))

    def __call__(self, prefix: Sequence) -> np.ndarray:
        number = 0
        for token in prefix:
            number = number * self.vocab + token + 1
        return self.log_probs[number]


def search_tables(
    models: list[PrefixTable], num_beams: int, search: BeamSearch, stop_tokens: Sequence, new: int | None = None
) -> Beams:
    """The search under test, one model a row; a beam's state is its prefix's number, which must follow its parents."""
    arrays = jnp.stack([model.logits for model in models])
    new = new or models[0].length
    groups = search.groups(num_beams)
    return jax.device_get(_search_tables(arrays, search.penalties(), num_beams, groups, stop_tokens, new))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _search_tables(
    logits: jax.Array, penalties: Any, num_beams: int, num_groups: int, stop_tokens: Sequence, new: int
) -> Beams:
    rows, _, vocab = logits.shape

    def step(tokens: jax.Array, parents: jax.Array | None, state: jax.Array, made: jax.Array) -> Any:
        if parents is not None:
            state = jnp.take_along_axis(state, parents, axis=1)
        state = state * vocab + tokens + 1
        return jnp.take_along_axis(logits, jnp.clip(state, 0, logits.shape[1] - 1)[..., None], axis=1), state

    return beam_search(
        step,
        logits[:, 0],
        jnp.zeros((rows, num_beams), jnp.int32),
        num_beams=num_beams,
        num_groups=num_groups,
        penalties=penalties,
        max_new_tokens=new,
        stop_tokens=stop_tokens,
        pad_token=PAD,
    )


def plain_search(
    model: Model, num_beams: int, search: BeamSearch, stop_tokens: Sequence, new: int
) -> list[tuple[Sequence, float]]:
    """Algorithm 1 of arXiv 1610.02424 with groups that end, by lists: sequences with their log-probabilities."""
    groups = num_beams if search.num_beam_groups is None else search.num_beam_groups
    size, power = num_beams // groups, search.length_penalty
    running: list[list[tuple[Sequence, float, float]]] = [[((), 0.0, 0.0)] for _ in range(groups)]
    finished: list[list[tuple[float, Sequence, float]]] = [[] for _ in range(groups)]
    for length in range(1, new + 1):
        chosen: Counter[int] = Counter()
        taken: set[Sequence] = set()
        for group in range(groups):
            candidates = []
            for prefix, own, lost in running[group]:
                for token, log_prob in enumerate(model(prefix)):
                    penalty = lost + search.diversity_penalty * chosen[token]
                    candidates.append(((*prefix, token), own + log_prob, penalty))
            candidates = [c for c in candidates if c[0] not in taken]
            candidates.sort(key=lambda c: c[2] - c[1])

            def complete(sequence: Sequence, length: int = length) -> bool:
                return sequence[-1] in stop_tokens or length == new

            ended = [c for c in candidates[:size] if complete(c[0])]
            places = finished[group] + [((own - lost) / length**power, s, own) for s, own, lost in ended]
            finished[group] = sorted(places, reverse=True)[:size]
            going = [c for c in candidates if not complete(c[0])][:size]
            if going and len(finished[group]) == size:
                best = (going[0][1] - going[0][2]) / length**power
                if search.early_stopping or best <= finished[group][-1][0]:
                    going = []
            running[group] = going
            taken |= {s for s, _, _ in ended} & {s for _, s, _ in finished[group]}
            chosen.update(s[-1] for s, _, _ in ended + going)
    found = [(s, own) for group in finished for _, s, own in group]
    return sorted(found, key=lambda item: item[1] / len(item[0]) ** power, reverse=True)


def agrees(made: Beams, row: int, expected: list[tuple[Sequence, float]], power: float) -> None:
    """Sequences equal; log-probabilities within 1e-5, some float32 roundings of sums of up to six terms below 30."""
    count, beams = len(expected), made.valid.shape[1]
    np.testing.assert_array_equal(made.valid[row], np.arange(beams) < count)
    for place, (sequence, log_prob) in enumerate(expected):
        length = made.lengths[row, place]
        assert tuple(made.tokens[row, place, :length].tolist()) == sequence
        np.testing.assert_array_equal(made.tokens[row, place, length:], PAD)
        np.testing.assert_allclose(made.log_probs[row, place], log_prob, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(made.scores[row, place], log_prob / length**power, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(made.log_probs[row, count:], -np.inf)
    np.testing.assert_array_equal(made.scores[row, count:], -np.inf)
    np.testing.assert_array_equal(made.lengths[row, count:], 0)
    np.testing.assert_array_equal(made.tokens[row, count:], PAD)


MODELS = [PrefixTable(vocab=5, length=5, seed=seed, scale=0.5 + seed % 3) for seed in range(15)]


@pytest.mark.parametrize(
    ("num_beams", "groups", "stop_tokens"),
    [(1, 1, (2,)), (4, 1, (0, 3)), (4, 2, ()), (6, 3, (2,)), (6, 3, (0, 3)), (8, None, ()), (8, None, (2,))],
)
def test_equals_the_plain_search(num_beams: int, groups: int | None, stop_tokens: Sequence) -> None:
    """15 models x 12 settings for each shape, beams up to twice the vocabulary among them."""
    for strength, power, early in itertools.product((0.0, 0.4, 3.0), (0.0, 1.0), (False, True)):
        search = BeamSearch(groups, strength, power, early)
        made = search_tables(MODELS, num_beams, search, stop_tokens)
        for row, model in enumerate(MODELS):
            agrees(made, row, plain_search(model, num_beams, search, stop_tokens, model.length), power)


@pytest.mark.parametrize("groups", [1, 2, None])
def test_more_beams_than_sequences(groups: int | None) -> None:
    """Two tokens, one of which ends, and three steps: the four sequences there are, or what the groups find of them."""
    models = [PrefixTable(vocab=2, length=3, seed=seed) for seed in range(10)]
    search = BeamSearch(groups)
    made = search_tables(models, 8, search, (1,))
    for row, model in enumerate(models):
        agrees(made, row, plain_search(model, 8, search, (1,), 3), 1.0)
    if groups == 1:
        assert np.all(made.valid.sum(1) == 4)


def every_sequence(model: PrefixTable, stop_tokens: Sequence) -> list[tuple[Sequence, float]]:
    """All sequences that end with a stop token or at the full length, with their log-probabilities."""
    found, open_ones = [], [((), 0.0)]
    for length in range(1, model.length + 1):
        longer = [((*s, token), p + q) for s, p in open_ones for token, q in enumerate(model(s))]
        ended = [s[-1] in stop_tokens or length == model.length for s, _ in longer]
        found += list(itertools.compress(longer, ended))
        open_ones = [item for item, end in zip(longer, ended, strict=True) if not end]
    assert math.isclose(sum(math.exp(p) for _, p in found), 1.0)
    return found


@pytest.mark.parametrize(("num_beams", "powers"), [(12, (0.0,)), (20, (0.0, 1.0, 2.0))])
def test_wide_beams_find_the_best_of_all_sequences(num_beams: int, powers: tuple[float, ...]) -> None:
    """Three tokens, one of which ends: 15 sequences, at most 12 candidates a step, so 12 beams miss nothing.

    Fewer than 15 may stop before a longer sequence of better score where scores are divided by a length.
    """
    models = [PrefixTable(vocab=3, length=3, seed=seed) for seed in range(10)]
    for power in powers:
        made = search_tables(models, num_beams, BeamSearch(1, length_penalty=power), (1,))
        for row, model in enumerate(models):
            ranked = sorted(every_sequence(model, (1,)), key=lambda item: -item[1] / len(item[0]) ** power)
            agrees(made, row, ranked[:num_beams], power)


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_groups_of_a_sharp_model_still_find_distinct_sequences(strength: float) -> None:
    """A model that is nearly sure of every token leads all groups to the same sequences: none comes twice."""
    models = [PrefixTable(vocab=8, length=4, seed=seed, scale=20.0) for seed in range(10)]
    search = BeamSearch(None, strength)
    made = search_tables(models, 6, search, (2,))
    assert made.valid.all()
    for row, model in enumerate(models):
        agrees(made, row, plain_search(model, 6, search, (2,), 4), 1.0)
        assert len({tuple(tokens) for tokens in made.tokens[row].tolist()}) == 6


def test_diversity_spreads_the_first_tokens() -> None:
    """With a strength above all differences in score every group begins differently; with none fewer do."""
    models = [PrefixTable(vocab=6, length=4, seed=seed) for seed in range(10)]

    def beginnings(strength: float) -> list[int]:
        made = search_tables(models, 6, BeamSearch(None, strength), ())
        return [len(set(row)) for row in made.tokens[:, :, 0].tolist()]

    assert beginnings(100.0) == [6] * 10
    assert np.mean(beginnings(0.0)) < 4


def test_log_probs_are_the_models_own() -> None:
    """Whatever the penalties: sums of the table's entries along the sequence (tolerance as above), best score first."""
    made = search_tables(MODELS, 6, BeamSearch(3, 2.0), (2,))
    for row, model in enumerate(MODELS):
        for tokens, length, log_prob in zip(made.tokens[row], made.lengths[row], made.log_probs[row], strict=True):
            sequence = tuple(tokens[:length].tolist())
            expected = sum(model(sequence[:i])[token] for i, token in enumerate(sequence))
            np.testing.assert_allclose(log_prob, expected, rtol=1e-5, atol=1e-5)
    assert np.all(np.diff(made.scores, axis=1) <= 0)
    assert made.log_probs.dtype == np.float32


def test_tokens_of_no_probability_are_not_found() -> None:
    """Logits of -inf leave two sequences; the search neither returns others nor counts them as valid."""
    model = PrefixTable(vocab=4, length=2, seed=0)
    model.logits[:, 2:] = -np.inf
    model.logits[1:, 1] = -np.inf
    made = search_tables([model], 4, BeamSearch(1), ())
    np.testing.assert_array_equal(made.valid, [[True, True, False, False]])
    assert sorted(made.tokens[0, :2].tolist()) == [[0, 0], [1, 0]]


@pytest.mark.parametrize(("vocab", "count"), [(7, 7), (64, 3), (1000, 3), (1024, 16), (1030, 5)])
def test_top_log_probs(vocab: int, count: int) -> None:
    """Against a full sort in float64, with blocks that are full, cut and fewer than asked for; float32 roundings."""
    logits = np.random.default_rng(vocab).normal(scale=3, size=(2, 3, vocab)).astype(np.float32)
    values, ids = jax.jit(top_log_probs, static_argnums=1)(logits, count)
    exact = logits.astype(np.float64)
    exact -= np.log(np.sum(np.exp(exact), axis=-1, keepdims=True))
    order = np.argsort(-exact, axis=-1)[..., :count]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(values, np.take_along_axis(exact, order, axis=-1), rtol=1e-5, atol=1e-5)


def test_top_log_probs_of_masked_rows() -> None:
    """Where fewer tokens than asked for are possible, the rest is -inf."""
    logits = np.full((1, 1, 1030), -np.inf, np.float32)
    logits[..., [5, 1029]] = 0.0
    values, ids = jax.jit(top_log_probs, static_argnums=1)(logits, 4)
    np.testing.assert_array_equal(values[0, 0, 2:], -np.inf)
    assert sorted(np.asarray(ids)[0, 0, :2].tolist()) == [5, 1029]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BeamSearch(0), "num_beam_groups 0"),
        (lambda: BeamSearch(diversity_penalty=-0.1), "diversity_penalty -0.1"),
        (lambda: BeamSearch(diversity_penalty=math.inf), "finite"),
        (lambda: BeamSearch(3).groups(8), "num_beams 8 must .* multiple of num_beam_groups 3"),
        (lambda: BeamSearch(1).groups(0), "num_beams 0 must be at least 1"),
        (lambda: BeamSearch().groups(0), "num_beams 0 must be at least 1"),
    ],
)
def test_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
