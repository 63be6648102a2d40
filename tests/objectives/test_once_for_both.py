"""What policy and reference have in common is traced once and computed once."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarks.gpu_cases import CASES
from sysdpo_jax.objectives import log_ratio
from tests.models.programs import compiling
from tests.training.systems import CHAIN, pairs

KEY = jax.random.key(1)
CASE = CASES["tiny"]["unet"]()
QUICK = {"xla_backend_optimization_level": 0}


@pytest.fixture(scope="module")
def arguments():
    params = jax.eval_shape(CASE.system.init, jax.random.key(0))
    return params, CASE.batch().chosen


def ratio(params, reference, features):
    return log_ratio(CASE.system, params, reference, features, KEY)


@pytest.mark.parametrize(("dtype", "times"), [(None, 1), ("float32", 2)])
def test_python_runs_once_for_trees_of_equal_shapes_and_types(arguments, monkeypatch, dtype, times):
    params, features = arguments
    runs, component = [], type(CASE.component)
    whole = component.log_prob_with_metrics

    def noting(self, *given):
        runs.append(1)
        return whole(self, *given)

    monkeypatch.setattr(component, "log_prob_with_metrics", noting)
    reference = jax.tree.map(lambda leaf: leaf.update(dtype=dtype or leaf.dtype), params)
    jax.make_jaxpr(jax.grad(lambda *given: sum(map(jnp.sum, ratio(*given).values()))))(params, reference, features)
    assert len(runs) == times


def test_draws_and_the_waves_of_times_are_computed_once(arguments):
    """Operations of the optimised program, as many as of one of the two; products, which differ, are twice as many."""
    params, features = arguments
    node = CASE.system.nodes[0]

    def one(params, features):
        return CASE.system.node_log_prob(node, node.tree(params), features[node.name], KEY)[0]

    programs = [
        jax.jit(function, compiler_options=QUICK).lower(*given).compile().as_text()
        for function, given in ((one, (params, features)), (ratio, (params, params, features)))
    ]
    for operation, factor in (("cosine", 1), ("sine", 1), ("shift-right-logical", 1), ("dot", 2), ("convolution", 2)):
        alone, both = (program.count(f" {operation}(") for program in programs)
        assert alone > 0, operation
        assert both == factor * alone, operation


def test_without_a_trace_nothing_compiles_anew():
    """As a function of its own, made in every call, it would."""
    params, features = CHAIN.init(KEY), pairs(2).chosen
    log_ratio(CHAIN, params, params, features, KEY)
    with compiling() as programs:
        log_ratio(CHAIN, params, params, features, KEY)
    assert not programs
