"""Records, rollouts, pairs and batches."""

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
    Tool,
    epoch_batches,
    load_preferences,
    make_pairs,
    prepare_pairs,
    rollout,
)


def double(value):
    return 2 * value


SYSTEM = CompoundSystem(
    ("x",),
    (Node("y", Categorical(50, (3,)), ("x",)), Node("z", Tool(double), ("y",))),
)
PARAMS = SYSTEM.init(jax.random.key(0))
LINES = [
    {"inputs": {"x": 0}, "chosen": {"y": 1, "z": 2}, "rejected": {"y": 3, "z": 6}},
    {"inputs": {"x": 2}, "chosen": {"y": 0, "z": 0}, "rejected": {"y": 4, "z": 8}},
]


def written(tmp_path, *lines):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_lines_end_at_line_feeds_alone(tmp_path):
    """Empty lines and a byte order mark are no records; U+2028 within a string ends none."""
    path = tmp_path / "pairs.jsonl"
    line = {"inputs": {"x": "a\u2028b"}, "chosen": {"y": 1}, "rejected": {"y": 2}}
    path.write_text("\ufeff\n" + json.dumps(line, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert load_preferences(path) == [PreferenceRecord(**line)]


def test_a_file_becomes_records_and_features(tmp_path):
    records = load_preferences(written(tmp_path, *LINES))
    assert records == [PreferenceRecord(**line) for line in LINES]
    batch = prepare_pairs(SYSTEM, records)
    # Categorical's features: a column for each parent, then the value.
    np.testing.assert_array_equal(batch.chosen["y"], [[0, 1], [2, 0]])
    np.testing.assert_array_equal(batch.rejected["y"], [[0, 3], [2, 4]])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((LINES[0], "{"), r"pairs\.jsonl, row 2: not valid JSON"),
        (({"inputs": {"x": 0}, "chosen": {}},), "row 1: the field 'rejected' must be an object"),
        (([1],), "row 1: list instead of an object"),
        ((LINES[0] | {"chosen": [1]},), "row 1: the field 'chosen' must be an object"),
        ((), r"pairs\.jsonl holds no record"),
    ],
)
def test_bad_files_name_line_and_field(tmp_path, lines, message):
    path = written(tmp_path, *lines)
    if lines and lines[-1] == "":
        path.write_text(json.dumps(LINES[0]) + "\n\n" + json.dumps(LINES[1]))
    with pytest.raises(RecordError, match=message):
        load_preferences(path)


def test_a_record_without_a_nodes_value_is_refused():
    with pytest.raises(RecordError, match=r"chosen runs: .*'y'"):
        prepare_pairs(SYSTEM, [PreferenceRecord({"x": 0}, {"z": 2}, {"y": 3, "z": 6})])
    with pytest.raises(RecordError, match=r"rejected runs: .*'y'"):
        prepare_pairs(SYSTEM, [PreferenceRecord({"x": 0}, {"y": 3, "z": 6}, {"z": 2})])


def test_runs_of_an_input_are_adjacent_and_complete():
    """7 inputs x 3 samples in batches of 4, the last one filled up and cut."""
    counts = []
    inputs = [{"x": i % 3} for i in range(7)]
    records = rollout(SYSTEM, PARAMS, inputs, jax.random.key(1), samples=3, batch_size=4, progress=counts.append)
    assert [record["x"] for record in records] == [i % 3 for i in range(7) for _ in range(3)]
    assert all(record["z"] == 2 * record["y"] for record in records)
    assert counts == [4, 4, 4, 4, 4, 1]
    assert len({record["y"] for record in records}) > 5
    again = rollout(SYSTEM, PARAMS, inputs, jax.random.key(1), samples=3, batch_size=4)
    assert again == records
    shards = [
        rollout(SYSTEM, PARAMS, inputs, jax.random.key(1), samples=3, batch_size=4, shard=(index, 2))
        for index in range(2)
    ]
    assert shards[0] == records[:4] + records[8:12] + records[16:20]
    assert shards[1] == records[4:8] + records[12:16] + records[20:]


def runs(*values, x=0):
    return [{"x": x, "y": value, "z": 2 * value} for value in values]


def test_pairs_are_the_best_against_the_worst_of_a_group():
    records = runs(1, 2, 3, 4) + runs(5, 6, 7, 8, x=1)
    scores = np.array([0.0, 3.0, -1.0, 1.0, 0.2, 0.2, 0.4, 0.3])
    first, second, third = (
        PreferenceRecord({"x": x}, {"y": best, "z": 2 * best}, {"y": worst, "z": 2 * worst})
        for x, best, worst in ((0, 2, 3), (0, 2, 1), (0, 4, 3))
    )
    wide = PreferenceRecord({"x": 1}, {"y": 7, "z": 14}, {"y": 5, "z": 10})
    assert make_pairs(SYSTEM, records, scores, 4) == [first, wide]
    assert make_pairs(SYSTEM, records, scores, 4, min_margin=0.5) == [first]
    # The tie of runs 5 and 6 makes no pair.
    assert make_pairs(SYSTEM, records, scores, 2)[:2] == [second, third]
    assert len(make_pairs(SYSTEM, records, scores, 2)) == 3


def test_groups_that_lack_runs_are_of_one_input_each():
    records = runs(1, 2, 3) + runs(4, x=1) + runs(5, 6, 7, 8, x=2) + runs(9, 10)
    made = make_pairs(SYSTEM, records, np.arange(10.0), 4)
    assert [(pair.inputs["x"], pair.chosen["y"], pair.rejected["y"]) for pair in made] == [
        (0, 3, 1),
        (2, 8, 5),
        (0, 10, 9),
    ]


@pytest.mark.parametrize(
    ("scores", "pairs", "ties", "expected"),
    [
        ([1, 3, 1, 2], "best_worst", "drop", [(1, 0)]),
        ([1, 3, 1, 2], "best_worst", "keep", [(1, 0)]),
        ([1, 3, 1, 2], "all", "drop", [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2)]),
        ([1, 3, 1, 2], "all", "keep", [(1, 3), (1, 0), (1, 2), (3, 0), (3, 2), (0, 2)]),
        ([5, 5, 5], "best_worst", "drop", []),
        ([5, 5, 5], "best_worst", "keep", [(0, 2)]),
        ([5], "best_worst", "keep", []),
        ([5], "all", "keep", []),
    ],
)
def test_ties_are_dropped_or_kept_in_the_order_of_the_runs(scores, pairs, ties, expected):
    records = runs(*range(len(scores)))
    made = make_pairs(SYSTEM, records, np.array(scores, float), len(scores), pairs=pairs, ties=ties)
    assert [(pair.chosen["y"], pair.rejected["y"]) for pair in made] == expected


def test_a_margin_and_ties_exclude_each_other():
    with pytest.raises(ValueError, match="drops the ties"):
        make_pairs(SYSTEM, runs(1, 2), np.array([0.0, 0.0]), 2, min_margin=0.1, ties="keep")


@pytest.mark.parametrize(
    ("records", "scores", "group", "message"),
    [
        (runs(1, 2), [0.0], 2, "there are 2 runs and 1 scores: give a score for each run"),
        (runs(1, 2), [0.0, 1.0], 0, "group 0 must be at least 1 run"),
        (runs(1, 2), [0.0, float("nan")], 2, "score of run 1 is not finite: fix or drop"),
    ],
)
def test_bad_scores_and_groups_are_refused(records, scores, group, message):
    with pytest.raises(ValueError, match=message):
        make_pairs(SYSTEM, records, np.array(scores), group)


def test_batches_depend_on_the_step_alone_and_cover_an_epoch():
    data = {"a": np.arange(10), "b": np.arange(20).reshape(10, 2)}
    batches = [epoch_batches(data, 3, seed=5)(step) for step in range(6)]
    again = epoch_batches(data, 3, seed=5)
    for step in (4, 0, 5):
        np.testing.assert_array_equal(again(step)["a"], batches[step]["a"])
    epochs = [np.concatenate([batch["a"] for batch in batches[start : start + 3]]) for start in (0, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(batches[2]["b"][:, 0], 2 * batches[2]["a"])
    assert (epoch_batches(data, 3, seed=6)(0)["a"] != batches[0]["a"]).any()
    with pytest.raises(ValueError, match="10 rows do not fill one batch of 11"):
        epoch_batches(data, 11, seed=0)
