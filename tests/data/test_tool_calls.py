"""A tool, which may be a paid service, is called once for each real value; what it fails on is left out or named."""

import json

import jax
import numpy as np
import pytest

from sysdpo_jax import (
    Categorical,
    CompoundSystem,
    Node,
    PreferenceRecord,
    RecordError,
    SearchedBatches,
    Tool,
    draw_intermediates,
    load_preferences,
    make_pairs,
    preference_dataset,
    prepare_pairs,
    rollout,
    sampled_batch,
)
from sysdpo_jax.components.tool import ToolError
from sysdpo_jax.data.intermediates import IntermediateSearch
from sysdpo_jax.data.rollouts import RolloutStopped
from tests.components.test_tool import Paid

KEY = jax.random.key(0)


def chain(given=None, between=None):
    """x -> document (tool) -> y -> looked_up (tool) -> z, and a tool that reads what no model reads."""
    given, between = given or Tool(Paid()), between or Tool(Paid())
    nodes = (
        Node("document", given, ("x",)),
        Node("y", Categorical(5, (200,)), ("document",)),
        Node("looked_up", between, ("y",)),
        Node("z", Categorical(3, (60,)), ("looked_up",)),
    )
    return CompoundSystem(("x",), nodes)


def params_of(system):
    return system.init(jax.random.key(1))


def inputs(number):
    return [{"x": x} for x in range(number)]


def pair(x, **values):
    return PreferenceRecord({"x": x}, {"z": 0, **values}, {"z": 1, **values})


def calls(tool):
    made = list(tool.function.calls)
    tool.function.calls.clear()
    return made


def test_rows_that_fill_a_batch_up_reach_no_tool():
    given, between = Tool(Paid()), Tool(Paid())
    system = chain(given, between)
    runs = rollout(system, params_of(system), inputs(5), KEY, samples=3, batch_size=4)
    assert calls(given) == [x for x in range(5) for _ in range(3)]
    assert calls(between) == [run["y"] for run in runs]


def test_the_draws_are_those_of_a_batch_filled_with_copies():
    system = chain()
    filled = system.sample(params_of(system), [*inputs(5), *[{"x": 4}] * 3], jax.random.fold_in(KEY, 0))[:5]
    assert rollout(system, params_of(system), inputs(5), KEY, batch_size=8) == filled


def test_a_run_that_a_tool_skips_is_left_out_and_told():
    between = Tool(Paid([2], KeyError), on_error="skip")
    system, whole = chain(between=between), chain()
    left = {}
    runs = rollout(system, params_of(system), inputs(6), KEY, 4, 5, skipped=left.__setitem__)
    every = rollout(whole, params_of(whole), inputs(6), KEY, 4, 5)
    assert sorted(left) == [place for place, run in enumerate(every) if run["y"] == 2]
    assert 0 < len(left) < 24
    assert runs == [run for run in every if run["y"] != 2]
    place = min(left)
    said = (
        f"prompt {place // 4 + 1}, sample {place % 4 + 1}: node 'looked_up': the tool tests.components.test_tool:Paid"
    )
    assert str(left[place]).startswith(f"{said} for y=2 failed (KeyError")
    # Pairs are of the runs that there are, of one prompt each.
    groups = [[run for run in runs if run["x"] == x] for x in range(6)]
    scores = np.arange(len(runs), dtype=float)
    assert make_pairs(system, runs, scores, group=4) == [
        PreferenceRecord({"x": x}, *({n.name: run[n.name] for n in system.nodes} for run in (group[-1], group[0])))
        for x, group in enumerate(groups)
        if len(group) > 1
    ]
    assert {len(group) for group in groups} > {4}


def test_by_default_what_is_left_out_is_logged(caplog):
    system = chain(Tool(Paid([1]), on_error="skip"))
    with caplog.at_level("WARNING"):
        assert len(rollout(system, params_of(system), inputs(3), KEY)) == 2
    assert "left out: prompt 2, sample 1: node 'document'" in caplog.text


def test_a_tool_that_fails_names_prompt_and_sample():
    system = chain(Tool(Paid([3])))
    with pytest.raises(
        ToolError, match=r"^prompt 4, sample 1: node 'document': the tool .*Paid for x=3 failed .Connect"
    ) as stop:
        rollout(system, params_of(system), inputs(6), KEY, samples=2, batch_size=8)
    assert isinstance(stop.value, RolloutStopped)
    assert isinstance(stop.value.__cause__, ConnectionError)
    # What was complete, in the batch of the failure too, is not lost.
    whole = chain()
    assert stop.value.records == rollout(whole, params_of(whole), inputs(6), KEY, samples=2, batch_size=8)[:6]


def test_both_sides_of_a_pair_share_what_a_tool_gave_of_the_inputs():
    given, between = Tool(Paid()), Tool(Paid())
    system = chain(given, between)
    records = [PreferenceRecord({"x": x}, {"y": 1, "z": 0}, {"y": 2, "z": 0}) for x in range(3)]
    batch = prepare_pairs(system, records)
    assert calls(given) == [0, 1, 2]
    assert sorted(calls(between)) == [1, 2]
    np.testing.assert_array_equal(batch.chosen["y"], [[0, 1], [10, 1], [20, 1]])
    np.testing.assert_array_equal(batch.rejected["z"], [[20, 0]] * 3)


def test_a_tool_that_no_model_reads_is_not_called():
    paid = Tool(Paid([0]))
    system = CompoundSystem(("x",), (Node("y", Categorical(2, (3,)), ("x",)), Node("note", paid, ("y",))))
    features = system.prepare([{"x": 1, "y": 0}])
    assert features["note"].shape == (1, 0)
    assert calls(paid) == []


def test_every_epoch_of_a_dataset_after_the_first_calls_none():
    given, between = Tool(Paid()), Tool(Paid())
    system = chain(given, between)
    dataset = preference_dataset(system, [pair(x, y=x) for x in range(4)], 2, seed=0)
    first = [dataset[0], dataset[1]]
    assert (sorted(calls(given)), sorted(calls(between))) == ([0, 1, 2, 3], [0, 1, 2, 3])
    again = [dataset[k] for k in range(2, 6)]
    assert (calls(given), calls(between)) == ([], [])
    assert sum(batch.chosen["y"].sum() for batch in first) * 2 == sum(batch.chosen["y"].sum() for batch in again)


def test_sets_that_fill_a_row_up_reach_no_tool():
    given, between = Tool(Paid()), Tool(Paid())
    system = chain(given, between)
    batch = sampled_batch(system, [pair(0), pair(1)], [[{"y": 1}], [{"y": 0}, {"y": 3}]], 4)
    assert (sorted(calls(given)), sorted(calls(between))) == ([0, 1], [0, 1, 3])
    np.testing.assert_array_equal(batch.valid.sum(1), [1, 2])
    np.testing.assert_array_equal(batch.outputs.chosen["z"][..., 0], [[10] * 4, [0, 30, 0, 0]])


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_sets_that_a_tool_fails_on_stop_or_are_left_out(on_error):
    system = chain(between=Tool(Paid([3]), on_error=on_error))
    sets = [[{"y": 1}], [{"y": 0}, {"y": 3}]]
    if on_error == "stop":
        with pytest.raises(ToolError, match=r"row 1: node 'looked_up': .* y=3 failed .ConnectionError"):
            sampled_batch(system, [pair(0), pair(1)], sets, 4)
        return
    batch = sampled_batch(system, [pair(0), pair(1)], sets, 4)
    np.testing.assert_array_equal(batch.valid.sum(1), [1, 1])
    with pytest.raises(ToolError, match="row 0: none of its 1 sets of intermediates is usable: node 'looked_up'"):
        sampled_batch(system, [pair(0)], [[{"y": 3}]], 4)


def test_a_set_that_a_tool_refuses_is_left_out_though_it_comes_first():
    def picky(y):
        if y == 2:
            raise RecordError("no twos")
        return y

    batch = sampled_batch(chain(between=Tool(picky)), [pair(0)], [[{"y": 2}, {"y": 0}, {"y": 1}]], 4)
    np.testing.assert_array_equal(batch.valid.sum(1), [2])


def test_a_search_and_its_batches_call_tools_once(tmp_path):
    given, between = Tool(Paid()), Tool(Paid())
    system = chain(given, between)
    params = params_of(system)
    spec = SearchedBatches(system, [pair(x) for x in range(5)], 4, seed=0, num_intermediates=3, every=2)
    search = IntermediateSearch(spec, tmp_path)
    rows = {row for step in (0, 1) for row in spec.rows_at(step).tolist()}
    for step in (0, 1):
        search.batch(step, lambda: params)
    assert sorted(calls(given)) == sorted(rows)
    drawn = calls(between)
    assert len(drawn) == len(set(drawn))
    search.batch(2, lambda: params)
    assert not rows.intersection(calls(given))


def test_a_draw_leaves_out_sets_that_a_tool_skips():
    between = Tool(Paid([2]), on_error="skip")
    nodes = (*chain().nodes[:2], Node("looked_up", between, ("y",)), Node("w", Categorical(2, (60,)), ("looked_up",)))
    system = CompoundSystem(("x",), (*nodes, Node("z", Categorical(3, (2,)), ("w",))))
    [sets] = draw_intermediates(system, system.init(KEY), [{"x": 1}], 5, KEY)
    assert {y["y"] for y in sets} == {0, 1, 3, 4}
    assert len(between.function.calls) == 5
    stopped = CompoundSystem(("x",), (*nodes[:2], Node("looked_up", Tool(Paid([2])), ("y",)), *system.nodes[3:]))
    with pytest.raises(ToolError, match=r"row 0: node 'looked_up': .* y=2 failed"):
        draw_intermediates(stopped, system.init(KEY), [{"x": 1}], 5, KEY)


def written(tmp_path, records):
    path = tmp_path / "pairs.jsonl"
    rows = ({"inputs": dict(r.inputs), "chosen": dict(r.chosen), "rejected": dict(r.rejected)} for r in records)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_loading_calls_a_tool_once_and_keeps_its_value(tmp_path):
    given, between = Tool(Paid()), Tool(Paid())
    system = chain(given, between)
    loaded = load_preferences(written(tmp_path, [pair(x, y=x % 2) for x in range(4)]), system)
    assert (calls(given), sorted(calls(between))) == ([0, 1, 2, 3], [0, 1])
    assert loaded[3] == pair(3, y=1, document=30, looked_up=10)
    dataset = preference_dataset(system, loaded, 2, seed=0)
    assert dataset[0].chosen["y"].shape == (2, 2)
    assert (calls(given), calls(between)) == ([], [])


def test_loading_final_values_keeps_what_tools_gave_of_inputs(tmp_path):
    given, between = Tool(Paid()), Tool(Paid())
    system = chain(given, between)
    loaded = load_preferences(written(tmp_path, [pair(x) for x in range(4)]), system)
    assert (calls(given), calls(between)) == ([0, 1, 2, 3], [])
    assert loaded[2] == pair(2, document=20)


def test_values_that_a_file_cannot_give_back_as_they_are_are_not_kept(tmp_path):
    given = Tool(lambda x: (10 * x,))
    length, y = Node("length", Tool(len), ("document",)), Node("y", Categorical(3, (2,)), ("length",))
    system = CompoundSystem(("x",), (Node("document", given, ("x",)), length, y))
    record = PreferenceRecord({"x": 1}, {"y": 0}, {"y": 1})
    assert load_preferences(written(tmp_path, [record]), system)[0].chosen == {"y": 0, "length": 1}


@pytest.mark.parametrize("of", ["tool", "data"])
@pytest.mark.parametrize("raised", [ValueError, ConnectionError, SystemExit, StopIteration, KeyError])
def test_a_record_that_a_tool_fails_on_stops_or_is_skipped_and_counted(tmp_path, raised, of):
    path = written(tmp_path, [pair(x, y=1) for x in range(5)])
    with pytest.raises(RecordError, match=r"row 3: chosen: node 'document': the tool .*Paid for x=2 failed"):
        load_preferences(path, chain(Tool(Paid([2], raised))))
    paid = Paid([2, 4], raised)
    tool = Tool(paid, on_error="skip") if of == "tool" else Tool(paid)
    loaded = load_preferences(path, chain(tool), on_error="skip" if of == "data" else "stop")
    assert [record.inputs["x"] for record in loaded] == [0, 1, 3]
    assert (loaded.counts.skipped, loaded.counts.kept) == (2, 3)
    assert "row 3: chosen: node 'document'" in loaded.summary()
    assert sorted(paid.calls) == [0, 1, 2, 3, 4]
