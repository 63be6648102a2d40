"""What is said of an alignment that goes wrong."""

import pytest

from sysdpo_jax.training.health import ROWS, Watch, margin_shares


def test_shares_are_of_the_margins_sizes():
    row = {"rewards/margins": 1.0, "rewards/margins/a": 3.0, "rewards/margins/b": -1.0, "loss": 2.0}
    assert margin_shares(row) == {"margin_share/a": 0.75, "margin_share/b": 0.25}
    assert margin_shares({"rewards/margins/a": 0.0}) == {}


def said(rows):
    watch = Watch()
    return [(step, text) for step, row in enumerate(rows) for text in watch.see(step, row)]


def test_a_node_that_drowns_the_others_is_named_once():
    drowned = {"margin_share/image": 0.97, "margin_share/caption": 0.03}
    [(step, text)] = said([drowned] * 3 * ROWS)
    assert step == ROWS - 1
    assert "node 'image' has carried more than 95% of the margin" in text
    assert said([drowned] * (ROWS - 1) + [{"margin_share/image": 0.9, "margin_share/caption": 0.1}] + [drowned]) == []
    assert said([{"margin_share/image": 1.0}] * 2 * ROWS) == []


@pytest.mark.parametrize(("reward", "times"), [(-0.1, 1), (0.1, 0)])
def test_falling_likelihood_of_the_chosen_runs_is_said(reward, times):
    found = said([{"rewards/chosen": reward}] * 2 * ROWS)
    assert len(found) == times
    assert all("less likely than under the reference" in text for _, text in found)
