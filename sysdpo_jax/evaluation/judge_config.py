"""What a judge is, as a configuration has it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, with_config

from sysdpo_jax.typing import STRICT, Natural, Positive


@with_config(STRICT)
@dataclass(frozen=True)
class JudgeConfig:
    """A model that scores runs, behind an endpoint that speaks OpenAI's chat completions. url: "" for none.

    url: as OpenAI's client takes it, https://api.openai.com/v1; of a server alone, http://localhost:8000, /v1 is added.
    model: its name there. template: a file with the question, the run's values in braces. answer: "stated" asks for the
    score as a JSON object in the last line, and takes no other number; "last_number" takes the last number of whatever
    the template asks for. range: the lowest and the highest score. key: the environment variable of the API key.
    temperature: null for models that take none. max_tokens: of an answer, null for the server's limit. timeout: seconds
    of a whole request. retries: of a failed one, within two minutes. parallel: requests at a time, of each process.
    """

    url: str = ""
    model: str = ""
    template: str = ""
    answer: Literal["stated", "last_number"] = "stated"
    range: tuple[float, float] = (0.0, 10.0)
    key: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    max_tokens: Positive | None = None
    timeout: Annotated[float, Field(gt=0)] = 60.0
    retries: Natural = 5
    parallel: Positive = 4
