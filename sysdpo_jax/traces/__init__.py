"""Traces of programs that run already -> the system that they are, its runs and their scores."""
