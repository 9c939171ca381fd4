"""When the blocks of an extent were filled, as runs: those of a prompt were all filled at the same moment.

Births are an array of int64 with two numbers a run: how many blocks, at least 1, and when they were filled. What an
operation costs goes by the runs that it touches, not by their blocks.
"""

from __future__ import annotations

from array import array
from typing import Final

_ONE: Final = array("q", (1,))


def one_by_one(dates: array[int]) -> array[int]:
    """Return the births of blocks that were filled at `dates`, int64 [blocks]."""
    births = _ONE * (2 * len(dates))
    births[1::2] = dates
    return births


def _run_of_last(births: array[int], blocks: int) -> tuple[int, int]:
    """Return where the run is with the first of the last `blocks` blocks, and how many of its blocks come before."""
    at, left = len(births), blocks
    while left > 0:
        at -= 2
        left -= births[at]
    return at, -left


def last(births: array[int], blocks: int) -> array[int]:
    """Return the births of the last `blocks` blocks."""
    at, before = _run_of_last(births, blocks)
    found = births[at:]
    if before:
        found[0] -= before  # only some of that run
    return found


def drop_last(births: array[int], blocks: int) -> None:
    """Take the last `blocks` blocks out."""
    at, before = _run_of_last(births, blocks)
    if before:
        births[at] = before
        at += 2
    del births[at:]


def cut_first(births: array[int], blocks: int) -> array[int]:
    """Take the first `blocks` blocks, at least 1, out and return their births."""
    at, left = 0, blocks
    while left > births[at]:
        left -= births[at]
        at += 2
    found = births[: at + 2]
    found[at] = left
    births[at] -= left
    del births[: at if births[at] else at + 2]
    return found
