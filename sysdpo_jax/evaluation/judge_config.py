"""What a judge is, as a configuration has it."""

from dataclasses import dataclass
from typing import Literal

from sysdpo_jax.typing import AboveZero, Natural, Positive


@dataclass(frozen=True)
class JudgeConfig:
    """A model that scores runs, behind an endpoint that speaks OpenAI's chat completions.

    Args:
        url: Address of the server, such as https://api.openai.com/v1; /v1 is added where there is no path.
        model: Name of the model on that server.
        template: File with the question, in which the run's values stand in braces.
        answer: "stated" asks for the score as a JSON object in the last line, and takes no other number; "last_number"
            takes the last number of whatever the template asks for.
        range: The lowest and the highest score.
        key: Name of the environment variable that holds the API key.
        temperature: Sampling temperature; null for models that take none.
        max_tokens: Largest number of tokens in an answer; null for the server's limit.
        timeout: Seconds that a whole request may take.
        retries: Further attempts after a failed request, within two minutes.
        parallel: Requests at the same time, of each process.
    """

    url: str = ""
    model: str = ""
    template: str = ""
    answer: Literal["stated", "last_number"] = "stated"
    range: tuple[float, float] = (0.0, 10.0)
    key: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: Positive | None = None
    timeout: AboveZero = 60.0
    retries: Natural = 5
    parallel: Positive = 4
