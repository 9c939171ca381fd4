"""Belady's policy: the optimum, for those who know the future."""

from __future__ import annotations

from array import array
from collections.abc import Hashable

from allocator.content import Content
from allocator.eviction.names import BlockNames, Name
from allocator.eviction.policy import EvictionPolicy
from allocator.eviction.queue import ExtentQueue, Key
from allocator.prefix import Extent

NEVER = 2**62


class _Uses:
    """The requests foreseen that use a block: those from index `at` on have not begun."""

    __slots__ = ("at", "numbers")

    def __init__(self) -> None:
        self.numbers = array("q")
        self.at = 0


class Belady(EvictionPolicy):
    """Take the block whose next use lies farthest ahead; of equals, the least recently used.

        policy = Belady()
        numbers = [policy.foresee(content, tokens_per_block) for content in contents]
        manager = KVCacheManager(num_blocks, tokens_per_block, policy=policy)
        for number, content in zip(numbers, contents):
            policy.begin(number)
            manager.admit(content, ...)

    Belady, A Study of Replacement Algorithms for a Virtual-Storage Computer, IBM Systems Journal 5(2), 1966. The
    next use of a block is the first request foreseen, and not begun, whose prompt has the block behind the same
    prefix. A prompt that has a block has all those before it, so a block is never used later than those cached
    behind it, and the farthest of all evictable blocks is always one without cached children.

    This is optimal if each request may be cached whole before anything is given up. It is a heuristic where
    blocks of running sequences cannot be taken, and a prompt's last token is computed though it is cached.
    Blocks that nobody was said to use count as never used again; with no future at all this is LRU.

    A call costs O(log extents), and `foresee` and `begin` O(log extents) for each block of the prompt.
    """

    def __init__(self) -> None:
        self._names = BlockNames()
        self._paths: list[list[Name]] = []  # of each request foreseen; emptied once it has begun
        self._begun = bytearray()
        self._uses: dict[Name, _Uses] = {}  # without those that are not used again
        self._tails: dict[Name, Extent] = {}  # exposed extents by their last block
        self._exposed = ExtentQueue()
        self._numbers: dict[Extent, int] = {}
        self._released = 0

    def foresee(self, content: Content, tokens_per_block: int, salt: Hashable = "") -> int:
        """Note that a prompt is going to be admitted, after all foreseen so far; return the request's number."""
        number = len(self._paths)
        width = content.history(tokens_per_block).key_width
        path = self._names.find(content.family(), salt, content.prompt_keys(tokens_per_block), width)
        for name in path:
            self._names.hold(name)
            uses = self._uses.get(name)
            if uses is None:
                uses = self._uses[name] = _Uses()
            uses.numbers.append(number)
            self._requeue(name)
        self._paths.append(path)
        self._begun.append(False)
        return number

    def begin(self, number: int) -> None:
        """Note that a request foreseen is being admitted: what it uses, it uses now. Raises ValueError if twice."""
        if self._begun[number]:
            raise ValueError(f"number ({number}) must be that of a request that has not begun")
        self._begun[number] = True
        path, self._paths[number] = self._paths[number], []
        for name in path:
            uses = self._uses[name]
            while uses.at < len(uses.numbers) and self._begun[uses.numbers[uses.at]]:
                uses.at += 1
            if uses.at == len(uses.numbers):
                del self._uses[name]
            self._requeue(name)
        for name in reversed(path):
            self._names.drop(name)

    def _next_use(self, name: Name) -> int:
        uses = self._uses.get(name)
        return NEVER if uses is None else uses.numbers[uses.at]

    def _put(self, extent: Extent, key: Key) -> None:
        self._exposed.put(extent, key)

    def _take_out(self, extent: Extent) -> None:
        self._exposed.discard(extent)

    def _requeue(self, name: Name) -> None:
        extent = self._tails.get(name)
        if extent is not None:
            self._put(extent, (-self._next_use(name), self._numbers[extent]))

    def cached(self, extent: Extent, num_blocks: int) -> None:
        self._names.cached(extent, num_blocks)

    def released(self, extent: Extent) -> None:
        self._released += 1
        self._numbers[extent] = self._released

    def exposed(self, extent: Extent) -> None:
        name = self._names.of(extent)[-1]
        self._tails[name] = extent
        self._requeue(name)

    def referenced(self, extent: Extent) -> None:
        self._take_out(extent)
        self._tails.pop(self._names.of(extent)[-1], None)

    def split(self, head: Extent, tail: Extent) -> None:
        self._names.split(head, tail)

    def evicted(self, extent: Extent, num_blocks: int) -> None:
        self._tails.pop(self._names.of(extent)[-1], None)
        self._names.evicted(extent, num_blocks)
        if not extent.ids:
            self._take_out(extent)
            self._numbers.pop(extent, None)
        elif not extent.references:
            self.exposed(extent)

    def victim(self, wanted: int) -> tuple[Extent, int]:
        extent = self._exposed.first()
        names, number = self._names.of(extent), self._numbers[extent]
        most = min(wanted, len(names))
        if most == 1:
            return extent, 1
        other, count = self._exposed.second_key(), 1
        if other is None:
            return extent, most
        while count < most and (-self._next_use(names[-1 - count]), number) < other:
            count += 1
        return extent, count
