"""Chunked log-probabilities against the plain ones: values, gradients, and what the compiler says they cost."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.scaling.systems import DECODERS
from sysdpo_jax.batch import PairBatch
from sysdpo_jax.components import LanguageModel
from sysdpo_jax.components.token_log_probs import number_of_chunks, token_log_probs
from sysdpo_jax.graph import CompoundSystem, Node
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.models.head import logits_of
from sysdpo_jax.models.lora import LoRA, add_lora
from sysdpo_jax.objectives import DirectObjective
from sysdpo_jax.training.throughput import count_flops
from tests.components.stubs import IdTokenizer

# Nearly all the time of these tests is compilation, of programs that run once.
QUICK = {"xla_backend_optimization_level": 0}
SMALL = DecoderConfig(97, 16, 24, 1, 2, 1, dtype="float32")
HEADS = {
    "kernel": SMALL,
    "tied": dataclasses.replace(SMALL, tie_word_embeddings=True),
    "soft cap": dataclasses.replace(SMALL, final_logit_softcapping=3.0),
}
PROMPTS, LENGTHS = np.array([1, 3, 4]), np.array([20, 9, 16])


class PlainLanguageModel(LanguageModel):
    """The log-probability written out over the logits of all positions."""

    def log_prob_with_metrics(self, params: Any, features: Any, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        tokens, lengths = features["tokens"], features["lengths"][:, None]
        place = jnp.arange(tokens.shape[1])
        logits = self.decoder.apply({"params": params}, tokens, mask=place < lengths)[:, :-1]
        scores = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
        counted = (place[1:] >= features["prompt_lengths"][:, None]) & (place[1:] < lengths)
        metrics = {name: features[name] for name in ("truncated", "retokenized")}
        metrics["tokens"] = counted.sum(-1).astype(jnp.float32)
        return jnp.sum(chosen * counted, -1), metrics


def models(config: DecoderConfig, prompt: int, new: int) -> tuple[LanguageModel, LanguageModel]:
    """The library's and the plain one."""
    made = (kind(Decoder(config), IdTokenizer(), prompt, new) for kind in (LanguageModel, PlainLanguageModel))
    chunked, plain = made
    return chunked, plain


@pytest.mark.parametrize("name", [*HEADS, "LoRA"])
def test_values_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-5 of the largest entry: float32 sums over vocabulary, rows and layers in another order. 3 sides at once."""
    chunked, plain = models(HEADS.get(name, SMALL), 4, 19)
    monkeypatch.setattr("sysdpo_jax.components.token_log_probs.MIN_CHUNK_BYTES", 4 * 10 * SMALL.vocab_size)
    # Chunks of 4 tokens, the last one padded.
    assert number_of_chunks(3 * 19, SMALL.hidden_size, SMALL.vocab_size) == 5
    params = jax.jit(chunked.init)(jax.random.key(0))
    if name == "LoRA":
        params = add_lora(params, LoRA(2, 4.0, ("lm_head", "q_proj")), jax.random.key(1))
    random = np.random.default_rng(0)
    # Sharp distributions, and no zeros: LoRA's second factor would hide the first.
    params = jax.tree.map(lambda x: 8 * x + random.normal(0, 0.1, x.shape).astype("float32"), params)
    rows = random.integers(0, SMALL.vocab_size, (3, 3, 23))
    ends = {"prompt_lengths": np.tile(PROMPTS, (3, 1)), "lengths": np.tile(LENGTHS, (3, 1))}
    cut = {name: np.zeros((3, 3), np.float32) for name in ("truncated", "retokenized")}
    features = chunked.resize(ends | cut | {"tokens": rows}, {"prompt": 4, "completion": 19})
    weights = jnp.linspace(-1, 2, 9).reshape(3, 3)

    def run(model: LanguageModel) -> Any:
        def total(params: Any) -> tuple[jax.Array, jax.Array]:
            found = jax.vmap(lambda f: model.log_prob(params, f, jax.random.key(0)))(features)
            return jnp.sum(weights * found), found

        return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=QUICK)(params)

    jax.tree.map(
        lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()),
        run(chunked),
        run(plain),
    )


@pytest.mark.parametrize("chunks", [1, 2])
def test_large_logits(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are all larger by 2^17, where float32 has steps of 1/64, give the same numbers to the last bit."""
    monkeypatch.setattr("sysdpo_jax.components.token_log_probs.number_of_chunks", lambda *sizes: chunks)
    random = np.random.default_rng(0)
    # Whole numbers, which float32 adds and multiplies without rounding.
    hidden, kernel = (jnp.asarray(random.integers(-3, 4, shape), jnp.float32) for shape in ((2, 4, 5), (5, 97)))
    targets = jnp.asarray(random.integers(0, 97, (2, 4)))

    def run(larger: float) -> jax.Array:
        return token_log_probs(lambda weights, part: part @ weights + larger, kernel, hidden, targets, 97)

    np.testing.assert_array_equal(jax.jit(run)(2.0**17), jax.jit(run)(0.0))
    wanted = jnp.take_along_axis(jax.nn.log_softmax(hidden @ kernel), targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(jax.jit(run)(2.0**17), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunks", [1, 4])
def test_gradient_in_bfloat16(chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 1 per cent, in norm, of the closed form in float64, (onehot - softmax) W^T, on the same weights.

    Rounding to 8 bits errs by at most 2^-9 of a number, 0.2 per cent, in each of the gradient of the logits, the result
    and, where they are kept, hidden states; over chunks the sum is in float32, so that it adds no error.
    """
    width, vocab, rows = 128, 1000, 256
    monkeypatch.setattr("sysdpo_jax.components.token_log_probs.MIN_CHUNK_BYTES", 4 * rows * vocab // chunks)
    assert number_of_chunks(rows, width, vocab) == chunks
    random = np.random.default_rng(0)
    hidden, kernel = random.normal(0, 1, (4, 64, width)), random.normal(0, 0.2, (width, vocab))
    hidden, kernel = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, kernel))
    targets, weights = random.integers(0, vocab, (4, 64)), random.normal(size=(4, 64))

    def total(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        found = token_log_probs(lambda k, h: logits_of(h, k, "bfloat16"), kernel, hidden, jnp.asarray(targets), vocab)
        return jnp.sum(weights * found)

    found = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, kernel)
    states, matrix = (np.asarray(x, np.float64) for x in (hidden, kernel))
    logits = states @ matrix
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    slope = weights[..., None] * (np.eye(vocab)[targets] - exponentials / exponentials.sum(-1, keepdims=True))
    wanted = slope @ matrix.T, np.einsum("bld,blv->dv", states, slope)
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(got, np.float64) - want) < 0.01 * np.linalg.norm(want)


def test_an_empty_prompt() -> None:
    """The first token of all has no log-probability; the others count."""
    chunked, plain = models(SMALL, 4, 6)
    params = jax.jit(chunked.init)(jax.random.key(0))
    features = {
        "tokens": np.arange(20).reshape(2, 10),
        "prompt_lengths": np.array([0, 4]),
        "lengths": np.array([3, 10]),
        "truncated": np.zeros(2, np.float32),
        "retokenized": np.zeros(2, np.float32),
    }
    features = chunked.resize(features, {"prompt": 4, "completion": 6})
    found, wanted = (jax.jit(m.log_prob_with_metrics)(params, features, jax.random.key(0)) for m in (chunked, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


def temporary_bytes(function: Callable[..., Any], *shapes: Any) -> int:
    """What the compiler allocates beside arguments and results, for the CPU."""
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def head_gradient(width: int, vocab: int, plain: bool) -> Callable[..., Any]:
    """Of the summed log-probabilities in hidden states and kernel."""

    def total(hidden: jax.Array, kernel: jax.Array, targets: jax.Array) -> jax.Array:
        if plain:
            scores = jax.nn.log_softmax(hidden @ kernel)
            return jnp.take_along_axis(scores, targets[..., None], -1).sum()
        return token_log_probs(lambda weights, part: part @ weights, kernel, hidden, targets, vocab).sum()

    return jax.grad(total, argnums=(0, 1))


def head_shapes(rows: int, length: int, width: int, vocab: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    shape = jax.ShapeDtypeStruct
    hidden, targets = shape((rows, length, width), jnp.float32), shape((rows, length), jnp.int32)
    return hidden, shape((width, vocab), jnp.float32), targets


def test_memory_of_the_head() -> None:
    """Both sides of 4 pairs of 512 tokens and SmolLM2's head: at most an eighth of the plain log-probabilities'."""
    width, vocab = 576, 49152
    chunked, plain = (
        temporary_bytes(head_gradient(width, vocab, kind), *head_shapes(8, 512, width, vocab)) for kind in (False, True)
    )
    assert chunked <= plain / 8


@pytest.mark.parametrize("rows", [3, 8, 9, 40])
def test_chunks_never_cost_memory(rows: int) -> None:
    """On both sides of the threshold, which 9 rows of the length 64 pass for this head."""
    width, vocab = 512, 65536
    shapes = head_shapes(rows, 64, width, vocab)
    assert (number_of_chunks(rows * 64, width, vocab) > 1) == (rows > 8)
    assert temporary_bytes(head_gradient(width, vocab, False), *shapes) <= temporary_bytes(
        head_gradient(width, vocab, True), *shapes
    )


def test_memory_and_work_of_a_step() -> None:
    """The gradient of SysDPO on SmolLM2-135M's shape, 4 pairs of 512 tokens, float32, layers scanned and recomputed.

    At most 33 per cent of the temporary bytes with plain log-probabilities, at most 1.15 times the work.
    """
    config = dataclasses.replace(DECODERS["smollm2-135m"], remat="full")
    shape = jax.ShapeDtypeStruct
    numbers = {name: shape((4,), jnp.int32) for name in ("prompt_lengths", "lengths")}
    shares = {name: shape((4,), jnp.float32) for name in ("truncated", "retokenized")}
    texts = {"tokens": shape((4, 512), jnp.int32), "completion": shape((4, 480), jnp.bool_)}
    side = {"answer": numbers | shares | texts}
    costs = []
    for model in models(config, 32, 480):
        system = CompoundSystem(("request",), (Node("answer", model, ("request",)),))
        params = {"answer": jax.eval_shape(model.init, jax.random.key(0))}

        def loss(params: Any, reference: Any, batch: Any, system: CompoundSystem = system) -> jax.Array:
            return DirectObjective(0.1)(system, params, reference, batch, jax.random.key(0))[0]

        args = (params, params, PairBatch(side, side))
        costs.append((temporary_bytes(jax.grad(loss), *args), count_flops(jax.grad(loss), *args)))
    (memory, work), (plain_memory, plain_work) = costs
    assert memory <= 0.33 * plain_memory
    assert work <= 1.15 * plain_work
