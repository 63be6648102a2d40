"""Language and image models behind a switch and in a loop: padding, shared prompts, frozen parts, FLOPs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sysdpo_jax import (
    CompoundSystem,
    DirectObjective,
    Loop,
    Node,
    PreferenceRecord,
    Switch,
    Tool,
    create_state,
    encode_batch,
    make_optimizer,
    make_train_step,
    preference_dataset,
    prepare_pairs,
)
from sysdpo_jax.components.routed import Routed
from sysdpo_jax.training import ComponentOptimizer
from sysdpo_jax.training.throughput import Throughput, count_units, padding, step_flops
from tests.components.painters import painter
from tests.data.prepared_systems import init, words, writer

KEY = jax.random.key(0)


def told(question, turns):
    return " on ".join([question, *(turn["said"] for turn in turns)])


def enough(turn):
    return len(turn["said"].split()) > 6


def texts():
    """A question goes to one writer, or to an agent of up to three turns whose last words are the answer."""
    body = (Node("prompt", Tool(told), ("question", "turns")), Node("said", writer(), ("prompt",), params="agent"))
    return CompoundSystem(
        ("question", "route"),
        (
            Node("short", writer(), ("question",)),
            Loop("turns", body, 3, enough),
            Node("last", Tool(last_words), ("turns",)),
            Node("answer", Switch(("short", "long")), ("route", "short", "last")),
        ),
    )


def last_words(turns):
    return turns[-1]["said"]


SYSTEM = texts()


def record(row):
    rng = np.random.default_rng((row, 3))
    route = ("short", "long")[row % 2]

    def side():
        if route == "short":
            return {"short": words(rng, 7)}
        turns = [{"said": words(rng, 7)}]
        while len(turns) < 3 and not enough(turns[-1]):
            turns.append({"said": words(rng, 7)})
        return {"turns": turns}

    return PreferenceRecord({"question": words(rng, 9), "route": route}, side(), side())


RECORDS = [record(row) for row in range(24)]
PARAMS = init(SYSTEM)


def turns_of(records, side):
    """The prompts and texts of every turn of the records, and whose they are."""
    rows = []
    for number, each in enumerate(records):
        turns = getattr(each, side).get("turns", [])
        rows += [(number, told(each.inputs["question"], turns[:k]), turn["said"]) for k, turn in enumerate(turns)]
    return rows


def alone(params, rows, count):
    """log p of texts after their prompts by the component itself, summed for each record."""
    if not rows:
        return np.zeros(count)
    numbers, prompts, said = zip(*rows, strict=True)
    model = writer()
    features = model.prepare(list(said), {"prompt": list(prompts)})
    values = jax.jit(lambda params: model.log_prob(params, features, KEY))(params)
    return np.bincount(numbers, np.asarray(values, np.float64), count)


def test_log_probs_are_those_of_the_models_alone():
    """In memory and from the store, whose rows have other sizes; float32 sums of up to 60 tokens, so 1e-4."""
    dataset = preference_dataset(SYSTEM, RECORDS, 8, seed=0)
    picked = [RECORDS[row] for row in dataset.plan.at(0)[0]]
    batches = [(RECORDS, prepare_pairs(SYSTEM, RECORDS)), (picked, dataset[0])]
    for records, batch in batches:
        for side in ("chosen", "rejected"):
            features = getattr(batch, side)
            assert features["said"].features["tokens"].shape[:2] == (len(records), 3)
            terms = jax.jit(SYSTEM.log_prob)(PARAMS, features, KEY)
            np.testing.assert_allclose(
                terms["said"], alone(PARAMS["agent"], turns_of(records, side), len(records)), atol=1e-4
            )
            short = [
                (n, r.inputs["question"], getattr(r, side)["short"])
                for n, r in enumerate(records)
                if r.inputs["route"] == "short"
            ]
            np.testing.assert_allclose(terms["short"], alone(PARAMS["short"], short, len(records)), atol=1e-4)


def test_a_step_computes_what_ran_and_counts_it():
    dataset = preference_dataset(SYSTEM, RECORDS, 8, seed=0)
    batch = dataset[0]
    optimizer = make_optimizer({name: ComponentOptimizer(optax.sgd(0.1)) for name in SYSTEM.param_keys})
    state = create_state(SYSTEM, jax.tree.map(jnp.array, PARAMS), optimizer)
    dense = batch._replace(
        chosen={n: replace(f, room=None) if isinstance(f, Routed) else f for n, f in batch.chosen.items()},
        rejected={n: replace(f, room=None) if isinstance(f, Routed) else f for n, f in batch.rejected.items()},
    )
    routed, whole = (step_flops(SYSTEM, state, which) for which in (batch, dense))
    for name in ("short", "said"):
        places = 2 * batch.chosen[name].ran.size
        share = -(-batch.chosen[name].room // 2) * 2 / places
        np.testing.assert_allclose(routed[name] / whole[name], share, rtol=1e-6)
        assert share < 1
    picked = [RECORDS[row] for row in dataset.plan.at(0)[0]]
    ran = [row for side in ("chosen", "rejected") for row in turns_of(picked, side)]
    units = count_units(SYSTEM, batch)
    model = writer()
    made = model.prepare([text for *_, text in ran], {"prompt": [prompt for _, prompt, _ in ran]})
    assert units["tokens_per_second/said"] == made["lengths"].sum()
    shares = padding(SYSTEM, [("said", batch.chosen["said"])])
    assert 0 < shares["said"] < 1
    watched = Throughput(SYSTEM, make_train_step(SYSTEM, DirectObjective(), optimizer).mesh)
    watched.count(0, state, batch)
    assert "padding/said" in watched.read(0, 1.0)


def test_a_step_on_routed_texts_is_that_on_all_rows():
    """With room and without, and in two parts: the same update, to rounding."""
    dataset = preference_dataset(SYSTEM, RECORDS, 8, seed=0)
    optimizer = make_optimizer({name: ComponentOptimizer(optax.sgd(0.1)) for name in SYSTEM.param_keys})
    batch = dataset[0]
    dense = jax.tree.map(lambda x: x, batch)
    for side in (dense.chosen, dense.rejected):
        side |= {n: replace(f, room=None) for n, f in side.items() if isinstance(f, Routed)}
    made = []
    for which, accumulate in ((batch, 1), (batch, 2), (dense, 1)):
        state = create_state(SYSTEM, jax.tree.map(jnp.array, PARAMS), optimizer)
        state, metrics = make_train_step(SYSTEM, DirectObjective(), optimizer, accumulate=accumulate)(state, which, KEY)
        made.append((jax.device_get(state.params), float(metrics["loss"])))
        assert bool(metrics["finite"])
    for params, loss in made[1:]:
        np.testing.assert_allclose(loss, made[0][1], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, made[0][0])


def test_texts_are_sampled_for_the_rows_that_run():
    inputs = [{"question": "a red ball", "route": ("short", "long")[row % 2]} for row in range(6)]
    runs = SYSTEM.sample(PARAMS, inputs, KEY)
    for run in runs:
        assert ("short" in run, "turns" in run) == (run["route"] == "short", run["route"] == "long")
        if "turns" in run:
            assert run["answer"] == run["turns"][-1]["said"]
    again = SYSTEM.attempt(PARAMS, [None, inputs[1], None, None, inputs[4], None], KEY)
    assert [again[1], again[4]] == [runs[1], runs[4]]


def pictures():
    return CompoundSystem(
        ("caption", "route"),
        (
            Node("painted", painter(caption_dropout=0.5), ("caption",)),
            Node("answer", Switch((0, 1)), ("route", "painted", "caption")),
        ),
    )


@pytest.mark.parametrize("stored", [True, False])
def test_frozen_parts_encode_what_ran(stored):
    """Noise is a row's own: the routed rows have the log-probabilities that they have among all."""
    system, rng = pictures(), np.random.default_rng(0)
    params = init(system)

    def side(route):
        return {"painted": rng.random((4, 6, 3))} if route == 0 else {}

    routes = [row % 2 for row in range(8)]
    records = [PreferenceRecord({"caption": "a ball", "route": r}, side(r), side(r)) for r in routes]
    if stored:
        dataset = preference_dataset(system, records, 8, seed=0)
        dataset.prepare(params)
        batch, order = dataset[0], dataset.plan.at(0)[0]
        assert batch.chosen["painted"].room == 8
    else:
        batch, order = encode_batch(system, params, prepare_pairs(system, records)), np.arange(8)
    records = [records[row] for row in order]
    keys = jax.random.split(jax.random.key(1), 8)
    terms = system.log_prob(params, batch.chosen, keys)["painted"]
    ran = [row for row, each in enumerate(records) if each.inputs["route"] == 0]
    plain = CompoundSystem(("caption",), (Node("painted", painter(caption_dropout=0.5), ("caption",)),))
    runs = [{"caption": "a ball", "painted": records[row].chosen["painted"]} for row in ran]
    features = plain.encode(params, plain.prepare(runs))
    expected = plain.log_prob(params, features, keys[np.array(ran)])["painted"]
    np.testing.assert_allclose(np.asarray(terms)[ran], expected, rtol=1e-4)
    assert not np.asarray(terms)[[row for row in range(8) if row not in ran]].any()


def test_pictures_are_sampled_from_their_rows_own_keys():
    system = pictures()
    params = init(system)
    inputs = [{"caption": "a ball", "route": route} for route in (0, 1, 0, 0)]
    runs = system.sample(params, inputs, KEY)
    assert ["painted" in run for run in runs] == [True, False, True, True]
    [alone] = [run for run in system.attempt(params, [None, None, inputs[2], None], KEY) if run]
    np.testing.assert_allclose(alone["painted"], runs[2]["painted"], atol=1e-5)
    assert np.abs(runs[0]["painted"] - runs[2]["painted"]).max() > 1e-3
