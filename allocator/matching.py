"""PrefixMatch: what a lookup found, what it did not find, and why not."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

from allocator.content import Content
from allocator.partial import PartialHit, PartialReuse
from allocator.prefilling import Prefilling
from allocator.prefix import Extent, PrefixIndex, Root
from allocator.sequence import KVSequence


class PrefixMatch:
    """The result of one lookup, good until the cache next changes (then admission looks up again).

    path          (extent, blocks of it) from the root down, blocks that are hit only
    repeated      the extent with the one cached block that has to be computed again for the last token's sake,
                  if there is one: the sequence will hold it beside its own
    hit_blocks    whole blocks found, on the GPU or in host memory
    hit_tokens    tokens of the prompt that need not be computed
    query_blocks  ceil(num_prompt_tokens / tokens_per_block): what hit_blocks and the misses sum up to
    miss_blocks   cause -> blocks, see allocator.stats.MISS_CAUSES; causes without blocks are left out
    partial       with partial reuse, the block of which the first tokens are hit as well; it counts as missed,
                  as it has to be computed in part
    computed_by   a sequence that is about to compute the first of the blocks missed, or None
    host_blocks   how many of the hit blocks are in host memory only, and have to come back to the GPU
    held, idle    how many extents of the path were referenced when somebody last asked, and how many blocks the
                  others have on the GPU
    """

    __slots__ = (
        "computed_by",
        "content",
        "held",
        "hit_blocks",
        "hit_tokens",
        "host_blocks",
        "idle",
        "index",
        "miss_blocks",
        "partial",
        "path",
        "query_blocks",
        "repeated",
        "salt",
        "version",
    )

    def __init__(
        self,
        index: PrefixIndex,
        content: Content,
        salt: Hashable,
        path: Sequence[tuple[Extent, int]],
        repeated: Extent | None,
        hit_blocks: int,
        hit_tokens: int,
        query_blocks: int,
        miss_blocks: dict[str, int],
        version: int,
        partial: PartialHit | None = None,
        computed_by: KVSequence | None = None,
        host_blocks: int = 0,
        held: int = 0,
        idle: int = 0,
    ) -> None:
        self.index = index
        self.content = content
        self.salt = salt
        self.path = path
        self.repeated = repeated
        self.hit_blocks = hit_blocks
        self.hit_tokens = hit_tokens
        self.query_blocks = query_blocks
        self.miss_blocks = miss_blocks
        self.version = version
        self.partial = partial
        self.computed_by = computed_by
        self.host_blocks = host_blocks
        self.held = held
        self.idle = idle

    @property
    def partial_tokens(self) -> int:
        """Return how many of the hit tokens lie in a block that is hit in part."""
        return 0 if self.partial is None else self.partial.num_tokens

    @property
    def evictable_blocks(self) -> int:
        """Return how many of the hit blocks are evictable now, and would stop being so. For a current match.

        O(1), averaged over the references that have come and gone since the last call. As whoever references an
        extent references all those above it, one place on the path parts what is referenced from what is not, and
        that place is followed. In a windowed cache, where it is not so, O(blocks of the window).
        """
        path = self.path
        if self.index.windowed:
            return sum(1 for node, _ in path if node.ids and not node.references)
        held, idle = self.held, self.idle
        while held < len(path) and path[held][0].references:
            idle -= path[held][1]
            held += 1
        while held and not path[held - 1][0].references:
            held -= 1
            idle += path[held][1]
        self.held, self.idle = held, idle
        return idle

    @property
    def repeated_blocks(self) -> int:
        """Return 1 if the block to be computed again is evictable now, and would stop being so; else 0."""
        if self.repeated is None or self.repeated.references or not self.repeated.ids:
            return 0
        partial = self.partial  # if that is stolen, it is not there any more to be held
        return int(partial is None or partial.extent is not self.repeated or not partial.can_be_stolen)

    @property
    def copied_blocks(self) -> int:
        """Return 1 if a copy's source is evictable now, and would not be until the copy is made; else 0."""
        partial = self.partial
        return int(partial is not None and not partial.extent.references and not partial.can_be_stolen)


_NO_SALTS: Final[dict[Hashable, Root]] = {}


def find_match(
    index: PrefixIndex,
    content: Content,
    salt: Hashable,
    tokens_per_block: int,
    prefilling: Prefilling,
    partial_reuse: PartialReuse | None = None,
) -> PrefixMatch:
    """Look a prompt up. Changes nothing."""
    prompt = content.num_prompt_tokens
    full = prompt // tokens_per_block
    salts = index.roots.get(content.family(), _NO_SALTS)
    root = salts.get(salt)
    if partial_reuse is None and len(salts) == (root is not None):
        key = content.first_key(tokens_per_block) if full else b""
        if root is None or not ((root.children and key in root.children) or prefilling.begins(root, key)):
            return no_match(index, content, salt, tokens_per_block)

    query_blocks = -(-prompt // tokens_per_block)
    usable = (prompt - 1) // tokens_per_block  # the last token is always computed
    keys = content.prompt_keys(tokens_per_block)
    walked = index.match(root, keys) if root is not None else []
    path: list[tuple[Extent, int]] = []
    hit_blocks = live = known = held = idle = on_host = 0
    for extent, blocks in walked:
        known += blocks
        if extent.ids or extent.host:
            live += blocks
            if live > usable:
                blocks -= live - usable
            if blocks > 0:
                path.append((extent, blocks))
                hit_blocks += blocks
                if extent.references:
                    held += 1
                elif extent.ids:
                    idle += blocks
                else:
                    on_host += blocks

    partial = None
    if partial_reuse is not None and root is not None:
        parent, at = path[-1] if path else (root, 0)
        partial = partial_reuse.find_hit(parent, at, content, tokens_per_block, hit_blocks, query_blocks)

    misses: dict[str, int] = {}
    computed_by = None
    repeated = None
    if live > usable:
        misses["last_token"] = live - usable
        repeated = next(extent for extent, _ in reversed(walked) if extent.ids or extent.host)
    if query_blocks > full:
        misses["short_of_block"] = 1
    if live < full:
        reached = live
        # A list, as looking through one may settle an eviction, after which another is no more.
        others = [other for other in salts.values() if other is not root]
        if others:
            isolated = max(_live_blocks(index, other, keys) for other in others)
            if isolated > reached:
                misses["isolated"] = isolated - reached
                reached = isolated
        if root is not None:
            in_flight, ahead = prefilling.ahead(root, walked, keys)
            if in_flight > live:
                computed_by = ahead
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
        path,
        repeated,
        hit_blocks,
        hit_blocks * tokens_per_block + (0 if partial is None else partial.num_tokens),
        query_blocks,
        misses,
        index.version,
        partial,
        computed_by,
        on_host,
        held,
        idle,
    )


def no_match(
    index: PrefixIndex, content: Content, salt: Hashable, tokens_per_block: int, reuse: bool = True
) -> PrefixMatch:
    """Return the match of a prompt of which nothing is cached, remembered or about to be computed.

    Without `reuse`, nothing ever is, so that nothing can have been forgotten.
    """
    prompt = content.num_prompt_tokens
    full = blocks = prompt // tokens_per_block
    misses = {"unknown" if index.forgot and reuse else "cold": full} if full else {}
    if prompt % tokens_per_block:
        misses["short_of_block"] = 1
        blocks += 1
    return PrefixMatch(index, content, salt, (), None, 0, 0, blocks, misses, index.version)


def _live_blocks(index: PrefixIndex, root: Extent, keys: bytes) -> int:
    return sum(blocks for extent, blocks in index.match(root, keys) if extent.ids or extent.host)
