"""Runs of a system in files, what they score, and rounds of training on them."""
