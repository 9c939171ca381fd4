"""The naive cache before host memory: what is evicted moves there, and what is hit there comes back.

Every block that the GPU gives up is offloaded, which takes one that is free on the host, or the one there that nobody
needs for the longest time. The two hold the same content only while a sequence that is swapped out needs it on the
host, or a transfer reads or writes it.
"""

from __future__ import annotations

from naive_cache import Block, Job, Match, NaiveCache, Name


class Unclear(Exception):
    """The host has no room for a block that is evicted. How much of a prefix is lost then, blocks do not tell."""


class NaiveHostCache(NaiveCache):
    """Blocks of the GPU, and of the host. Transfers take until `move` is called."""

    def attach(self, host_blocks: int) -> None:
        """Start with an empty host."""
        self.host_blocks = self.host_free = host_blocks
        self.on_host: dict[
            Name, int
        ] = {}  # and by how many swapped-out jobs and transfers it is needed there
        self.host_idle: list[Name] = []  # needed by nobody, for the longest time first
        self.moving: list[Name] = []  # needed there by transfers, in the order in which they let go
        self.arriving: list[list[Block]] = []  # held for transfers, the path to what they bring
        self.sent: set[Block] = set()  # read by transfers, and so not free even if nobody holds them
        self.limbo = 0  # of these, given up already
        self.moved = 0  # blocks, in this step
        self.host_evicted = self.offloaded = self.onboarded = self.swapped_out = self.swapped_in = 0

    @property
    def host_available(self) -> int:
        return self.host_free + len(self.host_idle)

    def is_cached(self, name: Name) -> bool:
        return name in self.cached or name in self.on_host

    def salts(self) -> set[str]:
        return super().salts() | {salt for salt, _ in self.on_host}

    def take_host(self, blocks: int) -> None:
        """Take blocks of the host; what is forgotten for that is remembered as evicted."""
        while self.host_free < blocks:
            name = self.host_idle.pop(0)
            del self.on_host[name]
            self.host_free += 1
            self.host_evicted += 1
            self.remember(name)
        self.host_free -= blocks

    def need(self, name: Name) -> None:
        """Need once more what is on the host, or comes there."""
        self.on_host[name] = self.on_host.get(name, 0) + 1
        if name in self.host_idle:
            self.host_idle.remove(name)

    def spare(self, name: Name) -> None:
        """Need it once less: it stays there if the GPU does not have it."""
        self.on_host[name] -= 1
        if self.on_host[name] == 0:
            if name in self.cached:
                del self.on_host[name]
                self.host_free += 1
            else:
                self.host_idle.append(name)

    def move(self) -> None:
        """Let all transfers be done."""
        self.free += self.limbo
        self.limbo = 0
        self.sent.clear()
        for path in self.arriving:
            for block in reversed(path):
                self.drop(block)
        for name in self.moving:
            self.spare(name)
        self.arriving.clear()
        self.moving.clear()

    def host_counts(self) -> dict[str, int]:
        assert self.host_free + len(self.on_host) == self.host_blocks
        return {
            "free_blocks": self.host_free,
            "evictable_blocks": len(self.host_idle),
            "offloaded_blocks": self.offloaded,
            "onboarded_blocks": self.onboarded,
            "evicted_blocks": self.host_evicted,
            "swapped_out_blocks": self.swapped_out,
            "swapped_in_blocks": self.swapped_in,
        }

    # ------------------------------------------------------------ blocks of the GPU

    def take(self) -> Block:
        sends = not self.free and self._evict_to_host()
        block = super().take()
        if sends:
            self.sent.add(block)
        return block

    def _evict_to_host(self) -> bool:
        """Make a block free, and return whether its content moves to the host, which may have it already."""
        found = self.candidates()
        block = found[0] if self.policy == "lru" else min(found, key=lambda each: each.number)
        name = block.name
        assert name is not None
        self.idle.remove(block)
        del self.cached[name]
        self.free += 1
        self.evicted += 1
        if name in self.on_host:
            return False
        if not self.host_available:
            raise Unclear
        self.take_host(1)
        self.need(name)
        self.moving.append(name)
        self.moved += 1
        self.offloaded += 1
        return True

    def drop(self, block: Block) -> None:
        super().drop(block)
        if not block.holders and block.name is None and block in self.sent:
            self.free -= 1
            self.limbo += 1

    def enter(self, name: Name, block: Block) -> None:
        super().enter(name, block)
        if name in self.host_idle:  # computed anew, or back
            self.host_idle.remove(name)
            del self.on_host[name]
            self.host_free += 1

    # ------------------------------------------------------------ hits

    def begin(self, job: Job, match: Match) -> None:
        for block in match.hits:
            if block is not None:
                self.hold(block)
        names = [name for name, block in zip(match.names, match.hits, strict=True) if block is None]
        for name in names:
            self.need(name)
        blocks = [self.take() for _ in names]
        for name, block in zip(names, blocks, strict=True):
            self.enter(name, block)
        path = [self.cached[name] for name in match.names]
        if names:
            for block in path:
                self.hold(block)
            self.arriving.append(path)
            self.moving += reversed(names)
        self.moved += len(names)
        self.onboarded += len(names)
        job.table, job.path = list(path), list(path)

    # ------------------------------------------------------------ swapping

    def blocks_to_swap_out(self, job: Job) -> int:
        """Return how many blocks of the host it takes to hold all that a job holds."""
        return sum(block.name not in self.on_host for block in job.path) + len(job.table) - len(job.path)

    def swap_out(self, job: Job) -> None:
        needed = self.blocks_to_swap_out(job)
        self.take_host(needed)
        job.names = [block.name for block in job.path]
        job.own_blocks = len(job.table) - len(job.path)
        for name in job.names:
            self.need(name)
        self.moved += needed
        self.swapped_out += needed
        self.release(job)
        job.table, job.path = [], []
        self.move()

    def blocks_to_swap_in(self, job: Job) -> tuple[int, int]:
        """Return how many blocks of the GPU a job has to take to come back, and how many idle ones it finds."""
        there = [self.cached[name] for name in job.names if name in self.cached]
        return job.own_blocks + len(job.names) - len(there), sum(not block.holders for block in there)

    def swap_in(self, job: Job) -> None:
        taken, _ = self.blocks_to_swap_in(job)
        missing = [name for name in job.names if name not in self.cached]
        for name in job.names:
            if name in self.cached:
                self.hold(self.cached[name])
        blocks = [self.take() for _ in range(taken)]
        for name in missing:
            self.enter(name, blocks.pop(0))
        job.path = [self.cached[name] for name in job.names]
        job.table = [*job.path, *blocks]
        self.moved += taken
        self.swapped_in += taken
        self.forget_swapped(job)
        self.move()

    def forget_swapped(self, job: Job) -> None:
        """Need no longer what a swapped-out job has on the host."""
        self.host_free += job.own_blocks
        for name in reversed(job.names):
            self.spare(name)
        job.names, job.own_blocks = [], 0
