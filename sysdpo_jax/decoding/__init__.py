"""Decoding of language models: a cache of keys and values, sampling, beam search."""
