"""The world and the figures of the DSPy program of docs/programs/dspy.md, which itself needs DSPy."""

import json
import math
import re
from pathlib import Path

import pytest

from experiments.programs.dspy_figures import FIGURES, beside, figures
from experiments.programs.elements import PASSAGES, f1, questions, retrieve, words

DOCS = Path(__file__).parents[2] / "docs/programs"


def test_held_out_questions_are_of_other_elements():
    training, held_out = questions("training"), questions("held_out")
    assert len({each.text for each in training + held_out}) == len(training + held_out) == 2 * len(PASSAGES) == 184
    assert not {each.element for each in training} & {each.element for each in held_out}


@pytest.mark.parametrize("part", ["training", "held_out"])
def test_every_question_is_answered_by_a_passage_that_its_own_words_find(part):
    for each in questions(part):
        assert each.passage in retrieve(each.text, 2)
        assert each.wanted.lower() in words(each.passage)


def test_a_query_of_other_words_finds_nothing_of_its_own():
    assert retrieve("who knows?", 2) == PASSAGES[:2]
    assert [retrieve(query, 1)[0].split()[0] for query in ("Pd", "207.2", "number 46")] == [
        "Palladium",
        "Lead",
        "Palladium",
    ]


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("46", "46", 1.0),
        ("**Pd.**", "Pd", 1.0),
        ("", "Pd", 0.0),
        ("The number is 45.", "46", 0.0),
        # Precision 1/4, recall 1.
        ("The mass is 106.42.", "106.42", 0.4),
    ],
)
def test_the_score_is_the_f1_of_words(answer, wanted, score):
    assert f1(answer, wanted) == pytest.approx(score)


def _rows(scores):
    said = {"query": "tin", "answer": "of two", "wanted": "Sn"}
    return [
        {"question": f"What is the symbol of {name}?", "element": name, **said, **dict.fromkeys(FIGURES, score)}
        for name, score in scores
    ]


def test_figures_are_clustered_by_element_and_paired_by_question():
    """Two runs an element: their means are what varies, s / sqrt(n) over the elements."""
    before = _rows([("tin", 0.0), ("iron", 0.0), ("tin", 0.2), ("iron", 0.4)])
    after = _rows([("iron", 0.5), ("iron", 0.9), ("tin", 0.6), ("tin", 0.6)])
    made = figures(before, after)
    means = {"before": (0.1, 0.2), "after": (0.6, 0.7), "difference": (0.5, 0.5)}
    for when, (tin, iron) in means.items():
        assert made["f1"][when]["value"] == pytest.approx((tin + iron) / 2)
        spread = math.sqrt(2 * ((tin - iron) / 2) ** 2)
        assert made["f1"][when]["standard_error"] == pytest.approx(spread / math.sqrt(2))
    assert (made["questions"], made["runs"]) == (2, 4)
    assert made["words of an answer"]["after"]["value"] == 2
    assert [each["after"]["f1"] for each in made["examples"]] == [0.5, 0.9, 0.6, 0.6]
    with pytest.raises(ValueError, match="different questions"):
        figures(before, after[1:])


def test_a_control_is_paired_by_question_with_every_run():
    after = _rows([("iron", 0.5), ("iron", 0.9), ("tin", 0.6), ("tin", 0.6)])
    made = beside(_rows([("tin", 0.4), ("iron", 0.5)]), after)["f1"]
    assert made["control"]["value"] == pytest.approx(0.45)
    assert (made["difference"]["value"], made["difference"]["n"]) == (pytest.approx(0.2), 4)
    assert made["difference"]["standard_error"] == pytest.approx(0, abs=1e-9)


def test_the_page_has_the_figures_of_the_file():
    held_out = json.loads((DOCS / "dspy.json").read_text())["held_out"]
    page = (DOCS / "dspy.md").read_text()
    rows = re.findall(
        r"^\| (\w+)[^|]*\| ([\d.]+) ± ([\d.]+) \| ([\d.]+) ± ([\d.]+) \| ([+-][\d.]+) ± ([\d.]+)", page, re.M
    )
    assert {row[0] for row in rows} == set(FIGURES)
    for name, *numbers in rows:
        found = [held_out[name][when] for when in ("before", "after", "difference")]
        expected = [100 * each[part] for each in found for part in ("value", "standard_error")]
        assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.051), name
