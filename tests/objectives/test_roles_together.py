"""Roles in one forward pass: their log-probabilities and gradients are those of one pass each."""

from dataclasses import replace
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from sysdpo_jax import CompoundSystem, DirectObjective, LanguageModel, LoRA, Node, PairBatch, lora_factors
from sysdpo_jax.batch import share
from sysdpo_jax.components.together import GATHERING, READING, SAVING, Widths, pays
from sysdpo_jax.models import Decoder, DecoderConfig, choosing
from sysdpo_jax.models.lora import in_turns, on_base
from sysdpo_jax.roles import together
from sysdpo_jax.training import count_flops
from tests.components.drawn import drawn
from tests.components.stubs import WORDS, word_tokenizer

# The package has a function of that name.
ratios = import_module("sysdpo_jax.objectives.log_ratio")
KEY = jax.random.key(0)
CONFIG = DecoderConfig(14, 16, 24, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=False)
# Roles of other lengths, ranks and layers.
ROLES = {"plan": (12, 4), "write": (20, 8), "review": (16, 5)}
LORAS = {"plan": LoRA(2, 4.0), "write": LoRA(3, 3.0, "mlp"), "review": LoRA(1, 2.0, "all_linear")}


def model(prompt, new, **changes):
    return LanguageModel(Decoder(replace(CONFIG, **changes)), word_tokenizer(), prompt, new)


def system(apart=False, **changes):
    nodes = (Node(n, model(*sizes, **changes), ("x",), base="base") for n, sizes in ROLES.items())
    return CompoundSystem(("x",), tuple(replace(node, base=None) if apart else node for node in nodes))


def parameters(seed=0):
    base = drawn(model(2, 2).init, seed)
    own = {}
    for number, name in enumerate(ROLES):
        factors = lora_factors(base, LORAS[name], jax.random.key(number))
        rng = np.random.default_rng((seed, number))
        own[name] = jax.tree.map(
            lambda x, rng=rng: x if x.ndim == 1 else x + 0.1 * rng.normal(size=x.shape).astype(np.float32), factors
        )
    return {"base": base, **own}


def batch(rows=3, prompts=1):
    """Pairs whose prompts are alike on both sides; prompts: of how many words at least."""
    rng = np.random.default_rng(0)
    text = lambda least, most: " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))  # noqa: E731
    asked = [text(prompts, 12) for _ in range(rows)]
    side = lambda: [{"x": x, **{name: text(1, new) for name, (_, new) in ROLES.items()}} for x in asked]  # noqa: E731
    return PairBatch(*share(system(), [system().prepare(side()) for _ in range(2)]))


def loss(graph, params, reference, pairs):
    value, aux = DirectObjective(0.5)(graph, params, reference, pairs, KEY)
    return value, aux


def compared(graph, pairs):
    """(loss, gradients) with every role's reference."""
    params, reference = parameters(), {name: tree for name, tree in parameters(1).items() if name != "base"}

    def of(own):
        return loss(graph, {"base": params["base"], **own}, reference, pairs)

    own = {name: params[name] for name in ROLES}
    return jax.jit(jax.value_and_grad(of, has_aux=True))(own)


def scans(graph, pairs):
    params = parameters()
    """How often layers are scanned: a function that several calls share counts for each of them."""
    whole = jax.make_jaxpr(lambda tree: loss(graph, tree, {n: tree[n] for n in ROLES}, pairs)[0])(params)

    def count(jaxpr):
        inner = [sub for eqn in jaxpr.eqns for sub in jaxprs_in_params(eqn.params)]
        return sum(eqn.primitive.name == "scan" for eqn in jaxpr.eqns) + sum(map(count, inner))

    return count(whole.jaxpr)


@pytest.mark.parametrize("packed", [True, False])
def test_one_pass_gives_what_one_a_role_gives(packed, monkeypatch):
    """1e-5 of the log-probabilities and 1e-4 of the gradients, relative to the largest: other sums in float32."""
    pairs = batch()
    if not packed:
        pairs = PairBatch(*({n: {k: v for k, v in f.items() if k != "shared"} for n, f in side.items()}
                            for side in (pairs.chosen, pairs.rejected)))  # fmt: skip
    assert scans(system(), pairs) == 2
    (one, figures), gradients = compared(system(), pairs)
    monkeypatch.setattr(ratios, "together", lambda nodes, params, features: tuple((node,) for node in nodes))
    assert scans(system(), pairs) == 6
    (other, expected), wanted = compared(system(), pairs)
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)
    assert figures.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(figures.metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    for found, like in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, like, rtol=0, atol=1e-4 * max(np.abs(like).max(), 1e-3))
    assert min(np.abs(tree["layers"][part][layer]["lora_b"]).max() for tree, part, layer in (
        (gradients["plan"], "self_attn", "q_proj"), (gradients["write"], "mlp", "up_proj"))) > 1e-4  # fmt: skip


def test_some_references_may_be_known_and_figures_keep_their_order():
    """What is known is taken; the others are evaluated."""
    params, pairs = parameters(), batch()
    features = {name: system().node(name).component.fold_runs(pairs.sides()[name], 2) for name in ROLES}
    reference = {name: params[name] for name in ROLES}
    whole = ratios.node_log_probs(system(), params, reference, features, KEY)
    known = {"write": whole["write"].reference + 1}
    part = ratios.node_log_probs(system(), params, {**reference, "write": None}, features, KEY, known)
    assert list(part) == list(whole) == list(ROLES)
    np.testing.assert_array_equal(part["write"].reference, known["write"])
    for name in ("plan", "review"):
        np.testing.assert_allclose(part[name].reference, whole[name].reference, rtol=0, atol=1e-5)
    assert all(np.abs(term.log_ratio).max() < 1e-5 for name, term in part.items() if name != "write")


def test_rows_take_turns():
    """Against each role's own tree, layer by layer, with a role that has no factors."""
    params = parameters()
    decoder, base = model(2, 2).decoder, params["base"]
    roles = [params["plan"], {}, params["review"]]
    tokens = np.random.default_rng(0).integers(0, 14, (6, 7))
    found = decoder.apply({"params": in_turns(base, roles)}, jnp.asarray(tokens))
    for row in range(6):
        own = decoder.apply({"params": on_base(base, roles[row % 3])}, jnp.asarray(tokens[row : row + 1]))
        np.testing.assert_allclose(found[row], own[0], rtol=0, atol=1e-5)


def named(groups):
    return sorted(sorted(node.name for node in group) for group in groups)


def test_who_goes_together():
    pairs, params = batch(), parameters()
    features = {name: system().node(name).component.fold_runs(pairs.sides()[name], 2) for name in ROLES}
    assert named(together(system().nodes, params, features)) == [sorted(ROLES)]
    alone = [["plan"], ["review"], ["write"]]
    # Models of their own, other decoders, other leaves than factors, plates, and one at a time.
    assert named(together(system(apart=True).nodes, params, features)) == alone
    mixed = [node if node.name != "plan" else replace(node, component=model(*ROLES["plan"], remat="full"))
             for node in system().nodes]  # fmt: skip
    assert named(together(mixed, params, features)) == [["plan"], ["review", "write"]]
    other = {**params, "plan": {**params["plan"], "norm": params["base"]["norm"]}}
    assert named(together(system().nodes, other, features)) == [["plan"], ["review", "write"]]
    headed = {**params, "plan": lora_factors(params["base"], LoRA(2, 2.0, "lm_head"), KEY)}
    assert named(together(system().nodes, headed, features)) == [["plan"], ["review", "write"]]
    plated = [replace(node, plate=2) if node.name == "plan" else node for node in system().nodes]
    assert named(together(plated, params, features)) == [["plan"], ["review", "write"]]
    assert named(together(system(remat="whole").nodes, params, features)) == alone
    with choosing("whole"):
        assert named(together(system(remat="auto").nodes, params, features)) == alone
    # A text that is far longer than the others goes alone.
    long = {**features, "write": {**features["write"], "tokens": jnp.zeros((6, 200), jnp.int32)}}
    assert named(together(system().nodes, params, long)) == [["plan", "review"], ["write"]]


def test_it_pays_until_padding_costs_what_reading_saves():
    size = Widths(rows=8, runs=2, places=32, shared=0, completion=8)
    tokens = 2 * 8 * 32
    assert pays([size, size], 1, False)
    spare = READING - SAVING * tokens
    fits, exceeds = (replace(size, places=32 - int(padding / 8)) for padding in (0.9 * spare, 1.1 * spare))
    assert pays([size, fits], 1, False)
    assert not pays([size, exceeds], 1, False)
    # Of many tokens the reading is no part, unless the weights are gathered; and each device has its part of them.
    many = replace(size, rows=200)
    assert not pays([many, many], 1, False)
    assert pays([many, many], 1, True)
    assert pays([many, many], 4, False)
    assert not pays([replace(size, rows=4000)] * 2, 1, True)
    assert GATHERING > READING
    # Rows that do not match take no turns.
    assert not pays([size, replace(size, rows=4)], 1, False)
    assert not pays([size, replace(size, runs=1)], 1, False)


def test_the_padding_is_all_that_is_added():
    """Roles of one length: thin products of the largest rank in all layers, which are narrow here, and nothing else."""
    pairs = batch(prompts=10)
    graph = CompoundSystem(("x",), tuple(replace(node, component=model(12, 4)) for node in system().nodes))
    without = {name: x for name, x in pairs.chosen["plan"].items() if name != "shared"}
    params = parameters()

    def count(features):
        same = PairBatch(*[dict.fromkeys(ROLES, features)] * 2)
        return count_flops(lambda tree: loss(graph, tree, {n: tree[n] for n in ROLES}, same)[0], params)

    one, unpacked = count(pairs.chosen["plan"]), count(without)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratios, "together", lambda nodes, params, features: tuple((node,) for node in nodes))
        apart = count(pairs.chosen["plan"])
    assert apart < one < 1.35 * apart
    assert one < 0.8 * unpacked
