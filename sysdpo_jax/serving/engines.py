"""What servers of language models are asked, and what they answer: vLLM's and SGLang's own words.

A prompt goes as token ids and comes back with the ids that were sampled and their log-probabilities, so that no text is
tokenized twice. Everything that a server would take from a model's generation_config.json is stated.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

# A path below the server's address, and the body.
Call = tuple[str, dict[str, Any]]


class Settings(NamedTuple):
    """How a text is sampled: the room for it in tokens, temperature, nucleus, and the tokens that end it."""

    max_new_tokens: int
    temperature: float
    top_p: float
    ends: tuple[int, ...]


class Sampled(NamedTuple):
    """What was sampled.

    tokens: With the one that ended it. log_probs: Of each of them, of the model's plain distribution, in nats. stopped:
    Whether it ended, and was not cut for want of room.
    """

    tokens: list[int]
    log_probs: list[float]
    stopped: bool


class AnswerError(ValueError):
    """An answer that lacks what was asked for: says what."""


class Engine(Protocol):
    """A kind of server. A name stands for parameters: that of an adapter, or the version of whole weights.

    needs: How one must be started to take parameters. keeps_tied_heads: Whether it keeps the old head of a model whose
    head is its embedding when it takes other weights.
    """

    needs: str
    keeps_tied_heads: bool

    def completion(self, model: str, adapter: str | None, prompt: Sequence[int], seed: int, settings: Settings) -> Call:
        """The question for one text. model: what the server began with. adapter: name of one that it loaded."""
        ...

    def read(self, answer: Any) -> Sampled:
        """The text of an answer. Raises `AnswerError`."""
        ...

    def load_adapter(self, name: str, folder: str) -> Call:
        """Takes LoRA factors from a folder in PEFT's layout."""
        ...

    def unload_adapter(self, name: str) -> Call:
        """Forgets them."""
        ...

    def load_weights(self, name: str, folder: str) -> tuple[Call, ...]:
        """Takes whole weights from a folder of transformers in the place of those it has."""
        ...


class VLLM:
    """vLLM's OpenAI-compatible server (0.32)."""

    needs = (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and a --max-lora-rank of at least theirs for adapters, "
        "VLLM_SERVER_DEV_MODE=1 for whole weights"
    )
    # It says in its log that the head could not be loaded.
    keeps_tied_heads = True

    def completion(self, model: str, adapter: str | None, prompt: Sequence[int], seed: int, settings: Settings) -> Call:
        return "/v1/completions", {
            "model": adapter or model,
            "prompt": list(prompt),
            "seed": seed,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(settings.ends),
            "skip_special_tokens": False,
            "logprobs": 0,
            "return_token_ids": True,
        }

    def read(self, answer: Any) -> Sampled:
        try:
            [choice] = answer["choices"]
            made = choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"] == "stop"
        except (LookupError, TypeError, ValueError):
            raise AnswerError("one choice with token_ids and logprobs is wanted: use vLLM 0.10 or newer") from None
        return _checked(*made)

    def load_adapter(self, name: str, folder: str) -> Call:
        return "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}

    def unload_adapter(self, name: str) -> Call:
        return "/v1/unload_lora_adapter", {"lora_name": name}

    def load_weights(self, name: str, folder: str) -> tuple[Call, ...]:
        # What was computed of prompts by the old weights must not be used again.
        return (
            ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
            ("/reset_prefix_cache", {}),
        )


class SGLang:
    """SGLang's own endpoints (0.5)."""

    needs = "--enable-lora for adapters, and SGLANG_RETURN_ORIGINAL_LOGPROB=1 where the temperature is not 1"
    keeps_tied_heads = False

    def completion(self, model: str, adapter: str | None, prompt: Sequence[int], seed: int, settings: Settings) -> Call:
        return "/generate", {
            "input_ids": list(prompt),
            **({} if adapter is None else {"lora_path": adapter}),
            "return_logprob": True,
            "sampling_params": {
                "sampling_seed": seed,
                "max_new_tokens": settings.max_new_tokens,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "stop_token_ids": list(settings.ends),
                "skip_special_tokens": False,
            },
        }

    def read(self, answer: Any) -> Sampled:
        try:
            about = answer["meta_info"]
            log_probs = [entry[0] for entry in about["output_token_logprobs"]]
            made = answer["output_ids"], log_probs, about["finish_reason"]["type"] == "stop"
        except (LookupError, TypeError):
            raise AnswerError("output_ids and output_token_logprobs are wanted: use SGLang 0.5 or newer") from None
        return _checked(*made)

    def load_adapter(self, name: str, folder: str) -> Call:
        return "/load_lora_adapter", {"lora_name": name, "lora_path": folder}

    def unload_adapter(self, name: str) -> Call:
        return "/unload_lora_adapter", {"lora_name": name}

    def load_weights(self, name: str, folder: str) -> tuple[Call, ...]:
        return (("/update_weights_from_disk", {"model_path": folder, "weight_version": name}),)


ENGINES: Mapping[str, Engine] = {"vllm": VLLM(), "sglang": SGLang()}


def _checked(tokens: Any, log_probs: Any, stopped: bool) -> Sampled:
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens) or not tokens:
        raise AnswerError("the ids of the tokens are no list of whole numbers, or empty")
    if not isinstance(log_probs, list) or len(log_probs) != len(tokens):
        raise AnswerError(f"{len(tokens)} tokens need as many log-probabilities")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in log_probs):
        raise AnswerError("a log-probability is not a finite number")
    return Sampled(tokens, [float(value) for value in log_probs], stopped)
