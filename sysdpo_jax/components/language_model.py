"""An autoregressive language model: log p(completion | prompt) is the sum over the completion's tokens."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from sysdpo_jax.components.base import Component, LogProbs, Metrics, RecordError, as_rows, batch_size
from sysdpo_jax.components.joined_turns import joined
from sysdpo_jax.components.prompts import (
    TRUNCATIONS,
    Prompt,
    Tokenizing,
    Truncation,
    check_vocabulary,
    closing,
    completion_ids,
    fitted,
    prompt_ids,
    tokenized,
)
from sysdpo_jax.components.sampled_text import sampled_texts
from sysdpo_jax.components.shared_prompt import Runs, marked, prefix_of
from sysdpo_jax.components.source import Source
from sysdpo_jax.components.token_log_probs import token_log_probs
from sysdpo_jax.components.token_sizes import resized, sizes_of
from sysdpo_jax.decoding import batches
from sysdpo_jax.decoding.beam_search import BeamSearch
from sysdpo_jax.decoding.decode import beam_generate, generate
from sysdpo_jax.keys import row_keys
from sysdpo_jax.models.decoder import Decoder, head_params
from sysdpo_jax.models.initial import fresh_params
from sysdpo_jax.models.remat import of_model
from sysdpo_jax.static import hold_tuples
from sysdpo_jax.typing import Features, Keys, Params, Parents
from sysdpo_jax.user_code import name_of, user_code
from sysdpo_jax.values import distinct


@dataclass(frozen=True)
class LanguageModel(Component):
    """A text given its parents.

    The tokenizer may hold more tokens than the decoder, as long as no row does; its padding token is never read.

    Args:
        decoder: The model.
        tokenizer: From transformers, with an end-of-sequence token.
        max_prompt_length: The room for a prompt, in tokens.
        max_new_tokens: The room for a completion, in tokens.
        prompt: Module-level function of the parents' values, in the order of Node.parents, that returns a string, a
            list of chat messages, or {"messages": [...], "tools": [...], "chat_template_kwargs": {...}}; by default the
            node's only parent is the prompt. A string is tokenized as the tokenizer does by default, messages through
            its chat template.
        temperature: Of `sample`; 0 takes the likeliest token.
        top_p: Of `sample`: nucleus sampling.
        truncation: Of texts without room. "error" refuses them; "keep_start" and "keep_end" keep the first or the last
            tokens of a prompt and, both of them, the first tokens of a completion, which has then no end. "keep_end"
            also keeps the tokenizer's beginning-of-sequence token in front; "keep_start" cuts from messages the header
            of the turn to come, so that the model does not know whose turn it is. The share of cut rows is the metric
            "truncated".
        stop_tokens: Token ids that end a completion beside the tokenizer's end-of-sequence token, as the `eos_token_id`
            of a generation_config.json lists them, and the token that closes a turn in the chat template.
        search: Settings of the beam search that finds `candidates`.
        source: The files that it was read from, which `pretrained.save` hands on.

    Raises:
        TypeError: For a search that is no `BeamSearch`.
        ValueError: For lengths beyond the decoder's positions, ends beyond its vocabulary, a truncation that does not
            exist, and a tokenizer without an end-of-sequence token.
    """

    decoder: Decoder
    tokenizer: Any = field(compare=False, repr=False)
    max_prompt_length: int
    max_new_tokens: int
    prompt: Callable[..., Any] | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    truncation: Truncation = "error"
    stop_tokens: tuple[int, ...] = ()
    search: BeamSearch = BeamSearch()
    source: Source | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        hold_tuples(self)
        if self.tokenizer.eos_token_id is None:
            raise ValueError("LanguageModel: the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"LanguageModel: truncation {self.truncation!r} is none of {', '.join(TRUNCATIONS)}")
        config, length = self.decoder.config, self._longest
        if length > config.max_position_embeddings:
            raise ValueError(
                f"LanguageModel: max_prompt_length {self.max_prompt_length} and max_new_tokens {self.max_new_tokens} "
                f"exceed the decoder's {config.max_position_embeddings} positions: lower them"
            )
        if not isinstance(self.search, BeamSearch):
            raise TypeError(f"LanguageModel: search must be a BeamSearch, not {type(self.search).__name__}")
        beyond = [end for end in self.ends if not 0 <= end < config.vocab_size]
        if beyond:
            raise ValueError(
                f"LanguageModel: the ends {beyond} of tokenizer.eos_token_id, stop_tokens and the chat template are "
                f"outside the decoder's {config.vocab_size} tokens: give the tokenizer and the stop_tokens that belong "
                "to the decoder"
            )

    @property
    def prepared_by(self) -> Any:
        lengths = self.max_prompt_length, self.max_new_tokens
        own = self.tokenizer, self.prompt, self.truncation, self.stop_tokens
        return *own, *lengths, self.decoder.config.vocab_size

    def init(self, key: PRNGKeyArray) -> Params:
        return fresh_params(self.decoder, key, jax.ShapeDtypeStruct((1, 2), jnp.int32))

    def prepare(self, values: Sequence[Any], parents: Parents) -> Features:
        """Token ids [batch, length], right padded, the prompt's length and the whole length of each row.

        length is max_prompt_length + max_new_tokens. "completion" [batch, max_new_tokens] is True once for each token
        of a completion; its width is the room that `log_prob` has for one. "truncated" is 1 in the rows of which
        anything was cut, and "retokenized" in those whose completion has other tokens than its model made or would
        make, see `CompletionIds`, or whose prompt holds earlier turns of which that is true; else they are 0.
        A completion is a string or, after a prompt of messages, a list of the one message that follows. What a model
        with this tokenizer sampled keeps its tokens, and gets no end where it was cut. All else is tokenized as it
        follows its prompt in one text, after messages as the chat template writes it, and one end closes it unless an
        end is there already or the completion fills max_new_tokens, where `sample` stops too. After messages that is
        the token that closes a turn of the chat template if there is one, else the end-of-sequence token.

        Raises:
            RecordError: For a text of another kind, one without room, what the chat template refuses, and tokens that
                the decoder does not have.
        """
        prompts = self._prompts(parents, len(values))
        tokens = np.full((len(values), self._longest), self._pad, np.int32)
        starts, lengths, truncated, retokenized = np.zeros((4, len(values)), np.int32)
        rows = tokenized(self.tokenizer, map(self._row, prompts, values, range(len(values))))
        for row, (start, answer, cut, other) in enumerate(rows):
            starts[row], lengths[row] = len(start), len(start) + len(answer)
            tokens[row, : lengths[row]] = start + answer
            truncated[row], retokenized[row] = cut, other
        return {
            "tokens": tokens,
            "prompt_lengths": starts,
            "lengths": lengths,
            "completion": np.arange(self.max_new_tokens) < (lengths - starts)[:, None],
            "truncated": truncated.astype(np.float32),
            "retokenized": retokenized.astype(np.float32),
        }

    def log_prob(self, params: Params, features: Features, key: Keys) -> LogProbs:
        return self.log_prob_with_metrics(params, features, key)[0]

    def log_prob_with_metrics(self, params: Params, features: Features, key: Keys) -> tuple[LogProbs, Metrics]:
        """Sum over completion tokens of log softmax(logits)[token], in float32, and their number as "tokens".

        "truncated" and "retokenized" are those of `prepare`, "turns" that of `join_turns`. The mask comes from lengths,
        never from the padding token, which may equal the end of sequence; what a model was told between its turns is
        not in it. Only the positions before a completion's tokens get logits, see `token_log_probs`.
        """
        return of_model(self._log_probs, self.decoder.config.remat)(params, jax.tree.map(jnp.asarray, features))

    def _log_probs(self, params: Params, features: Features) -> tuple[LogProbs, Metrics]:
        token_log_prob, completion = self.token_log_probs(params, features)
        counted = {name: features[name] for name in ("truncated", "retokenized", "turns") if name in features}
        metrics = counted | {"tokens": completion.sum(-1).astype(jnp.float32)}
        return jnp.sum(token_log_prob * completion, axis=-1), metrics

    def token_log_probs(
        self, params: Params, features: Features
    ) -> tuple[Float[Array, "batch completion"], Bool[Array, "batch completion"]]:
        """The log-probability of each token of the completions. Jittable.

        Args:
            params: The component's tree.
            features: As `prepare` makes them.

        Returns:
            log softmax(logits)[token] in nats, float32, and which of them are a completion's; others have no meaning.
        """
        features = jax.tree.map(jnp.asarray, features)
        tokens, starts = features["tokens"], features["prompt_lengths"]
        place = starts[:, None] + jnp.arange(features["completion"].shape[-1])
        made = token_log_probs(
            lambda head, part: cast(Array, self.decoder.apply({"params": head}, part, method="head")),
            head_params(self.decoder.config, params),
            self._hidden(params, features, place - 1),
            jnp.take_along_axis(tokens, place, axis=1, mode="clip"),
            self.decoder.config.vocab_size,
        )
        # The first token of all has nothing before it that could predict it.
        return made, features["completion"] & (place >= 1)

    def _hidden(self, params: Params, features: Features, places: Int[Array, "batch places"]) -> Array:
        """Hidden states at places of the rows; what the rows of a preference begin with is computed once."""
        tokens, prefix = features["tokens"][:, : self._longest], prefix_of(features, self._longest)
        run = partial(self.decoder.apply, {"params": params}, method="hidden_states")
        # Rows are padded on the right, so that causality alone hides the padding.
        places = jnp.clip(places, 0, tokens.shape[-1] - 1)
        if prefix is not None:
            return prefix.at(cast(Array, run(prefix.pack(tokens), prefix=prefix)), places)
        return jnp.take_along_axis(cast(Array, run(tokens)), places[..., None], axis=1)

    def sample(self, params: Params, parents: Parents, key: Keys) -> list[Any]:
        """One `SampledText` for each row, up to an end or max_new_tokens. Its draws depend on the key and its number.

        It remembers its tokens for `prepare`. As text it has all special tokens but ends, padding and starts of
        sequence. Prompts are cut or refused as in `prepare`, with `RecordError`.
        """
        prompts, lengths = self.prompt_tokens(parents)
        keys, tokens = row_keys(key, len(prompts)), np.zeros((len(prompts), self.max_new_tokens), np.int32)
        ends = np.zeros_like(lengths)
        for rows, start in self._parts(prompts, lengths):
            made = generate(
                self.decoder,
                params,
                start,
                lengths[rows],
                keys[rows],
                max_new_tokens=self.max_new_tokens,
                stop_tokens=self.ends,
                pad_token=self._pad,
                temperature=self.temperature,
                top_p=self.top_p,
                places=batches.places(len(rows)),
            )
            tokens[rows], ends[rows] = made.tokens, made.lengths
        kept = [row[:end].tolist() for row, end in zip(tokens, ends, strict=True)]
        return list(sampled_texts(self.tokenizer, kept, self.ends))

    def candidates(self, params: Params, parents: Parents, number: int, key: PRNGKeyArray) -> list[list[Any]]:
        """The distinct texts that `search` finds with `number` beams for each row, the best first; no key is used.

        There are fewer than `number` where sequences of different tokens read the same, of which the best stands for
        all: they are one value to the next node. Texts are as in `sample`. Beams beyond `number` fill the last of the
        search's groups.

        Raises:
            ValueError: Where the model gives no number.
        """
        groups = self.search.num_beam_groups or number
        prompts, starts = self.prompt_tokens(parents)
        beams = len(prompts), -(-number // groups) * groups
        tokens, lengths = np.zeros((*beams, self.max_new_tokens), np.int32), np.zeros(beams, np.int32)
        valid = np.zeros(beams, bool)
        for rows, start in self._parts(prompts, starts):
            made = beam_generate(
                self.decoder,
                params,
                start,
                starts[rows],
                num_beams=beams[1],
                search=self.search,
                max_new_tokens=self.max_new_tokens,
                stop_tokens=self.ends,
                pad_token=self._pad,
            )
            tokens[rows], lengths[rows], valid[rows] = made.tokens, made.lengths, made.valid
        if not valid.any(axis=1).all():
            raise ValueError(
                f"LanguageModel: the search found nothing for row {int(np.argmin(valid.any(axis=1)))}: the logits are "
                "not finite"
            )
        found = [row[:length].tolist() for row, length in zip(tokens[valid], lengths[valid], strict=True)]
        texts = iter(sampled_texts(self.tokenizer, found, self.ends))
        return [distinct([next(texts) for _ in range(found)])[:number] for found in valid.sum(1)]

    def join_turns(
        self, features: Features, ran: Bool[np.ndarray, "records turns"]
    ) -> tuple[Features, Bool[np.ndarray, "records turns"]]:
        """One row for turns of which each, with its prompt, is what the next one's prompt begins with.

        "completion" is then as wide as a prompt and a completion together, and False on what the model was told between
        its turns. "turns" counts those that a row holds.
        """
        return joined(features, ran, self._longest)

    def mark_shared(self, runs: Sequence[Features]) -> Sequence[Features]:
        """With "shared", see `shared_prompt`."""
        return marked(runs)

    def fold_runs(self, features: Features, axes: int) -> Features:
        """Of features with "shared" also "runs", by which `log_prob` knows which rows begin alike."""
        known, number = features.get("runs", Runs(1)).number, math.prod(features["tokens"].shape[1:axes])
        made: Features = as_rows(features, axes)
        return made | {"runs": Runs(known * number)} if "shared" in features else made

    def sizes(self, features: Features) -> Mapping[str, Int[np.ndarray, "..."]]:
        """The numbers of tokens of "prompt" and "completion"; what is "shared" is not counted in the prompt again.

        The completion of joined turns is all behind the first prompt.
        """
        return sizes_of(features)

    def resize(self, features: Features, sizes: Mapping[str, int]) -> Features:
        """The features with room for so many tokens of each of `sizes`, but no more than the model has.

        Raises:
            ValueError: For too few.
        """
        most = {"completion": self._longest if "turns" in features else self.max_new_tokens}
        rooms = {name: min(room, most.get(name, self.max_prompt_length)) for name, room in sizes.items()}
        return resized(features, rooms, self._pad)

    def padding(self, features: Features) -> float:
        places = np.size(features["tokens"])
        return 1 - float(np.sum(features["lengths"])) / places if places else 0.0

    def units(self, features: Features) -> Mapping[str, int]:
        """The tokens of prompts and completions; padding is none."""
        return {"tokens": int(np.sum(features["lengths"]))}

    def prompt_tokens(self, parents: Parents) -> tuple[Int[np.ndarray, "batch prompt"], Int[np.ndarray, "batch"]]:
        """What `sample` gives the model.

        Args:
            parents: `{parent: values}`.

        Returns:
            Right-padded token ids of the prompts, and their lengths.

        Raises:
            RecordError: As `prepare` does of a prompt.
        """
        rows = batch_size(parents, "LanguageModel")
        tokens, lengths = np.full((rows, self.max_prompt_length), self._pad, np.int32), np.zeros(rows, np.int32)
        made = tokenized(self.tokenizer, map(self._prompt_row, self._prompts(parents, rows), range(rows)))
        for row, (_, ids, _) in enumerate(made):
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        return tokens, lengths

    def _parts(
        self, prompts: Int[np.ndarray, "rows prompt"], lengths: Int[np.ndarray, "rows"]
    ) -> Iterator[tuple[Int[np.ndarray, "part"], Int[np.ndarray, "part width"]]]:
        """The rows that are decoded together, and their prompts, no wider than these need."""
        for rows in batches.parts(lengths, self.max_prompt_length):
            yield rows, prompts[rows, : batches.width(int(lengths[rows].max()), self.max_prompt_length)]

    @property
    def _longest(self) -> int:
        """As many tokens as a row has at most."""
        return self.max_prompt_length + self.max_new_tokens

    @property
    def _pad(self) -> int:
        """The tokenizer's padding token where the decoder has it: padding is masked, so any known id does."""
        pad = self.tokenizer.pad_token_id
        return int(self.tokenizer.eos_token_id if pad is None or pad >= self.decoder.config.vocab_size else pad)

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids of the tokens at which a completion ends, each once."""
        turn = closing(self.tokenizer)
        ends = (int(self.tokenizer.eos_token_id), *self.stop_tokens, *(() if turn is None else turn.ends))
        return tuple(dict.fromkeys(ends))

    def _prompts(self, parents: Parents, rows: int) -> list[Any]:
        """Each row's prompt, a string, messages, or messages with tools and arguments of the chat template."""
        if self.prompt is None and len(parents) != 1:
            raise RecordError(
                f"a language model without a `prompt` function reads exactly one parent, got "
                f"{', '.join(parents) or 'none'}: pass LanguageModel(prompt=...) to join them"
            )
        if self.prompt is None:
            return list(*parents.values())
        # Rows of the very same objects are copies: what fills a batch up reaches no function of the user's.
        values = list(zip(*parents.values(), strict=True))
        same = [tuple(map(id, row)) for row in values]
        made: dict[tuple[int, ...], Any] = {}
        for row in range(rows):
            if same[row] not in made:
                with user_code(f"the prompt function {name_of(self.prompt)} in row {row}", RecordError, (RecordError,)):
                    made[same[row]] = self.prompt(*values[row])
        return [made[copy] for copy in same]

    def _row(self, prompt: Any, value: Any, row: int) -> Tokenizing[tuple[list[int], list[int], bool, bool]]:
        """Ids of the prompt and of the completion as they fit, whether any were cut, and whether they are others."""
        whole, start, start_cut = yield from self._prompt_row(prompt, row)
        answer = yield from completion_ids(self.tokenizer, whole, value, self.ends, self.max_new_tokens, row)
        # The first tokens whatever becomes of prompts: a completion is judged from where it begins.
        keep: Truncation = "error" if self.truncation == "error" else "keep_start"
        kept, cut = fitted(answer.ids, self.max_new_tokens, keep, "completion", "max_new_tokens", row)
        check_vocabulary(self.tokenizer, kept, self.decoder.config.vocab_size, "completion", row)
        return start, kept, start_cut or cut, whole.retokenized or answer.retokenized

    def _prompt_row(self, prompt: Any, row: int) -> Tokenizing[tuple[Prompt, list[int], bool]]:
        """The prompt, its ids as they fit, and whether any were cut."""
        whole, start = (yield from prompt_ids(self.tokenizer, prompt, row)), self.tokenizer.bos_token_id
        setting = "max_prompt_length"
        kept, cut = fitted(whole.ids, self.max_prompt_length, self.truncation, "prompt", setting, row, start)
        check_vocabulary(self.tokenizer, kept, self.decoder.config.vocab_size, "prompt", row)
        return whole, kept, cut
