"""Decoding with a key-value cache: sampling, and diverse beam search."""

from sysdpo_jax.decoding.beam_search import Beams, BeamSearch, Penalties, beam_search
from sysdpo_jax.decoding.decode import Generated, beam_generate, generate

__all__ = ["BeamSearch", "Beams", "Generated", "Penalties", "beam_generate", "beam_search", "generate"]
