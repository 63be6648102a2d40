"""Long lists of prompts, which are decoded in parts of like lengths: what each row gets, and in which order."""

from typing import Any

import jax
import numpy as np
import pytest

from sysdpo_jax import BeamSearch, LanguageModel
from sysdpo_jax.components import language_model
from sysdpo_jax.models import Decoder, DecoderConfig
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer

CONFIG = DecoderConfig(len(SPECIAL) + len(WORDS), 16, 24, 1, 2, 2, max_position_embeddings=160)
NODE = LanguageModel(Decoder(CONFIG), word_tokenizer(), 128, 6, search=BeamSearch(1))
KEY = jax.random.key(3)


def prompts() -> list[str]:
    """36 of a few words and 4 long ones, mixed."""
    random = np.random.default_rng(0)
    lengths = random.permutation([*random.integers(1, 20, 36), 90, 100, 110, 128])
    return [" ".join(random.choice(WORDS, length)) for length in lengths]


@pytest.fixture(scope="module")
def params() -> Any:
    made = NODE.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.5 * jax.random.normal(jax.random.key(x.size), x.shape), made)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Of the prompts of each call."""
    found: list[tuple[int, ...]] = []
    for name in ("generate", "beam_generate"):
        call = getattr(language_model, name)

        def recorded(*inputs: Any, call: Any = call, **settings: Any) -> Any:
            found.append(inputs[2].shape)
            return call(*inputs, **settings)

        monkeypatch.setattr(language_model, name, recorded)
    return found


def test_samples_of_parts_are_those_of_all_rows_together(
    params: Any, shapes: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the draws of each row's number in the list, whatever part it was in."""
    apart = NODE.sample(params, {"x": prompts()}, KEY)
    assert shapes == [(20, 32), (20, 128)]
    monkeypatch.setattr(language_model.batches, "parts", lambda lengths, most: [np.arange(len(lengths))])
    together = NODE.sample(params, {"x": prompts()}, KEY)
    assert shapes[2:] == [(40, 128)]
    assert [value.tokens for value in apart] == [value.tokens for value in together]
    assert len({value.tokens for value in apart}) > 10


def test_candidates_come_in_the_order_of_the_list(params: Any, shapes: list[tuple[int, ...]]) -> None:
    found = NODE.candidates(params, {"x": prompts()}, 2, KEY)
    assert len(shapes) == 2
    for row in (0, 7, 39):
        [alone] = NODE.candidates(params, {"x": prompts()[row : row + 1]}, 2, KEY)
        assert [value.tokens for value in found[row]] == [value.tokens for value in alone]
