"""What both programs ask, where they look it up, and how their answers are scored."""

import re

QUESTIONS = (
    ("What is the capital of France?", "Paris"),
    ("What is the capital of Japan?", "Tokyo"),
    ("How many legs does a spider have?", "eight"),
    ("Which planet is the largest?", "Jupiter"),
    ("What do bees make?", "honey"),
    ("Who wrote Hamlet?", "Shakespeare"),
    ("At how many degrees Celsius does water boil?", "100"),
    ("What gas do plants take in?", "carbon dioxide"),
    ("How many sides does a hexagon have?", "six"),
    ("What is the longest river of Africa?", "Nile"),
    ("What metal is liquid at room temperature?", "mercury"),
    ("Which animal is the tallest?", "giraffe"),
)
PASSAGES = (
    "Paris is the capital of France and lies on the Seine.",
    "Tokyo is the capital of Japan.",
    "A spider has eight legs, an insect has six.",
    "Jupiter is the largest planet of the solar system.",
    "Bees make honey from the nectar of flowers.",
    "Hamlet is a play that Shakespeare wrote around 1600.",
    "Water boils at 100 degrees Celsius at sea level.",
    "Plants take in carbon dioxide and give off oxygen.",
    "A hexagon has six sides, a pentagon has five.",
    "The Nile is the longest river of Africa.",
    "Mercury is a metal that is liquid at room temperature.",
    "The giraffe is the tallest animal on land.",
)


def retrieve(query: str, number: int = 2) -> list[str]:
    """The passages that share the most words with the query."""
    words = set(re.findall(r"\w+", query.lower()))
    shared = {text: len(words & set(re.findall(r"\w+", text.lower()))) for text in PASSAGES}
    return sorted(PASSAGES, key=lambda text: -shared[text])[:number]


def quality(answer: str, wanted: str) -> float:
    """1 for an answer that has the wanted word, less a hundredth for each of its words."""
    return float(wanted.lower() in answer.lower()) - len(answer.split()) / 100
