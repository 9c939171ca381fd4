"""Prefill and decode apart: replicas that compute prompts, and replicas that go on from there.

A request's life:

- A prefill replica computes its prompt, of which as much is hit as that replica has cached. The end of that is the
  first token: TTFT is over. A request of one token is done; of any other, the sequence keeps its blocks, but no place
  in the batch, until they have been copied.
- A decode replica is chosen, by a routing policy of its own. There the request waits, in the queue's order, for room
  by the rule of admission. Then all blocks of the prompt are taken at once, of which those that the replica's own
  cache has are hit; the last token's block never is. They can be hit from now on, as a link's transfers are over in
  the order of their beginning.
- The other blocks come over the link. When they have, the prefill replica releases the sequence, whose content
  stays cached there, and the decode replica gives it a token from its next step on: all its samples, if there are
  several. Who is preempted there computes again where it is.

What is hit on a prefill replica counts in the hit rates; what is hit on a decode replica, on the GPU or in its host
memory, only saves transfers. A block that is hit in part is transferred whole: a decode replica has no partial reuse.
Each replica has static batches of its own, if it is to have any. On a prefill replica, nobody joins a batch of which a
prompt is complete until all are, whoever still keeps blocks for a transfer. On a decode replica, nobody is given blocks
from when the first of a batch joins those that decode until all of it is done, whoever is still to come over the link.
The timeline has rows of steps only: blocks that are held for a transfer while a replica takes none are in no row.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

from allocator.config import BuildConfig, CacheConfig
from allocator.content import Content
from sim.cluster.link import Link, TransferCost
from sim.cluster.replica import ClusterReplica
from sim.request import Request
from sim.scheduler.job import Job
from sim.scheduler.plan import Plan
from sim.scheduler.retention import RetentionOptions
from sim.scheduler.scheduler import Scheduler


def check_supported(build: BuildConfig, cache: CacheConfig, retention: RetentionOptions | None) -> None:
    """Raise ValueError for what cannot be divided into prefill and decode replicas."""
    for name, value, wanted in (
        ("enable_paged_kv_cache", build.enable_paged_kv_cache, True),
        ("window", cache.window, None),
    ):
        if value != wanted:
            raise ValueError(f"{name} ({value}) must be {wanted} with prefill_replicas")
    if retention is not None and retention.session_priority is not None:
        raise ValueError(
            f"session_priority ({retention.session_priority}) must not be given with prefill_replicas: where a prompt "
            "is computed, nobody knows when its answer ends"
        )


class PrefillScheduler(Scheduler):
    """Schedules prompts, and holds the blocks of those that are complete until they are asked to let go."""

    def hold(self, job: Job) -> None:
        """Keep the blocks of a job whose prompt is complete, but not its place."""
        del self.running[job]
        self.sequences -= job.samples
        self.apart[job] = None

    def let_go(self, job: Job) -> None:
        """Release a job that is held."""
        assert job.sequence is not None
        del self.apart[job]
        self.final_blocks -= job.final_blocks
        self.manager.release(job.sequence)
        job.content = job.match = None


def decode_cache(cache: CacheConfig) -> CacheConfig:
    """Return how the cache of a decode replica differs from those that compute prompts."""
    return replace(cache, enable_partial_reuse=False)


class DecodeScheduler(Scheduler):
    """Schedules jobs whose prompts were computed elsewhere: they wait as if they were swapped out.

    received  jobs that have been given their blocks since somebody looked, and how many of these were not hit
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.received: list[tuple[Job, int]] = []

    def _swap_in(self, job: Job, plan: Plan) -> bool:
        """Give the first waiting job, which is elsewhere, blocks for all of its prompt, if there is room."""
        if job.sequence is not None:  # it has been here, and is in host memory
            return super()._swap_in(job, plan)
        manager = self.manager
        match = self._look_up(job)
        left = job.target - match.hit_tokens
        if self.running or self.apart:
            if self._rule.blocks_for(job, match) > self._room_to_admit():
                return False
        elif not manager.can_admit(match, left):
            return False
        self.waiting.pop_first()
        assert job.content is not None
        job.sequence = manager.admit(
            job.content,
            left,
            match,
            job.request.salt,
            readmission=True,
            retention=None if self.wishes is None else self.wishes.of(job, self._pool.now),
        )
        job.swapped = False
        self.final_blocks += job.final_blocks
        self.sequences += job.samples
        self.apart[job] = None
        self.received.append((job, len(job.sequence.table) - match.hit_blocks))
        return True

    def join(self, job: Job) -> None:
        """Let a job decode whose blocks have come. Its next token does not come a step after the one before."""
        del self.apart[job]
        self.running[job] = None
        before = len(self.decoding)
        self.begin_decoding(job)
        for branch in islice(self.decoding, before, None):
            branch.last_ps = job.first_ps
        self._stalled = True
        if self._config.admission == "static_batch":
            self._closed = True

    def _batch_goes_on(self) -> bool:
        return bool(self.running or self.apart)


class PrefillReplica(ClusterReplica):
    """Computes prompts. What is complete is handed over: `complete` has those jobs until somebody takes them."""

    scheduler: PrefillScheduler

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.complete: deque[Job] = deque()

    def _accept(self, job: Job) -> None:
        """Take the job as one of its prompt alone."""
        job.samples = job.left = 1
        job.final_tokens = job.target
        job.final_blocks = -(-job.target // self.scheduler.manager.tokens_per_block)
        super()._accept(job)

    def end_prefills(self, plan: Plan, now_ps: int) -> None:
        for job in plan.completed:
            self.prompt_tokens -= job.request.prompt_tokens
            job.generated = 1
            job.first_ps = now_ps
            if job.request.output_tokens == 1:
                self.scheduler.finish(job)
                self._finish(job, now_ps)
            else:
                self.sequences -= job.samples
                self.scheduler.hold(job)
                self.complete.append(job)

    def let_go(self, job: Job, now_ps: int) -> None:
        """Release a job whose blocks have been copied."""
        self.set_clock(now_ps)
        self.scheduler.let_go(job)


class DecodeReplica(ClusterReplica):
    """Goes on where prefill replicas have stopped.

    link      over which it receives
    received  is told of each job that is given its blocks: how many come over the link, and when that began
    """

    scheduler: DecodeScheduler

    def __init__(self, *args: Any, transfer: TransferCost, received: Callable[[Job, int, int], None]) -> None:
        super().__init__(*args)
        self.link = Link(transfer)
        self._received = received
        self._ready: deque[Job] = deque()

    def hand_over(self, prefilled: Job, content: Content, now_ps: int) -> Job:
        """Take over from a job of which the prompt is complete; return the job that goes on."""
        request: Request = prefilled.request
        job = Job(request, request.num_sequences)
        if self.scheduler.accepts_arrivals():
            self.settle(now_ps)
        cause = self.scheduler.reject_cause(job)
        assert not cause, f"{job} was accepted by a replica like this one"
        for name in ("arrival_ps", "admit_ps", "first_ps", "query_blocks", "hit_blocks", "hit_tokens"):
            setattr(job, name, getattr(prefilled, name))
        job.generated, job.content, job.swapped = 1, content, True
        self._accept(job)
        self.inbox.put(job, now_ps)
        return job

    def end_transfer(self, now_ps: int) -> Job:
        """Return the job whose transfer is over now; it decodes from the next step on."""
        job = self.link.take()
        self.settle(now_ps)
        self._ready.append(job)
        return job

    @property
    def next_ps(self) -> int:
        return min(self.end_ps, self.link.next_ps)

    def schedule(self, now_ps: int) -> Plan:
        plan = super().schedule(now_ps)
        received = self.scheduler.received
        for job, num_blocks in received:
            self.link.begin(job, num_blocks, now_ps)
            self._received(job, num_blocks, now_ps)
            if self._events is not None:
                self.recorder.started(job)
        received.clear()
        return plan

    def _begin(self, now_ps: int) -> None:
        ready = self._ready
        if ready:
            self.set_clock(now_ps)
        while ready:
            job = ready.popleft()
            self.prompt_tokens -= job.request.prompt_tokens
            self.scheduler.join(job)
        super()._begin(now_ps)
