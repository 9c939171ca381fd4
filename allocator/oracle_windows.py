"""What queries attend to in a windowed cache, and so what tables must hold, by counting positions.

Without a window that is everything, and all of this holds for any cache.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from allocator.sequence import KVSequence
from allocator.shadow import State, Story


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


class WindowOracle:
    """The part of the oracle that knows which blocks a sequence has to hold."""

    window: int | None
    num_sinks: int
    attended: Attended
    size: int
    stories: dict[KVSequence, Story]

    @abstractmethod
    def table(self, sequence: KVSequence) -> list[int]:
        """Return a sequence's block table."""

    @abstractmethod
    def end_step_of(self, sequence: KVSequence) -> None:
        """Let the step run first if `sequence` takes part in it."""

    def held_positions(self, sequence: KVSequence) -> list[int]:
        """Return the positions in the blocks that a sequence holds: those its last step needs, and later ones."""
        return self.positions_held(self.stories[sequence])

    def positions_held(self, story: Story) -> list[int]:
        """Return the same of the sequence with this story, which may be swapped out."""
        size, length = self.size, story.length
        blocks = self.attended.blocks(story.step, length)
        return [p for block in blocks for p in range(block * size, min((block + 1) * size, length))]

    def check_window(self, sequence: KVSequence, found: list[State]) -> None:
        """Let kernels run the last step on what the table holds, knowing nothing of what has left."""
        story = self.stories[sequence]
        assert sequence.context_len == len(found)
        for query in range(story.step, story.length):
            seen = self.attended.by_kernel(query, story.length - sequence.context_len)
            wanted = self.attended.by(query)
            assert [found[key] for key in seen] == [story.states[key] for key in wanted], (
                f"query {query} of {story}"
            )

    def leaving(self, sequences: Sequence[KVSequence]) -> int:
        """Return how many blocks no table has any more once sequences have let go of what they need no longer."""
        if self.window is None:
            return 0
        tables = {sequence: self.table(sequence) for sequence in self.stories}
        before = {block for table in tables.values() for block in table}
        for sequence in sequences:
            length = self.stories[sequence].length
            held = self.attended.blocks(self.stories[sequence].step, length)
            needed = self.attended.blocks(length, length)
            table = tables[sequence]
            tables[sequence] = [block for block, at in zip(table, held, strict=True) if at in needed]
        return len(before - {block for table in tables.values() for block in table})

    def growth(self, sequences: Sequence[KVSequence], count: int) -> int:
        """Return how many blocks sequences need to go on by `count` tokens, less those they let go of before."""
        size = self.size
        starts = sum(-(-(s.num_tokens + count) // size) - -(-s.num_tokens // size) for s in sequences)
        return starts - self.leaving(sequences)

    def least_length(self, sequence: KVSequence) -> int:
        """Return from how many tokens on a sequence can be cut: what the next query attends to has not left."""
        story = self.stories[sequence]
        held = set(self.held_positions(sequence))
        lacking = [n for n in range(1, story.length) if not held >= set(self.attended.by(n)) - {n}]
        return max(lacking, default=0) + 1

    def settle(self, sequences: Sequence[KVSequence]) -> None:
        """Run the step if any of `sequences` takes part in it and blocks may leave: growing says that it is done."""
        if self.window is not None:
            for sequence in sequences:
                self.end_step_of(sequence)

    def held_states(self) -> set[State]:
        """Return the histories whose cached blocks are held, be they in a table or not."""
        if self.window is not None:  # what is not in a table is not held
            return set()
        return {state for story in self.stories.values() for state in story.full_states()}
