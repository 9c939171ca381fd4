"""FreeBlocks: which blocks of a pool have no content worth keeping, and which must not be reused yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from allocator.checks import as_int

MAX_BLOCKS = 2**31 - 1
_FRESH_AT_ONCE: Final = 1024
"""Blocks never used before that are put on the stack together: fewer would be no different, and slower."""


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


class FreeBlocks(ABC):
    """`num_blocks` blocks, numbered from 0: free ones are taken first, the last freed first.

    What takes content away from blocks when too few are free is the business of a subclass: `_evict`. It can put a
    whole victim below the free blocks, as a *stock* from which blocks are taken when those are used up.
    """

    name = "GPU"

    def __init__(self, num_blocks: int) -> None:
        num_blocks = as_int("num_blocks", num_blocks, 1)
        if num_blocks > MAX_BLOCKS:
            raise ValueError(f"num_blocks ({num_blocks}) must be at most {MAX_BLOCKS}: block ids are int32")
        self.num_blocks = num_blocks
        self.available = num_blocks  # how many blocks `take` could give: free or evictable
        self.limbo: dict[int, None] = {}  # freed, but pinned by a copy or transfer that may still use them
        self._pins: dict[int, int] = {}
        self._freed = array("i")  # a stack
        self._stocked = 0  # the lowest of its blocks, which are a victim's and evictable till they are taken
        self._stock = 0  # how many those were at first
        self._tell_at = 0  # with no more left than that, the subclass is told
        # Where to note when some of the stock was taken, how many blocks, and when it had last been used; None if
        # nobody wants to know.
        self._evictions: list[tuple[int, int, int]] | None = None
        self._touched = 0
        self.now = 0  # the caller's time
        self._fresh = 0  # blocks from here on have never been used, nor put on the stack
        self._evicted = 0  # without those that are gone from the stock

    @property
    def num_free(self) -> int:
        """Return how many blocks have no content worth keeping."""
        return self.counts()[0]

    @property
    def num_evictable(self) -> int:
        """Return how many blocks have content that nobody references."""
        return self.counts()[1]

    @property
    def evicted_blocks(self) -> int:
        """Return how many blocks have lost their content for others, so far."""
        return self.counts()[2]

    def counts(self) -> tuple[int, int, int]:
        """Return num_free, num_evictable and evicted_blocks, all blocks."""
        stocked = self._stocked
        free = len(self._freed) - stocked + self.num_blocks - self._fresh
        return free, self.available - free, self._evicted + self._stock - stocked

    def free_ids(self) -> NDArray[np.int32]:
        """Return all free blocks, int32 [num_free], the next to be taken last."""
        never_used = np.arange(self.num_blocks - 1, self._fresh - 1, -1, dtype=np.int32)
        return np.concatenate([never_used, np.array(self._freed[self._stocked :], dtype=np.int32)])

    def take(self, count: int) -> array[int]:
        """Return `count` blocks, evicting as needed. Raises OutOfBlocks, with nothing changed."""
        freed = self._freed
        left = len(freed) - count
        if left < self._stocked:
            if left > self._tell_at:
                self._draw(left)
            else:
                left = self._refill(count)
        taken = freed[: left - 1 : -1] if left else freed[::-1]
        del freed[left:]
        self.available -= count
        return taken

    def _draw(self, left: int) -> None:
        """Let the stock have only `left` blocks left: the others are free."""
        if self._evictions is not None:
            self._evictions.append((self.now, self._stocked - left, self._touched))
        self._stocked = left

    def take_one(self) -> int:
        """Return the one block of `take(1)`: a third of the time, if it is free."""
        if len(self._freed) > self._stocked:
            self.available -= 1
            return self._freed.pop()
        return self.take(1)[0]

    def _refill(self, count: int) -> int:
        """Put blocks below those on the stack, or free those of the stock, until the top `count` are free; return how
        many are below these.
        """
        if count > self.available:
            raise OutOfBlocks(count, self.available, self.name)
        freed = self._freed
        left = len(freed) - count
        while left < self._stocked:
            if self._stocked:
                self._evict_stock(left if left > 0 else 0)
            elif self._fresh == self.num_blocks:
                self._evict(-left)
            else:
                fresh = min(max(-left, _FRESH_AT_ONCE), self.num_blocks - self._fresh)
                self._fresh += fresh
                ids = np.arange(self._fresh - 1, self._fresh - fresh - 1, -1, dtype=np.int32)
                freed[:0] = array("i", ids.tobytes())
            left = len(freed) - count
        return left

    @abstractmethod
    def _evict(self, wanted: int) -> None:
        """Put between 1 and `wanted` blocks of what is evictable below the free ones, or a victim as the stock.

        Called only while something is evictable, and without a stock.
        """

    def _evict_stock(self, left: int) -> None:
        """Note that the stock has `left` blocks left, the others being free. A pool that makes a stock says how."""
        raise AssertionError(f"{type(self).__name__} has made no stock of which {left} blocks could be left")

    def free_evicted(self, ids: array[int]) -> None:
        """Put blocks that have just lost their content below the free ones, the last of them to be taken first."""
        self._freed[:0] = ids
        self.available += len(ids)

    def give(self, ids: Sequence[int]) -> None:
        """Take back uncached blocks that nobody holds any more, the next to be reused last."""
        if not self._pins:
            self._freed.extend(ids)
            self.available += len(ids)
            return
        for block in ids:
            if block in self._pins:
                self.limbo[block] = None
            else:
                self._freed.append(block)
                self.available += 1

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
                self.available += 1
