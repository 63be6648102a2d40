"""Training with LoRA: the base is there once, the reference is the base, and no merged kernel ever exists."""

import dataclasses
import functools
import re

import jax
import numpy as np
import optax
import pytest

from sysdpo_jax import CompoundSystem, DirectObjective, LanguageModel, Node, PairBatch
from sysdpo_jax.models.decoder import Decoder, DecoderConfig
from sysdpo_jax.models.lora import TRAINABLE, LoRA, add_lora, is_lora, merge_lora
from sysdpo_jax.training import (
    CheckpointMismatchError,
    ComponentOptimizer,
    Trainer,
    create_state,
    make_optimizer,
    make_train_step,
)
from sysdpo_jax.trees import by_path
from tests.components.stubs import WORDS, word_tokenizer

SMALL = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
)
WIDE = dataclasses.replace(
    SMALL, hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_key_value_heads=4, remat="full"
)
OPTIMIZER = make_optimizer({"lm": ComponentOptimizer(optax.adam(1e-2), trainable=TRAINABLE)})
OBJECTIVE = DirectObjective(0.5)
KEY = jax.random.key(0)


def system(config):
    model = LanguageModel(Decoder(config), word_tokenizer(), 8, 8)
    return CompoundSystem(("x",), (Node("text", model, ("x",), params="lm"),))


def adapted(config, rank=4):
    params = system(config).init(KEY)
    return {"lm": add_lora(params["lm"], LoRA(rank, 2.0 * rank, ("attention", "mlp")), jax.random.key(1))}


def pairs(rows=2, seed=0):
    """Sentences of random words on both sides."""
    rng = np.random.default_rng(seed)

    def text(longest):
        return " ".join(rng.choice(WORDS, rng.integers(3, longest)))

    def side():
        return system(SMALL).prepare([{"x": text(8), "text": text(8)} for _ in range(rows)])

    return PairBatch(side(), side())


@functools.cache
def stepper(config, objective):
    return make_train_step(system(config), objective, OPTIMIZER)


def start(config, objective=OBJECTIVE):
    return create_state(system(config), adapted(config), OPTIMIZER), stepper(config, objective)


@pytest.mark.parametrize(
    "change",
    [{}, pytest.param({"dtype": "bfloat16", "remat": "full"}, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16, rematerialised"],
)
def test_step_zero_has_no_margin_and_only_factors_change(change):
    """1e-6, an ulp of the log-probability: XLA fuses a forward pass otherwise when its gradient is wanted."""
    state, step = start(dataclasses.replace(SMALL, **change))
    before, base = jax.device_get(by_path(state.params)), by_path(state.reference_params)
    state, metrics = step(state, pairs(), KEY)
    np.testing.assert_allclose(metrics["loss"], np.log(2), rtol=0, atol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], 0, rtol=0, atol=1e-6)
    state, metrics = step(state, pairs(), KEY)
    assert float(metrics["rewards/margins"]) > 1e-3
    for path, leaf in by_path(state.params).items():
        trained = re.search(TRAINABLE, path) is not None
        assert np.array_equal(leaf, before[path]) != trained, path
        assert (leaf is base[path]) != trained, path
    assert {path.rpartition("/")[2] for path in by_path(state.opt_state) if is_lora(path)} == {"lora_a", "lora_b"}


def test_a_state_holds_every_array_once_and_gives_the_whole_trees():
    state, _ = start(SMALL)
    assert {path.rpartition("/")[2] for path in by_path(state.reference)} == {"lora_a", "lora_b"}
    arrays = [id(leaf) for leaf in jax.tree.leaves(state)]
    assert len(set(arrays)) == len(arrays)
    params, trained, frozen = by_path(state.params), by_path(state.trained), by_path(state.frozen)
    assert params.keys() == by_path(adapted(SMALL)).keys() == by_path(state.reference_params).keys()
    assert all(leaf is (trained | frozen)[path] for path, leaf in params.items())
    assert not trained.keys() & frozen.keys()


@pytest.mark.slow
def test_a_run_resumes_on_its_base_alone(tmp_path):
    trainer = Trainer(system(SMALL), OBJECTIVE, OPTIMIZER, tmp_path / "run")

    def fit(params, steps):
        return trainer.fit(create_state(system(SMALL), params, OPTIMIZER), lambda step: pairs(seed=step), steps, KEY)

    fit(adapted(SMALL), 1)
    resumed = fit(adapted(SMALL), 2)
    whole, step = start(SMALL)
    for number in range(2):
        whole, _ = step(whole, pairs(seed=number), KEY)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    other = adapted(SMALL)
    other["lm"]["norm"]["weight"] = other["lm"]["norm"]["weight"].at[3].add(1e-3)
    with pytest.raises(CheckpointMismatchError) as error:
        fit(other, 3)
    assert re.findall(r"(\S+) was ", str(error.value)) == ["(frozen.lm/norm/weight"]


@pytest.mark.slow
def test_the_step_takes_the_base_once_and_never_merges():
    """By the compiler's account; a step that merges the kernels first is caught."""

    def merging(system, params, reference, batch, key):
        params, reference = ({"lm": merge_lora(tree["lm"])} for tree in (params, reference))
        return OBJECTIVE(system, params, reference, batch, key)

    def analyse(objective):
        state, step = start(WIDE, objective)
        return state, step.lower(state, pairs(), KEY).compile().memory_analysis()

    state, thin = analyse(OBJECTIVE)
    params = by_path(state.params)
    sizes = {path.removesuffix("kernel"): leaf.nbytes for path, leaf in params.items() if path.endswith("/kernel")}
    kernels = sum(size for path, size in sizes.items() if f"{path}lora_a" in params)
    total = sum(leaf.nbytes for leaf in params.values())
    assert kernels > 30e6
    assert total < thin.argument_size_in_bytes < 1.1 * total
    # A quarter in fact: of 8 layers, less than the kernels of 3 at any time, activations and all.
    assert thin.temp_size_in_bytes < kernels / 3
    assert analyse(merging)[1].temp_size_in_bytes > kernels
