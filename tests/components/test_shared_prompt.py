"""Tokens that the runs of a preference begin with are computed once: same numbers, less work.

The plain way, which tests/parity compares with PyTorch, is the measure: 1e-5 of log-probabilities and 1e-4 of gradients
of the largest entry, for float32 sums in another order.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params

import sysdpo_jax as sj
from sysdpo_jax.batch import share
from sysdpo_jax.components.shared_prompt import LEAST, Runs, prefix_of
from sysdpo_jax.models import Decoder, DecoderConfig
from sysdpo_jax.training.throughput import count_flops
from tests.components.stubs import SPECIAL, WORDS, word_tokenizer
from tests.parity.test_decoder_families import VARIANTS

KEY = jax.random.key(0)
CONFIG = DecoderConfig(len(SPECIAL) + len(WORDS), 16, 24, 2, 2, 1, max_position_embeddings=64)
REQUESTS = ["a red ball", "the small cube on the left", "ball", "a large green cube"]
ANSWERS = ["ball", "a large green ball", "", "on the left"]
OTHERS = ["the cube on the left", "a", "red red red", "small"]
RECORDS = [
    sj.PreferenceRecord({"x": x}, {"answer": y}, {"answer": z})
    for x, y, z in zip(REQUESTS, ANSWERS, OTHERS, strict=True)
]


def asked(draft: str, request: str) -> str:
    """A prompt whose beginning is the request's, twice, and whose end is the draft."""
    return f"{request} {request} {request} on the left on the left {draft} "


def model(
    config: DecoderConfig = CONFIG, max_prompt_length: int = 12, new: int = 6, **settings: Any
) -> sj.LanguageModel:
    return sj.LanguageModel(Decoder(config), word_tokenizer(), max_prompt_length, new, **settings)


def system(config: DecoderConfig = CONFIG, **settings: Any) -> sj.CompoundSystem:
    return sj.CompoundSystem(("x",), (sj.Node("answer", model(config, **settings), ("x",)),))


def plain(batch: Any) -> Any:
    """Without what `share` found."""
    if isinstance(batch, dict):
        return {name: plain(value) for name, value in batch.items() if name != "shared"}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(plain, batch))
    return batch


def trees(graph: sj.CompoundSystem, rank: int = 0) -> tuple[Any, Any]:
    """A policy and a reference that differ in everything."""
    made = []
    for seed in (1, 2):
        params = graph.init(jax.random.key(seed))
        if rank:
            params = {name: sj.add_lora(tree, sj.LoRA(rank, 4.0, "all_linear"), KEY) for name, tree in params.items()}
        random = np.random.default_rng(seed)
        made.append(jax.tree.map(lambda x, r=random: x + r.normal(0, 0.1, x.shape).astype("float32"), params))
    return made[0], made[1]


def evaluated(graph: Any, objective: Any, batch: Any, rank: int = 0) -> Any:
    """(loss, metrics, gradients)."""
    policy, reference = trees(graph, rank)

    def loss(params: Any, base: Any) -> Any:
        value, aux = objective(graph, params, base, batch, KEY)
        return value, aux.metrics

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(policy, reference)


def assert_equal(found: Any, wanted: Any) -> None:
    (loss, metrics), gradients = found
    (wanted_loss, wanted_metrics), wanted_gradients = wanted
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    for name, value in wanted_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for (path, got), want in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max() + 1e-12, err_msg=where)


@pytest.mark.parametrize("name", [*VARIANTS, "full", "dots_saveable", "LoRA"])
def test_loss_metrics_and_gradients(name: str) -> None:
    """Every family, recomputation, adapters; prompts of 1 to 6 tokens in a batch, completions of 0 to 5 and an end."""
    config = dataclasses.replace(VARIANTS.get(name, CONFIG), vocab_size=CONFIG.vocab_size)
    if name in ("full", "dots_saveable"):
        config = dataclasses.replace(config, remat=name)
    graph, rank = system(config), 2 if name == "LoRA" else 0
    batch = sj.prepare_pairs(graph, RECORDS)
    assert batch.chosen["answer"]["shared"].sum(-1).tolist() == [3, 6, 1, 4]
    found, wanted = (evaluated(graph, sj.DirectObjective(), each, rank) for each in (batch, plain(batch)))
    assert_equal(found, wanted)


def test_the_work_that_is_saved() -> None:
    """Of 48 + 16 tokens on each of two sides 128 places become 80, in every product of every layer but attention's."""
    graph = system(max_prompt_length=48, new=16)
    batch = sj.prepare_pairs(graph, RECORDS)
    policy, reference = trees(graph)

    def dense(batch: Any) -> int:
        """FLOPs of the step's gradient beside those of attention and head, which see whole rows and completions."""
        gradient = jax.grad(lambda p: sj.DirectObjective()(graph, p, reference, batch, KEY)[0])
        narrow = system(dataclasses.replace(CONFIG, intermediate_size=12), max_prompt_length=48, new=16)
        thin = jax.eval_shape(lambda: trees(narrow)[0])
        other = jax.grad(lambda p: sj.DirectObjective()(narrow, p, thin_values, batch, KEY)[0])
        thin_values = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), thin)
        return count_flops(gradient, policy) - count_flops(other, thin)

    # Half of the feed-forward layers' products, whose number is exactly that of the tokens.
    assert dense(batch) / dense(plain(batch)) == 80 / 128


def scans(program: Jaxpr) -> Iterator[JaxprEqn]:
    """Every loop in it."""
    for equation in program.eqns:
        if equation.primitive.name == "scan":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from scans(inner)


def test_layers_read_no_zeros() -> None:
    """JAX takes what is alike in all layers out of their loop: zeros under a mask would be arrays that each reads."""
    graph = system(dataclasses.replace(CONFIG, remat="products_saveable"))
    batch = sj.prepare_pairs(graph, RECORDS)
    policy, reference = trees(graph)
    gradient = jax.grad(lambda p: sj.DirectObjective()(graph, p, reference, batch, KEY)[0])
    loops = list(scans(jax.make_jaxpr(gradient)(policy).jaxpr))
    # Of policy and reference forwards, and the policy's backwards.
    assert len(loops) == 3
    shared = [value.aval for loop in loops for value in loop.invars[: loop.params["num_consts"]]]
    assert not {x.shape for x in shared if x.ndim > 2 and x.shape[-1] == CONFIG.head_width}


def test_flops_of_the_compiled_step() -> None:
    """The compiler's own count, of one layer: it counts the body of a loop once, however often it runs.

    Per token of width 64 a layer has 2 (2 64^2 + 2 64 32 + 3 64 192) = 98,304 FLOPs in dense products, four times in a
    step: with 80 of 128 places, and 4 pairs, 75.5 million less.
    """
    config = DecoderConfig(CONFIG.vocab_size, 64, 192, 1, 4, 2, max_position_embeddings=64, remat=None)
    graph = system(config, max_prompt_length=48, new=16)
    batch = sj.prepare_pairs(graph, RECORDS)
    policy, reference = trees(graph)

    def flops(batch: Any) -> float:
        gradient = jax.grad(lambda p: sj.DirectObjective()(graph, p, reference, batch, KEY)[0])
        return float(jax.jit(gradient).lower(policy).compile().cost_analysis()["flops"])

    saved = flops(plain(batch)) - flops(batch)
    # The moves add some operations, each to a number and not to a product's row.
    np.testing.assert_allclose(saved, 4 * 4 * 48 * 98_304, rtol=0.1)


def test_short_prompts_are_left_alone() -> None:
    """Where 2 of 32 places could be saved the step is the plain one, to the last operation."""
    graph = system(max_prompt_length=2, new=30)
    records = [dataclasses.replace(r, inputs={"x": "a"}) for r in RECORDS]
    batch = sj.prepare_pairs(graph, records)
    policy, reference = trees(graph)

    def text(batch: Any) -> str:
        return str(jax.make_jaxpr(lambda p: sj.DirectObjective()(graph, p, reference, batch, KEY)[0])(policy))

    rows = graph.node("answer").component.fold_runs(batch.sides()["answer"], 2)
    assert rows["runs"] == Runs(2)
    assert prefix_of(rows, 32) is None
    assert text(batch).count("dot_general") == text(plain(batch)).count("dot_general")


def chain(plate: int | None = None) -> sj.CompoundSystem:
    """A draft, and an answer whose prompt begins with the request and ends with the draft."""
    draft, answer = model(max_prompt_length=6), model(max_prompt_length=40, prompt=asked)
    return sj.CompoundSystem(
        ("x",),
        (sj.Node("draft", draft, ("x",), plate=plate), sj.Node("answer", answer, ("draft", "x"), plate=plate)),
    )


def listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def drafts(plate: int | None = None) -> list[sj.PreferenceRecord]:
    def run(draft: str, answer: str) -> dict[str, Any]:
        texts = {"draft": draft, "answer": answer}
        return texts if plate is None else {name: [text, "a ball"] for name, text in texts.items()}

    sides = zip(REQUESTS, ANSWERS, OTHERS, OTHERS[::-1], strict=True)
    return [sj.PreferenceRecord({"x": x}, run(a, b), run(b, c)) for x, a, b, c in sides]


@pytest.mark.parametrize("plate", [None, 2])
def test_prompts_that_begin_alike(plate: int | None) -> None:
    """What stands before the drafts is computed once for both sides, and all copies of a plate: any lengths."""
    graph = chain(plate)
    records = drafts(plate)
    batch = sj.preference_dataset(graph, records, 4, seed=0, shapes=2)[0]
    common = []
    for record in records:
        texts = [
            asked(text, record.inputs["x"]) for run in (record.chosen, record.rejected) for text in listed(run["draft"])
        ]
        columns = zip(*map(str.split, texts), strict=False)
        words = sum(itertools.takewhile(bool, (len({*column}) == 1 for column in columns)))
        common.append(words if words >= LEAST else 0)
    side = batch.chosen["answer"]
    assert sorted(np.reshape(side["shared"].sum(-1), (4, -1))[:, 0].tolist()) == sorted(common)
    # One of them is too short to count.
    assert 0 in common
    assert len({*common}) > 2
    packed = prefix_of(graph.node("answer").component.fold_runs(batch.sides()["answer"], 2 if plate is None else 3), 46)
    assert packed is not None
    assert packed.sizes.rows == (2 if plate is None else 4)
    assert_equal(*(evaluated(graph, sj.DirectObjective(), each) for each in (batch, plain(batch))))


@pytest.mark.parametrize("chunk", [None, 2])
def test_intermediates(chunk: int | None) -> None:
    """All intermediates share the request's tokens, and both sides of each the prompt with the draft in it."""
    graph = chain()
    records = [
        dataclasses.replace(r, chosen={"answer": r.chosen["answer"]}, rejected={"answer": r.rejected["answer"]})
        for r in drafts()
    ]
    searched = [[{"draft": text} for text in ("a", "red ball", "the cube on")][: 1 + row] for row in range(3)] + [
        [{"draft": "a"}]
    ]
    batch = sj.sampled_batch(graph, records, searched, 3)
    assert batch.intermediates["draft"]["shared"].shape == (4, 3, 6)
    assert batch.outputs.chosen["answer"]["shared"].shape == (4, 3, 40)
    objective = sj.SamplingObjective(0.5, chunk_size=chunk)
    assert_equal(*(evaluated(graph, objective, each) for each in (batch, plain(batch))))


def test_shapes_do_not_depend_on_the_rows() -> None:
    """Of a draft's revision every intermediate has a prompt of its own: it is left out, whatever the rows hold.

    Each process of several marks its own rows, and all must have arrays of the same sizes.
    """
    revision = model(max_prompt_length=40, prompt=asked)
    nodes = (sj.Node("draft", model(), ("x",)), sj.Node("revision", revision, ("draft", "x")))
    graph = sj.CompoundSystem(("x",), (*nodes, sj.Node("answer", model(), ("revision",))))
    shapes = set()
    for texts in (("a", "red ball"), ("a", "a")):
        records = [sj.PreferenceRecord({"x": x}, {"answer": "a"}, {"answer": "red"}) for x in REQUESTS]
        sets = [[{"draft": text, "revision": f"{text} {n}"} for n, text in enumerate(texts)]] * len(records)
        batch = sj.sampled_batch(graph, records, sets, 2)
        assert "shared" not in batch.intermediates["revision"]
        shapes.add(str(jax.tree.map(np.shape, batch)))
    assert len(shapes) == 1
    assert batch.intermediates["draft"]["shared"].shape == batch.outputs.chosen["answer"]["shared"].shape == (4, 2, 12)


def test_steps_in_parts() -> None:
    """The same update whole and in two parts, and one program for all batches of a size."""
    graph = system()
    batches = [sj.prepare_pairs(graph, records) for records in (RECORDS, RECORDS[::-1])]
    optimizer = sj.make_optimizer({"answer": sj.ComponentOptimizer(optax.sgd(0.1))})
    found = []
    for accumulate, batch in ((1, batches[0]), (2, batches[0]), (1, plain(batches[0]))):
        step = sj.make_train_step(graph, sj.DirectObjective(), optimizer, accumulate=accumulate)
        state = sj.create_state(graph, trees(graph)[0], optimizer)
        state, _ = step(state, batch, KEY)
        found.append(jax.tree.map(np.asarray, state.params))
        if accumulate == 1 and batch is batches[0]:
            state, _ = step(state, batches[1], KEY)
            assert sum(function._cache_size() for function in step._functions.values()) == 1
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found[0], other)


def test_other_prompts_on_the_two_sides() -> None:
    """Pairs put together by hand need not share anything: of a batch in which one does not, none is marked."""
    graph = system()
    sides = [graph.prepare([{"x": x, "answer": "a"} for x in texts]) for texts in (REQUESTS, [*REQUESTS[:3], "a"])]
    marked = share(graph, sides)
    assert [side["answer"]["shared"].shape for side in marked] == [(4, 0), (4, 0)]
    marked = share(graph, [jax.tree.map(lambda x: x[:3], side) for side in sides])
    assert [side["answer"]["shared"].shape for side in marked] == [(3, 12), (3, 12)]
