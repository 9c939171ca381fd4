"""Two kinds of KV memory behind one face: contiguous reservations, and the paged manager."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from allocator.config import CacheConfig
from allocator.content import UniqueContent
from allocator.manager import KVCacheManager, KVSequence, OutOfBlocks
from allocator.reservation import OutOfSlots, Reservation, ReservationPool


@dataclass(eq=False)
class Lifetime:
    """One request on its way: what it asks for, and how far it has come."""

    arrival_ps: int
    prompt_tokens: int
    output_tokens: int
    done_tokens: int = 0
    """Output tokens generated so far."""
    place: Reservation | KVSequence | None = field(default=None, repr=False)
    """Where its keys and values are, while it runs."""

    @property
    def final_tokens(self) -> int:
        """Slots it fills in the end: the last output token is never written."""
        return self.prompt_tokens + self.output_tokens - 1

    @property
    def prefill_tokens(self) -> int:
        """Tokens to compute on admission; after a preemption, those generated before too."""
        return self.prompt_tokens + self.done_tokens

    @property
    def remaining_tokens(self) -> int:
        """Output tokens still to be generated."""
        return self.output_tokens - self.done_tokens


@dataclass(frozen=True)
class Shares:
    """Where the memory's slots go; the four add up to all of them (the paper's figure 2).

    `external` is what no running request owns or can ever write: the placement's rounding, and free slots. While
    a request waits, free slots are fragmentation, as they are too few, or too scattered, for it.
    """

    tokens: int
    reserved: int
    internal: int
    external: int


class Memory(Protocol):
    """A KV memory as the serving loop uses it. A call that returns False has changed nothing."""

    name: str
    num_slots: int

    def admit(self, request: Lifetime) -> bool:
        """Write the request's prefill tokens, if there is room."""

    def advance(self, running: list[Lifetime], num_tokens: int) -> bool:
        """Write `num_tokens` more tokens of each running request, if there is room for all."""

    def release(self, request: Lifetime) -> None:
        """Take the request's memory back."""

    def shares(self, running: list[Lifetime]) -> Shares:
        """Return where the slots go now."""


class ContiguousMemory:
    """A ReservationPool under one rule: never preempts, since a sequence has all it will need."""

    def __init__(self, name: str, num_slots: int, rule: str, placement: str, max_seq_len: int) -> None:
        self.name = name
        self.num_slots = num_slots
        self.max_seq_len = max_seq_len
        self.pool = ReservationPool(num_slots, rule, placement)

    def admit(self, request: Lifetime) -> bool:
        """Reserve a range by the rule, if one is free."""
        try:
            request.place = self.pool.allocate(request.prefill_tokens, request.final_tokens, self.max_seq_len)
        except OutOfSlots:
            return False
        return True

    def advance(self, running: list[Lifetime], num_tokens: int) -> bool:
        """Write into the ranges reserved; there is always room."""
        for request in running:
            assert isinstance(request.place, Reservation)
            self.pool.grow(request.place, num_tokens)
        return True

    def release(self, request: Lifetime) -> None:
        """Free the range."""
        assert isinstance(request.place, Reservation)
        self.pool.free(request.place)
        request.place = None

    def shares(self, running: list[Lifetime]) -> Shares:
        """Return the pool's own accounting."""
        usage = self.pool.usage()
        return Shares(usage.tokens, usage.reserved, usage.internal, usage.rounding + usage.free)


class PagedMemory:
    """A KVCacheManager without block reuse: what is compared is memory, not caching.

    While anything runs, admission leaves the share `watermark` of the blocks for those that run to grow into.
    """

    def __init__(self, name: str, num_slots: int, tokens_per_block: int, watermark: float = 0.01) -> None:
        self.name = name
        self.num_slots = num_slots
        self.kept_blocks = int(watermark * (num_slots // tokens_per_block))
        self.manager = KVCacheManager(
            num_slots // tokens_per_block, tokens_per_block, CacheConfig(enable_block_reuse=False)
        )

    def admit(self, request: Lifetime) -> bool:
        """Take blocks for the tokens to compute, if there are enough."""
        manager, content = self.manager, UniqueContent(request.prefill_tokens)
        needed = -(-request.prefill_tokens // manager.tokens_per_block)
        if manager.sequences and needed + self.kept_blocks > manager.available_blocks:
            return False
        try:
            request.place = manager.admit(content, request.prefill_tokens)
        except OutOfBlocks:
            return False
        return True

    def advance(self, running: list[Lifetime], num_tokens: int) -> bool:
        """Take a block for each sequence that starts one, if there are enough."""
        sequences = [request.place for request in running if isinstance(request.place, KVSequence)]
        try:
            self.manager.advance(sequences, num_tokens)
        except OutOfBlocks:
            return False
        return True

    def release(self, request: Lifetime) -> None:
        """Give the blocks back."""
        assert isinstance(request.place, KVSequence)
        self.manager.release(request.place)
        request.place = None

    def shares(self, running: list[Lifetime]) -> Shares:
        """Return the manager's block counts; of a last block's unwritten slots, some will be written."""
        stats = self.manager.stats()
        size = stats.tokens_per_block
        owned = stats.referenced_blocks * size
        reserved = 0
        for request in running:
            assert isinstance(request.place, KVSequence)
            tokens = request.place.num_tokens
            reserved += min(-tokens % size, request.final_tokens - tokens)
        return Shares(
            tokens=stats.kv_tokens,
            reserved=reserved,
            internal=owned - stats.kv_tokens - reserved,
            external=self.num_slots - owned,
        )
