"""The published algorithms, a block at a time and as plainly as possible: what policies are compared with.

A reference sees single blocks by their identity (nested pairs of parent and content, down to a first one of
"root" and a salt), and looks at everything. `victim` chooses among `leaves`, the evictable blocks without cached
children.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from fractions import Fraction
from typing import Any

Identity = tuple[Any, ...]
"""(identity of the parent, content of the block)."""


class Reference:
    """What a block manager tells a reference; `self.order` has the evictable blocks as they were released."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.order: OrderedDict[Identity, None] = OrderedDict()
        self.now = 0

    def cached(self, block: Identity) -> None:
        """Note a block that is new in the cache, and referenced."""

    def hit(self, block: Identity) -> None:
        """Note that a sequence was admitted that found a block."""

    def retained(self, block: Identity, priority: int, duration: int | None) -> None:
        """Note how a referenced block is to be kept once it no longer is."""

    def pass_time(self, now: int) -> None:
        """Let it be `now`."""
        self.now = now

    def released(self, block: Identity) -> None:
        """Note a block that nobody references any more."""
        self.order[block] = None

    def referenced(self, block: Identity) -> None:
        """Note a block that was evictable, and is referenced."""
        del self.order[block]

    def evicted(self, block: Identity) -> None:
        """Forget a block that was taken; `order` no longer has it."""

    def uncached(self, block: Identity) -> None:
        """Forget a referenced block that its holder took out of the cache."""

    def victim(self, leaves: set[Identity]) -> Identity:
        """Return the block to take, one of `leaves`."""
        raise NotImplementedError


class LRU(Reference):
    def victim(self, leaves: set[Identity]) -> Identity:
        return next(block for block in self.order if block in leaves)


class MRU(Reference):
    def victim(self, leaves: set[Identity]) -> Identity:
        return next(block for block in reversed(self.order) if block in leaves)


class LFU(Reference):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.hits: Counter[Identity] = Counter()

    def hit(self, block: Identity) -> None:
        self.hits[block] += 1

    def evicted(self, block: Identity) -> None:
        del self.hits[block]

    uncached = evicted

    def victim(self, leaves: set[Identity]) -> Identity:
        return min((block for block in self.order if block in leaves), key=lambda block: self.hits[block])


class FIFO(Reference):
    """`self.queue` has all cached blocks, referenced or not, the oldest first."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.queue: list[Identity] = []

    def cached(self, block: Identity) -> None:
        self.queue.append(block)

    def evicted(self, block: Identity) -> None:
        self.queue.remove(block)

    uncached = evicted

    def victim(self, leaves: set[Identity]) -> Identity:
        return next(block for block in self.queue if block in leaves)


class SIEVE(Reference):
    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.queue: list[Identity] = []
        self.marked: set[Identity] = set()
        self.hand = 0

    def cached(self, block: Identity) -> None:
        self.queue.append(block)

    def hit(self, block: Identity) -> None:
        self.marked.add(block)

    def evicted(self, block: Identity) -> None:
        self.hand -= self.queue.index(block) < self.hand
        self.queue.remove(block)
        self.marked.discard(block)

    uncached = evicted

    def victim(self, leaves: set[Identity]) -> Identity:
        while True:
            block = self.queue[self.hand % len(self.queue)]
            self.hand = self.hand % len(self.queue) + 1
            if block in leaves and block not in self.marked:
                return block
            if block in leaves:
                self.marked.remove(block)


class SLRU(Reference):
    def __init__(self, num_blocks: int, share: float = 0.8) -> None:
        super().__init__(num_blocks)
        self.room = int(num_blocks * share)
        self.marked: set[Identity] = set()
        self.protected: OrderedDict[Identity, None] = OrderedDict()
        self.probation: OrderedDict[Identity, None] = OrderedDict()

    def hit(self, block: Identity) -> None:
        self.marked.add(block)

    def released(self, block: Identity) -> None:
        super().released(block)
        (self.protected if block in self.marked else self.probation)[block] = None
        if len(self.protected) > self.room:
            demoted, _ = self.protected.popitem(last=False)
            self.marked.remove(demoted)
            self.probation[demoted] = None

    def referenced(self, block: Identity) -> None:
        super().referenced(block)
        self.protected.pop(block, None)
        self.probation.pop(block, None)

    def evicted(self, block: Identity) -> None:
        self.marked.discard(block)
        self.protected.pop(block, None)
        self.probation.pop(block, None)

    uncached = evicted

    def victim(self, leaves: set[Identity]) -> Identity:
        return next(block for block in [*self.probation, *self.protected] if block in leaves)


class S3FIFO(Reference):
    def __init__(self, num_blocks: int, share: float = 0.1) -> None:
        super().__init__(num_blocks)
        self.room = max(1, int(num_blocks * share))
        self.small: list[Identity] = []
        self.main: list[Identity] = []
        self.ghosts: list[Identity] = []
        self.hits: Counter[Identity] = Counter()

    def cached(self, block: Identity) -> None:
        (self.main if block in self.ghosts else self.small).append(block)
        self.ghosts = [ghost for ghost in self.ghosts if ghost != block]

    def hit(self, block: Identity) -> None:
        self.hits[block] = min(self.hits[block] + 1, 3)

    def evicted(self, block: Identity) -> None:
        if block in self.small:
            room = self.num_blocks - self.room
            self.ghosts = [*self.ghosts, block][-room:] if room else []
        self.uncached(block)

    def uncached(self, block: Identity) -> None:
        (self.small if block in self.small else self.main).remove(block)
        del self.hits[block]

    def victim(self, leaves: set[Identity]) -> Identity:
        found = None
        if len(self.small) >= self.room or not leaves & set(self.main):
            found = self.victim_of_small(leaves)
        return found or self.victim_of_main(leaves)

    def victim_of_small(self, leaves: set[Identity]) -> Identity | None:
        while leaves & set(self.small):
            block = next(block for block in self.small if block in leaves)
            if self.hits[block] <= 1:
                return block
            self.small.remove(block)
            self.main.append(block)
            self.hits[block] = 0
            if len(self.main) > self.num_blocks - self.room:
                return None
        return None

    def victim_of_main(self, leaves: set[Identity]) -> Identity:
        while True:
            block = next(block for block in self.main if block in leaves)
            if not self.hits[block]:
                return block
            self.main.remove(block)
            self.main.append(block)
            self.hits[block] -= 1


class GDSF(Reference):
    def __init__(self, num_blocks: int, attention_blocks: int = 800) -> None:
        super().__init__(num_blocks)
        self.attention_blocks = attention_blocks
        self.clock = 0
        self.uses: Counter[Identity] = Counter()
        self.values: dict[Identity, int] = {}

    def cached(self, block: Identity) -> None:
        self.uses[block] = 1

    def hit(self, block: Identity) -> None:
        self.uses[block] += 1

    def released(self, block: Identity) -> None:
        super().released(block)
        depth, above = 0, block[0]
        while above[0] != "root":
            depth, above = depth + 1, above[0]
        self.values[block] = self.clock + self.uses[block] * (self.attention_blocks + depth)

    def victim(self, leaves: set[Identity]) -> Identity:
        block = min((block for block in self.order if block in leaves), key=lambda block: self.values[block])
        self.clock = max(self.clock, self.values[block])
        return block


class Priority(Reference):
    """A block without an entry in `kept` has priority 35, for good."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.kept: dict[Identity, tuple[int, int | None]] = {}
        self.ends: dict[Identity, int] = {}

    def retained(self, block: Identity, priority: int, duration: int | None) -> None:
        self.kept[block] = (priority, duration)

    def pass_time(self, now: int) -> None:
        super().pass_time(now)
        over = [block for block in self.order if self.ends.get(block, now + 1) <= now]
        for block in sorted(over, key=lambda block: self.ends[block]):
            del self.ends[block], self.kept[block]
            self.order.move_to_end(block)

    def released(self, block: Identity) -> None:
        super().released(block)
        priority, duration = self.kept.get(block, (35, None))
        if priority != 35 and duration is not None:
            self.ends[block] = self.now + duration

    def referenced(self, block: Identity) -> None:
        super().referenced(block)
        self.ends.pop(block, None)

    def evicted(self, block: Identity) -> None:
        self.ends.pop(block, None)
        self.kept.pop(block, None)

    uncached = evicted

    def victim(self, leaves: set[Identity]) -> Identity:
        blocks = (block for block in self.order if block in leaves)
        return min(blocks, key=lambda block: self.kept.get(block, (35, None))[0])


class Belady(Reference):
    """`future` has the blocks of each request; those whose number is in `begun` no longer count."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.future: list[list[Identity]] = []
        self.begun: set[int] = set()

    def next_use(self, block: Identity) -> float:
        coming = (i for i, blocks in enumerate(self.future) if i not in self.begun and block in blocks)
        return next(coming, float("inf"))

    def victim(self, leaves: set[Identity]) -> Identity:
        return max((block for block in self.order if block in leaves), key=self.next_use)


class WeightedBelady(Belady):
    """Costs are those of GDSF, to five binary digits."""

    def __init__(self, num_blocks: int, attention_blocks: int = 800) -> None:
        super().__init__(num_blocks)
        self.attention_blocks = attention_blocks

    def worth(self, block: Identity) -> Fraction:
        use = self.next_use(block)
        if use == float("inf"):
            return Fraction(0)
        depth, above = 0, block[0]
        while above[0] != "root":
            depth, above = depth + 1, above[0]
        cost = max(self.attention_blocks + depth, 1)
        while cost % 2 ** max(cost.bit_length() - 5, 0):
            cost -= 1
        return Fraction(cost, max(int(use) - max(self.begun, default=0), 1))

    def victim(self, leaves: set[Identity]) -> Identity:
        blocks = (block for block in self.order if block in leaves)
        return min(blocks, key=lambda block: (self.worth(block), -self.next_use(block)))


REFERENCES: dict[str, type[Reference]] = {
    "belady": Belady,
    "fifo": FIFO,
    "gdsf": GDSF,
    "lfu": LFU,
    "lru": LRU,
    "mru": MRU,
    "priority": Priority,
    "s3fifo": S3FIFO,
    "sieve": SIEVE,
    "slru": SLRU,
}
