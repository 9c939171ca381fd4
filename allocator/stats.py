"""CacheStats: what a manager has counted so far, and how its blocks stand now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from allocator.field_docs import with_field_docs

if TYPE_CHECKING:
    from allocator.matching import PrefixMatch

MISS_CAUSES = ("last_token", "short_of_block", "isolated", "in_flight", "evicted", "cold", "unknown")
"""Why a block of a prompt was not found, in the order in which the causes are tried; the first that applies:

last_token      cached, but a prompt's last token is always computed, and blocks are reused whole
short_of_block  the prompt's last tokens fill no block
isolated        cached under another salt
in_flight       another sequence is about to compute it
evicted         was cached once, and its ghost is still remembered
cold            never seen
unknown         not remembered, and older ghosts have been forgotten: evicted or cold
"""


@dataclass
class Lookups:
    """Counts over first admissions; `miss_blocks` sums up to query_blocks − hit_blocks.

    A block hit in part is a miss; its tokens are hit tokens, and `partial_hits` counts such blocks.
    """

    query_tokens: int = 0
    query_blocks: int = 0
    hit_tokens: int = 0
    hit_blocks: int = 0
    partial_hits: int = 0
    miss_blocks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MISS_CAUSES, 0))

    def count(self, match: PrefixMatch) -> None:
        """Count a first admission, by what its lookup found."""
        self.query_tokens += match.content.num_prompt_tokens
        self.query_blocks += match.query_blocks
        if match.hit_tokens:
            self.hit_tokens += match.hit_tokens
            self.hit_blocks += match.hit_blocks
            self.partial_hits += match.partial is not None
        misses = self.miss_blocks
        for cause, blocks in match.miss_blocks.items():
            misses[cause] += blocks


@with_field_docs
@dataclass(frozen=True)
class HostStats:
    """A snapshot of the host tier, in host blocks. num_blocks = free + evictable + held + in_transfer.

    evictable    content that only the host holds and nobody is waiting for
    held         needed by swapped-out sequences, or arriving content between those and what they need
    in_transfer  held by nothing but a transfer
    """

    num_blocks: int
    free_blocks: int
    evictable_blocks: int
    held_blocks: int
    in_transfer_blocks: int
    offloaded_blocks: int
    """Evicted from the GPU and moved to the host, so far."""
    onboarded_blocks: int
    """Moved back for admissions that found them, so far."""
    hit_blocks: int
    """Of the hit blocks of first admissions, those that came from the host."""
    evicted_blocks: int
    """Content that the host has given up, so far."""
    swapped_out_blocks: int
    """Moved to the host by swapped-out sequences, so far."""
    swapped_in_blocks: int


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a manager.

    logical_blocks, logical_tokens   of all tables, a shared block counted once for each table
    saved_blocks, saved_tokens       by how much that exceeds what the tables' blocks hold, each counted once; a
                                     cached block holds tokens_per_block even if a truncated sequence uses fewer
    cow_copies, cow_tokens           copies made because a shared or cached block was to be written
    partial_copies, …copied_tokens   copies of the part of a block that a prompt shares

    num_blocks = free + evictable + referenced + in_transfer; logical counts take a shared block once for each
    table that holds it, kv_tokens counts its written slots once.
    """

    num_blocks: int
    tokens_per_block: int
    free_blocks: int
    evictable_blocks: int
    referenced_blocks: int
    in_transfer_blocks: int
    logical_blocks: int
    logical_tokens: int
    saved_blocks: int
    saved_tokens: int
    kv_tokens: int
    query_tokens: int
    query_blocks: int
    hit_tokens: int
    hit_blocks: int
    miss_blocks: dict[str, int]
    evicted_blocks: int
    cow_copies: int
    cow_tokens: int
    partial_hits: int
    partial_copies: int
    partial_copied_tokens: int
    stolen_blocks: int
    host: HostStats | None = None
    """Of the host tier, if there is one."""

    @property
    def swapped_blocks(self) -> int:
        """Return how many blocks have been moved between GPU and host, either way, so far."""
        host = self.host
        if host is None:
            return 0
        return (
            host.offloaded_blocks + host.onboarded_blocks + host.swapped_out_blocks + host.swapped_in_blocks
        )
