"""The tool of sysdpo_jax/recipes/llama3_sdxl.yaml: an answer of three captions."""

NUMBER = 3


def split_captions(answer: str) -> list[str]:
    """The first three lines that are not empty, without what numbers or marks them; a line that is missing is empty."""
    lines = [line.strip().lstrip("0123456789.-*) ").strip() for line in answer.splitlines()]
    captions = [line for line in lines if line][:NUMBER]
    return captions + [""] * (NUMBER - len(captions))
