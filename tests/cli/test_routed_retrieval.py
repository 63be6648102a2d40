"""The worked example of a component of your own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sysdpo_jax as sj
from sysdpo_jax.recipes.routed_retrieval import Routed, kind_of, retrieve
from sysdpo_jax.runs.files import read_config, recipes
from sysdpo_jax.runs.system import build_system
from tests.pretrained.checkpoints import write_decoder

KEY = jax.random.key(0)


def test_a_routed_value_has_the_log_probability_of_its_expert():
    """In closed form: two tables of logits, each row's taken from the one that its route names."""
    routed = Routed((sj.Categorical(3, (2,)), sj.Categorical(3, (2,))))
    params = routed.init(KEY)
    routes, parents, values = [0, 1, 1, 0], [0, 0, 1, 1], [2, 1, 0, 2]
    found = routed.log_prob(params, routed.prepare(values, {"route": routes, "x": parents}), KEY)
    tables = np.stack([np.asarray(params[str(i)]["logits"], np.float64) for i in range(2)])
    rows = tables[routes, parents]
    wanted = rows[np.arange(4), values] - np.log(np.exp(rows).sum(-1))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)  # float32


def test_a_routed_value_is_drawn_from_its_expert():
    """Each expert can draw one value only."""
    routed = Routed((sj.Categorical(2, (1,)), sj.Categorical(2, (1,))))
    params = {"0": {"logits": jnp.array([[0.0, -jnp.inf]])}, "1": {"logits": jnp.array([[-jnp.inf, 0.0]])}}
    assert routed.sample(params, {"route": [0, 1, 1], "x": [0, 0, 0]}, KEY) == [0, 1, 1]
    with pytest.raises(sj.RecordError, match="route in row 1 is 2, not one of the 2 experts"):
        routed.sample(params, {"route": [0, 2], "x": [0, 0]}, KEY)


@pytest.mark.slow
def test_the_configuration_makes_a_system_that_runs(tmp_path):
    """With small models in the places of those on the hub."""
    for name in ("first", "second"):
        write_decoder(tmp_path / name, "llama", num_hidden_layers=1)
    text = recipes()["routed_retrieval"].read_text()
    for name, hub in (
        ("first", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("second", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    ):
        assert hub in text
        text = text.replace(hub, str(tmp_path / name))
    path = tmp_path / "run.yaml"
    path.write_text(text.replace("max_prompt_length: 64", "max_prompt_length: 32"))
    system, params = build_system(read_config(path), sj.make_mesh())
    [run] = system.sample(params, [{"question": "a red ball"}], KEY)
    assert (run["passage"], run["kind"]) == (retrieve("a red ball"), kind_of("a red ball"))
    assert retrieve("a red ball") == "a ball is round and often red"
    assert run["route"] in (0, 1)
    # The factors of both experts are there, and the recorded run has a probability under them.
    assert any(
        "lora_a" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params["experts"])
    )
    log_probs = system.log_prob(params, system.prepare([{**run, "answer": "a red ball"}]), KEY)
    assert np.isfinite([float(value[0]) for value in log_probs.values()]).all()
