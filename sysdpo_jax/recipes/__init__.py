"""Worked examples of components and tools of your own."""
