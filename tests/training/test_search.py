"""Training on intermediates that the policy draws: the schedule, its record, and resuming bit for bit."""

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import (
    LORA_PARAMS,
    BeamSearch,
    Categorical,
    ComponentOptimizer,
    CompoundSystem,
    DirectObjective,
    GraphError,
    LanguageModel,
    LoRA,
    Node,
    PreferenceRecord,
    RecordError,
    SamplingObjective,
    SearchedBatches,
    Tool,
    Trainer,
    add_lora,
    create_state,
    draw_intermediates,
    make_optimizer,
)
from sysdpo_jax.data.intermediates import IntermediateSearch
from sysdpo_jax.decoding import decode
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.row_files import RowFile
from sysdpo_jax.training import CheckpointMismatchError, read_metrics
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer
from tests.training.systems import trained_rows

SYSTEM = CompoundSystem(("x",), (Node("y", Categorical(9, (4,)), ("x",)), Node("z", Categorical(3, (9,)), ("y",))))
RECORDS = [PreferenceRecord({"x": i % 4}, {"z": i % 3}, {"z": (i + 1) % 3}) for i in range(10)]
OPTIMIZER = make_optimizer({name: ComponentOptimizer(optax.adam(0.1)) for name in "yz"})
KEY = jax.random.key(3)


def batches(**changes):
    settings = {"batch_size": 3, "seed": 1, "num_intermediates": 4} | changes
    return SearchedBatches(SYSTEM, settings.pop("records", RECORDS), **settings)


def fresh():
    return create_state(SYSTEM, SYSTEM.init(jax.random.key(0)), OPTIMIZER)


def trainer(directory, **changes):
    settings = {"objective": SamplingObjective(1.0), "optimizer": OPTIMIZER, "checkpoint_every": 4} | changes
    return Trainer(SYSTEM, directory=directory, **settings)


def same(left, right):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(left), jax.device_get(right))


def drawn_at(directory):
    return sorted(int(path.name[:8]) for path in (directory / "intermediates").glob("*.rows.arrow"))


@pytest.mark.parametrize(("stop", "every"), [(4, 1), (5, 3)])
def test_two_parts_equal_one_run_bit_for_bit(tmp_path, every, stop):
    """The stop falls on a step that draws, or between two where old values are in use."""
    whole = trainer(tmp_path / "whole").fit(fresh(), batches(every=every), 11, KEY)
    trainer(tmp_path / "parts").fit(fresh(), batches(every=every), stop, KEY)
    same(whole, trainer(tmp_path / "parts").fit(fresh(), batches(every=every), 11, KEY))
    assert trained_rows(tmp_path / "whole") == trained_rows(tmp_path / "parts")


def test_a_run_that_was_killed_after_its_checkpoint_draws_again(tmp_path):
    """Files of later steps than the checkpoint's are not taken for the resumed run's own."""
    whole = trainer(tmp_path / "whole").fit(fresh(), batches(every=3), 8, KEY)
    trainer(tmp_path / "parts").fit(fresh(), batches(every=3), 5, KEY)
    (tmp_path / "parts" / "intermediates" / "00000006.npz").write_bytes(b"torn")
    same(whole, trainer(tmp_path / "parts").fit(fresh(), batches(every=3), 8, KEY))


def test_the_schedule_and_the_staleness_it_logs(tmp_path):
    """Three batches of three an epoch, ten records: four steps need the nine of an epoch and some of the next."""
    trainer(tmp_path, checkpoint_every=100).fit(fresh(), batches(every=4), 10, KEY)
    assert drawn_at(tmp_path) == [0, 4, 8]
    logged = [row["intermediates/staleness"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert logged == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    order = [np.random.default_rng((1, epoch)).permutation(10)[:9] for epoch in range(2)]
    drawn = [row["record"] for row in RowFile(tmp_path / "intermediates" / "00000000")]
    assert drawn[:9] == order[0].tolist()
    assert set(drawn[9:]) == set(order[1][:3].tolist()) - set(order[0].tolist())
    assert len(set(drawn)) == len(drawn)


def test_each_draw_is_from_the_policy_of_its_step(tmp_path):
    """Recomputed from the policies before steps 0, 2 and 4."""
    policy, system = fresh().params, SYSTEM
    for step in (0, 2, 4):
        rows = np.concatenate(
            [np.random.default_rng((1, at // 3)).permutation(10)[3 * (at % 3) :][:3] for at in (step, step + 1)]
        )
        rows = list(dict.fromkeys(rows.tolist()))
        sets = draw_intermediates(system, policy, [RECORDS[row].inputs for row in rows], 4, KEY)
        policy = trainer(tmp_path, checkpoint_every=1).fit(fresh(), batches(every=2), step + 2, KEY).params
        found = list(RowFile(tmp_path / "intermediates" / f"{step:08d}"))
        assert found == [{"record": row, "sets": own} for row, own in zip(rows, sets, strict=True)]
        assert all(len(row["sets"]) == 4 for row in found)


def test_the_same_seed_gives_the_same_run_and_another_does_not(tmp_path):
    runs = [
        trainer(tmp_path / str(number)).fit(fresh(), batches(seed=seed), 4, KEY).params
        for number, seed in enumerate((1, 1, 2))
    ]
    same(runs[0], runs[1])
    assert not np.array_equal(runs[0]["y"]["logits"], runs[2]["y"]["logits"])


def test_only_what_a_resumed_run_reads_is_kept(tmp_path):
    """Files go when a later checkpoint is written: what the older one reads is still there."""
    trainer(tmp_path, keep=2).fit(fresh(), batches(every=3), 11, KEY)
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [8, 11]
    assert drawn_at(tmp_path) == [3, 6, 9]
    trainer(tmp_path, keep=2).fit(fresh(), batches(every=3), 20, KEY)
    assert min(drawn_at(tmp_path)) >= 9


def test_a_missing_file_is_named(tmp_path):
    trainer(tmp_path).fit(fresh(), batches(every=3), 5, KEY)
    (tmp_path / "intermediates" / "00000003.rows.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"00000003\.rows\.arrow with the intermediates drawn at step 3"):
        trainer(tmp_path).fit(fresh(), batches(every=3), 8, KEY)


def test_shards_draw_their_own_rows_and_any_number_goes_on_with_them(tmp_path):
    """Two shards of a batch of four, at a step between two draws; the candidates of a table need no noise."""
    policy = lambda: fresh().params  # noqa: E731

    def search(shard):
        return IntermediateSearch(batches(batch_size=4, every=2, shard=shard), tmp_path)

    # Of a start that was killed before its checkpoint.
    search((0, 1)).batch(2, lambda: jax.tree.map(lambda x: -x, policy()))
    halves = [search((index, 2)) for index in range(2)]
    parts = [[half.batch(step, policy) for half in halves] for step in (2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"00000002-0000{number}-of-00002.{kind}.arrow" for number in (1, 2) for kind in ("leaves", "rows")
    ]
    joined = [jax.tree.map(lambda *x: np.concatenate(x), *each) for each in parts]
    same(joined[1], search((0, 1)).batch(3, policy))
    whole = search((0, 1))
    same(joined, [whole.batch(step, policy) for step in (2, 3)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002.leaves.arrow", "00000002.rows.arrow"]
    same(parts[1], [search((index, 2)).batch(3, policy) for index in range(2)])


def test_a_missing_part_is_not_gone_on_without(tmp_path):
    halves = [IntermediateSearch(batches(batch_size=4, every=2, shard=(index, 2)), tmp_path) for index in range(2)]
    for half in halves:
        half.batch(0, lambda: fresh().params)
    (tmp_path / "00000000-00001-of-00002.rows.arrow").unlink()
    with pytest.raises(FileNotFoundError, match=r"00000000\.rows\.arrow with the intermediates drawn at step 0"):
        IntermediateSearch(batches(batch_size=4, every=2), tmp_path).batch(1, lambda: fresh().params)
    halves[1].forget(2)
    assert not list(tmp_path.iterdir())


def test_other_records_are_another_run(tmp_path):
    """One more record, the others as they were: what is on disk is not taken for another row's."""
    trainer(tmp_path).fit(fresh(), batches(every=9), 4, KEY)
    with pytest.raises(CheckpointMismatchError, match=r"configuration\.records was"):
        trainer(tmp_path).fit(fresh(), batches(every=9, records=[*RECORDS, RECORDS[0]]), 8, KEY)


@pytest.mark.parametrize("changes", [{"every": 2}, {"seed": 2}, {"num_intermediates": 3}])
def test_another_schedule_is_another_run(tmp_path, changes):
    trainer(tmp_path).fit(fresh(), batches(), 4, KEY)
    [(name, value)] = changes.items()
    with pytest.raises(CheckpointMismatchError, match=rf"configuration\.batches\.{name} was \d, now {value}"):
        trainer(tmp_path).fit(fresh(), batches(**changes), 8, KEY)


def test_what_is_learned_is_not_lost_when_a_batch_fails(tmp_path):
    """The bad value comes in the last batch of the first epoch."""
    order = np.random.default_rng((1, 0)).permutation(10)
    records = list(RECORDS)
    records[order[7]] = PreferenceRecord({"x": 0}, {"z": 0}, {"z": 3})
    with pytest.raises(RecordError, match=rf"the records .*{order[7]}.* its own value is 3 in row 1"):
        trainer(tmp_path, checkpoint_every=100).fit(fresh(), batches(records=records), 5, KEY)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_bad_settings_and_records_are_refused(tmp_path):
    whole = PreferenceRecord({"x": 0}, {"y": 1, "z": 0}, {"y": 1, "z": 1})
    for changes, kind, message in (
        ({"every": 0}, ValueError, "num_intermediates 4 and every 0 must be at least 1"),
        ({"records": [whole] * 3}, RecordError, "the records hold intermediate values"),
        ({"records": [*RECORDS, whole]}, RecordError, "record 10: chosen has the intermediate values y"),
        ({"batch_size": 11}, ValueError, "10 rows do not fill one batch of 11"),
        ({"records": []}, ValueError, "0 rows do not fill one batch of 3"),
        (
            {"records": [*RECORDS, PreferenceRecord({}, {"z": 0}, {"z": 1})]},
            RecordError,
            "record 10 lacks a value for the input x",
        ),
    ):
        with pytest.raises(kind, match=message):
            batches(**changes)
    single = CompoundSystem(("x",), (Node("z", Categorical(3, (4,)), ("x",)),))
    with pytest.raises(GraphError, match="no intermediate values to search for"):
        SearchedBatches(single, RECORDS, 3, 1)
    other = CompoundSystem(("x",), (Node("y", Categorical(9, (4,)), ("x",)), Node("z", Categorical(4, (9,)), ("y",))))
    with pytest.raises(ValueError, match="of another system than the Trainer's"):
        trainer(tmp_path).fit(fresh(), SearchedBatches(other, RECORDS, 3, 1), 2, KEY)


def test_alignment_on_final_values_moves_both_components(tmp_path):
    """Every record prefers z = 0, and the policy comes to give it: from about a third to nearly always."""
    records = [PreferenceRecord({"x": i % 4}, {"z": 0}, {"z": 1 + i % 2}) for i in range(16)]
    spec = SearchedBatches(SYSTEM, records, batch_size=8, seed=0, num_intermediates=4, every=5)
    state = trainer(tmp_path).fit(fresh(), spec, 60, KEY)

    def share(params):
        y, z = (np.asarray(jax.nn.softmax(params[name]["logits"])) for name in "yz")
        return (y @ z)[:, 0]

    start = SYSTEM.init(jax.random.key(0))
    assert share(state.params).min() > 0.9 > 0.6 > share(start).mean()
    assert all(np.abs(state.params[name]["logits"] - start[name]["logits"]).max() > 0.1 for name in "yz")


def length(text):
    return len(text.split())


def echo(draft, number):
    return f"{draft} the {'large' if number > 1 else 'small'}"


@pytest.mark.slow
def test_language_models_compile_once_and_resume_bit_for_bit(tmp_path):
    """Two models with a tool between them, LoRA on the first: neither step nor search compiles again."""
    config = DecoderConfig(len(SPECIAL) + len(WORDS), 16, 32, 1, 2, 2, max_position_embeddings=12)
    drafter = LanguageModel(Decoder(config), word_tokenizer(), 4, 3, search=BeamSearch(num_beam_groups=2))
    system = CompoundSystem(
        ("x",),
        (
            Node("draft", drafter, ("x",)),
            Node("length", Tool(length), ("draft",)),
            Node("answer", LanguageModel(Decoder(config), word_tokenizer(), 8, 3, prompt=echo), ("draft", "length")),
        ),
    )
    texts = ("a ball", "red", "the cube", "small", "green cube", "left")
    records = [PreferenceRecord({"x": text}, {"answer": "red ball"}, {"answer": "the"}) for text in texts]
    start = system.init(jax.random.key(0))
    start["draft"] = add_lora(start["draft"], LoRA(rank=2, alpha=4.0, targets="attention"), jax.random.key(1))
    optimizer = make_optimizer(
        {
            "draft": ComponentOptimizer(optax.adam(0.01), trainable=LORA_PARAMS),
            "answer": ComponentOptimizer(optax.adam(0.01)),
        }
    )
    spec = SearchedBatches(system, records, batch_size=2, seed=0, num_intermediates=4, every=2)

    def run(directory, steps):
        runner = Trainer(system, SamplingObjective(0.5, chunk_size=2), optimizer, directory)
        return runner, runner.fit(create_state(system, start, optimizer), spec, steps, KEY)

    searches = decode._beam_generate._cache_size()
    runner, whole = run(tmp_path / "whole", 5)
    assert decode._beam_generate._cache_size() == searches + 1
    assert sum(function._cache_size() for function in runner.step._functions.values()) == 1
    run(tmp_path / "parts", 3)
    same(whole, run(tmp_path / "parts", 5)[1])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), whole.params, start)
    assert max(jax.tree.leaves(moved["draft"])) > 0 < max(jax.tree.leaves(moved["answer"]))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"accumulate": 2}, "3 rows cannot be cut into 2 equal parts"),
        ({"objective": SamplingObjective(sft=(("w", 0.1),))}, "sft names the node 'w', which is not .*: y, z are"),
        ({"objective": DirectObjective()}, "DirectObjective takes no SearchedBatches, give"),
    ],
)
def test_what_needs_no_draw_is_refused_before_the_first(tmp_path, settings, said):
    accepted = []
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path / "run", **settings).fit(fresh(), batches(), 2, KEY, accepted=lambda: accepted.append(1))
    assert accepted == []
    assert not (tmp_path / "run").exists()
