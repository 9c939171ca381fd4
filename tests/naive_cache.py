"""A prefix cache written the naive way, a block at a time: what the naive engine keeps its sequences in."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import gcd

from naive_retention import USUAL, Said, Wish, nothing

from sim.request import Request

Token = Hashable
Name = tuple[str, tuple[Token, ...]]
"""What a cached block says: the salt, and all tokens from the first to the block's last."""


@dataclass(eq=False)
class Block:
    """One block of the pool. It is cached if it has a name, else private to the tables that hold it."""

    name: Name | None = None
    holders: int = 0
    number: int = 0
    """Cached as the so-and-so-manieth."""
    wish: Wish | None = None
    """How it is to be kept while it is held by nobody, by the newest word."""
    ends: int | None = None
    """When that is over, if it is held by nobody."""

    @property
    def priority(self) -> int:
        return USUAL if self.wish is None else self.wish[0]

    def say(self, wish: Wish | None) -> None:
        if wish is not None:
            self.wish = None if wish[0] == USUAL else wish


@dataclass(eq=False)
class Job:
    """One sequence: all samples of a request before they part, and one of them after."""

    request: Request
    samples: int
    sample: int = 0
    target: int = 0
    generated: int = 0
    tokens: int = 0
    """Tokens that have a slot."""
    table: list[Block] = field(default_factory=list)
    path: list[Block] = field(default_factory=list)
    """The cached block of each full block of the table: the same block, or the one that said so before."""
    written: int = 0
    preemptions: int = 0
    recomputed: int = 0
    copies: int = 0
    hit_tokens: int = 0
    computed: int = 0
    """Tokens that were computed since the last admission until the prompt was complete."""
    last_token_ps: int | None = None
    paused_ps: int = -1  # when it was preempted last
    swapped: bool = False
    """It waits in host memory, where the content of these names is, and some blocks that are its own."""
    names: list[Name] = field(default_factory=list)
    own_blocks: int = 0
    group: list[Job] = field(default_factory=list)
    """The beams of its search, itself among them, while they decode."""
    wishes: Said = nothing
    said: list[Token] = field(default_factory=list)
    """What a beam has generated, those before it included."""

    @property
    def final_tokens(self) -> int:
        return self.request.prompt_tokens + self.request.output_tokens - 1

    def story(self, length: int) -> tuple[Token, ...]:
        """Return what its first `length` tokens say."""
        return tuple(self._token(position) for position in range(length))

    def _token(self, position: int) -> Token:
        request = self.request
        generated = position >= request.prompt_tokens
        if generated and request.beam_width > 1:
            return self.said[position - request.prompt_tokens]
        if position < request.named_tokens and not (generated and self.sample):
            if request.token_ids is not None:
                return ("token", int(request.token_ids[position]))
            assert request.chunk_ids is not None
            return (request.granularity, int(request.chunk_ids[position // request.granularity]))
        return ("said", request.request_id, self.sample if generated else 0, position)


@dataclass
class Match:
    """What a lookup found: the blocks hit, and the one that is cached but has to be computed again.

    Of one more block, the first `part_tokens` may be hit. If nobody holds it and nothing builds on it, it is `stolen`.
    """

    hits: list[Block]
    repeated: Block | None
    misses: dict[str, int]
    tokens: int
    names: list[Name] = field(default_factory=list)
    """Of the blocks hit. Those that only host memory holds are None among the hits."""
    part: Block | None = None
    part_tokens: int = 0
    stolen: bool = False

    @property
    def kept(self) -> int:
        """How many blocks that could be evicted now cannot be until the part is copied."""
        return int(self.part is not None and not self.stolen and self.part.holders == 0)


class NaiveCache:
    """Blocks, free and cached."""

    def __init__(self, num_blocks: int, size: int, reuse: bool, policy: str, partial: str = "") -> None:
        self.num_blocks = self.free = num_blocks
        self.size = size
        self.reuse = reuse
        self.policy = policy
        self.partial = partial  # "copy", or "steal" alone, or nothing
        self.fresh: list[Block] = []  # became full in this step, so that its copies cannot read them
        self.sources: list[list[Block]] = []  # held until copies have read the last of each
        self.since: dict[Block, int] = {}  # when blocks became such that a part of them could be used
        self.changes = 0
        self.cached: dict[Name, Block] = {}
        self.idle: list[Block] = []  # cached and held by nobody, for the longest time first
        self.guards: dict[
            Job, list[Block]
        ] = {}  # what is not to be evicted for a job's sake, the last to give it up first
        self.guarded: list[Block] = []  # held by nobody, and guarded: not among the idle
        self.ghosts: dict[Name, None] = {}  # evicted first, first
        self.forgot = False
        self.evicted = 0
        self.numbers = 0
        self.copied_tokens = 0
        self.moved = 0  # blocks between here and host memory
        self.now = 0

    @property
    def available(self) -> int:
        return self.free + len(self.idle) + len(self.guarded)

    def blocks_of(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def take(self) -> Block:
        if not self.free:
            self._evict()
        self.free -= 1
        return Block(holders=1)

    def guard(self, job: Job, blocks: list[Block]) -> None:
        """Do not evict these blocks, and those alone, for a job's sake; of all jobs, it is the last to do so."""
        before = self.guards.pop(job, [])
        self.guards[job] = blocks
        for block in blocks:
            if block in self.idle:
                self.idle.remove(block)
                self.guarded.append(block)
        self._let_go(before)

    def unguard(self, job: Job) -> None:
        self._let_go(self.guards.pop(job, []))

    def _let_go(self, blocks: list[Block]) -> None:
        for block in reversed(blocks):
            if block in self.guarded and not any(block in others for others in self.guards.values()):
                self.guarded.remove(block)
                self.idle.append(block)

    def candidates(self) -> list[Block]:
        """Return which of the idle blocks may be evicted: those on which no cached block builds."""
        parents = {(salt, tokens[: -self.size]) for salt, tokens in self.cached}
        return [block for block in self.idle if block.name not in parents]

    def _evict(self) -> None:
        if not self.idle:
            for job in reversed(list(self.guards)):
                self.unguard(job)
        found = self.candidates()
        if self.policy == "fifo":
            block = min(found, key=lambda each: each.number)
        elif self.policy == "priority":
            block = min(found, key=lambda each: each.priority)  # of equals, the first
        else:
            block = found[0]
        self._forget(block)
        self.free += 1
        self.evicted += 1
        self._note_usable()

    def _forget(self, block: Block) -> None:
        """Take a block that nobody holds out of the cache."""
        assert block.name is not None
        for blocks in (self.idle, self.guarded, *self.guards.values()):
            if block in blocks:
                blocks.remove(block)
        del self.cached[block.name]
        self.remember(block.name)
        block.name = block.wish = block.ends = None

    def remember(self, name: Name) -> None:
        """Remember what was evicted."""
        self.ghosts[name] = None
        while len(self.ghosts) > 16 * self.num_blocks:
            del self.ghosts[next(iter(self.ghosts))]
            self.forgot = True

    def is_cached(self, name: Name) -> bool:
        return name in self.cached

    def pass_time(self, now: int) -> None:
        """Let it be `now`: what was to be kept until then becomes like any other that has just been given back."""
        self.now = now
        over = [block for block in self.idle + self.guarded if block.ends is not None and block.ends <= now]
        for block in sorted(over, key=lambda block: block.ends or 0):
            block.wish = block.ends = None
            if block in self.idle:
                self.idle.remove(block)
                self.idle.append(block)

    def hold(self, block: Block) -> None:
        block.ends = None
        for unheld in (self.idle, self.guarded):
            if block in unheld:
                unheld.remove(block)
        block.holders += 1
        self._note_usable()

    def drop(self, block: Block) -> None:
        block.holders -= 1
        if block.holders == 0:
            if block.wish is not None and block.wish[1] is not None:
                block.ends = self.now + block.wish[1]
            if block.name is None:
                self.free += 1
            elif any(block in blocks for blocks in self.guards.values()):
                self.guarded.append(block)
            else:
                self.idle.append(block)
        self._note_usable()

    # ------------------------------------------------------------ parts of blocks

    def is_free_leaf(self, block: Block) -> bool:
        """Return whether nobody holds a cached block, and no cached block builds on it."""
        return not block.holders and not any(
            (salt, tokens[: -self.size]) == block.name for salt, tokens in self.cached
        )

    def _note_usable(self) -> None:
        """Note since when a part of each block could be used: of those since one moment, first who was cached first."""
        if not self.partial:
            return
        usable = [
            block
            for block in self.cached.values()
            if block not in self.fresh and (self.partial == "copy" or self.is_free_leaf(block))
        ]
        self.since = {block: at for block, at in self.since.items() if block in usable}
        for block in sorted(usable, key=lambda each: each.number):
            self.changes += 1
            self.since.setdefault(block, self.changes)

    def find_part(self, job: Job, match: Match) -> None:
        """Let a match know of the block that agrees with most of what a job's prompt goes on with, if there is one."""
        size, request = self.size, job.request
        if not self.partial or (
            self.partial == "copy" and self.blocks_at_once(job.target) >= self.num_blocks
        ):
            return
        unit = 1
        if request.token_ids is None:
            unit = gcd(0 if request.chunk_ids is None else request.granularity, size)
        story, start = job.story(job.target), len(match.hits) * size
        common = {}
        for block in sorted(self.since, key=self.since.__getitem__):
            assert block.name is not None
            salt, tokens = block.name
            if (salt, tokens[:-size]) == (request.salt, story[:start]):
                same = [mine == theirs for mine, theirs in zip(story[start:], tokens[start:], strict=False)]
                common[block] = [*same, False].index(False) // unit
        best = max(common, key=common.__getitem__, default=None)
        units = 0 if best is None else min(common[best], (job.target - 1 - start) // unit)
        if units:
            match.part, match.part_tokens, match.stolen = best, units * unit, self.is_free_leaf(best)
            match.tokens += match.part_tokens

    def blocks_at_once(self, tokens: int) -> int:
        """Return how many blocks so many tokens need at once, at the least, to be computed."""
        return self.blocks_of(tokens)

    def with_path(self, hits: list[Block], block: Block) -> list[Block]:
        """Return what is held along with a block that continues these."""
        return [*hits, block]

    def take_part(self, match: Match) -> list[Block]:
        """Return a block for whoever hits the part of a match: that block, or a copy; no block if there is no part."""
        part = match.part
        if part is None:
            return []
        if self.is_free_leaf(part):
            self._forget(part)
            part.holders = 1
            self._note_usable()
            return [part]
        held = self.with_path(match.hits, part)
        for block in held:
            self.hold(block)
        self.sources.append(held)
        self.copied_tokens += match.part_tokens
        return [self.take()]

    def move(self) -> None:
        """Let what has to move between here and host memory do so: nothing."""

    def host_counts(self) -> dict[str, int]:
        return {}

    def end_step(self) -> None:
        """Let the copies be made: what they read is let go of, and what the step has filled can be read next."""
        for held in self.sources:
            for block in reversed(held):
                self.drop(block)
        self.sources.clear()
        self.fresh.clear()
        self._note_usable()

    # ------------------------------------------------------------ what a job does with blocks

    def table(self, job: Job) -> list[tuple[int, Block]]:
        """Return the blocks of a job's table, and which of the sequence's each is."""
        return [(at, block) for at, block in enumerate(job.table) if block is not None]

    def held(self, job: Job) -> set[Block]:
        """Return the blocks that a job holds, be they in its table or not."""
        return {block for block in job.table + job.path if block is not None}

    def begin(self, job: Job, match: Match) -> None:
        """Let a job hold what it hits, and say how that is to be kept."""
        for at, block in enumerate(match.hits):
            self.hold(block)
            block.say(job.wishes(at))
        job.table, job.path = [*match.hits, *self.take_part(match)], list(match.hits)

    def write(self, job: Job, tokens: int) -> None:
        """Take the blocks for `tokens` more tokens."""
        job.tokens += tokens
        if job.group:
            job.said.append(object())  # unlike anything else
        while len(job.table) * self.size < job.tokens:
            job.table.append(self.take())

    def cache_full(self, job: Job) -> None:
        """Name the blocks that have become full; where the content is cached already, hold that block as well."""
        while self.reuse and (len(job.path) + 1) * self.size <= job.tokens:
            at = len(job.path)
            name = (job.request.salt, job.story((at + 1) * self.size))
            if name in self.cached:
                self.hold(self.cached[name])
            else:
                self.enter(name, job.table[at])
            self.cached[name].say(job.wishes(at))
            job.path.append(self.cached[name])

    def enter(self, name: Name, block: Block) -> None:
        """Cache a block that has just become full."""
        assert block.holders == 1
        block.name = name
        self.numbers += 1
        block.number = self.numbers
        self.cached[name] = block
        self.ghosts.pop(name, None)
        self.fresh.append(block)
        self._note_usable()

    def copy_shared_tail(self, job: Job) -> None:
        """Give the job a copy of its last block if it is partly written and others hold it too."""
        if job.tokens % self.size and job.table[-1].holders > 1:
            self.drop(job.table[-1])
            job.table[-1] = self.take()
            job.copies += 1
            self.copied_tokens += job.tokens % self.size

    def release(self, job: Job) -> None:
        """Give everything back, the last block first."""
        for at in reversed(range(len(job.table))):
            if at < len(job.path):
                self.drop(job.path[at])
            if at >= len(job.path) or job.path[at] is not job.table[at]:
                self.drop(job.table[at])

    def share(self, job: Job, sample: int) -> Job:
        """Return another sample of the same request that holds all that `job` holds."""
        for block in self.held(job):
            block.holders += 1
        return Job(
            job.request,
            1,
            sample,
            target=job.target,
            generated=job.generated,
            tokens=job.tokens,
            table=list(job.table),
            path=list(job.path),
            wishes=job.wishes,
            said=list(job.said),
        )

    def lookup(self, job: Job, prefilling: Sequence[Job]) -> Match:
        """Look the job's target up; `prefilling` are the jobs whose prompts are not complete."""
        size, salt = self.size, job.request.salt
        story = job.story(job.target)
        names = [(salt, story[:end]) for end in range(size, len(story) + 1, size)]
        live = 0
        while live < len(names) and self.is_cached(names[live]):
            live += 1
        hits = min(live, (job.target - 1) // size)
        misses = {"last_token": live - hits, "short_of_block": int(len(story) % size > 0)}
        for name in names[live:]:
            cause = self._cause(name, prefilling)
            misses[cause] = misses.get(cause, 0) + 1
        match = Match(
            [self.cached.get(name) for name in names[:hits]],
            self.cached.get(names[hits]) if live > hits else None,
            {cause: blocks for cause, blocks in misses.items() if blocks},
            hits * size,
            names[:hits],
        )
        self.find_part(job, match)
        return match

    def salts(self) -> set[str]:
        return {salt for salt, _ in self.cached}

    def _cause(self, name: Name, prefilling: Sequence[Job]) -> str:
        salt, tokens = name
        if not self.reuse:
            return "cold"
        if any(other != salt and self.is_cached((other, tokens)) for other in self.salts()):
            return "isolated"
        for job in prefilling:
            prompt_blocks = job.target // self.size * self.size
            if job.request.salt == salt and job.story(prompt_blocks)[: len(tokens)] == tokens:
                return "in_flight"
        if name in self.ghosts:
            return "evicted"
        return "unknown" if self.forgot else "cold"
