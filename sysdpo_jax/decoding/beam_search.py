"""Beam search and diverse beam search (arXiv 1610.02424) on the device, for any model that yields next-token logits.

Beams are divided into groups that are searched side by side: at each step a group loses score for the tokens that
earlier groups have just chosen. One group is plain beam search, with the rules of transformers' `generate`.

Axes: B batch, R beams, G groups, M beams in a group, N new tokens, V vocabulary, T likeliest tokens of a beam.
Functions with an underscore work on one row of the batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

State = TypeVar("State")
# (newest tokens [B, R], parents [B, R] or None, state, tokens made so far) -> (next-token logits [B, R, V], state).
Step = Callable[[Array, Array | None, State, Array], tuple[Float[Array, "batch beams vocab"], State]]
BLOCK = 64


class Penalties(NamedTuple):
    """The settings that are traced: new values do not compile anew.

    Attributes:
        diversity: `BeamSearch.diversity_penalty`.
        length: `BeamSearch.length_penalty`.
        early_stopping: `BeamSearch.early_stopping`.
    """

    diversity: Array
    length: Array
    early_stopping: Array


@dataclass(frozen=True)
class BeamSearch:
    """Settings of diverse beam search (arXiv 1610.02424), under transformers' names.

    Args:
        num_beam_groups: By default one group for every beam, as section 5 of the paper recommends; 1 is plain beam
            search.
        diversity_penalty: The strength lambda, what a group's candidate loses for every time an earlier group has
            chosen its token at the same step (Hamming diversity, section 4).
        length_penalty: Finished sequences are ranked by log p / length ** length_penalty.
        early_stopping: A group is done as soon as all its places are taken, instead of when its running beams, at their
            present length, score no better than the worst of them.

    Raises:
        ValueError: For a number of groups below 1 and a diversity_penalty that is negative or not finite.
    """

    num_beam_groups: int | None = None
    diversity_penalty: float = 1.0
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        if self.num_beam_groups is not None and self.num_beam_groups < 1:
            raise ValueError(f"BeamSearch: num_beam_groups {self.num_beam_groups} must be at least 1, or None.")
        if not 0 <= self.diversity_penalty < math.inf:
            raise ValueError(f"BeamSearch: diversity_penalty {self.diversity_penalty} must be >= 0 and finite.")

    def groups(self, num_beams: int) -> int:
        """Divide beams into groups.

        Args:
            num_beams: How many there are.

        Returns:
            The number of groups.

        Raises:
            ValueError: If they cannot be divided evenly.
        """
        groups = num_beams if self.num_beam_groups is None else self.num_beam_groups
        if num_beams < 1 or num_beams % groups:
            raise ValueError(
                f"beam search: num_beams {num_beams} must be at least 1 and a multiple of num_beam_groups {groups}."
            )
        return groups

    def penalties(self) -> Penalties:
        """The settings beside the number of groups.

        Returns:
            Them as arrays, so that other values do not compile anew.
        """
        settings = jnp.float32(self.diversity_penalty), jnp.float32(self.length_penalty)
        return Penalties(*settings, jnp.bool_(self.early_stopping))


class Beams(NamedTuple):
    """What a search found, the best score first; no two valid sequences of a row are equal.

    Attributes:
        tokens: [batch, beams, tokens], padded after the end.
        lengths: [batch, beams], counting a stop token produced.
        log_probs: float32 [batch, beams], the model's own, without penalties.
        scores: log_probs / lengths ** length_penalty.
        valid: bool [batch, beams], False in the last places of a row with fewer distinct sequences than beams:
            log_probs and scores are -inf there, lengths 0.
    """

    tokens: Array
    lengths: Array
    log_probs: Array
    scores: Array
    valid: Array


class _Running(NamedTuple):
    """The unfinished beams. A beam of log_probs -inf does not run: its group is done or found nothing better."""

    token: Array  # [R] the newest token
    tokens: Array  # [R, N]
    log_probs: Array  # [R] the model's own
    penalties: Array  # [R] the diversity penalties of all steps


class _Finished(NamedTuple):
    """The best finished sequences of each group; ranks are penalised scores, -inf at an empty place."""

    ranks: Array  # [R]
    tokens: Array  # [R, N]
    lengths: Array  # [R]
    log_probs: Array  # [R]


class _Chosen(NamedTuple):
    """What the groups so far have chosen at this step; -1 is nothing."""

    going: Array  # [R] tokens with which beams go on
    ending: Array  # [R] tokens with which candidates ended
    kept: Array  # [R] the beams that those were continuations of, where they entered the finished sequences


class _Loop(NamedTuple):
    made: Array
    running: _Running
    finished: _Finished
    parents: Array  # [B, R] which beam of its row each running beam continues
    state: Any


def beam_search(
    step: Step[State],
    first_logits: Float[Array, "batch vocab"],
    state: State,
    *,
    num_beams: int,
    num_groups: int,
    penalties: Penalties,
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
    pad_token: int,
) -> Beams:
    """Search for the most promising continuations of every row; to be called under jit.

    Within a group candidates, finished sequences and the end of the search are ranked by scores less the sum of the
    diversity penalties (arXiv 1610.02424, algorithm 1). Beams that go on count as chosen, and so do those that end. A
    sequence belongs to the first group that finishes it and is no candidate of later ones. At max_new_tokens all end.

    Args:
        step: (tokens, parents, state, made) -> logits after `made` tokens, the newest of which are `tokens` [B, R], for
            beams that continue the beams `parents` [B, R] of the row, counted from 0, as they were at the last call. At
            the first call all beams of a row are equal. parents is None if every beam continues itself: in groups of
            one.
        first_logits: Of the first token.
        state: The model's, spread over the beams.
        num_beams: Of a row.
        num_groups: Which divides them.
        penalties: See `BeamSearch.penalties`.
        max_new_tokens: A sequence ends there, if not at a stop token.
        stop_tokens: Ids that end a sequence.
        pad_token: What fills a sequence after its end.

    Returns:
        The sequences, the best first.
    """
    batch, vocab = first_logits.shape
    size, stops = num_beams // num_groups, len(set(stop_tokens))
    # Of so many candidates `size` do not stop. Penalties lower at most the scores of the tokens that earlier groups
    # chose, so that many more tokens of each beam are enough to find a group's candidates among.
    wanted = (1 + stops) * size
    likeliest = min(vocab, wanted + (num_beams - size + stops if num_groups > 1 else 0))

    def advance(loop: _Loop, log_probs: Array, tokens: Array) -> _Loop:
        row = partial(
            _advance,
            made=loop.made,
            penalties=penalties,
            num_groups=num_groups,
            wanted=wanted,
            stop_tokens=stop_tokens,
        )
        running, finished, parents = jax.vmap(row)(loop.running, loop.finished, log_probs, tokens)
        return _Loop(loop.made + 1, running, finished, parents, loop.state)

    def goes_on(loop: _Loop) -> Array:
        return (loop.made < max_new_tokens) & jnp.any(loop.running.log_probs > -jnp.inf)

    def continued(loop: _Loop) -> _Loop:
        logits, state = step(loop.running.token, None if size == 1 else loop.parents, loop.state, loop.made)
        return advance(loop._replace(state=state), *top_log_probs(logits, likeliest))

    flat, empty = jnp.full((batch, num_beams), -jnp.inf, jnp.float32), jnp.zeros((batch, num_beams), jnp.int32)
    padding = jnp.full((batch, num_beams, max_new_tokens), pad_token, jnp.int32)
    # Equal beams would find the same: one in each group starts.
    alone = jnp.where(jnp.arange(num_beams) % size == 0, 0, flat)
    start = _Loop(
        made=jnp.int32(0),
        running=_Running(empty, padding, alone, jnp.zeros_like(flat)),
        finished=_Finished(flat, padding, empty, flat),
        parents=empty,
        state=state,
    )
    first = top_log_probs(first_logits[:, None], likeliest)
    spread = (jnp.broadcast_to(x, (batch, num_beams, likeliest)) for x in first)
    end = jax.lax.while_loop(goes_on, continued, advance(start, *spread))
    return _sorted(end.finished, penalties, pad_token)


def top_log_probs(
    logits: Float[Array, "batch beams vocab"], count: int
) -> tuple[Float[Array, "batch beams count"], Int[Array, "batch beams count"]]:
    """Log-probabilities and ids of the `count` likeliest tokens, the likeliest first.

    They lie in the `count` blocks of highest maxima, so that only these blocks are sorted.
    """
    *leading, vocab = logits.shape
    blocks = -(-vocab // BLOCK)
    if blocks <= count:
        values, ids = jax.lax.top_k(logits, count)
    else:
        padded = jnp.pad(logits, ((0, 0), (0, 0), (0, blocks * BLOCK - vocab)), constant_values=-jnp.inf)
        blocked = padded.reshape(*leading, blocks, BLOCK)
        _, best = jax.lax.top_k(jnp.max(blocked, axis=-1), count)
        inside = jnp.take_along_axis(blocked, best[..., None], axis=-2).reshape(*leading, count * BLOCK)
        values, places = jax.lax.top_k(inside, count)
        ids = jnp.take_along_axis(best, places // BLOCK, axis=-1) * BLOCK + places % BLOCK
    return values - jax.nn.logsumexp(logits, axis=-1, keepdims=True), ids


def _advance(
    running: _Running,
    finished: _Finished,
    log_probs: Float[Array, "beams likeliest"],
    ids: Int[Array, "beams likeliest"],
    made: Int[Array, ""],
    penalties: Penalties,
    num_groups: int,
    wanted: int,
    stop_tokens: tuple[int, ...],
) -> tuple[_Running, _Finished, Int[Array, " beams"]]:
    """The beams with one more token, the finished sequences, and the beams that the former continue; of one row."""
    (beams, likeliest), room = ids.shape, running.tokens.shape[1]
    size = beams // num_groups
    ranks = jnp.arange(min(wanted, size * likeliest))
    length = made + 1
    shortened = length.astype(jnp.float32) ** penalties.length
    # alike[i, j]: beams i and j hold the same tokens so far.
    alike = jnp.all(running.tokens[:, None] == running.tokens, axis=-1)

    def group(chosen: _Chosen, inputs: tuple[Any, ...]) -> tuple[_Chosen, tuple[_Running, _Finished, Array]]:
        offset, beam, held, log_probs, ids, alike = inputs
        counts = _count(ids, chosen.going) + _count(ids, chosen.ending)
        twins = alike[:, chosen.kept] & (chosen.kept >= 0)
        taken = jnp.any((ids[..., None] == chosen.ending) & twins[:, None], axis=-1)
        # What a model says of beams that do not run is not looked at.
        own = jnp.where(beam.log_probs[:, None] > -jnp.inf, beam.log_probs[:, None] + log_probs, -jnp.inf)
        lost = beam.penalties[:, None] + penalties.diversity * counts
        score, place = jax.lax.top_k(jnp.where(taken, -jnp.inf, own - lost).ravel(), len(ranks))
        source, token = place // likeliest, ids.ravel()[place]

        def continuation(picked: Array) -> tuple[Array, Array]:
            return beam.tokens[source[picked]].at[:, made].set(token[picked]), own.ravel()[place[picked]]

        # As in transformers, only the first `size` candidates may end; those behind them stand in for them.
        complete = jnp.isin(token, jnp.array(stop_tokens, jnp.int32)) | (length == room)
        ends = (complete & (score > -jnp.inf))[:size]
        sequences, own_ended = continuation(ranks[:size])
        ended = _Finished(
            ranks=jnp.where(ends, score[:size] / shortened, -jnp.inf),
            tokens=sequences,
            lengths=jnp.broadcast_to(length, (size,)),
            log_probs=own_ended,
        )
        held, entered = _best(held, ended)

        score, picked = jax.lax.top_k(jnp.where(complete, -jnp.inf, score), size)
        sequences, own_going = continuation(picked)
        full = jnp.all(held.ranks > -jnp.inf)
        hopeless = score[0] / shortened <= jnp.min(held.ranks)
        goes = (score > -jnp.inf) & ~(full & (penalties.early_stopping | hopeless))
        beam = _Running(
            token=token[picked],
            tokens=sequences,
            log_probs=jnp.where(goes, own_going, -jnp.inf),
            penalties=lost.ravel()[place[picked]],
        )

        def put(table: Array, here: Array, values: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(table, jnp.where(here, values, -1), offset, axis=0)

        chosen = _Chosen(
            going=put(chosen.going, goes, beam.token),
            ending=put(chosen.ending, ends, token[:size]),
            kept=put(chosen.kept, ends & entered, offset + source[:size]),
        )
        return chosen, (beam, held, offset + source[picked])

    offsets = jnp.arange(num_groups, dtype=jnp.int32) * size
    inputs = running, finished, log_probs, ids, alike
    divided = jax.tree.map(lambda x: x.reshape(num_groups, size, *x.shape[1:]), inputs)
    nothing = jnp.full(beams, -1, jnp.int32)
    _, results = jax.lax.scan(group, _Chosen(nothing, nothing, nothing), (offsets, *divided))
    return jax.tree.map(lambda x: x.reshape(beams, *x.shape[2:]), results)


def _best(held: _Finished, ended: _Finished) -> tuple[_Finished, Bool[Array, " size"]]:
    """The best of the sequences held so far and of as many new ones, and which of the new are among them."""
    size = held.ranks.shape[0]
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), held, ended)
    _, best = jax.lax.top_k(both.ranks, size)
    return jax.tree.map(lambda x: x[best], both), jnp.any(best[:, None] == size + jnp.arange(size), axis=0)


def _count(ids: Int[Array, "size likeliest"], chosen: Int[Array, " beams"]) -> Int[Array, "size likeliest"]:
    return jnp.sum(ids[..., None] == chosen, axis=-1)


def _sorted(finished: _Finished, penalties: Penalties, pad_token: int) -> Beams:
    """All groups' sequences in one order, by scores without the diversity penalties."""
    valid = finished.ranks > -jnp.inf
    lengths = jnp.where(valid, finished.lengths, 0)
    log_probs = jnp.where(valid, finished.log_probs, -jnp.inf)
    scores = jnp.where(valid, log_probs / jnp.maximum(lengths, 1).astype(jnp.float32) ** penalties.length, -jnp.inf)
    tokens = jnp.where(valid[..., None], finished.tokens, pad_token)
    order = jnp.argsort(-scores, axis=1)
    tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
    rest = (jnp.take_along_axis(x, order, axis=1) for x in (lengths, log_probs, scores, valid))
    return Beams(tokens, *rest)
