"""FreeBlocks: which blocks of a pool have no content worth keeping, and which must not be reused yet."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from allocator.checks import as_int

MAX_BLOCKS = 2**31 - 1


class OutOfBlocks(Exception):
    """A pool cannot give as many blocks as were asked for. The call that raised it has changed nothing.

    pool  "GPU" or "host"
    """

    def __init__(self, needed: int, available: int, pool: str = "GPU") -> None:
        super().__init__(
            needed, available, pool
        )  # as they are: pickle and SimPy make exceptions anew from their args
        self.needed = needed
        self.available = available
        self.pool = pool

    def __str__(self) -> str:
        kind = "blocks" if self.pool == "GPU" else f"{self.pool} blocks"
        return f"{self.needed} {kind} needed, {self.available} free or evictable"


class FreeBlocks:
    """`num_blocks` blocks, numbered from 0: free ones are taken first, the last freed first.

    What takes content away from blocks when too few are free is the business of a subclass: `_evict`.
    """

    name = "GPU"

    def __init__(self, num_blocks: int) -> None:
        num_blocks = as_int("num_blocks", num_blocks, 1)
        if num_blocks > MAX_BLOCKS:
            raise ValueError(f"num_blocks ({num_blocks}) must be at most {MAX_BLOCKS}: block ids are int32")
        self.num_blocks = num_blocks
        self.num_evictable = 0
        self.evicted_blocks = 0
        self.limbo: dict[int, None] = {}  # freed, but pinned by a copy or transfer that may still use them
        self._pins: dict[int, int] = {}
        self._freed = array("i")  # a stack
        self._fresh = 0  # blocks from here on have never been used

    @property
    def num_free(self) -> int:
        """Return the number of blocks without content worth keeping."""
        return len(self._freed) + self.num_blocks - self._fresh

    @property
    def available(self) -> int:
        """Return how many blocks `take` could give."""
        return len(self._freed) + self.num_blocks - self._fresh + self.num_evictable

    def free_ids(self) -> NDArray[np.int32]:
        """Return all free blocks, int32 [num_free], the next to be taken last."""
        never_used = np.arange(self.num_blocks - 1, self._fresh - 1, -1, dtype=np.int32)
        return np.concatenate([never_used, np.array(self._freed, dtype=np.int32)])

    def take(self, count: int) -> array[int]:
        """Return `count` blocks, evicting as needed. Raises OutOfBlocks, with nothing changed."""
        freed = self._freed
        left = len(freed) - count
        if left >= 0:
            taken = freed[left:]
            del freed[left:]
            taken.reverse()
            return taken
        if count > self.available:
            raise OutOfBlocks(count, self.available, self.name)
        taken = freed[::-1]
        del freed[:]
        count = -left
        fresh = min(count, self.num_blocks - self._fresh)
        if fresh:
            taken.frombytes(np.arange(self._fresh, self._fresh + fresh, dtype=np.int32).tobytes())
            self._fresh += fresh
            count -= fresh
        while count:
            evicted = self._evict(count)
            count -= len(evicted)
            if not count and not taken:
                return evicted
            taken.extend(evicted)
        return taken

    def _evict(self, wanted: int) -> array[int]:
        """Take between 1 and `wanted` blocks from what is evictable; called only while something is."""
        raise NotImplementedError

    def give(self, ids: Iterable[int]) -> None:
        """Take back uncached blocks that nobody holds any more, the next to be reused last."""
        if not self._pins:
            self._freed.extend(array("i", ids) if not isinstance(ids, array) else ids)
            return
        for block in ids:
            if block in self._pins:
                self.limbo[block] = None
            else:
                self._freed.append(block)

    def pin(self, block: int) -> None:
        """Keep a block from being reused until `unpin`, whoever frees it."""
        self.pin_all((block,))

    def pin_all(self, blocks: Iterable[int]) -> None:
        """Pin each of some blocks."""
        pins = self._pins
        for block in blocks:
            pins[block] = pins.get(block, 0) + 1

    def pins(self, block: int) -> int:
        """Return how many copies and transfers keep a block from being reused."""
        return self._pins.get(block, 0)

    def unpin(self, block: int) -> None:
        """Undo one `pin`; a block freed meanwhile becomes free."""
        self.unpin_all((block,))

    def unpin_all(self, blocks: Iterable[int]) -> None:
        """Unpin each of some blocks, in order."""
        pins, limbo = self._pins, self.limbo
        for block in blocks:
            left = pins.pop(block) - 1
            if left:
                pins[block] = left
            elif block in limbo:
                del limbo[block]
                self._freed.append(block)
