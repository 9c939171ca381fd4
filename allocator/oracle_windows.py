"""Attended: what queries attend to in a windowed cache, and so what tables must hold, by counting positions."""

from __future__ import annotations

from collections.abc import Sequence


class Attended:
    """Say for each query which positions it attends to: the last `window`, its own included, and the sinks.

    Without a window these are all up to its own.
    """

    def __init__(self, window: int | None, num_sinks: int, tokens_per_block: int) -> None:
        self.window = window
        self.num_sinks = num_sinks
        self.size = tokens_per_block

    def by(self, query: int) -> list[int]:
        """Return the positions that one query attends to."""
        if self.window is None:
            return list(range(query + 1))
        return [p for p in range(query + 1) if p > query - self.window or p < self.num_sinks]

    def blocks(self, query: int, length: int) -> list[int]:
        """Return which blocks of a sequence's `length` tokens are needed for `query` and all later ones.

        `query` may lie beyond: those that it needed stay while the sequence is cut.
        """
        if self.window is None:
            positions: Sequence[int] = range(length)
        else:
            before = range(max(length, query))
            positions = [p for p in before if p > query - self.window or p < self.num_sinks]
        return sorted(
            {position // self.size for position in positions if position // self.size * self.size < length}
        )

    def by_kernel(self, query: int, offset: int) -> list[int]:
        """Return which keys of its table a kernel attends to, the query being `offset` positions further in front.

        It knows nothing of blocks that have left: it applies window and sinks to what it is given.
        """
        return self.by(query - offset)
