"""A serving engine written the naive way: the oracle for the one in sim/, with which it shares no code.

It takes its steps one by one, keeps every block as an object of its own, names cached content by all the tokens
that lead to it, and finds out by looking what the real engine keeps count of: who holds a block, which blocks have
children, how many blocks the running jobs still need. Requests, configurations and the cost of a step are the real
engine's, as plain data.
"""

from __future__ import annotations

from collections.abc import Sequence

from naive_cache import Block, Job, Match, NaiveCache
from naive_host import NaiveHostCache
from naive_preemption import NaivePreemption, NaiveRun
from naive_retention import wishes

from allocator.config import BuildConfig, CacheConfig
from sim.cost import StepBatch, StepCost
from sim.request import Request
from sim.scheduler.beams import beam_parents
from sim.scheduler.config import EngineConfig
from sim.scheduler.retention import RetentionOptions


def partial_reuse(config: CacheConfig) -> str:
    """Return what may become of a block that is hit in part: "copy" or "steal", or "" for nothing."""
    return ("copy" if config.copy_on_partial_reuse else "steal") if config.enable_partial_reuse else ""


class NaiveEngine(NaivePreemption):
    """Continuous batching, a step at a time."""

    considered = 128
    """Among how many that wait the longest cached prefix is looked for."""
    protected = 16
    """For how many that wait hits are protected."""

    def __init__(
        self,
        requests: Sequence[Request],
        build: BuildConfig,
        cache: CacheConfig,
        engine: EngineConfig,
        num_blocks: int,
        cost: StepCost,
        retention: RetentionOptions | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        self.retention = retention
        self.build, self.engine, self.cost = build, engine, cost
        size, reuse = build.tokens_per_block, cache.enable_block_reuse
        if not build.enable_paged_kv_cache:
            num_blocks, size, reuse = num_blocks * size // build.max_seq_len, build.max_seq_len, False
        self.cache = self._make_cache(num_blocks, size, reuse, cache)
        if num_host_blocks:
            self.cache = NaiveHostCache(num_blocks, size, reuse, cache.policy)
            self.cache.attach(num_host_blocks)
        self.reserved = int(engine.watermark * num_blocks)
        self.requests = requests
        self.due = [(request.arrival_ps, request.request_id) for request in requests if request.parent < 0]
        self.samples_left = [request.num_sequences for request in requests]
        self.waiting: list[Job] = []
        self.running: list[Job] = []  # in the order of starting
        self.prefilling: list[Job] = []
        self.decoding: list[Job] = []  # in the order in which prompts were completed
        self.closed = False  # a static batch, until all of it is done
        self.run = NaiveRun([self._blank(request) for request in requests])
        self.rows = self.run.requests

    def _make_cache(self, num_blocks: int, size: int, reuse: bool, config: CacheConfig) -> NaiveCache:
        return NaiveCache(num_blocks, size, reuse, config.policy, partial_reuse(config))

    @staticmethod
    def _blank(request: Request) -> dict[str, object]:
        row: dict[str, object] = dict.fromkeys(("admit_ps", "first_token_ps", "finish_ps"), -1)
        counters = ("query_blocks", "hit_blocks", "hit_tokens", "preemptions", "recomputed_tokens")
        row.update(dict.fromkeys((*counters, "blocks", "cow_copies"), 0))
        row.update(arrival_ps=request.arrival_ps, status="", reject_cause="")
        return row

    def simulate(self) -> NaiveRun:
        """Run until all is done."""
        now = 0
        while True:
            self._arrive(now)
            if self.waiting or self.running:
                now = self._step(now)
            elif self.due:
                now = min(self.due)[0]
            else:
                self.run.evicted = self.cache.evicted
                self.run.host = self.cache.host_counts()
                return self.run

    # ------------------------------------------------------------ arrivals

    def _arrive(self, now: int) -> None:
        while self.due and min(self.due)[0] <= now:
            arrival, row = min(self.due)
            self.due.remove((arrival, row))
            self.rows[row]["arrival_ps"] = arrival
            request = self.requests[row]
            job = Job(request, request.num_sequences, target=request.prompt_tokens)
            cause = self._reject_cause(job)
            if cause:
                self._reject(request, cause)
            else:
                self.waiting.append(job)

    def _reject_cause(self, job: Job) -> str:
        request, build = job.request, self.build
        if request.prompt_tokens + request.output_tokens > build.max_seq_len:
            return "exceeds_max_seq_len"
        if request.num_sequences > build.max_batch_size:
            return "exceeds_max_batch_size"
        if request.prompt_tokens > build.max_num_tokens and not self.engine.enable_chunked_prefill:
            return "exceeds_max_num_tokens"
        least = self._least_blocks(job)
        if request.beam_width > 1:
            full = self.cache.reuse and request.prompt_tokens % self.cache.size == 0
            least = max(least, self._final_blocks(job) + int(full))
        return "exceeds_pool" if least > self.cache.num_blocks else ""

    def _reject(self, request: Request, cause: str) -> None:
        assert not self.rows[request.request_id]["status"]
        self.rows[request.request_id].update(status="rejected", reject_cause=cause)
        for turn in self.requests:
            if turn.parent == request.request_id:
                self._reject(turn, "follows_rejected")

    # ------------------------------------------------------------ arithmetic of admission

    @property
    def promises_the_end(self) -> bool:
        """Whether who starts is promised all the blocks that it takes to finish."""
        return self.engine.admission != "max_utilization"

    def _least_blocks(self, job: Job) -> int:
        """Return in how many blocks the job, alone, would finish."""
        return self._final_blocks(job) if self.promises_the_end else self.cache.blocks_of(job.final_tokens)

    def _final_blocks(self, job: Job) -> int:
        """Return what all its samples hold at the end. With one token each, they never part."""
        end = self.cache.blocks_of(job.final_tokens)
        shared = job.request.prompt_tokens // self.cache.size
        return end if job.request.output_tokens == 1 else shared + job.samples * (end - shared)

    def _outstanding(self) -> int:
        """Return the blocks that the running jobs will still take: growth, and copies of shared tails."""
        tails = {job.table[-1] for job in self.running if job.tokens % self.cache.size}
        growth = sum(self._final_blocks(job) - len(job.table) for job in self.running)
        return growth + sum(block.holders - 1 for block in tails)

    def _unfinished(self) -> int:
        """Return the blocks that prompts which are not complete will still take."""
        return sum(self.cache.blocks_of(job.target) - len(job.table) for job in self.prefilling)

    def _first_waiting(self) -> Job:
        """Return who is to start next, by looking at all that wait: preempted ones first, the latest of them."""
        order = self.engine.queue_order
        arrived = [job for job in self.waiting if not job.preemptions]
        if order == "fcfs" or self.waiting[0].preemptions:
            return self.waiting[0]
        if order == "priority":
            return max(arrived, key=lambda job: job.request.priority)
        if order == "shortest":
            return min(arrived, key=lambda job: job.request.prompt_tokens + job.request.output_tokens)
        return max(arrived[: self.considered], key=lambda job: self.cache.lookup(job, self.prefilling).tokens)

    def _first_chunk(self, job: Job, match: Match, chunk: int) -> int:
        """Return how many of so many tokens a job may start with; 0 if it has to wait."""
        return chunk if self._fits(job, match, chunk) else 0

    def _fits(self, job: Job, match: Match, chunk: int) -> bool:
        cache, hits, again = self.cache, len(match.hits), match.repeated
        # What is hit on the host takes a block, what is hit and idle cannot be taken for others any more.
        idle_hits = sum(block is None or block.holders == 0 for block in match.hits)
        if not self.running:
            first = cache.blocks_of(match.tokens + chunk)
            return first - hits + idle_hits + match.kept <= cache.available
        whole = cache.blocks_of(job.target) + match.kept
        if self.promises_the_end:
            stays_idle = again is None or again.holders or (match.stolen and again is match.part)
            needed = self._final_blocks(job) + (not stays_idle)
            if match.kept:
                needed = max(needed, whole)
            promised = self._outstanding()
        else:
            needed = whole
            promised = self._unfinished()
        return needed - hits + idle_hits <= cache.available - promised - self.reserved

    # ------------------------------------------------------------ a step

    def _step(self, now: int) -> int:
        cache = self.cache
        cache.pass_time(now)
        evicted = cache.evicted
        cache.copied_tokens = cache.moved = 0
        if self.engine.protect_waiting_hits:
            self._protect()
        self._preempted = 0
        self._short = False
        if self.engine.mixed_steps:
            self._decode(now)
            decoders = list(self.decoding)
            prefills = self._compute_prompts(self.build.max_num_tokens - len(decoders), now)
        else:
            prefills = self._compute_prompts(self.build.max_num_tokens, now)
            if not prefills:
                self._decode(now)
            decoders = [] if prefills else list(self.decoding)
        cache.move()
        cache.end_step()
        batch = StepBatch(len(decoders), sum(job.tokens for job in decoders))
        batch.prefills = [(tokens, job.tokens) for job, tokens in prefills]
        batch.copied_tokens = cache.copied_tokens
        batch.swapped_tokens = cache.moved * cache.size
        batch.window_keys = tuple(
            sum(min(job.tokens, window) for job in decoders) for window in getattr(self.cost, "windows", ())
        )
        end = now + self.cost.step(batch)
        on_time = 0
        for job in decoders or (self.decoding if prefills else ()):  # who decodes, or who has to wait
            if not decoders:
                job.last_token_ps = now if job.last_token_ps is None else job.last_token_ps
            elif job.last_token_ps is None:
                on_time += 1
            else:
                self.run.gaps.append(end - job.last_token_ps)
                job.last_token_ps = None
        self.run.steps.append(
            {
                "start_ps": now,
                "end_ps": end,
                "running": len(self.running),
                "waiting": len(self.waiting),
                "decode_sequences": len(decoders),
                "itl_tokens": on_time,
                "prefill_sequences": len(prefills),
                "prefill_tokens": sum(tokens for _, tokens in prefills),
                "preemptions": self._preempted,
                "out_of_block_steps": int(self._short),
                "evicted_blocks": cache.evicted - evicted,
                **self._blocks(),
            }
        )
        cache.pass_time(end)
        self._finish_step(decoders, prefills, end)
        return end

    def _protect(self) -> None:
        """Guard the hits of the first that wait, where the order follows the cache of the first that arrived."""
        ahead = [job for job in self.waiting if job.preemptions]
        arrived = [job for job in self.waiting if not job.preemptions]
        if self.engine.queue_order == "priority":
            arrived.sort(key=lambda job: -job.request.priority)
        if self.engine.queue_order == "shortest":
            arrived.sort(key=lambda job: job.request.prompt_tokens + job.request.output_tokens)
        first = (ahead + arrived)[: self.protected]
        for job in list(self.cache.guards):
            if job not in first:
                self.cache.unguard(job)
        for job in first:
            self.cache.guard(job, self.cache.lookup(job, self.prefilling).hits)

    def _compute_prompts(self, budget: int, now: int) -> list[tuple[Job, int]]:
        prefills = self._continue_prefills(budget, now)
        if not self._preempted:
            prefills += self._admit(budget - sum(tokens for _, tokens in prefills), now)
        return prefills

    def _blocks(self) -> dict[str, int]:
        """Count what is in the pool by looking at every table."""
        cache = self.cache
        written: dict[Block, int] = {}
        for job in self.running:
            for at, block in cache.table(job):
                slots = min(cache.size, job.tokens - at * cache.size)
                written[block] = max(slots, written.get(block, 0))
            written.update(dict.fromkeys(cache.held(job) & set(job.path), cache.size))
        assert cache.free + len(cache.idle) + len(cache.guarded) + len(written) == cache.num_blocks
        tables = [block for job in self.running for _, block in cache.table(job)]
        gone = sum(len(job.table) for job in self.running) - len(tables)
        return {
            "free_blocks": cache.free,
            "evictable_blocks": len(cache.idle) + len(cache.guarded),
            "referenced_blocks": len(written),
            "logical_blocks": len(tables),
            "logical_tokens": sum(job.tokens for job in self.running) - gone * cache.size,
            "saved_blocks": len(tables) - len(set(tables)),
            "kv_tokens": sum(written.values()),
        }

    def _decode(self, now: int) -> None:
        cache = self.cache
        for job in list(self.decoding):
            if job.group and job is job.group[0] and job.tokens > job.request.prompt_tokens:
                self._reorder(job.group)
        while self.decoding and self._blocks_to_decode() > cache.available:
            self._short = True
            self._preempt(self._victim(), now)
        self._write_tokens()

    def _write_tokens(self) -> None:
        """Give every job that decodes a slot for its token."""
        cache = self.cache
        for job in self.decoding:
            cache.copy_shared_tail(job)
        for job in self.decoding:
            cache.write(job, 1)
        for job in self.decoding:
            cache.cache_full(job)

    def _reorder(self, beams: list[Job]) -> None:
        """Let each beam hold and say what the one from which it goes on does."""
        request = beams[0].request
        parents = beam_parents(request.request_id, beams[0].tokens - request.prompt_tokens, len(beams))
        heirs = {i: self.cache.share(beams[p], 0) for i, p in enumerate(parents) if i != p}
        for i, heir in heirs.items():
            beam = beams[i]
            beam.table, heir.table = heir.table, beam.table
            beam.path, heir.path = heir.path, beam.path
            beam.said = heir.said
            self.cache.release(heir)

    def _blocks_to_decode(self) -> int:
        size = self.cache.size
        tails = {job.table[-1] for job in self.decoding if job.tokens % size}
        starts = sum(job.tokens % size == 0 for job in self.decoding)
        return starts + sum(block.holders - 1 for block in tails)

    def _continue_prefills(self, budget: int, now: int) -> list[tuple[Job, int]]:
        prefills: list[tuple[Job, int]] = []
        for job in list(self.prefilling):
            if job not in self.prefilling:
                continue  # preempted for the sake of one before it
            while (room := self._room(job)) == 0 and budget > 0:
                self._short = True
                last = self.running[-1]
                alone = last is job and not self.decoding and not prefills
                if last in self.decoding or (last is job and not alone):
                    break
                self._preempt(last, now)
                if alone:
                    return prefills
            chunk = min(job.target - job.tokens, budget, room)
            if chunk <= 0:
                break
            self._continue(job, chunk)
            prefills.append((job, chunk))
            budget -= chunk
        return prefills

    def _room(self, job: Job) -> int:
        return (len(job.table) + self.cache.available) * self.cache.size - job.tokens

    def _continue(self, job: Job, chunk: int) -> None:
        """Compute more of a prompt that is begun."""
        self._prefill(job, chunk)

    def _prefill(self, job: Job, chunk: int) -> None:
        job.computed += chunk
        self.cache.write(job, chunk)
        self.cache.cache_full(job)

    def _admit(self, budget: int, now: int) -> list[tuple[Job, int]]:
        prefills: list[tuple[Job, int]] = []
        if not self.running:
            self.closed = False
        while self.waiting and budget > 0 and not self.closed:
            job = self._first_waiting()
            branches = sum(other.samples for other in self.running)
            match = self.cache.lookup(job, self.prefilling)
            left = job.target - match.tokens
            chunk = min(left, budget)
            whole = chunk == left or self.engine.enable_chunked_prefill or job.preemptions
            if branches + job.samples > self.build.max_batch_size:
                break
            if job.swapped:
                if not self._swap_in(job, now):
                    break
                continue
            if not whole:
                break
            chunk = self._first_chunk(job, match, chunk)
            if not chunk:
                break
            self.waiting.remove(job)
            self._start(job, match, now)
            self._prefill(job, chunk)
            prefills.append((job, chunk))
            budget -= chunk
        return prefills

    def _start(self, job: Job, match: Match, now: int) -> None:
        size, row, parent = self.cache.size, self.rows[job.request.request_id], job.request.parent
        parent_ended_ps = self.rows[parent]["finish_ps"] if parent >= 0 else 0
        assert isinstance(parent_ended_ps, int)
        job.wishes = wishes(self.retention, self.requests, job.request, size, parent_ended_ps, now)
        self.cache.begin(job, match)
        job.tokens = job.hit_tokens = match.tokens
        job.computed = 0
        if job.preemptions:
            job.recomputed += max(0, job.written - job.hit_tokens)
            self.run.pauses.append((job.request.request_id, job.sample, job.paused_ps, now))
        else:
            row.update(
                admit_ps=now,
                query_blocks=self.cache.blocks_of(job.target),
                hit_blocks=len(match.hits),
                hit_tokens=job.hit_tokens,
            )
            for cause, blocks in match.misses.items():
                self.run.misses[cause] = self.run.misses.get(cause, 0) + blocks
        self.running.append(job)
        self.cache.unguard(job)
        self.prefilling.append(job)

    def _finish_step(self, decoders: list[Job], prefills: list[tuple[Job, int]], end: int) -> None:
        for job in decoders:
            job.generated += 1
            if job.generated == job.request.output_tokens:
                self.decoding.remove(job)
                self._finish(job, end)
        for job, _ in prefills:
            if job.tokens == job.target:
                self._finish_prefill(job, end)

    def _finish_prefill(self, job: Job, end: int) -> None:
        assert job.hit_tokens + job.computed == job.target
        self.prefilling.remove(job)
        job.generated += 1
        self.closed = self.engine.admission == "static_batch"
        row = self.rows[job.request.request_id]
        if row["first_token_ps"] == -1:
            row["first_token_ps"] = end
        if job.last_token_ps is not None:
            self.run.gaps.append(end - job.last_token_ps)
            job.last_token_ps = None
        if job.generated == job.request.output_tokens:
            self._finish(job, end)
            return
        branches = [self.cache.share(job, sample) for sample in range(1, job.samples)]
        job.samples = 1
        if job.request.beam_width > 1:
            for beam in (job, *branches):
                beam.group = [job, *branches]
        self.running += branches
        self.decoding += [job, *branches]

    def _finish(self, job: Job, end: int) -> None:
        row, request = self.rows[job.request.request_id], job.request
        self.running.remove(job)
        self.cache.release(job)
        for name, value in (
            ("preemptions", job.preemptions),
            ("recomputed_tokens", job.recomputed),
            ("blocks", len(self.cache.table(job))),
            ("cow_copies", job.copies),
        ):
            row[name] += value  # type: ignore[operator]
        self.samples_left[request.request_id] -= job.samples
        if self.samples_left[request.request_id]:
            return
        assert not row["status"]
        row.update(status="finished", finish_ps=end)
        for turn in self.requests:
            if turn.parent == request.request_id:
                self.due.append((max(turn.arrival_ps, end + turn.think_ps), turn.request_id))
