"""Speed and utilisation against hand counts, on a clock that the test sets."""

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
from sysdpo_jax.training.throughput import Meter, Throughput, count_units, memory, padding
from tests.components.stubs import SPECIAL, WORDS, IdTokenizer, word_tokenizer
from tests.training.systems import CHAIN, pairs

ROWS = 4
TRAINED = ComponentOptimizer(optax.sgd(0.1))
OPTIMIZER = make_optimizer({"a": TRAINED, "b": TRAINED, "c": FROZEN})
# The products of a [rows, parents] matrix of values with a [parents, size] kernel: 2 rows parents size. A trained node
# has 3 of them for the policy and 1 for the reference, on two sides; the frozen one none.
NODE_FLOPS = {"a": 8 * 2 * ROWS * 2 * 3, "b": 8 * 2 * ROWS * 3 * 2, "c": 0}


def meter_of(steps=range(0)):
    used = Throughput(CHAIN, make_mesh())
    state = create_state(CHAIN, CHAIN.init(jax.random.key(0)), OPTIMIZER)
    meter = Meter()
    for step in steps:
        meter = used.count(meter, step, state, pairs(ROWS))
    return used, meter, state


@pytest.fixture
def known_peak(monkeypatch):
    """The test's device at 1000 FLOP/s."""
    monkeypatch.setitem(throughput.PEAK_FLOPS, jax.devices()[0].device_kind, 1000.0)


def test_the_first_reading_holds_compilation_and_gives_no_speed(known_peak):
    used, meter, _ = meter_of(range(1))
    after, figures = used.read(meter, 0, 100.0)
    assert not [name for name in figures if name.startswith("throughput")]
    assert after == Meter(meter.flops, (), (0, 100.0))


def test_speed_and_utilisation_are_those_of_the_steps_between_two_readings(known_peak):
    used, meter, state = meter_of(range(1))
    meter, _ = used.read(meter, 0, 100.0)
    for step in range(1, 6):
        meter = used.count(meter, step, state, pairs(ROWS))
    # The device has done the steps up to 4; step 5 is on its way.
    after, figures = used.read(meter, 4, 102.0)
    assert figures["throughput/steps_per_second"] == 4 / 2
    assert figures["throughput/pairs_per_second"] == 4 * ROWS / 2
    for node, flops in NODE_FLOPS.items():
        assert figures[f"throughput/mfu/{node}"] == pytest.approx(flops * 4 / 2 / 1000)
    assert figures["throughput/mfu"] == pytest.approx(sum(NODE_FLOPS.values()) * 4 / 2 / 1000)
    assert [counted.step for counted in after.waiting] == [5]
    assert used.read(after, 5, 103.0)[1]["throughput/steps_per_second"] == 1


def test_other_processes_count_as_much_as_this_one(known_peak, monkeypatch):
    used, meter, _ = meter_of(range(2))
    meter = meter._replace(last=(-1, 0.0))
    alone = used.read(meter, 1, 1.0)[1]
    monkeypatch.setattr(throughput, "batch_shard", lambda mesh: (1, 3))
    three = used.read(meter, 1, 1.0)[1]
    assert three["throughput/steps_per_second"] == alone["throughput/steps_per_second"]
    for name in ("pairs_per_second", "mfu", "mfu/a"):
        assert three[f"throughput/{name}"] == pytest.approx(3 * alone[f"throughput/{name}"])


def test_there_is_no_utilisation_where_the_peak_is_not_known():
    used, meter, _ = meter_of(range(1))
    assert not meter.flops
    figures = used.read(meter._replace(last=(-1, 0.0)), 0, 1.0)[1]
    assert figures == {"throughput/steps_per_second": 1.0, "throughput/pairs_per_second": float(ROWS)}


def test_batches_of_other_shapes_have_their_own_flops(known_peak):
    """Each step counts as what it is: a batch of twice the rows has twice the FLOPs of one of the others."""
    used, meter, state = meter_of(range(1))
    meter = used.count(meter, 1, state, pairs(2 * ROWS))._replace(last=(-1, 0.0))
    figures = used.read(meter, 1, 1.0)[1]
    assert figures["throughput/mfu"] == pytest.approx(3 * sum(NODE_FLOPS.values()) / 1000)
    assert len(meter.flops) == 2


def test_padding_is_the_share_of_places_without_a_token():
    decoder = Decoder(DecoderConfig(len(SPECIAL) + len(WORDS), 8, 16, 1, 2, 2, max_position_embeddings=12))
    system = CompoundSystem(
        ("request",), (Node("answer", LanguageModel(decoder, word_tokenizer(), 6, 6), ("request",)),)
    )
    features = system.prepare([{"request": "a red", "answer": "ball"}, {"request": "a", "answer": "red green ball"}])
    # Three tokens of twelve places in the first row, four in the second, and an end in each.
    assert padding(system, [features, features]) == {"answer": pytest.approx(1 - 9 / 24)}
    resized = system.node("answer").component.resize(features["answer"], {"prompt": 2, "completion": 4})
    assert padding(system, [{"answer": resized}]) == {"answer": pytest.approx(1 - 9 / 12)}


def test_another_batch_gives_steps_alone(known_peak):
    used, meter, state = meter_of()
    meter = used.count(meter._replace(last=(-1, 0.0)), 0, state, {"x": np.zeros(3)})
    figures = used.read(meter, 0, 0.5)[1]
    assert figures == {"throughput/steps_per_second": 2.0}


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

    counted = count_units(system, PairBatch(side([5, 7, 3]), side([2, 2, 2])))
    assert counted == {"pairs_per_second": 3, "tokens_per_second/answer": 21, "images_per_second/images": 12}


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
