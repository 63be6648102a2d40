"""What people answered in Label Studio and Argilla, who were asked which of two is better."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

from sysdpo_jax.components.base import RecordError

# Which side is better.
Answer = Literal["left", "right", "tie", "skip"]
ANSWERS: tuple[Answer, ...] = get_args(Answer)


class Said(NamedTuple):
    """An answer. person: who gave it, "" where that is not known; time: when, as a text that sorts, "" likewise."""

    answer: Answer
    person: str = ""
    time: str = ""


# What Argilla calls a response that is given; a draft is none yet, and a discarded one is skipped.
SUBMITTED, DRAFT = "submitted", "draft"
# How `to_datasets` of Argilla spells the responses to a question out.
FLAT = ".responses"


def label_studio_answers(task: Mapping[str, Any]) -> list[Said]:
    """The answers in a task of the JSON export, https://labelstud.io/guide/task_format, one for each annotation.

    Of an annotation without `completed_by` its id stands for the person.

    `annotations[].result[].value.selected` of the Pairwise tag (https://labelstud.io/tags/pairwise) is left or right, a
    choice `tie` is a tie; what was cancelled or says neither is skipped. Raises `RecordError` for another answer.
    """
    return [Said(_annotated(each), _annotator(each), _time(each)) for each in task["annotations"]]


def argilla_answers(
    responses: Mapping[str, Sequence[Mapping[str, Any]]], sides: tuple[str, str] = ("left", "right")
) -> list[Said]:
    """The answers among `responses` of a record of `dataset.records.to_json`, {question: [{"value", "user_id"}]}, one
    for each person. Responses without a user are of a person for each place in the lists, which then have one order.

    A label is one of the sides, left, right, tie or skip, a ranking has both sides with ranks, or two questions that
    are called as the sides have ratings. Raises `RecordError` for another answer.
    """
    people: dict[tuple[str, int], dict[str, Any]] = {}
    for question, given in responses.items():
        for place, response in enumerate(given or ()):
            user = str(response.get("user_id") or "")
            if response.get("status") != DRAFT:
                discarded = (response.get("status") or SUBMITTED) != SUBMITTED
                value = "skip" if discarded else _renamed(response["value"], sides)
                people.setdefault((user, 0 if user else place), {})[_renamed(question, sides)] = value
    return [Said(_one(list(_responded(questions))), user) for (user, _), questions in people.items()]


def responses_of(row: Mapping[str, Any]) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    """`responses` of a record, whether it is nested or a row of `dataset.records.to_datasets`, which has
    "<question>.responses", ".responses.users" and ".responses.status". Raises `RecordError` where there is neither.
    """
    if isinstance(row.get("responses"), Mapping):
        return dict(row["responses"])
    made = {}
    for name in (name for name in row if name.endswith(FLAT)):
        values = row[name] or ()
        users, states = (row.get(f"{name}.{part}") or [None] * len(values) for part in ("users", "status"))
        parts = zip(values, users, states, strict=True)
        made[name.removesuffix(FLAT)] = [{"value": v, "user_id": user, "status": state} for v, user, state in parts]
    if not made:
        raise RecordError("the row has no responses: export the records with Argilla's to_json or to_datasets")
    return made


def _annotated(annotation: Mapping[str, Any]) -> Answer:
    if annotation.get("was_cancelled"):
        return "skip"
    values = [entry.get("value", {}) for entry in annotation["result"]]
    said = [value["selected"] for value in values if value.get("selected", "none") != "none"]
    said += [choice for value in values for choice in value.get("choices", ()) if choice == "tie"]
    return _one(said) if said else "skip"


def _annotator(annotation: Mapping[str, Any]) -> str:
    """Who made an annotation: Label Studio writes a person's number, or an object with it."""
    person = annotation.get("completed_by")
    person = person.get("id", person.get("email")) if isinstance(person, Mapping) else person
    own = annotation.get("id")
    return str(person) if person is not None else "" if own is None else f"annotation {own}"


def _time(annotation: Mapping[str, Any]) -> str:
    return str(annotation.get("updated_at") or annotation.get("created_at") or "")


def _responded(questions: Mapping[str, Any]) -> Iterator[Any]:
    """What the answers to all questions say, of which those that are no comparison, as a remark, say nothing."""
    for name, value in questions.items():
        if isinstance(value, str) and value in ANSWERS:
            yield value
        elif isinstance(value, list) and {"left", "right"} == {_ranked(each) for each in value}:
            ranks: dict[str, Any] = {each["value"]: each.get("rank") for each in value if isinstance(each, dict)}
            if None in ranks.values() or len(ranks) < 2:
                raise RecordError(f"the ranking {name!r} has no ranks, which ties need: ask with a label question")
            yield _higher(-ranks["left"], -ranks["right"])
    ratings = [questions.get(name) for name in ("left", "right")]
    if all(isinstance(rating, int) for rating in ratings):
        yield _higher(*ratings)


def _ranked(entry: Any) -> Any:
    return entry.get("value") if isinstance(entry, dict) else entry


def _higher(left: Any, right: Any) -> Answer:
    return "tie" if left == right else "left" if left > right else "right"


def _one(said: Sequence[Any]) -> Answer:
    """The answer of which there is one."""
    if len(set(said)) != 1 or said[0] not in ANSWERS:
        words = " and ".join(map(repr, said)) or "nothing of left, right or tie"
        raise RecordError(f"an answer says {words}: it must be one of {', '.join(ANSWERS)}")
    found: Answer = said[0]
    return found


def _renamed(value: Any, sides: tuple[str, str]) -> Any:
    """A response, or the name of a question, with left and right for the names of the sides."""
    if isinstance(value, list):
        return [_renamed(each, sides) for each in value]
    if isinstance(value, Mapping):
        return {**value, "value": _renamed(value.get("value"), sides)}
    return dict(zip(sides, ("left", "right"), strict=True)).get(value, value) if isinstance(value, str) else value
