"""PrefixMatch: what a lookup found, what it did not find, and why not."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass

from allocator.content import Content
from allocator.prefix import Extent, PrefixIndex, Root, common_blocks
from allocator.sequence import KVSequence


@dataclass(slots=True, eq=False)  # not frozen: that would triple the time it takes to make one
class PrefixMatch:
    """The result of one lookup, good until the cache next changes (then admission looks up again).

    path          (extent, blocks of it) from the root down, blocks that are hit only
    repeated      the extent with the one cached block that has to be computed again for the last token's sake,
                  if there is one: the sequence will hold it beside its own
    hit_blocks    blocks found, on the GPU or in host memory
    query_blocks  ceil(num_prompt_tokens / tokens_per_block): what hit_blocks and the misses sum up to
    miss_blocks   cause -> blocks, see allocator.stats.MISS_CAUSES; causes without blocks are left out
    """

    index: PrefixIndex
    content: Content
    salt: Hashable
    tokens_per_block: int
    path: list[tuple[Extent, int]]
    repeated: Extent | None
    hit_blocks: int
    query_blocks: int
    miss_blocks: dict[str, int]
    version: int

    @property
    def hit_tokens(self) -> int:
        """Return how many tokens of the prompt need not be computed."""
        return self.hit_blocks * self.tokens_per_block

    @property
    def evictable_blocks(self) -> int:
        """Return how many of the hit blocks are evictable now, and would stop being so."""
        evictable = 0
        for extent, blocks in self.path:
            if not extent.references and extent.ids:
                evictable += blocks
        return evictable

    @property
    def host_blocks(self) -> int:
        """Return how many of the hit blocks are in host memory only, and have to come back to the GPU."""
        return sum(blocks for extent, blocks in self.path if not extent.ids)

    @property
    def repeated_blocks(self) -> int:
        """Return 1 if the block to be computed again is evictable now, and would stop being so; else 0."""
        return int(self.repeated is not None and not self.repeated.references and bool(self.repeated.ids))


_NO_SALTS: dict[Hashable, Root] = {}


def find_match(
    index: PrefixIndex,
    content: Content,
    salt: Hashable,
    tokens_per_block: int,
    prefilling: Collection[KVSequence],
) -> PrefixMatch:
    """Look a prompt up. Changes nothing.

    `prefilling` are the sequences whose prompts are not computed completely yet.
    """
    prompt = content.num_prompt_tokens
    query_blocks = -(-prompt // tokens_per_block)
    full = prompt // tokens_per_block
    usable = (prompt - 1) // tokens_per_block  # the last token is always computed
    keys = content.prompt_keys(tokens_per_block)
    salts = index.roots.get(content.family(), _NO_SALTS)
    root = salts.get(salt)

    walked = index.match(root, keys) if root is not None else []
    path: list[tuple[Extent, int]] = []
    hit_blocks = live = known = 0
    for extent, blocks in walked:
        known += blocks
        if extent.ids or extent.host:
            live += blocks
            if live > usable:
                blocks -= live - usable
            if blocks > 0:
                path.append((extent, blocks))
                hit_blocks += blocks

    misses: dict[str, int] = {}
    repeated = None
    if live > usable:
        misses["last_token"] = live - usable
        repeated = next(extent for extent, _ in reversed(walked) if extent.ids or extent.host)
    if query_blocks > full:
        misses["short_of_block"] = 1
    if live < full:
        reached = live
        if len(salts) > (root is not None):
            isolated = max(_live_blocks(index, other, keys) for other in salts.values() if other is not root)
            if isolated > reached:
                misses["isolated"] = isolated - reached
                reached = isolated
        if prefilling and root is not None:
            in_flight = max(_blocks_ahead(s, root, walked, live, keys) for s in prefilling)
            if in_flight > reached:
                misses["in_flight"] = in_flight - reached
                reached = in_flight
        if known > reached:
            misses["evicted"] = known - reached
            reached = known
        if full > reached:
            misses["unknown" if index.forgot else "cold"] = full - reached
    return PrefixMatch(
        index,
        content,
        salt,
        tokens_per_block,
        path,
        repeated,
        hit_blocks,
        query_blocks,
        misses,
        index.version,
    )


def _live_blocks(index: PrefixIndex, root: Extent, keys: bytes) -> int:
    return sum(blocks for extent, blocks in index.match(root, keys) if extent.ids or extent.host)


def _blocks_ahead(
    sequence: KVSequence, root: Extent, walked: list[tuple[Extent, int]], live: int, keys: bytes
) -> int:
    """Return up to which block of the prompt `sequence` is going to compute what the prompt needs."""
    anchor, start = sequence.anchor, sequence.anchored
    if start > live or start * root.width >= len(keys):
        return 0
    if anchor is not root and (anchor, anchor.num_blocks) not in walked:
        return 0
    size = sequence.history.tokens_per_block
    end = sequence.num_prompt_tokens // size
    if start >= end:
        return 0
    return start + common_blocks(sequence.history.keys(start, end), keys, start, root.width)
