"""The naive engine in front of a windowed cache: what it is that a window changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from naive_cache import Block, Job, Match, NaiveCache, Name
from naive_engine import NaiveEngine, partial_reuse
from naive_windows import Attention

from allocator.config import CacheConfig


class NaiveWindowedCache(NaiveCache):
    """Blocks of sequences that let go of what their window has passed.

    What has left is None in a job's table; in its path, so is what it has computed beside a cached block. Jobs hold
    what is in their tables and nothing else, and any idle block may be evicted.
    """

    attention: Attention

    def candidates(self) -> list[Block]:
        return self.idle

    def begin(self, job: Job, match: Match) -> None:
        query = len(match.hits) * self.size  # what it needs serves a part behind it as well
        needed = [block if self.attention.needs(query, at) else None for at, block in enumerate(match.hits)]
        for at, block in enumerate(needed):
            if block is not None:
                self.hold(block)
                block.say(job.wishes(at))
        job.table, job.path = [*needed, *self.take_part(match)], list(needed)

    def guard(self, job: Job, blocks: list[Block]) -> None:
        query = len(blocks) * self.size
        super().guard(job, [block for at, block in enumerate(blocks) if self.attention.needs(query, at)])

    def leaving(self, job: Job) -> list[int]:
        """Return which blocks a job's next query, and all later ones, do not need."""
        return [at for at, _ in self.table(job) if not self.attention.needs(job.tokens, at)]

    def let_go(self, job: Job) -> None:
        for at in self.leaving(job):
            self.drop(job.table[at])
            job.table[at] = None
            if at < len(job.path):
                job.path[at] = None

    def gain(self, jobs: Sequence[Job]) -> int:
        """Return how many blocks nobody would hold any more if these jobs let go of what they do not need."""
        gone = Counter(job.table[at] for job in jobs for at in self.leaving(job))
        return sum(block.holders == times for block, times in gone.items())

    def cache_full(self, job: Job) -> None:
        while self.reuse and (len(job.path) + 1) * self.size <= job.tokens:
            at = len(job.path)
            name = (job.request.salt, job.story((at + 1) * self.size))
            block = job.table[at]
            wish = job.wishes(at)
            if name in self.cached:
                block = None
                if wish is not None:  # nothing holds the cached block for the job: its time begins anew
                    self.hold(self.cached[name])
                    self.cached[name].say(wish)
                    self.drop(self.cached[name])
            else:
                self.enter(name, block)
                block.say(wish)
            job.path.append(block)

    def release(self, job: Job) -> None:
        """Give back what is the job's own, the last first, then what is cached, front first but for sinks."""
        own = [block for at, block in self.table(job) if at >= len(job.path) or job.path[at] is None]
        for block in reversed(own):
            self.drop(block)
        cached = [(at, block) for at, block in enumerate(job.path) if block is not None]
        for _, block in sorted(cached, key=lambda pair: pair[0] * self.size < self.attention.num_sinks):
            self.drop(block)

    # ------------------------------------------------------------ looking up

    def deepest(self, names: list[Name]) -> int:
        """Return behind how many of these blocks a query finds all that it needs."""
        for depth in range(len(names), 0, -1):
            query = depth * self.size
            needed = [name for at, name in enumerate(names[:depth]) if self.attention.needs(query, at)]
            if all(name in self.cached for name in needed):
                return depth
        return 0

    def lookup(self, job: Job, prefilling: Sequence[Job]) -> Match:
        size, salt = self.size, job.request.salt
        story = job.story(job.target)
        names = [(salt, story[:end]) for end in range(size, len(story) + 1, size)]
        hits = self.deepest(names[: (job.target - 1) // size])
        reached = self.deepest(names)
        misses = {"last_token": reached - hits, "short_of_block": int(len(story) % size > 0)}
        if self.reuse:
            salts = {other for other, _ in self.cached} - {salt}
            known = [at for at, name in enumerate(names, 1) if name in self.cached or name in self.ghosts]
            ends = [
                ("isolated", [self.deepest([(other, tokens) for _, tokens in names]) for other in salts]),
                ("in_flight", [self._ahead(other, names) for other in prefilling]),
                ("evicted", known),
            ]
            for cause, found in ends:
                if (end := max(found, default=0)) > reached:
                    misses[cause] = end - reached
                    reached = end
        misses["unknown" if self.forgot else "cold"] = len(names) - reached
        match = Match(
            [self.cached.get(name) for name in names[:hits]],
            None,
            {cause: blocks for cause, blocks in misses.items() if blocks},
            hits * size,
        )
        self.find_part(job, match)
        return match

    def blocks_at_once(self, tokens: int) -> int:
        whole = self.blocks_of(tokens)
        return whole if whole <= self.num_blocks else self.attention.most_blocks(tokens)

    def with_path(self, hits: list[Block], block: Block) -> list[Block]:
        return [block]

    def _ahead(self, job: Job, names: list[Name]) -> int:
        """Return up to which of these blocks a job whose prompt is not complete will compute some; 0 if none."""
        theirs = job.story(job.target // self.size * self.size)
        end = sum(salt == job.request.salt and theirs[: len(tokens)] == tokens for salt, tokens in names)
        return end if end > len(job.path) else 0


class NaiveWindowedEngine(NaiveEngine):
    """A step at a time; who is promised something is promised every block of its table, shared or not."""

    cache: NaiveWindowedCache

    def _make_cache(self, num_blocks: int, size: int, reuse: bool, config: CacheConfig) -> NaiveCache:
        assert config.window is not None
        cache = NaiveWindowedCache(num_blocks, size, reuse, config.policy, partial_reuse(config))
        cache.attention = Attention(config.window, config.num_sinks, size)
        return cache

    # ------------------------------------------------------------ arithmetic of admission

    def _final_blocks(self, job: Job) -> int:
        """Return the most that all its samples hold while they decode.

        If anything leaves by the end, they come to share no more than the sinks.
        """
        cache, attention = self.cache, self.cache.attention
        blocks = cache.blocks_of(job.final_tokens)
        leaves = not all(attention.needs(job.final_tokens, at) for at in range(blocks))
        if leaves:
            blocks = attention.most_blocks(job.final_tokens)
        if job.samples == 1 or job.request.output_tokens == 1:
            return blocks
        shared = job.request.prompt_tokens // cache.size
        if leaves:
            shared = min(shared, cache.blocks_of(attention.num_sinks))
        return shared + job.samples * (blocks - shared)

    def _least_blocks(self, job: Job) -> int:
        attention = self.cache.attention
        least = self._final_blocks(job) if self.promises_the_end else attention.most_blocks(job.final_tokens)
        return least if self.engine.enable_chunked_prefill else max(least, self.cache.blocks_of(job.target))

    def _unpromised(self, jobs: Sequence[Job]) -> int:
        """Return how many blocks nobody of these has been promised."""
        cache = self.cache
        if self.promises_the_end:
            return cache.num_blocks - sum(max(self._final_blocks(job), len(cache.table(job))) for job in jobs)
        unfinished = [job for job in jobs if job.tokens < job.target]
        left = [cache.attention.most_blocks(job.target) - len(cache.table(job)) for job in unfinished]
        return cache.available - sum(max(blocks, 0) for blocks in left)

    def _room(self, job: Job) -> int:
        cache = self.cache
        room = (len(job.table) + cache.available + cache.gain([job])) * cache.size - job.tokens
        if self.promises_the_end:
            spare = self._unpromised([other for other in self.running if other is not job])
            gone = sum(not cache.attention.needs(job.tokens, at) for at in range(len(job.table)))
            room = min(room, (gone + max(self._final_blocks(job), spare)) * cache.size - job.tokens)
        return max(room, 0)

    def _first_chunk(self, job: Job, match: Match, chunk: int) -> int:
        cache, hits = self.cache, len(match.hits)
        held = [block for at, block in enumerate(match.hits) if cache.attention.needs(hits * cache.size, at)]
        idle = sum(block.holders == 0 for block in held) + match.kept
        may_split = self.engine.enable_chunked_prefill or bool(job.preemptions)
        blocks = cache.available - idle
        if self.running:
            spare = self._unpromised(self.running) - self.reserved
            if self.promises_the_end:
                needed, most = self._final_blocks(job), spare - len(held)
            else:
                needed = cache.blocks_of(job.target) - hits + idle
                if may_split:
                    needed = min(needed, cache.attention.most_blocks(job.target))
                most = spare - idle
            if needed > spare:
                return 0
            blocks = min(blocks, most)
        fits = (hits + blocks) * cache.size - match.tokens
        return max(min(chunk, fits), 0) if fits >= chunk or may_split else 0

    # ------------------------------------------------------------ a step

    def _blocks_to_decode(self) -> int:
        return super()._blocks_to_decode() - self.cache.gain(self.decoding)

    def _write_tokens(self) -> None:
        """Let go first: those to whom it happens every tokens_per_block steps, then who has just begun to decode."""
        reach, size = self.cache.attention.window - 1, self.cache.size
        on_time = [job for job in self.decoding if (job.tokens - reach) % size == 0]
        for job in dict.fromkeys([*on_time, *self.decoding]):
            self.cache.let_go(job)
        super()._write_tokens()

    def _continue(self, job: Job, chunk: int) -> None:
        self.cache.let_go(job)
        super()._continue(job, chunk)
