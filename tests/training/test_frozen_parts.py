"""Training with frozen parts among the parameters: encoded once, never changed, in memory once, identified."""

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import (
    FROZEN,
    Categorical,
    CompoundSystem,
    DirectObjective,
    Node,
    PreferenceRecord,
    SamplingObjective,
    SearchedBatches,
    Tool,
    Trainer,
    create_state,
    describe_sharding,
    encode_batch,
    epoch_batches,
    make_optimizer,
    make_train_step,
    prepare_pairs,
)
from sysdpo_jax.training import CheckpointMismatchError, ComponentOptimizer, OptimizerError, make_mesh
from sysdpo_jax.training.ahead_of_time import device_bytes
from sysdpo_jax.training.throughput import step_flops
from sysdpo_jax.trees import by_path
from tests.components.drawn import drawn
from tests.components.painters import encoded_since, images, painter
from tests.distributed.test_meshes import printed
from tests.training.systems import trained_rows

KEY = jax.random.key(3)
# A decay that no gradient asks for would move whatever the optimiser reaches.
OPTIMIZER = make_optimizer({"image": ComponentOptimizer(optax.adamw(1e-2, weight_decay=0.5))}, ema_decay=0.9)


def system_of(**settings):
    node = Node("image", painter(caption_dropout=0.5, **settings), ("caption",))
    return CompoundSystem(("caption",), (node,))


def records(rows=4):
    """Captions that come twice, the same on both sides; images that differ."""
    pictures = images(2 * rows)
    sides = zip(pictures[::2], pictures[1::2], strict=True)
    return [
        PreferenceRecord({"caption": ("a ball", "cube")[row % 2]}, {"image": chosen}, {"image": rejected})
        for row, (chosen, rejected) in enumerate(sides)
    ]


@pytest.fixture(scope="module")
def system():
    return system_of()


@pytest.fixture(scope="module")
def params(system):
    return drawn(system.init)


def test_frozen_entries_are_not_trained_and_in_memory_once(system, params):
    """Not by weight decay either; neither optimiser nor average knows them, and the reference has the very arrays."""
    batch = encode_batch(system, params, prepare_pairs(system, records()))
    mesh = make_mesh()
    step, state = make_train_step(system, DirectObjective(), OPTIMIZER), create_state(system, params, OPTIMIZER, mesh)
    before = jax.device_get(by_path(state.params["image"]))
    [row] = describe_sharding(step, state).components
    trained = device_bytes(state.params["image"]["denoiser"])
    assert row.params == device_bytes(state.params["image"]) > device_bytes(state.params["image"]["codec"]) > trained
    assert row.reference == trained
    # Two moments and a count; the average.
    assert row.optimizer == 3 * trained + 4
    for _ in range(2):
        state, metrics = step(state, batch, KEY)
    assert metrics["finite"]
    reference = by_path(state.reference_params["image"])
    for path, leaf in by_path(state.params["image"]).items():
        frozen = not path.startswith("denoiser/")
        assert np.array_equal(leaf, before[path]) == frozen, path
        assert (leaf is reference[path]) == frozen, path
    assert len(jax.tree.leaves(state.ema)) == len(jax.tree.leaves(state.params["image"]["denoiser"]))


def test_the_steps_operations_are_the_denoisers_alone(system, params):
    batch = encode_batch(system, params, prepare_pairs(system, records()))
    state = create_state(system, params, OPTIMIZER)
    counted = step_flops(system, state, batch)["image"]
    text = batch.chosen["image"]["text"]["encoded"][0]
    # Affine: latents [4, 6, 2] by a 2 x 2 matrix, and 5 tokens of width 4 by a 4 x 2 one.
    assert counted == 2 * 4 * len(text) * 2 * (4 * 6 * 2 * 2 + 5 * 4 * 2)


def test_raw_data_are_encoded_once_and_train_as_encoded_ones(system, params, tmp_path):
    """Five steps over data of two steps an epoch; a plain function's batches are encoded when they come."""
    raw = prepare_pairs(system, records())
    names = ("raw", "plain", "made")
    trainers = {name: Trainer(system, DirectObjective(), OPTIMIZER, tmp_path / name) for name in names}
    batches = epoch_batches(raw, 2, seed=0)
    encoded_since()
    state = trainers["raw"].fit(create_state(system, params, OPTIMIZER), batches, 5, KEY)
    texts, pictures = encoded_since()
    # Two captions and the empty one, of both sides together; eight pictures, two at a time.
    assert (texts, pictures) == ([2, 1], [2] * 4)
    trainers["plain"].fit(create_state(system, params, OPTIMIZER), lambda step: batches(step), 5, KEY)
    assert len(encoded_since()[1]) == 5 * 2
    whole = epoch_batches(encode_batch(system, params, raw), 2, seed=0)
    encoded_since()
    trainers["made"].fit(create_state(system, params, OPTIMIZER), whole, 5, KEY)
    assert encoded_since() == ([], [])
    assert trained_rows(tmp_path / "raw") == trained_rows(tmp_path / "made") == trained_rows(tmp_path / "plain")
    assert int(state.step) == 5
    # The user's own object is as it was.
    assert batches.data is raw


def test_a_step_says_what_to_do_with_raw_features(system, params):
    step, state = make_train_step(system, DirectObjective(), OPTIMIZER), create_state(system, params, OPTIMIZER)
    with pytest.raises(ValueError, match=r"the features hold pixels, captions, null_captions.*encode_batch"):
        step(state, prepare_pairs(system, records()), KEY)


@pytest.mark.parametrize("entry", ["codec", "text"])
def test_a_run_does_not_go_on_with_other_frozen_weights(entry, system, params, tmp_path):
    trainer = Trainer(system, DirectObjective(), OPTIMIZER, tmp_path)
    batches = epoch_batches(prepare_pairs(system, records()), 2, seed=0)
    trainer.fit(create_state(system, params, OPTIMIZER), batches, 1, KEY)
    other = {"image": params["image"] | {entry: jax.tree.map(lambda x: x * 1.01, params["image"][entry])}}
    with pytest.raises(CheckpointMismatchError, match=rf"frozen\.image/{entry}/"):
        trainer.fit(create_state(system, other, OPTIMIZER), batches, 2, KEY)
    trainer.fit(create_state(system, params, OPTIMIZER), batches, 2, KEY)


def to_caption(word):
    return ("a ball", "cube", "red")[word]


def test_a_role_encodes_with_the_frozen_parts_of_its_base(system, params):
    """The role's own tree holds none of them."""
    [node] = system.nodes
    role = Node("again", node.component, ("caption",), base="image")
    graph = CompoundSystem(("caption",), (node, role))
    both = {**params, "again": {}}
    frozen = graph.frozen_params(both)
    assert frozen == system.frozen_params(params)
    pictures = images(2)
    raw = graph.prepare([{"caption": "a ball", "image": picture, "again": picture} for picture in pictures])
    made = graph.encode(frozen, raw)
    jax.tree.map(np.testing.assert_array_equal, made["image"], made["again"])
    found = graph.log_prob(both, {**made, "again": made["image"]}, KEY)
    assert np.isfinite(found["again"]).all()
    optimizer = make_optimizer({"image": FROZEN, "again": ComponentOptimizer(optax.adam(1e-2))})
    with pytest.raises(OptimizerError, match="matches no parameter of 'again'"):
        create_state(graph, both, optimizer)


def test_searched_batches_encode_each_image_once_for_all_intermediates(tmp_path):
    """Two records of two images each, with three captions: four images and three texts a batch, and the empty one."""
    pictures = images(4)
    system = CompoundSystem(
        ("x",),
        (
            Node("word", Categorical(3, (2,)), ("x",)),
            Node("caption", Tool(to_caption), ("word",)),
            Node("image", painter(caption_dropout=0.5), ("caption",)),
        ),
    )
    preferences = [PreferenceRecord({"x": i}, {"image": pictures[i]}, {"image": pictures[2 + i]}) for i in range(2)]
    optimizer = make_optimizer({name: ComponentOptimizer(optax.adam(1e-2)) for name in ("word", "image")})
    batches = SearchedBatches(system, preferences, batch_size=2, seed=0, num_intermediates=3)
    state = create_state(system, system.init(KEY), optimizer)
    encoded_since()
    state = Trainer(system, SamplingObjective(), optimizer, tmp_path).fit(state, batches, 1, KEY)
    assert encoded_since() == ([4, 1], [2, 2])
    assert int(state.step) == 1


@pytest.mark.slow
def test_frozen_parts_are_cut_over_a_mesh_and_encode_there():
    """On 8 virtual devices: every large leaf lies over fsdp, and the features are those of one device to 1e-5."""
    found = printed("frozen_parts")
    assert found["whole"] == []
    assert found["cut"] > 10
    assert found["difference"] < 1e-5
    assert found["bytes_of_one"] > 3 * found["bytes_of_eight"]
