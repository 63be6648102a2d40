"""The experiment's world: requests that do not leak, captions that parse, pictures that score what they show."""

import numpy as np
import pytest

from experiments.progressive import judge
from experiments.progressive.world import (
    ADVERBS,
    ATTRIBUTES,
    OBJECTS,
    Caption,
    Faults,
    Request,
    World,
    answers,
    join_captions,
    parse,
    pictures,
    render,
    split_captions,
    well_formed,
)

REQUEST = Request("ball", "bright", "less")
CAPTIONS = [Caption("a", adverb, "bright", "ball") for adverb in ("very", "quite", "barely")]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_split_keeps_requests_apart_and_training_never_sees_the_held_out(seed):
    world = World()
    parts = world.split(seed)
    assert {name: len(part) for name, part in parts.items()} == {"train": 40, "validation": 8, "test": 16}
    assert len(set().union(*parts.values())) == 64
    _, asked = answers(parts["train"], Faults(), 500, seed)
    assert set(asked) <= {request.text for request in parts["train"]}
    assert world.split(seed) == parts
    assert world.split(seed + 10) != parts


def test_answers_come_apart_into_the_captions_they_were_joined_from():
    answer = join_captions(CAPTIONS)
    assert answer == "a very bright ball ; a quite bright ball ; a barely bright ball"
    assert [parse(text) for text in split_captions(answer)] == CAPTIONS
    assert well_formed(REQUEST, answer)


@pytest.mark.parametrize(
    ("answer", "captions"),
    [
        ("", ["", "", ""]),
        ("a very bright ball", ["a very bright ball", "", ""]),
        ("a ; b ; c ; d", ["a", "b", "c"]),
        ("a very very very bright ball ; x ; y", ["a very very very", "x", "y"]),
    ],
)
def test_malformed_answers_still_make_three_captions(answer, captions):
    assert split_captions(answer) == captions
    assert not well_formed(REQUEST, answer)


def test_an_answer_about_something_else_is_not_well_formed():
    assert not well_formed(Request("box", "bright", "less"), join_captions(CAPTIONS))
    assert not well_formed(Request("ball", "red", "less"), join_captions(CAPTIONS))


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_a_perfect_picture_scores_the_value_it_shows(attribute):
    """0.15: one calibration serves eight shapes on a grid of 12 pixels; an adverb is a step of 1/6."""
    values = np.linspace(0, 1, len(ADVERBS))
    for shape in OBJECTS:
        shown = {name: np.full(len(values), 0.5) for name in ATTRIBUTES} | {attribute: values}
        scores = judge.measure(render(shape, shown))[attribute]
        np.testing.assert_allclose(scores, values, rtol=0, atol=0.15, err_msg=shape)
        assert (np.diff(scores) >= 0).all(), shape  # edges on the grid make plateaus


def test_grades_follow_the_asked_direction():
    values = np.array([0.2, 0.5, 0.8])
    images = render("ball", {name: np.full(3, 0.5) for name in ATTRIBUTES} | {"bright": values})
    more, less = Request("ball", "bright", "more"), REQUEST
    grades = judge.grades([more, less], [{"images": list(images)}] * 2)
    np.testing.assert_allclose(grades[0], values, atol=0.1)
    np.testing.assert_array_equal(grades[1], -grades[0])


def test_the_captions_alone_are_scored_by_their_adverbs():
    """Values 5/6, 4/6, 0: q = -(-5/6 - 0 + |-4/6 + 5/12|) = 5/6 - 1/4."""
    assert judge.answer_score(REQUEST, join_captions(CAPTIONS)) == pytest.approx(5 / 6 - 1 / 4)
    assert judge.answer_score(REQUEST, "nothing") == -3.0


def test_the_faults_are_in_the_training_data():
    """A share of answers in order: all of the ordered ones and 1/6 of the others; 0.03 is 3 standard errors."""
    made, asked = answers([REQUEST], Faults(ordered=0.6), 2000, 0)
    levels = [[parse(text).value for text in split_captions(answer)] for answer in made]
    assert np.mean([a > b > c for a, b, c in levels]) == pytest.approx(0.6 + 0.4 / 6, abs=0.035)
    assert set(asked) == {REQUEST.text}
    faults = Faults(contrast=0.5, noise=0.0, exchanged=(1, 3))
    images, captions = pictures(World(("ball",), ("red",)), faults, 300, 0)
    shown = judge.measure(images)["red"]
    means = [shown[[adverb in caption.split() for caption in captions]].mean() for adverb in ADVERBS]
    expected = 0.5 + 0.5 * (np.array([0, 3, 2, 1, 4, 5, 6]) / 6 - 0.5)
    np.testing.assert_allclose(means, expected, atol=0.02)
