"""Decoding of language models: a cache of keys and values, sampling, beam search."""

from sysdpo_jax.decoding.beam_decode import beam_generate
from sysdpo_jax.decoding.beam_search import Beams, BeamSearch, Penalties, beam_search

__all__ = [
    "BeamSearch",
    "Beams",
    "Penalties",
    "beam_generate",
    "beam_search",
]
