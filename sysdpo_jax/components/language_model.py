"""An autoregressive language model: log p(completion | prompt) is the sum over the completion's tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sysdpo_jax.components.base import Component, Metrics, RecordError
from sysdpo_jax.generation.decode import generate
from sysdpo_jax.models.decoder import Decoder
from sysdpo_jax.typing import Features, Params, Parents


@dataclass(frozen=True)
class LanguageModel(Component):
    """A text given its parents.

    decoder, tokenizer: the model and its Hugging Face tokenizer (with an end-of-sequence token).
    max_prompt_length, max_new_tokens: the room for prompt and completion, in tokens; a longer text is an error.
    prompt: module-level function of the parents' values that returns a string or a list of chat messages; by default
    the node's only parent is the prompt. A string is tokenized as the tokenizer does by default, messages through
    its chat template.
    temperature, top_p: of `sample`; temperature 0 takes the likeliest token.
    """

    decoder: Decoder
    tokenizer: Any = field(compare=False, repr=False)
    max_prompt_length: int
    max_new_tokens: int
    prompt: Callable[..., Any] | None = None
    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ValueError("LanguageModel: the tokenizer has no end-of-sequence token; set tokenizer.eos_token")

    def init(self, key: PRNGKeyArray) -> Params:
        return self.decoder.init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        """Token ids [batch, length], right padded, the prompt's length and the whole length of each row.

        length is max_prompt_length + max_new_tokens. Prompt and completion are tokenized apart, so that no token
        spans their boundary, and one end-of-sequence token closes the completion unless it is there already or the
        completion fills max_new_tokens, where `sample` stops as well.
        Raises `RecordError` for a text that is no string or is too long.
        """
        prompts = self._prompts(parents, len(values))
        tokens = np.full((len(values), self.max_prompt_length + self.max_new_tokens), self._pad, np.int32)
        lengths = np.zeros(len(values), np.int32)
        for row, (prompt, value) in enumerate(zip(prompts, values, strict=True)):
            ids = prompt + self._completion(value, row)
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
        return {"tokens": tokens, "prompt_lengths": np.array([len(p) for p in prompts], np.int32), "lengths": lengths}

    def log_prob(self, params: Params, features: Features, key: PRNGKeyArray) -> Float[Array, "batch"]:
        return self.log_prob_with_metrics(params, features, key)[0]

    def log_prob_with_metrics(
        self, params: Params, features: Features, key: PRNGKeyArray
    ) -> tuple[Float[Array, "batch"], Metrics]:
        """Sum over completion tokens of log softmax(logits)[token], in float32, and their number as "tokens".

        The mask comes from the lengths, never from the padding token, which may equal the end of sequence.
        """
        features = jax.tree.map(jnp.asarray, features)
        tokens, lengths = features["tokens"], features["lengths"][:, None]
        place = jnp.arange(tokens.shape[1])
        output: Any = self.decoder.apply({"params": params}, tokens, mask=place < lengths)
        logits = output[:, :-1]
        chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        token_log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
        completion = (place[1:] >= features["prompt_lengths"][:, None]) & (place[1:] < lengths)
        return jnp.sum(token_log_prob * completion, axis=-1), {"tokens": completion.sum(-1).astype(jnp.float32)}

    def sample(self, params: Params, parents: Parents, key: PRNGKeyArray) -> list[Any]:
        """One completion for each row, decoded without special tokens."""
        rows = len(next(iter(parents.values())))
        prompts = self._prompts(parents, rows)
        tokens = np.full((rows, self.max_prompt_length), self._pad, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        made = generate(
            self.decoder,
            params,
            tokens,
            np.array([len(prompt) for prompt in prompts], np.int32),
            key,
            max_new_tokens=self.max_new_tokens,
            stop_tokens=(self.tokenizer.eos_token_id,),
            pad_token=self._pad,
            temperature=self.temperature,
            top_p=self.top_p,
        )
        ids, lengths = np.asarray(made.tokens), np.asarray(made.lengths)
        kept: list[Int[np.ndarray, length]] = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        return list(self.tokenizer.batch_decode(kept, skip_special_tokens=True))

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None else pad)

    def _prompts(self, parents: Parents, rows: int) -> list[list[int]]:
        """Token ids of each row's prompt."""
        if self.prompt is None and len(parents) != 1:
            raise RecordError(
                f"a language model without a `prompt` function reads exactly one parent, got "
                f"{', '.join(parents) or 'none'}: pass LanguageModel(prompt=...) to join them"
            )
        join = self.prompt or (lambda value: value)
        return [self._prompt_ids(join(*(v[row] for v in parents.values())), row) for row in range(rows)]

    def _prompt_ids(self, prompt: Any, row: int) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif isinstance(prompt, Sequence):
            ids = self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        else:
            raise RecordError(f"the prompt in row {row} must be a string or messages, not {type(prompt).__name__}")
        return _fitting(list(ids), self.max_prompt_length, "prompt", "max_prompt_length", row)

    def _completion(self, value: Any, row: int) -> list[int]:
        if not isinstance(value, str):
            raise RecordError(f"the completion in row {row} must be a string, not {type(value).__name__}")
        ids = list(self.tokenizer(value, add_special_tokens=False)["input_ids"])
        # One that fills its room has no end, as `sample` stops there too: its probability is that of being cut.
        if len(ids) != self.max_new_tokens and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids.append(self.tokenizer.eos_token_id)
        return _fitting(ids, self.max_new_tokens, "completion", "max_new_tokens", row)


def _fitting(ids: list[int], room: int, what: str, setting: str, row: int) -> list[int]:
    if not 1 <= len(ids) <= room:
        raise RecordError(
            f"the {what} in row {row} has {len(ids)} tokens, outside 1..{room}: raise {setting} or edit it"
        )
    return ids
