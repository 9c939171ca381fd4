"""What a run's hit rate lies between: the prefix cache that never evicts, and none at all.

A cache of any size, under any policy and order of service, hits a block only if some other use of the same block
went before. So of the blocks that are looked up, each distinct one is missed at least once, unless something that
was not looked up stored it: a prompt's last block, which the last-token rule keeps from being hit but not from being
stored, an answer that a later prompt repeats, or a request that is not counted. The rest is the bound. It does not
depend on the order in which requests are served; a run reaches it if the store always comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import gcd

import numpy as np
from numpy.typing import NDArray

from sim.request import Request

MOST_EXTENTS = 2**19
MOST_UNITS = 2**25
"""Distinct content beyond these bounds, half a GiB of it, is not compared: there is no bound then."""

Ids = NDArray[np.integer]


@dataclass(frozen=True)
class CacheBound:
    """What an infinite cache could hit, of the prompts that are looked up."""

    query_tokens: int
    query_blocks: int
    hit_tokens: int
    hit_blocks: int

    @property
    def hit_rate_tokens(self) -> float | None:
        """Share of the prompt tokens."""
        return self.hit_tokens / self.query_tokens if self.query_tokens else None

    @property
    def hit_rate_blocks(self) -> float | None:
        """Share of the prompts' blocks, ⌈prompt / tokens_per_block⌉ each."""
        return self.hit_blocks / self.query_blocks if self.query_blocks else None


def infinite_cache(
    requests: Iterable[Request],
    tokens_per_block: int,
    *,
    partial_reuse: bool = False,
    stored: Callable[[Request], bool] = lambda request: True,
    counted: Callable[[Request], bool] = lambda request: True,
) -> CacheBound | None:
    """Return the bound on the hits of any run of these requests; None where there is too much content to compare.

    partial_reuse  a block whose beginning matches is hit that far: the bound counts in the finest units of content
                   that can be compared, tokens where there are token ids
    stored         which requests run at all; the others neither look up nor store
    counted        which of those are looked up as far as the bound is concerned; the others only store
    """
    trees: dict[tuple[str, int], _Tree] = {}
    finer: dict[tuple[str, int], _Tree] = {}
    query_tokens = query_blocks = 0
    extents = units = 0
    for request in requests:
        if not stored(request):
            continue
        looked_up = counted(request)
        if looked_up:
            query_tokens += request.prompt_tokens
            query_blocks += -(-request.prompt_tokens // tokens_per_block)
        ids = request.chunk_ids if request.token_ids is None else request.token_ids
        if ids is None:
            continue
        family = (request.salt, request.granularity)
        grain = request.granularity or 1
        unit = gcd(grain, tokens_per_block)
        for forest, size in ((trees, tokens_per_block), (finer, unit))[: 1 + partial_reuse]:
            tree = forest.get(family)
            if tree is None:
                tree = forest[family] = _Tree(size // unit, size)
            kept = min(request.named_tokens, request.prompt_tokens + request.output_tokens - 1) // size
            last = request.prompt_tokens - 1
            hittable = (-(-last // size) if forest is finer else last // size) if looked_up else 0
            row = ids[: -(-kept * size // grain)]
            extents -= tree.extents
            units -= tree.units
            tree.add(row if unit == grain else np.repeat(row, grain // unit), min(hittable, kept), kept)
            extents += tree.extents
            units += tree.units
        if extents > MOST_EXTENTS or units > MOST_UNITS:
            return None
    hit_blocks = sum(tree.hits() for tree in trees.values())
    hit_tokens = sum(tree.hits() * tree.size for tree in (finer if partial_reuse else trees).values())
    return CacheBound(query_tokens, query_blocks, min(hit_tokens, query_tokens), hit_blocks)


class _Extent:
    """Consecutive blocks that nothing branches off between: their ids, what may follow, and which were only stored.

    `only_stored` holds ranges of the extent's blocks, counted from its first, that some request stored without
    having been able to hit them.
    """

    __slots__ = ("children", "ids", "only_stored")

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.children: dict[bytes, _Extent] = {}
        self.only_stored: set[tuple[int, int]] = set()


class _Tree:
    """The distinct blocks of contents that can be compared, each behind what precedes it, as a radix tree."""

    def __init__(self, width: int, size: int) -> None:
        """Take the ids that make up a block, and the tokens it has."""
        self.size = size
        self.extents = self.units = 0
        self._width = width
        self._first: dict[bytes, _Extent] = {}
        self._looked_up = 0

    def add(self, row: Ids, hittable: int, kept: int) -> None:
        """Add a request's blocks: it stores `kept` of them, the first `hittable` of which it looked up."""
        self._looked_up += hittable
        width, depth, level = self._width, 0, self._first
        while depth < kept:
            key = row[depth * width : (depth + 1) * width].tobytes()
            extent = level.get(key)
            if extent is None:
                extent = level[key] = _Extent(row[depth * width : kept * width])
                self.extents += 1
                self.units += len(extent.ids)
            shared = self._shared(extent, row[depth * width : kept * width])
            if shared < len(extent.ids) // width and depth + shared < kept:
                self._split(extent, shared)
            if hittable < depth + shared:
                extent.only_stored.add((max(hittable - depth, 0), shared))
            depth += shared
            level = extent.children

    def _shared(self, extent: _Extent, row: Ids) -> int:
        """Return how many blocks of an extent a row begins with; the first is known to be one."""
        length = min(len(extent.ids), len(row))
        differs = extent.ids[:length] != row[:length]
        first = int(differs.argmax())
        return (first if differs[first] else length) // self._width

    def _split(self, extent: _Extent, at: int) -> None:
        tail = _Extent(extent.ids[at * self._width :])
        tail.children = extent.children
        for start, end in extent.only_stored:
            if end > at:
                tail.only_stored.add((max(start - at, 0), end - at))
        extent.ids = extent.ids[: at * self._width]
        extent.only_stored = {(start, min(end, at)) for start, end in extent.only_stored if start < at}
        extent.children = {tail.ids[: self._width].tobytes(): tail}
        self.extents += 1

    def hits(self) -> int:
        """Return the blocks looked up, less one for each that nothing stored without having looked it up."""
        missed = 0
        left = list(self._first.values())
        while left:
            extent = left.pop()
            left.extend(extent.children.values())
            missed += len(extent.ids) // self._width
            reached = 0
            for start, end in sorted(extent.only_stored):
                missed -= max(end - max(start, reached), 0)
                reached = max(reached, end)
        return self._looked_up - missed
