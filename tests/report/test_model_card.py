"""The model card of a component: what it says, and that no name or path breaks its form."""

import re

import pytest
import yaml

from sysdpo_jax import Categorical, CompoundSystem, Node
from sysdpo_jax.report.model_card import model_card

INTERVAL = {"eval/win_rate/low": 0.5, "eval/win_rate/high": 0.7}
EVALUATED = {"eval/win_rate": 0.6, "eval/score": 2.0, "eval/score_difference": 0.5, "eval/runs": 48, "eval/unscored": 0}
PART = {"checkpoint": "org/model", "factory": None, "mode": "lora", "learning_rate": 1e-5, "lora": {"rank": 8}}
OTHER = PART | {"factory": "a:b", "checkpoint": None, "mode": "full"}
CARD = {
    "name": "head",
    "library": "transformers",
    "hub": {"base_model": "org/model", "datasets": "owner/data"},
    "system": CompoundSystem(("x",), (Node("head", Categorical(2, (2,)), ("x",)),)),
    "configuration": {
        "directory": "/home/me/runs/my_run",
        "system": {"components": {"head": PART, "judge": OTHER}},
        "objective": {"kind": "sampling", "loss": "sigmoid", "beta": 0.1},
        "schedule": {"batch_size": 8, "learning_rate": 1e-4},
    },
    "data": {"source": "owner/data", "kept": 100, "sha256": "ab12"},
    "rows": [
        {"step": 0, "loss": 0.7, "rewards/margins": 0.0},
        {"step": 3, "loss": 0.5, "rewards/margins": None},
        {"step": 4, "eval/prompts": 24, **EVALUATED, **INTERVAL},
    ],
    "step": 4,
    "version": "1.2.3",
}
HOSTILE = "a | b`` ` <script>alert(1)</script>\n---\n# *c* [d](javascript:e) \\ {{ f }}"


def test_a_card_says_what_was_trained_on_what_and_how_it_did():
    _, head, body = model_card(**CARD).split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["sysdpo", "dpo", "compound-system"],
        "base_model": "org/model", "datasets": "owner/data",
    }  # fmt: skip
    lines = body.splitlines()
    for line in (
        "# `head`, aligned as a part of a compound system",
        "| `head` | `org/model` | lora |",
        "| `judge` | `a:b` | full |",
        "Loss sigmoid, beta 0.1; 8 pairs a step, AdamW at 1e-05, LoRA of rank 8; sysdpo_jax 1.2.3.",
        "Data: `owner/data`, 100 preferences, SHA-256 ab12.",
        "| eval/win_rate | 0.6 [0.5, 0.7] | 4 |",
        "| eval/score_before | 1.5 | 4 |",
        # The last value of each, where it has one.
        "| loss | 0.5 | 3 |",
        "| rewards/margins | 0 | 0 |",
        "Evaluated on 24 prompts x 2 samples; brackets hold 95% intervals.",
    ):
        assert line in lines
    assert "after 4 steps of SysDPO-Sampling" in body
    assert f"```mermaid\n{CARD['system'].describe()}\n```\n" in body


def test_what_there_is_none_of_is_left_out():
    text = model_card(**CARD | {"name": "judge", "library": None, "hub": {}, "rows": []})
    assert "LoRA" not in text
    assert "valuat" not in text
    assert yaml.safe_load(text.split("---\n")[1]) == {"tags": ["sysdpo", "dpo", "compound-system"]}


@pytest.mark.parametrize(("source", "shown"), [("/home/me/pairs.jsonl", "pairs.jsonl"), ("/home/me/runs/a/b", "a/b")])
def test_the_place_of_the_data_is_not_told(source, shown):
    """What lies beside the run's folder is named from there, another file by its name."""
    text = model_card(**CARD | {"data": CARD["data"] | {"source": source}})
    assert f"Data: `{shown}`, 100 preferences" in text
    assert "/home" not in text


def parts_of(text):
    """The front matter, and the lines of the rest without the block of code."""
    _, head, body = re.split(r"^---$\n", text, maxsplit=2, flags=re.MULTILINE)
    rest = re.sub(r"^(`{3,})mermaid\n.*?\n\1\n", "", body, flags=re.MULTILINE | re.DOTALL)
    return yaml.safe_load(head), rest.splitlines()


@pytest.mark.parametrize("name", [HOSTILE, "`", "``", "", "\ud800"])
def test_no_name_breaks_the_form(name):
    """Whatever it holds, it is code in one line, and a table's rows have as many cells as the header."""
    parts = {name: PART | {"checkpoint": name or "x"}, f"{name}2": PART}
    configuration = CARD["configuration"] | {"system": {"components": parts}}
    system = CompoundSystem(("x",), (Node(f"head\n```\n{name}", Categorical(2, (2,)), ("x",)),))
    changed = {"name": name, "configuration": configuration, "system": system, "data": CARD["data"] | {"source": name}}
    hub = {"base_model": name.replace("\ud800", "")}
    head, lines = parts_of(model_card(**CARD | changed | {"hub": hub}))
    assert head["base_model"] == hub["base_model"]
    usual = parts_of(model_card(**CARD))[1]
    assert len(lines) == len(usual)
    cells = [line.replace("\\|", "").count("|") for line in lines if line.startswith("|")]
    assert cells == [line.count("|") for line in usual if line.startswith("|")]
    plain = [re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line) for line in lines]
    assert not re.search("[<*]", "".join(plain))
