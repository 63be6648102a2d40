"""`remat: auto`: the fastest setting that fits, by the compiler's figures; decided once a shape, compiled once."""

import jax
import numpy as np
import pytest

from sysdpo_jax import DirectObjective, make_train_step
from sysdpo_jax.models import choosing
from sysdpo_jax.training import abstract_state, compile_step, compiling
from tests.training.remat_cases import KEY, decoder, pairs, start, system, unet

AUTO = decoder(layers=3)
CANDIDATES = compiling.CANDIDATES


def step_of(component=AUTO, **options):
    optimizer, state = start(component)
    return make_train_step(system(component), DirectObjective(), optimizer, **options), state


@pytest.fixture(scope="module")
def programs():
    """{setting: the compiled step}; the second needs less."""
    step, state = step_of()
    assert step.settings(state, pairs(AUTO), KEY) == CANDIDATES
    made = {setting: step.lower(state, pairs(AUTO), KEY, setting).compile() for setting in CANDIDATES}
    sizes = [compiling.peak_bytes(program, "cpu") for program in made.values()]
    assert sizes == sorted({*sizes}, reverse=True)
    return made


def give(monkeypatch, peak, program):
    """A device that has just so many bytes for the step."""
    free = peak - program.memory_analysis().argument_size_in_bytes
    monkeypatch.setattr(compiling, "_free_bytes", lambda device: free)


@pytest.mark.parametrize("expected", CANDIDATES)
def test_the_fastest_that_fits_is_taken_and_computes_what_the_others_do(expected, programs, monkeypatch, capsys):
    """1e-6 of the loss and 1e-5 of the updated parameters: float32, in another order."""
    peak = compiling.peak_bytes(programs[expected], "cpu")
    give(monkeypatch, peak, programs[expected])
    step, state = step_of()
    plain, same = step_of(decoder(layers=3, remat=None))
    state, metrics = step(state, pairs(AUTO), KEY)
    said = capsys.readouterr().err
    tried = CANDIDATES[: CANDIDATES.index(expected) + 1]
    assert said.startswith(f"remat auto: {expected}, the fastest that fits the {peak / 2**20:.1f} MiB")
    assert [part.split()[0] for part in said.rpartition(": ")[2].split(", ")] == [*tried]
    same, expected_metrics = plain(same, pairs(AUTO), KEY)
    np.testing.assert_allclose(metrics["loss"], expected_metrics["loss"], rtol=0, atol=1e-6)
    for one, other in zip(jax.tree.leaves(state.trained), jax.tree.leaves(same.trained), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


def test_where_nothing_fits_the_smallest_is_taken_and_said(programs, monkeypatch, capsys):
    give(monkeypatch, 1, programs["full"])
    step, state = step_of()
    step(state, pairs(AUTO), KEY)
    assert "remat auto: full, the smallest, though it may not fit the " in capsys.readouterr().err


def test_each_shape_decides_once_and_what_was_compiled_is_what_runs(programs, monkeypatch):
    """The backend's own count: two programs for the first shape, none for the second step of it."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: names.append(name) if "backend_compile" in name else None
    )
    monkeypatch.setattr(compiling, "_free_bytes", lambda device: 0)
    step, state = step_of()
    lines = []
    monkeypatch.setattr("sysdpo_jax.training.step.tell", lines.append)
    batches = [pairs(AUTO, rows) for rows in (1, 2)]
    step.metric_names(state, batches[0], KEY)
    counts = []
    for batch in (batches[0], batches[0], batches[1], batches[0], batches[1]):
        before = len(names)
        state, _ = step(state, batch, KEY)
        counts.append(len(names) - before)
    # The first call may compile a placement as well.
    assert counts[0] in (2, 3)
    assert counts[1:] == [0, 2, 0, 0]
    assert len(lines) == 2


def test_a_program_that_the_compiler_refuses_does_not_fit(programs):
    def compiled_as(setting):
        if setting != "full":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too large")
        return programs[setting]

    decision = compiling.fastest_that_fits(CANDIDATES, compiled_as, lambda program: 2**30, "cpu")
    assert (decision.setting, decision.fits) == ("full", True)
    assert [attempt.bytes for attempt in decision.tried] == [None, compiling.peak_bytes(programs["full"], "cpu")]
    assert "products_saveable refused by the compiler" in str(decision)
    with pytest.raises(jax.errors.JaxRuntimeError, match="too large"):
        compiling.fastest_that_fits(CANDIDATES[:1], compiled_as, lambda program: 2**30, "cpu")


def test_parts_of_a_batch_and_models_that_do_not_ask(monkeypatch, capsys):
    step, state = step_of(accumulate=2)
    step(state, pairs(AUTO, 2), KEY)
    assert capsys.readouterr().err.startswith("remat auto: products_saveable, the fastest that fits")
    fixed = decoder(layers=3, remat="full")
    step, state = step_of(fixed)
    monkeypatch.setattr(compiling, "_free_bytes", lambda device: 0)
    step(state, pairs(fixed), KEY)
    assert capsys.readouterr().err == ""


def products(component):
    """Of the gradient of its log-probability, by its own operations."""
    _, state = start(component)
    loss = lambda tree: system(component).log_prob(tree, pairs(component).chosen, KEY)["value"].sum()  # noqa: E731
    return str(jax.make_jaxpr(jax.grad(loss))(state.params)).count("dot_general[")


def test_without_a_step_nothing_is_recomputed():
    assert products(AUTO) == products(decoder(layers=3, remat=None))
    with choosing("full") as choice:
        assert products(AUTO) == products(decoder(layers=3, remat="full")) > products(decoder(layers=3, remat=None))
    assert choice.asked


def test_ahead_of_time_the_account_is_of_the_chosen_program():
    """The peak that JAX states for processors is of arguments and results alone: any limit above it takes the first."""
    optimizer, state = start(AUTO)
    step = make_train_step(system(AUTO), DirectObjective(), optimizer)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pairs(AUTO))
    planned = abstract_state(system(AUTO), state.params, optimizer, step.mesh)
    account = compile_step(step, planned, shapes, 16.0)
    assert (account["fits"], account["remat_auto"]) == (True, CANDIDATES[0])
    tiny = compile_step(step, planned, shapes, 1e-6)
    assert (tiny["fits"], len(tiny["remat_why"].rpartition(": ")[2].split(", "))) == (False, len(CANDIDATES))


def test_a_unet_applies_no_convolution_a_second_time():
    """By the gradient's own operations: JAX's policy for dots recomputes every convolution, ours none."""

    def convolutions(remat):
        model = unet(remat=remat)
        _, state = start(model)
        loss = lambda tree: system(model).log_prob(tree, pairs(model).chosen, KEY)["value"].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(state.params)).count("conv_general_dilated[")

    counts = {name: convolutions(name) for name in (None, "products_saveable", "dots_with_no_batch_dims_saveable")}
    assert counts["products_saveable"] == counts[None] < counts["dots_with_no_batch_dims_saveable"]
