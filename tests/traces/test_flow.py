"""Templates from prompts."""

from sysdpo_jax.traces.flow import Slot, Variable, find_template, region, written


def found(prompts, **texts):
    variables = [Variable(name, list(column)) for name, column in texts.items()]
    template, why = find_template([(("user", prompt),) for prompt in prompts], variables)
    return (written(template[0][1]) if template is not None else None), why


def test_a_template_makes_every_prompt():
    template, _ = found(["Q: red? D: ball.", "Q: six? D: cube."], question=["red", "six"], draft=["ball", "cube"])
    assert template == "Q: {question}? D: {draft}."


def test_longer_texts_come_first_and_short_ones_are_not_found_within_words():
    """The answer "a" of one run occurs in every word; the other run says where it stands."""
    prompts = ["What about a? Say a large answer.", "What about balls? Say a large answer."]
    assert found(prompts, draft=["a", "balls"])[0] == "What about {draft}? Say a large answer."


def test_equal_texts_are_told_apart_by_other_runs():
    prompts = ["Q red D red", "Q red D cube", "Q ball D red"]
    template, _ = found(prompts, question=["red", "red", "ball"], draft=["red", "cube", "red"])
    assert template == "Q {question} D {draft}"


def test_empty_values_and_braces_are_kept():
    template, _ = found(["{x} D:  end", "{x} D: cube end"], draft=["", "cube"])
    assert template == "{{x}} D: {draft} end"


def test_a_prompt_with_something_else_in_it_has_no_template():
    template, why = found(["Q red at 1", "Q ball at 2"], question=["red", "ball"])
    assert template is None
    assert why == "one template makes 1 of its 2 prompts, and none makes all"
    assert found(["red", "ball"], draft=["x", "y"])[1] == "its prompt holds nothing of the request or of earlier values"


def test_documents_are_the_part_of_a_prompt_that_has_them():
    documents = [("a ball", "a cube"), ("red", "green")]
    variable = Variable("facts", None, documents)
    prompts = [(("user", "Facts: [1] a ball [2] a cube. Go"),), (("user", "Facts: [1] red [2] green. Go"),)]
    template, _ = find_template(prompts, [variable])
    assert template == (("user", ("Facts: [1] ", Slot("facts"), ". Go")),)
    assert variable.texts == ["a ball [2] a cube", "red [2] green"]
    assert region("b a", ("a", "b")) is None
