"""Batch: sequences that decode in lockstep, sorted by the step at which each needs its next block."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import overload

from allocator.sequence import KVSequence


class Batch(Sequence[KVSequence]):
    """Running sequences, each of which gets one token a tick. Made by `KVCacheManager.batch()`.

    A sequence of t tokens at tick 0 starts a new block at every tick with (t + tick) mod tokens_per_block = 0,
    so the members are kept in buckets by −t mod tokens_per_block, and a step touches only the bucket whose
    turn it is, whatever the size of the batch. Add a sequence once its prefill is complete; remove it before
    releasing it. Iteration is in the order of addition.
    """

    def __init__(self, tokens_per_block: int, live: Container[KVSequence]) -> None:
        self.live = live
        self.tick = 0
        self.tokens_per_block = tokens_per_block
        self._members: dict[KVSequence, None] = {}
        self._buckets: dict[int, dict[KVSequence, None]] = {}
        self.unready: dict[
            KVSequence, None
        ] = {}  # to be looked at before the next write: it may have to copy

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[KVSequence]:
        return iter(self._members)

    def __contains__(self, sequence: object) -> bool:
        return sequence in self._members

    @overload
    def __getitem__(self, index: int) -> KVSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[KVSequence]: ...
    def __getitem__(self, index: int | slice) -> KVSequence | list[KVSequence]:
        return list(self._members)[index]

    def add(self, sequence: KVSequence) -> None:
        """Let a sequence take part from the next step on.

        Raises ValueError if it is in a batch already, not among the manager's live ones, or short of its prompt.
        """
        if sequence.batch is not None:
            raise ValueError(f"{sequence} must leave its batch before it joins another")
        if sequence not in self.live:
            state = "released" if sequence.released else "another manager's"
            raise ValueError(f"{sequence} must not be {state}")
        if sequence.num_tokens < sequence.num_prompt_tokens:
            raise ValueError(f"{sequence} must have its prompt of {sequence.num_prompt_tokens} complete")
        residue = (self.tick - sequence.num_tokens) % self.tokens_per_block
        tokens = sequence.num_tokens
        sequence.batch = self
        sequence.num_tokens = tokens
        self._members[sequence] = None
        self._buckets.setdefault(residue, {})[sequence] = None
        if tokens % self.tokens_per_block:
            self.unready[sequence] = None

    def remove(self, sequence: KVSequence) -> None:
        """Take a sequence out. Raises ValueError if it is not in this batch."""
        if sequence.batch is not self:
            raise ValueError(f"{sequence} must be in the batch to leave it")
        tokens = sequence.num_tokens
        residue = (self.tick - tokens) % self.tokens_per_block
        sequence.batch = None
        sequence.num_tokens = tokens
        del self._members[sequence]
        bucket = self._buckets[residue]
        del bucket[sequence]
        if not bucket:
            del self._buckets[residue]
        self.unready.pop(sequence, None)

    def growth(self, num_tokens: int) -> int:
        """Return how many blocks the next `num_tokens` ticks take, copies apart."""
        size, tick = self.tokens_per_block, self.tick
        blocks = 0
        for residue, bucket in self._buckets.items():
            offset = (residue - tick) % size
            if offset < num_tokens:
                blocks += len(bucket) * (1 + (num_tokens - 1 - offset) // size)
        return blocks

    def fills(self, num_tokens: int) -> int:
        """Return how many blocks become full in the next `num_tokens` ticks."""
        # a member fills a block one tick before it starts the next
        return self.growth(num_tokens + 1) - self.growth(1)

    def ticks_until_fill(self) -> int:
        """Return after how many ticks a member next fills a block (0 for an empty batch)."""
        size, tick = self.tokens_per_block, self.tick
        return min(((residue - tick - 1) % size + 1 for residue in self._buckets), default=0)

    def events(self, num_tokens: int) -> Iterator[tuple[dict[KVSequence, None], bool]]:
        """Yield, in order of time, the buckets that start (True) or fill (False) a block in the next ticks."""
        size, tick = self.tokens_per_block, self.tick
        order = sorted(((residue - tick) % size, bucket) for residue, bucket in self._buckets.items())
        for cycle in range(0, num_tokens + 1, size):
            for offset, bucket in order:
                when = cycle + offset
                if 0 < when <= num_tokens:
                    yield bucket, False
                if when < num_tokens:
                    yield bucket, True
