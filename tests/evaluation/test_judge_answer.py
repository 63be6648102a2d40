"""What counts as the score of a judge's answer, and what does not."""

import json

import pytest

from sysdpo_jax.endpoint import Again, NoCompletionError
from sysdpo_jax.errors import ConfigError, ScoreError
from sysdpo_jax.evaluation.judge_answer import Form, text_of

STATED = Form("stated", 0.0, 10.0)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('{"score": 7}', 7.0),
        ('The 3 facts are right, 1 of 4 is missing.\n{"score": 7.5}', 7.5),
        ('```json\n{"reason": "5 of\n6 {are} right", "score": 8}\n```', 8.0),
        ('{"score": "6/10", "facts": {"score": 1}}', 6.0),
        ('{"score": 4} and once more {"score": 4.0}', 4.0),
        ('{facts} {"score": 2}. That is 9 below the best.', 2.0),
        ('{"score": 7}\n\n**Score: 7/10**', 7.0),
        ('{"score": 7}\nThat is 3 below the best.', 7.0),
        ("7", 7.0),
        ("Score: 7/10", 7.0),
        ("8 of 10", 8.0),
        ("Good, 3 of 4 facts.\n\n**Score: 7.5**\n", 7.5),
        ("**8** out of **10**", 8.0),
        ("The final score is 1.5e0.", 1.5),
        ("my rating is: +.5", 0.5),
        ("`grade = 10`", 10.0),
        ("```\n9\n```", 9.0),
        ("<think>3 or 4, {\"score\": 4}</think> The score is 8.", 8.0),
        ("so 3 of 10</think>\n\n7", 7.0),
        ("[THINK]2[/THINK]6", 6.0),
    ],
)  # fmt: skip
def test_scores_that_are_stated(answer, score):
    assert STATED.score(answer) == score


@pytest.mark.parametrize(
    "answer",
    [
        "Score: 9 (scale 0 to 10)",
        "**Rating: 4** out of 5 stars. Reviewed 2024.",
        "I give 8/10, i.e. 80%",
        "Score: 7,5",
        "4 / 5",
        "80%",
        "4*5",
        "4**5",
        "1_000",
        "1" + "*" * 1_000_000 + "2",
        "3-4",
        "between 3 and 4",
        "7\nis what I would give to a better one",
        '{"score": 3} or {"score": 4}',
        '{"score": 3, "score": 4}',
        '{"score": null}\n7',
        'I think {"score": 7} but no:\nScore: 3',
        '{"score": 0} is the form.\n\nScore: 8\n',
        '{"score": 7}\n**3/10**',
        '{"score": 7}\nScore: 3/5',
        '{"score": true}',
        '{"score": [7]}',
        '{"result": {"score": 7}}',
        '{"score": 7',
        "{'score': 7}",
        "nan",
        "inf",
        "It is excellent.",
        "\N{SUPERSCRIPT SEVEN}",
        "\N{FULLWIDTH DIGIT SEVEN}",
        "7" * 101,
        '{"a":' * 100_000,
        "",
    ],
)
def test_answers_without_a_score(answer):
    with pytest.raises(ScoreError, match="has no score; it ends with") as failed:
        STATED.score(answer)
    assert (failed.value.reason, len(str(failed.value)) < 600) == ("the answer had no score", True)


@pytest.mark.parametrize("answer", ["-3", "\N{MINUS SIGN}3", "10.5", "1e400", '{"score": 1e400}'])
@pytest.mark.parametrize("form", ["stated", "last_number"])
def test_scores_out_of_range(answer, form):
    with pytest.raises(ScoreError, match=r"outside of 0 to 10: fix the template or judge\.range"):
        Form(form, 0.0, 10.0).score(answer)


@pytest.mark.parametrize("answer", ['{"score": NaN}', '{"score": -Infinity}', '{"score": Infinity}'])
def test_scores_that_are_not_finite(answer):
    with pytest.raises(ScoreError, match=r"is (nan|-inf|inf), outside of 0 to 10"):
        STATED.score(answer)


def test_a_range_of_ones_own():
    form = Form("stated", -1.0, 1.5)
    assert (form.score("-1"), form.score("1 / 1.5")) == (-1.0, 1.0)
    assert "a number from -1 to 1.5." in form.request
    # What the request shows is what the form reads.
    assert json.loads(form.request[form.request.index("{") : form.request.index("}") + 1]) == {"score": -1}
    for low, high in ((1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0), (0.0, float("inf"))):
        with pytest.raises(ConfigError, match="give the lowest score, then the highest one"):
            Form("stated", low, high)


@pytest.mark.parametrize("answer", ["<think>7", "7 <THINKING>and", "a</think>8 <think>9", "[THINK] 7"])
@pytest.mark.parametrize("form", ["stated", "last_number"])
def test_reasoning_without_an_end(answer, form):
    with pytest.raises(ScoreError, match=r"the judge's reasoning has no end.*max_tokens"):
        Form(form, 0.0, 10.0).score(answer)


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("I say 3-4", 4.0),
        ("8 of 10", 8.0),
        ("7 out of 10", 7.0),
        ("6 / 10", 6.0),
        ("-2", -2.0),
        ("about 1.5e-2.", 0.015),
        ("Score: **7**", 7.0),
        ("8.5/10.0", 8.5),
        ("**8** out of **10**", 8.0),
        (".8", 0.8),
        ("1,000", 1000.0),
        ("8,5", 8.5),
        ("<think>8 or 9</think>a score of 7", 7.0),
        ("9 (scale 0 to 10)", 10.0),
    ],
)
def test_the_last_number_by_choice(answer, number):
    form = Form("last_number", -1000.0, 1000.0)
    assert form.score(answer) == number
    assert form.request == ""
    with pytest.raises(ScoreError, match="expected is a number"):
        form.score("none")


def completion(content, ended="stop", **message):
    return {"choices": [{"finish_reason": ended, "message": {"content": content, **message}}]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("8", "8"),
        ([{"type": "text", "text": "8"}, {"type": "text", "text": ".5"}], "8.5"),
        ([{"type": "reasoning", "text": "9"}, {"type": "output_text", "text": "8"}], "8"),
        ("", ""),
        (None, ""),
    ],
)
@pytest.mark.parametrize("ended", ["stop", None, "eos_token"])
def test_the_text_of_a_completion(content, text, ended):
    assert text_of(completion(content, ended)) == text
    assert text_of({"choices": [{"message": {"content": content}}]}) == text


@pytest.mark.parametrize(
    ("found", "message", "reason"),
    [
        (completion("from 0 to 10", "length"), "cut .*'from 0 to 10'.* raise judge.max_tokens", "the answer was cut"),
        (completion("7", "MAX_TOKENS"), "was cut", "the answer was cut"),
        (completion(None, "content_filter"), "withheld", "the answer was withheld"),
        (completion(None, refusal="I cannot"), "withheld: 'I cannot'", "the answer was withheld"),
        (completion(None, reasoning_content="I think 7"), "reasoning and no text", "the reasoning has no end"),
        (completion("\n", reasoning="I think 7"), "reasoning and no text", "the reasoning has no end"),
    ],
)
def test_completions_that_have_no_score(found, message, reason):
    with pytest.raises(ScoreError, match=message) as failed:
        text_of(found)
    assert failed.value.reason == reason


@pytest.mark.parametrize("found", [{"choices": []}, {"choices": None}, completion("7", "error")])
def test_completions_that_the_server_failed_to_make(found):
    with pytest.raises(Again) as failed:
        text_of(found)
    assert isinstance(failed.value.final, ScoreError)


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"choices": 3},
        {"choices": ["7"]},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": 7}}]},
        {"choices": [{"message": {"content": [{"type": "text"}]}}]},
        {"choices": [{"message": {"content": ["7"]}}]},
    ],
)
def test_what_is_no_completion(found):
    with pytest.raises(NoCompletionError):
        text_of(found)
