"""Records without intermediates, and the intermediates drawn for them."""

import itertools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    Gaussian,
    GraphError,
    LanguageModel,
    Node,
    PreferenceRecord,
    RecordError,
    SearchedBatches,
    Switch,
    Tool,
    draw_intermediates,
    load_preferences,
    prepare_pairs,
    sampled_batch,
    without_intermediates,
)
from sysdpo_jax.data.intermediates import IntermediateSearch
from sysdpo_jax.data.records import hold_intermediates
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.values import distinct
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer

KEY = jax.random.key(0)


def half(value):
    return value // 2


def fails(value):
    raise AssertionError("nothing asks for it")


def total(values):
    return sum(values)


# x -> route (2 values) -> part (x4, read by a tool) -> z; the tool `seen` reads the final value.
SYSTEM = CompoundSystem(
    ("x",),
    (
        Node("route", Categorical(2, (3,)), ("x",)),
        Node("part", Categorical(4, (2,)), ("route",)),
        Node("half", Tool(half), ("part",)),
        Node("z", Categorical(3, (2, 2)), ("half", "route")),
        Node("seen", Tool(half), ("z",)),
    ),
)
PARAMS = SYSTEM.init(jax.random.key(1))
WHOLE = PreferenceRecord({"x": 0}, {"route": 1, "part": 2, "z": 0}, {"route": 0, "part": 3, "z": 1})
FINAL = PreferenceRecord({"x": 2}, {"z": 0}, {"z": 1})


def test_intermediates_and_outputs_of_a_graph():
    assert [node.name for node in SYSTEM.intermediates] == ["route", "part"]
    assert [node.name for node in SYSTEM.outputs] == ["z"]
    single = CompoundSystem(("x",), (Node("y", Categorical(2, (3,)), ("x",)), Node("t", Tool(half), ("y",))))
    assert single.intermediates == ()
    assert [node.name for node in single.outputs] == ["y"]


def test_records_with_and_without_intermediates_are_told_apart():
    assert hold_intermediates(SYSTEM, [WHOLE, WHOLE])
    assert not hold_intermediates(SYSTEM, [FINAL, FINAL])
    assert without_intermediates(SYSTEM, [WHOLE]) == [PreferenceRecord({"x": 0}, {"z": 0}, {"z": 1})]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([WHOLE, FINAL], "record 1: chosen lacks the intermediate values route, part, unlike what stands before"),
        ([FINAL, WHOLE], "record 1: chosen has the intermediate values route, part, unlike what stands before"),
        (
            [PreferenceRecord({"x": 0}, WHOLE.chosen, FINAL.rejected)],
            "record 0: rejected lacks the intermediate values route, part",
        ),
        (
            [WHOLE, PreferenceRecord({"x": 0}, WHOLE.chosen, {"part": 1, "z": 0})],
            "record 1: rejected holds part but not route: give all intermediate values or none",
        ),
        ([FINAL], r"the records hold no intermediate values \(route, part\): record them, or train with Sampling"),
    ],
)
def test_mixed_records_are_refused_by_row(records, message):
    with pytest.raises(RecordError, match=message):
        prepare_pairs(SYSTEM, records)


def way(x):
    return ("a", "b", "c")[x]


def ways():
    """x chooses by a tool between da -> a, db -> b, and c, which has no intermediate value."""
    table = Categorical(2, (3,))
    drafts = (Node("da", table, ("x",)), Node("db", table, ("x",)))
    end = Categorical(2, (2,))
    ends = (Node("a", end, ("da",)), Node("b", end, ("db",)), Node("c", table, ("x",)))
    answer = Node("answer", Switch(("a", "b", "c")), ("way", "a", "b", "c"))
    return CompoundSystem(("x",), (Node("way", Tool(way), ("x",)), *drafts, *ends, answer))


def of_way(x, whole):
    """Both sides of a record, as a table has them: null where there is no value."""
    end = way(x)
    sides = ({"a": None, "b": None, "c": None, "da": None, "db": None} | {end: z} for z in (0, 1))
    return PreferenceRecord({"x": x}, *({**side, f"d{end}": 1} if whole and end != "c" else side for side in sides))


@pytest.mark.parametrize("rows", [(0, 1, 2), (2, 0, 1), (2, 1, 2)])
def test_intermediates_that_all_stand_behind_switches_are_told_by_those_that_run(rows, tmp_path):
    """Rows whose way has none are of either kind, wherever they stand: in memory and in a file."""
    system = ways()
    assert [node.name for node in system.intermediates if system.is_routed(node)] == ["da", "db"]
    for whole in (True, False):
        records = [of_way(x, whole) for x in rows]
        assert hold_intermediates(system, records) == whole
        path = tmp_path / f"{whole}.jsonl"
        lines = [{"inputs": r.inputs, "chosen": r.chosen, "rejected": r.rejected} for r in records]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        read = load_preferences(path, system, cache=tmp_path / "cache")
        assert (len(read), read.held) == (3, whole)
    last = next(x for x in rows if x != 2)
    for whole, word in ((True, "has"), (False, "lacks")):
        message = f"record 3: chosen {word} the intermediate values d{way(last)}, unlike what stands before"
        with pytest.raises(RecordError, match=message):
            hold_intermediates(system, [*(of_way(x, not whole) for x in rows), of_way(last, whole)])
    half = of_way(0, True)
    with pytest.raises(RecordError, match="record 0: rejected lacks the intermediate values da"):
        hold_intermediates(system, [replace(half, rejected=of_way(0, False).rejected)])


def test_intermediates_are_searched_for_where_all_stand_behind_a_switch(tmp_path):
    """Both drafts of a row's own way are found, and none of the other way."""
    system, rows = ways(), [0, 1, 0, 1]
    params = system.init(jax.random.key(3))
    batches = SearchedBatches(system, [of_way(x, False) for x in rows], 4, seed=0, num_intermediates=2)
    search = IntermediateSearch(batches, tmp_path)
    batch = search.batch(0, lambda: params)
    assert batch.valid.all()
    order = [rows[row] for row in batches.rows_at(0)]
    for name, x in (("da", 0), ("db", 1)):
        np.testing.assert_array_equal(batch.intermediates[name].ran.all(1), [other == x for other in order])


@pytest.mark.parametrize(("number", "routes"), [(4, 1), (8, 2)])
def test_a_route_behind_what_fills_the_sets_is_its_likeliest_one(number, routes):
    """As docs/systems.md says: four values fill four sets; of eight, each value has both routes, the likelier first."""
    end = Categorical(2, (4,))
    nodes = (
        Node("wide", Categorical(4, (3,)), ("x",)),
        Node("route", Categorical(2, (4,)), ("wide",)),
        *(Node(name, end, ("wide",)) for name in "ab"),
    )
    system = CompoundSystem(("x",), (*nodes, Node("answer", Switch((0, 1)), ("route", "a", "b"))))
    params = system.init(jax.random.key(5))
    [sets] = draw_intermediates(system, params, [{"x": 0}], number, KEY)
    likely = np.argsort(-np.asarray(params["route"]["logits"]), axis=-1)
    found = {wide: [y["route"] for y in sets if y["wide"] == wide] for wide in range(4)}
    assert found == {wide: likely[wide, :routes].tolist() for wide in range(4)}


def test_a_file_of_final_values_is_read(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"inputs": {"x": 2}, "chosen": {"z": 0}, "rejected": {"z": 1}}\n')
    assert load_preferences(path) == [FINAL]


def test_a_missing_final_value_is_named():
    with pytest.raises(RecordError, match="record 1: rejected lacks a value for z: add the field"):
        without_intermediates(SYSTEM, [FINAL, PreferenceRecord({"x": 0}, {"z": 0}, {"route": 0})])


def log_softmax(name):
    return np.asarray(jax.nn.log_softmax(PARAMS[name]["logits"]))


def test_the_sets_are_distinct_and_the_likeliest_by_turns():
    """Two routes do not fill six sets, so each is continued by its three likeliest parts: NumPy's order of both."""
    drawn = draw_intermediates(SYSTEM, PARAMS, [{"x": x} for x in range(3)], 6, KEY)
    for x, sets in enumerate(drawn):
        routes = np.argsort(-log_softmax("route")[x]).tolist()
        parts = {route: np.argsort(-log_softmax("part")[route]).tolist() for route in routes}
        assert sets == [{"route": route, "part": parts[route][turn]} for turn in range(3) for route in routes]


def test_all_of_a_small_space_is_found_once():
    [sets] = draw_intermediates(SYSTEM, PARAMS, [{"x": 0}], 20, KEY)
    expected = {(route, part) for route, part in itertools.product(range(2), range(4))}
    assert len(sets) == 8
    assert {(y["route"], y["part"]) for y in sets} == expected


def test_copies_of_a_plate_are_combined_by_the_sum_of_their_ranks():
    """Every combination is among as many sets as there are combinations."""
    system = CompoundSystem(
        ("x",),
        (
            Node("y", Categorical(3, (2,)), ("x",), plate=2),
            Node("sum", Tool(total), ("y",)),
            Node("z", Categorical(2, (5,)), ("sum",)),
        ),
    )
    params = system.init(jax.random.key(2))
    [few], [every] = (draw_intermediates(system, params, [{"x": 1}], number, KEY) for number in (4, 9))
    rank = {value: place for place, value in enumerate(np.argsort(-np.asarray(params["y"]["logits"])[1]).tolist())}
    assert few == every[:4]
    sums = [sum(rank[value] for value in y["y"]) for y in every]
    assert sums == sorted(sums) == [0, 1, 1, 2, 2, 2, 3, 3, 4]
    assert len({tuple(y["y"]) for y in every}) == 9


def test_what_a_tool_gave_of_the_inputs_is_kept():
    """Retrieval: the recorded document, not the one that the tool would give now; and only what is needed is run."""
    system = CompoundSystem(
        ("x",),
        (
            Node("document", Tool(half), ("x",)),
            Node("y", Categorical(3, (4,)), ("document",)),
            Node("z", Categorical(2, (3,)), ("y",)),
            Node("score", Tool(fails), ("z",)),
        ),
    )
    params = system.init(jax.random.key(2))
    record = PreferenceRecord({"x": 2}, {"document": 3, "z": 0}, {"document": 3, "z": 1})
    [final] = without_intermediates(system, [record])
    assert final == record
    [sets] = draw_intermediates(system, params, [{"x": 2, "document": 3}], 3, KEY)
    assert [y["y"] for y in sets] == np.argsort(-np.asarray(params["y"]["logits"])[3]).tolist()
    batch = sampled_batch(system, [final], [sets], 3)
    assert batch.intermediates["y"][0, :, 0].tolist() == [3, 3, 3]


def test_sets_that_cannot_be_prepared_are_left_out():
    """z reads y as a parent of size 2: the third value of y is no use, and a record keeps none of it alone."""
    system = CompoundSystem(("x",), (Node("y", Categorical(3, (2,)), ("x",)), Node("z", Categorical(2, (2,)), ("y",))))
    records = [PreferenceRecord({"x": 0}, {"z": 0}, {"z": 1})]
    batch = sampled_batch(system, records, [[{"y": 2}, {"y": 1}, {"y": 0}]], 3)
    np.testing.assert_array_equal(batch.valid, [[True, True, False]])
    assert batch.intermediates["y"][0, :, 1].tolist() == [1, 0, 1]
    with pytest.raises(RecordError, match=r"row 0: its final values cannot .* node 'z': Categorical: y is 2 in row 0"):
        sampled_batch(system, records, [[{"y": 2}]], 3)


def test_samples_are_the_candidates_of_a_component_without_a_search():
    """A Gaussian's samples differ, and depend on the key alone."""
    system = CompoundSystem(("x",), (Node("y", Gaussian(2, 1), ("x",)), Node("z", Gaussian(1, 2), ("y",))))
    params = system.init(jax.random.key(0))
    draws = [draw_intermediates(system, params, [{"x": [0.5]}] * 2, 4, jax.random.key(seed)) for seed in (1, 1, 2)]
    values = np.array([[[y["y"] for y in sets] for sets in drawn] for drawn in draws])
    assert values.shape == (3, 2, 4, 2)
    np.testing.assert_array_equal(values[0], values[1])
    assert len(np.unique(values[[0, 2]].reshape(-1, 2), axis=0)) == 16


def test_a_language_models_candidates_are_distinct_texts():
    config = DecoderConfig(len(SPECIAL) + len(WORDS), 16, 32, 2, 2, 2, max_position_embeddings=16)
    model = LanguageModel(Decoder(config), word_tokenizer(), 4, 3)
    params = model.init(jax.random.key(0))
    found = model.candidates(params, {"x": ["a ball", "red"]}, 6, KEY)
    assert len(found) == 2
    for texts in found:
        assert 1 < len(texts) == len(set(texts)) <= 6
    assert found == model.candidates(params, {"x": ["a ball", "red"]}, 6, jax.random.key(9))
    features = model.prepare(found[0], {"x": ["a ball"] * len(found[0])})
    for row, text in enumerate(found[0]):
        made = features["tokens"][row, features["prompt_lengths"][row] : features["lengths"][row]]
        assert made.tolist() == list(text.tokens)


def test_the_batch_holds_every_set_on_both_sides():
    sets = [[{"route": 0, "part": 3}, {"route": 1, "part": 1}, {"route": 0, "part": 3}], [{"route": 1, "part": 0}]]
    batch = sampled_batch(SYSTEM, [FINAL, PreferenceRecord({"x": 1}, {"z": 2}, {"z": 0})], sets, 3, 5)
    # Categorical's features: a column for each parent, then the value. Repeats and padding repeat the first set.
    np.testing.assert_array_equal(batch.valid, [[True, True, False], [True, False, False]])
    np.testing.assert_array_equal(batch.staleness, [5, 5])
    np.testing.assert_array_equal(batch.intermediates["route"], [[[2, 0], [2, 1], [2, 0]], [[1, 1]] * 3])
    np.testing.assert_array_equal(batch.intermediates["part"], [[[0, 3], [1, 1], [0, 3]], [[1, 0]] * 3])
    np.testing.assert_array_equal(batch.outputs.chosen["z"], [[[1, 0, 0], [0, 1, 0], [1, 0, 0]], [[0, 1, 2]] * 3])
    np.testing.assert_array_equal(batch.outputs.rejected["z"], [[[1, 0, 1], [0, 1, 1], [1, 0, 1]], [[0, 1, 0]] * 3])
    assert set(batch.outputs.chosen) == {"z"}


@pytest.mark.parametrize("sets", [[], [{"route": r, "part": p} for r in range(2) for p in range(2)]])
def test_a_wrong_number_of_sets_is_refused(sets):
    with pytest.raises(RecordError, match=f"row 0 has {len(sets)} distinct sets of intermediates, outside 1..3"):
        sampled_batch(SYSTEM, [FINAL], [sets], 3)


def test_a_bad_final_value_is_named():
    bad = PreferenceRecord({"x": 1}, {"z": 0}, {"z": 3})
    with pytest.raises(
        RecordError,
        match=r"row 1: its final values cannot .* any of its 1 sets .* its own value is 3 in row 1",
    ):
        sampled_batch(SYSTEM, [FINAL, bad], [[{"route": 1, "part": 1}]] * 2, 2)


def test_a_system_without_intermediates_has_none_to_draw():
    single = CompoundSystem(("x",), (Node("y", Categorical(2, (3,)), ("x",)),))
    with pytest.raises(GraphError, match="no intermediate values to draw"):
        draw_intermediates(single, single.init(KEY), [{"x": 0}], 2, KEY)


def test_candidates_of_a_table_without_parents():
    """A value of probability 0 is none."""
    component = Categorical(4)
    params = {"logits": jnp.array([0.1, 0.4, -jnp.inf, 0.3])}
    assert component.candidates(params, {"x": [0, 0]}, 2, KEY) == [[1, 3], [1, 3]]
    assert component.candidates(params, {"x": [0]}, 4, KEY) == [[1, 3, 0]]


def test_values_are_equal_however_they_are_written():
    same = [{"a": 1, "b": [2]}, {"b": [np.int64(2)], "a": np.int32(1)}]
    assert distinct(same) == same[:1]
    pictures = [np.zeros((2, 2)), np.ones((2, 2)), np.zeros((2, 2)), np.zeros((4,))]
    assert [picture.shape for picture in distinct(pictures)] == [(2, 2), (2, 2), (4,)]


def test_bad_draws_are_refused():
    with pytest.raises(RecordError, match="record 1 lacks a value for the input x"):
        draw_intermediates(SYSTEM, PARAMS, [{"x": 0}, {}], 2, KEY)
    with pytest.raises(ValueError, match="missing \\['part'\\]"):
        draw_intermediates(SYSTEM, {name: PARAMS[name] for name in ("route", "z")}, [{"x": 0}], 2, KEY)
    for number, rows in ((0, [{"x": 0}]), (2, [])):
        with pytest.raises(ValueError, match="must be at least 1"):
            draw_intermediates(SYSTEM, PARAMS, rows, number, KEY)
