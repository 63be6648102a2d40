"""The task of the SmolLM2 size: questions that do not leak, prompts with each model's part, a checker read by hand."""

import pytest

from experiments.collaboration import smollm

SIZES = {"test": 128, "validation": 64, "train": 192}
GOOD = "Maybe the king saw a ship on the river!"
# What each text fails for the words "king, river" and the opener "Maybe", judged by reading it.
JUDGED = [
    (GOOD, set()),
    ("  Maybe, the King met the River!  ", set()),
    ("Maybe the king's boat crossed the river!", set()),
    ("Maybe the river had a king in it!", {"order"}),
    ("Maybe the river by the king was a river!", set()),
    ("Maybe the queen saw a ship on the river!", {"first word", "order"}),
    ("Maybe the kingdom lost its only river!", {"first word", "order"}),
    ("Maybe the king saw a ship at sea!", {"second word", "order"}),
    ("The king saw a ship on the river!", {"opener"}),
    ("Maybes the king saw a ship on the river!", {"opener"}),
    ("Maybe: the king saw a ship on the river!", {"opener", "one exclamation"}),
    ("maybe the king saw a ship on the river!", {"opener"}),
    ("Maybe the king saw a ship on the river.", {"one exclamation"}),
    ("Maybe the king saw a ship. On the river!", {"one exclamation"}),
    ("Maybe the king saw\na ship on the river!", {"one exclamation"}),
    ("Maybe the king saw the river!!", {"one exclamation"}),
    ("Maybe a king, a river!", set()),
    ("Maybe king and river!", {"length"}),
    ("Maybe the old king saw a very small ship on the river!", {"length"}),
    ("", {"first word", "second word", "order", "opener", "one exclamation", "length"}),
]


@pytest.mark.parametrize(("answer", "failed"), JUDGED)
def test_the_checker_agrees_with_a_reader(answer, failed):
    held = smollm.checks("king, river", "Maybe", answer)
    assert {name for name, holds in held.items() if not holds} == failed
    assert smollm.score("king, river", "Maybe", answer) == pytest.approx(1 - len(failed) / 6, abs=1e-12)


def test_only_an_answer_that_follows_everything_scores_exactly_one():
    assert [answer for answer, _ in JUDGED if smollm.score("king, river", "Maybe", answer) == 1.0] == [
        answer for answer, failed in JUDGED if not failed
    ]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_pair_of_words_is_asked_for_twice_in_whatever_order(seed):
    parts = smollm.questions(SIZES, seed)
    assert {name: len(part) for name, part in parts.items()} == SIZES
    pairs = [frozenset(question["words"].split(", ")) for part in parts.values() for question in part]
    assert len(set(pairs)) == sum(SIZES.values())
    assert {len(pair) for pair in pairs} == {2}
    assert smollm.questions(SIZES, seed) == parts
    assert smollm.questions(SIZES, seed + 10) != parts


def test_questions_use_every_word_and_opener_and_are_plain_strings():
    train = smollm.questions(SIZES, 0)["train"]
    assert {type(value) for question in train for value in question.values()} == {str}
    assert {word for question in train for word in question["words"].split(", ")} == set(smollm.WORDS)
    assert {question["opener"] for question in train} == set(smollm.OPENERS)
    assert any(words != sorted(words) for words in (question["words"].split(", ") for question in train))


def test_more_questions_than_there_are_pairs_are_refused():
    with pytest.raises(ValueError, match="781 questions asked for, but there are 780"):
        smollm.questions({"train": 781}, 0)


def test_each_model_is_shown_its_own_part_after_one_worked_example():
    draft = smollm.draft_prompt("king, river")
    answer = smollm.answer_prompt("Maybe", "The king saw\n the river. ")
    for messages in (draft, answer):
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert draft[-1]["content"] == "king, river"
    assert answer[-1]["content"] == "Maybe: The king saw the river."


def test_the_worked_examples_follow_the_instructions_themselves():
    """Their words are none of the questions', so that they give nothing away."""
    _, request, reply, _ = smollm.draft_prompt("king, river")
    first, second = request["content"].split(", ")
    held = smollm.checks(f"{first}, {second}", "Soon", reply["content"])
    assert all(held[name] for name in ("first word", "second word", "order", "length"))
    _, request, reply, _ = smollm.answer_prompt("Maybe", "")
    held = smollm.checks(f"{first}, flew", "Soon", reply["content"])
    assert all(held.values())
    assert not {first, second} & set(smollm.WORDS)
    assert "Soon" not in smollm.OPENERS
