"""How a list of prompts is decoded: to which width it is padded, in how many calls, how many rows at a time."""

import numpy as np
from jaxtyping import Int

Lengths = Int[np.ndarray, " rows"]
# Widths are these times powers of two, so that lists of prompts meet few shapes, each of which is compiled once.
WIDTHS = 32, 48
# A list is cut in so many parts of like lengths, of at least so many rows, if the prompts then take up this share of
# the tokens at most: two calls are two programs, and each ends with its own longest row.
CUTS, MIN_ROWS, SHARE = (2, 4), 16, 0.7
# So many rows are continued at once in any case, and a quarter of a longer list. With completions of lognormal lengths
# a row then has a neighbour at most times; where all are equally long, smaller batches only cost.
PLACES, WAITING = 128, 4


def width(longest: int, most: int) -> int:
    """To how many tokens prompts are padded the longest of which has `longest`; `most` is the room for any."""
    octave = WIDTHS[0]
    while octave * WIDTHS[1] // WIDTHS[0] < longest:
        octave *= 2
    fits = next(size for size in (octave, octave * WIDTHS[1] // WIDTHS[0]) if size >= longest)
    return min(fits, most)


def places(rows: int) -> int:
    """How many of so many rows are continued at a time."""
    return min(rows, max(PLACES, rows // WAITING))


def parts(lengths: Lengths, most: int) -> list[Int[np.ndarray, " part"]]:
    """The rows in parts that are decoded together: all in their order or, where that saves much, by length."""
    rows, order = len(lengths), np.argsort(lengths, kind="stable")
    if not rows:
        return []
    best, tokens = [np.arange(rows)], rows * width(int(lengths.max(initial=1)), most)
    for count in CUTS:
        cut = np.array_split(order, count)
        padded = sum(len(part) * width(int(lengths[part].max(initial=1)), most) for part in cut)
        if rows // count >= MIN_ROWS and padded <= SHARE * tokens:
            best, tokens = cut, padded
    return best
