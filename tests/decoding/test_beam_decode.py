"""Beam search of a decoder against transformers' generate, plain beams; groups against the search over tables."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jaxtyping import PyTree

from sysdpo_jax.decoding.beam_search import Beams, BeamSearch
from sysdpo_jax.decoding.decode import beam_generate
from sysdpo_jax.models.decoder import Decoder
from tests.decoding.test_beam_search import Model, plain_search
from tests.parity.convert import llama_params, torch_decoder
from tests.parity.test_decoder import BASE

# Not 0, which transformers takes for no pad token at all.
PAD, NEW, WIDTH = 11, 9, 7
# Few tokens and flat logits, so that some of them end sequences at every step.
SMALL = dataclasses.replace(BASE, vocab_size=12, num_hidden_layers=2)
CONFIGS = {
    "llama": SMALL,
    "mistral": dataclasses.replace(SMALL, model_type="mistral", sliding_window=4),
    "gemma2": dataclasses.replace(
        SMALL,
        model_type="gemma2",
        head_dim=16,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
        post_norms=True,
        norm_unit_offset=True,
        scale_embeddings=True,
        query_pre_attn_scalar=11.0,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=1.5,
        sliding_window=3,
        layer_types=("sliding_attention", "full_attention"),
    ),
}
PLAIN = BeamSearch(num_beam_groups=1)


@functools.cache
def model_and_params(name: str) -> tuple[Any, PyTree]:
    model = torch_decoder(CONFIGS[name], seed=3)
    if not CONFIGS[name].tie_word_embeddings:
        with torch.no_grad():
            model.lm_head.weight.mul_(0.2)
    return model, llama_params(model)


def ragged_prompts(rows: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-padded prompts of different lengths, without the pad token inside."""
    rng = np.random.default_rng(seed)
    lengths = np.concatenate([[WIDTH, 1], rng.integers(1, WIDTH + 1, rows - 2)])
    tokens = rng.integers(0, PAD, (rows, WIDTH))
    return np.where(np.arange(WIDTH) < lengths[:, None], tokens, PAD), lengths


def ours(
    search: BeamSearch,
    num_beams: int,
    stop_tokens: tuple[int, ...],
    name: str = "llama",
    prompts: tuple[np.ndarray, np.ndarray] | None = None,
) -> Beams:
    made = beam_generate(
        Decoder(CONFIGS[name]),
        model_and_params(name)[1],
        *(prompts or ragged_prompts()),
        num_beams=num_beams,
        search=search,
        max_new_tokens=NEW,
        stop_tokens=stop_tokens,
        pad_token=PAD,
    )
    return jax.device_get(made)


def theirs(
    search: BeamSearch, num_beams: int, stop_tokens: tuple[int, ...], name: str = "llama"
) -> tuple[np.ndarray, np.ndarray]:
    """transformers' sequences [B, R, NEW] and sequences_scores [B, R] for the same prompts, padded on the left."""
    prompts, lengths = ragged_prompts()
    left = np.stack([np.roll(row, WIDTH - length) for row, length in zip(prompts, lengths, strict=True)])
    mask = np.arange(WIDTH) >= WIDTH - lengths[:, None]
    made = model_and_params(name)[0].generate(
        torch.from_numpy(left),
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
        max_new_tokens=NEW,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        do_sample=False,
        length_penalty=search.length_penalty,
        early_stopping=search.early_stopping,
        pad_token_id=PAD,
        eos_token_id=list(stop_tokens) or None,
        return_dict_in_generate=True,
        output_scores=True,
    )
    new = made.sequences[:, WIDTH:].numpy()
    padded = np.pad(new, ((0, 0), (0, NEW - new.shape[1])), constant_values=PAD)
    shape = len(prompts), num_beams
    return padded.reshape(*shape, NEW), made.sequences_scores.numpy().reshape(shape)


# All lengths are equal without a stop token, so that one way to rank them is as good as the others.
@pytest.mark.parametrize(
    ("num_beams", "stop_tokens", "power", "early"),
    [(4, (), 1.0, False), (2, (3,), 0.0, True), (2, (3,), 2.0, False), (3, (3, 8), 1.0, True), (3, (3, 8), 2.0, False)]
    + [(4, (3,), power, early) for power in (0.0, 1.0, 2.0) for early in (False, True)],
)
def test_plain_beams_equal_transformers(
    num_beams: int, stop_tokens: tuple[int, ...], power: float, early: bool
) -> None:
    """Sequences and their order equal; scores within 1e-4, two float32 forward passes in different order."""
    search = BeamSearch(num_beam_groups=1, length_penalty=power, early_stopping=early)
    made = ours(search, num_beams, stop_tokens)
    tokens, scores = theirs(search, num_beams, stop_tokens)
    np.testing.assert_array_equal(made.tokens, tokens)
    np.testing.assert_allclose(made.scores, scores, rtol=0, atol=1e-4)
    assert made.valid.all()
    assert not stop_tokens or np.isin(made.tokens, stop_tokens).any()


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
def test_plain_beams_of_sliding_windows_equal_transformers(name: str) -> None:
    """Windows shorter than the prompts; tolerance as above."""
    made = ours(PLAIN, 4, (3,), name)
    tokens, scores = theirs(PLAIN, 4, (3,), name)
    np.testing.assert_array_equal(made.tokens, tokens)
    np.testing.assert_allclose(made.scores, scores, rtol=0, atol=1e-4)


def torch_log_probs(name: str, prompt: list[int]) -> Model:
    """A function from prefixes after the prompt to the next token's log-probabilities, by torch without a cache."""

    @functools.cache
    def log_probs(prefix: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            logits = model_and_params(name)[0](torch.tensor([[*prompt, *prefix]])).logits[0, -1]
        return torch.log_softmax(logits.double(), dim=-1).numpy()

    return log_probs


@pytest.mark.parametrize(("name", "groups", "strength"), [("llama", None, 1.0), ("llama", 2, 0.5), ("mistral", 2, 2.0)])
def test_groups_equal_the_plain_search(name: str, groups: int | None, strength: float) -> None:
    """Against lists and torch without a cache; log-probabilities within 1e-4, sums of float32 logits of order 3."""
    search = BeamSearch(groups, strength)
    prompts, lengths = ragged_prompts()
    made = ours(search, 4, (3, 8), name)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        expected = plain_search(torch_log_probs(name, prompt[:length].tolist()), 4, search, (3, 8), NEW)
        for place, (sequence, log_prob) in enumerate(expected):
            end = made.lengths[row, place]
            assert tuple(made.tokens[row, place, :end].tolist()) == sequence
            np.testing.assert_array_equal(made.tokens[row, place, end:], PAD)
            np.testing.assert_allclose(made.log_probs[row, place], log_prob, rtol=0, atol=1e-4)
        np.testing.assert_array_equal(made.valid[row], np.arange(4) < len(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_rows_are_independent_of_their_batch(name: str) -> None:
    """Each prompt alone, without padding, gives what it gives among others; scores within float32 roundings."""
    search = BeamSearch(2, 1.0)
    prompts, lengths = ragged_prompts(2)
    together = ours(search, 4, (3,), name, (prompts, lengths))
    for row, length in enumerate(lengths):
        alone = ours(search, 4, (3,), name, (prompts[row : row + 1, :length], lengths[row : row + 1]))
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[row])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[row], rtol=0, atol=1e-4)


def test_one_new_token() -> None:
    """The likeliest first tokens; transformers' plain beams are the reference for longer ones."""
    prompts, lengths = ragged_prompts(2)
    made = beam_generate(
        Decoder(SMALL),
        model_and_params("llama")[1],
        prompts,
        lengths,
        num_beams=4,
        search=BeamSearch(2),
        max_new_tokens=1,
        stop_tokens=(3,),
        pad_token=PAD,
    )
    for row, length in enumerate(lengths):
        log_probs = torch_log_probs("llama", prompts[row, :length].tolist())(())
        expected = plain_search(lambda _, p=log_probs: p, 4, BeamSearch(2), (3,), 1)
        assert [(token,) for token in made.tokens[row, :, 0].tolist()] == [s for s, _ in expected]


def test_prompts_and_new_tokens_may_fill_all_positions() -> None:
    """64 positions of the model, which leave no room to round the number of slots up."""
    prompts = np.random.default_rng(0).integers(0, PAD, (2, 51))
    made = beam_generate(
        Decoder(SMALL),
        model_and_params("llama")[1],
        prompts,
        np.array([51, 40]),
        num_beams=2,
        search=PLAIN,
        max_new_tokens=13,
        stop_tokens=(),
        pad_token=PAD,
    )
    np.testing.assert_array_equal(made.lengths, 13)


def test_one_compilation_per_shape() -> None:
    """New values of anything but shapes, groups and an equal decoder do not trace anew; other groups do."""
    traces, config = [], dataclasses.replace(SMALL, num_hidden_layers=1)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), ragged_prompts()[0])["params"]

    class Counting(Decoder):
        def extend(self, *args: Any, **kwargs: Any) -> Any:
            traces.append(1)
            return super().extend(*args, **kwargs)

    def call(seed: int, search: BeamSearch) -> None:
        beam_generate(
            Counting(config),
            jax.tree.map(lambda x: x * (1 + seed), params),
            *ragged_prompts(seed=seed),
            num_beams=4,
            search=search,
            max_new_tokens=3,
            stop_tokens=(5,),
            pad_token=PAD,
        )

    call(0, BeamSearch(2))
    once = len(traces)
    call(1, BeamSearch(2, 0.3, 2.0, True))
    call(2, BeamSearch(2, 0.0, 0.0, False))
    assert len(traces) == once > 0
    call(0, BeamSearch(4))
    assert len(traces) == 2 * once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "beam_generate: max_new_tokens 0"),
        ({"max_new_tokens": 58}, "max_position_embeddings 64"),
        ({"prompt_lengths": np.array([7, 0])}, "start token"),
        ({"num_beams": 0}, "num_beams 0"),
        ({"search": BeamSearch(3)}, "multiple of num_beam_groups 3"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    prompts, lengths = ragged_prompts(2)
    arguments: dict[str, Any] = {
        "prompt_lengths": lengths,
        "num_beams": 4,
        "search": BeamSearch(),
        "max_new_tokens": 3,
        "stop_tokens": (),
        "pad_token": PAD,
    }
    with pytest.raises(ValueError, match=message):
        beam_generate(Decoder(SMALL), model_and_params("llama")[1], prompts, **(arguments | change))
