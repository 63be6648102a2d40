"""Runnable experiments: each module is a command line with a dataclass configuration."""
