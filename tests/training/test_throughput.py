"""Speed and utilisation against hand counts, on a clock that the test sets."""

from contextlib import nullcontext
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import (
    FROZEN,
    ComponentOptimizer,
    CompoundSystem,
    LanguageModel,
    Node,
    PairBatch,
    SampledBatch,
    Tool,
    create_state,
    make_mesh,
    make_optimizer,
)
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.training import throughput
from sysdpo_jax.training.throughput import FlopsError, Throughput, count_units, memory, padding
from tests.components.stubs import SPECIAL, WORDS, IdTokenizer, word_tokenizer
from tests.training.systems import CHAIN, pairs

ROWS = 4
TRAINED = ComponentOptimizer(optax.sgd(0.1))
OPTIMIZER = make_optimizer({"a": TRAINED, "b": TRAINED, "c": FROZEN})
# The products of a [rows, parents] matrix of values with a [parents, size] kernel: 2 rows parents size. A trained node
# has 3 of them for the policy and 1 for the reference, on two sides; the frozen one none.
NODE_FLOPS = {"a": 8 * 2 * ROWS * 2 * 3, "b": 8 * 2 * ROWS * 3 * 2, "c": 0}


STATE = create_state(CHAIN, CHAIN.init(jax.random.key(0)), OPTIMIZER)


def counted(steps=range(0), last=None):
    used = Throughput(CHAIN, make_mesh(), last=last)
    for step in steps:
        used.count(step, STATE, pairs(ROWS))
    return used


@pytest.fixture
def known_peak(monkeypatch):
    """The test's device at 1000 FLOP/s."""
    monkeypatch.setitem(throughput.PEAK_FLOPS, jax.devices()[0].device_kind, 1000.0)


def test_the_first_reading_holds_compilation_and_gives_no_speed(known_peak):
    used = counted(range(1))
    figures = used.read(0, 100.0)
    assert not [name for name in figures if name.startswith("throughput")]
    assert (used.waiting, used.last) == ([], 100.0)


def test_speed_and_utilisation_are_those_of_the_steps_between_two_readings(known_peak):
    used = counted(range(1))
    used.read(0, 100.0)
    for step in range(1, 6):
        used.count(step, STATE, pairs(ROWS))
    # The device has done the steps up to 4; step 5 is on its way.
    figures = used.read(4, 102.0)
    assert figures["throughput/steps_per_second"] == 4 / 2
    assert figures["throughput/pairs_per_second"] == 4 * ROWS / 2
    for node, flops in NODE_FLOPS.items():
        assert figures[f"throughput/mfu/{node}"] == pytest.approx(flops * 4 / 2 / 1000)
    assert figures["throughput/mfu"] == pytest.approx(sum(NODE_FLOPS.values()) * 4 / 2 / 1000)
    assert [counted.step for counted in used.waiting] == [5]
    assert used.read(5, 103.0)["throughput/steps_per_second"] == 1


def test_other_processes_count_as_much_as_this_one(known_peak, monkeypatch):
    alone = counted(range(2), last=0.0).read(1, 1.0)
    monkeypatch.setattr(throughput, "batch_shard", lambda mesh: (1, 3))
    three = counted(range(2), last=0.0).read(1, 1.0)
    assert three["throughput/steps_per_second"] == alone["throughput/steps_per_second"]
    for name in ("pairs_per_second", "mfu", "mfu/a"):
        assert three[f"throughput/{name}"] == pytest.approx(3 * alone[f"throughput/{name}"])


def test_there_is_no_utilisation_where_the_peak_is_not_known():
    used = counted(range(1), last=0.0)
    assert not used.flops
    assert used.read(0, 1.0) == {"throughput/steps_per_second": 1.0, "throughput/pairs_per_second": float(ROWS)}


def test_batches_of_other_shapes_have_their_own_flops(known_peak):
    """Each step counts as what it is: a batch of twice the rows has twice the FLOPs of one of the others."""
    used = counted(range(1), last=0.0)
    used.count(1, STATE, pairs(2 * ROWS))
    assert used.read(1, 1.0)["throughput/mfu"] == pytest.approx(3 * sum(NODE_FLOPS.values()) / 1000)
    assert len(used.flops) == 2


def test_a_step_whose_flops_nobody_knows_leaves_the_row_without_utilisation(known_peak, monkeypatch):
    used = counted(range(1), last=0.0)

    def unknown(*arguments):
        raise FlopsError("a kernel")

    monkeypatch.setattr(throughput, "step_flops", unknown)
    for step in (1, 2):
        with pytest.warns(UserWarning, match="no throughput/mfu: a kernel") if step == 1 else nullcontext():
            used.count(step, STATE, pairs(2 * ROWS))
    figures = used.read(2, 1.0)
    assert figures["throughput/pairs_per_second"] == 5 * ROWS
    assert not [name for name in figures if "mfu" in name]
    used.count(3, STATE, pairs(ROWS))
    assert "throughput/mfu/a" in used.read(3, 2.0)


def test_padding_is_the_share_of_places_without_a_token():
    decoder = Decoder(DecoderConfig(len(SPECIAL) + len(WORDS), 8, 16, 1, 2, 2, max_position_embeddings=12))
    system = CompoundSystem(
        ("request",), (Node("answer", LanguageModel(decoder, word_tokenizer(), 6, 6), ("request",)),)
    )
    features = system.prepare([{"request": "a red", "answer": "ball"}, {"request": "a", "answer": "red green ball"}])
    # Three tokens of twelve places in the first row, four in the second, and an end in each.
    assert padding(system, [*features.items()] * 2) == {"answer": pytest.approx(1 - 9 / 24)}
    resized = system.node("answer").component.resize(features["answer"], {"prompt": 2, "completion": 4})
    assert padding(system, [("answer", resized)]) == {"answer": pytest.approx(1 - 9 / 12)}


def test_another_batch_gives_steps_alone(known_peak):
    used = counted(last=0.0)
    used.count(0, STATE, {"x": np.zeros(3)})
    assert used.read(0, 0.5) == {"throughput/steps_per_second": 2.0}


def image_system():
    """Request -> answer -> two captions -> two images, with the progressive experiment's diffusion."""
    from experiments.progressive.system import ModelConfig, diffusion

    decoder = Decoder(DecoderConfig(11, 8, 16, 1, 2, 2, max_position_embeddings=12))
    return CompoundSystem(
        ("request",),
        (
            Node("answer", LanguageModel(decoder, IdTokenizer(), 6, 6), ("request",)),
            Node("captions", Tool(lambda answer: [answer] * 2), ("answer",), plate=2),
            Node("images", diffusion(ModelConfig()), ("captions",), plate=2),
        ),
    )


def test_tokens_and_images_of_both_sides_count_whatever_axes_they_have():
    system = image_system()
    latent = system.node("images").component.codec.latent_shape

    def side(lengths):
        rows = len(lengths)
        return {
            "answer": {"lengths": np.array(lengths, np.int32), "tokens": np.zeros((rows, 12), np.int32)},
            "captions": {},
            "images": {"latents": np.zeros((rows, 2, *latent), np.float32)},
        }

    batch = PairBatch(side([5, 7, 3]), side([2, 2, 2]))
    assert count_units(system, batch) == {
        "pairs_per_second": 3,
        "tokens_per_second/answer": 21,
        "images_per_second/images": 12,
    }


def test_searched_intermediates_count_once_and_outputs_on_both_sides():
    system = image_system()
    latent = system.node("images").component.codec.latent_shape
    images = {"images": {"latents": np.zeros((2, 3, 2, *latent), np.float32)}}
    answers = {"answer": {"lengths": np.array([[1, 2, 3], [4, 5, 6]], np.int32)}}
    batch = SampledBatch(answers, PairBatch(images, images), np.ones((2, 3), bool), np.zeros(2, np.int32))
    assert count_units(system, batch) == {
        "pairs_per_second": 2,
        "tokens_per_second/answer": 21,
        "images_per_second/images": 2 * 2 * 3 * 2,
    }


def test_memory_is_that_of_the_fullest_device():
    def device(peak, used):
        return SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": peak, "bytes_in_use": used})

    assert memory([device(5, 4), device(9, 1)]) == {"memory/peak_bytes": 9.0, "memory/bytes_in_use": 4.0}
    assert memory([SimpleNamespace(memory_stats=lambda: None)]) == {}
