"""ClusterReplica: one engine of several, which others may look at between any two of its steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from allocator.content import Content
from sim.arrivals import NEVER, Arrivals
from sim.cluster.routing import ReplicaView
from sim.cost import StepCost
from sim.recorder import Recorder
from sim.replica import Replica
from sim.request import Request
from sim.scheduler.job import Job
from sim.scheduler.plan import Plan
from sim.scheduler.scheduler import Scheduler
from sim.stretch import Stretch, steps_until


class Inbox(Arrivals):
    """What has been routed to a replica and waits for its next step, in place of a trace of its own."""

    def __init__(self, shared: Arrivals) -> None:
        """Take the arrivals of the whole trace, which are told who has finished."""
        self.next_ps = NEVER
        self._shared = shared
        self._jobs: deque[tuple[int, Job]] = deque()

    def put(self, job: Job, now_ps: int) -> None:
        """Take in a job that comes now."""
        if not self._jobs:
            self.next_ps = now_ps
        self._jobs.append((now_ps, job))

    def take(self) -> Job:
        """Return the job that has waited longest. There must be one."""
        _, job = self._jobs.popleft()
        self.next_ps = self._jobs[0][0] if self._jobs else NEVER
        return job

    def finished(self, request: Request, now_ps: int) -> None:
        self._shared.finished(request, now_ps)

    def rejected(self, request: Request) -> None:
        self._shared.rejected(request)


class ClusterReplica(Replica):
    """An engine whose steps are taken when somebody looks, or when they are over.

    Steps that only decode are planned as one *stretch*, but not taken before its end: until `settle` says that its
    state has to be known at some moment. Then the steps that have begun by then are taken, and the stretch ends with
    the one in progress. Stepping instead of skipping, each step is taken when it begins; `settle` ends the stretch
    at the same one, as a step takes time: one that begins now does not end now.

    end_ps         when the stretch in progress ends, as far as is known; NEVER while there is none
    sequences      in flight: of requests that came and have not finished, each sample counted
    prompt_tokens  of prompts that are not computed yet
    """

    def __init__(
        self,
        number: int,
        scheduler: Scheduler,
        recorder: Recorder,
        cost: StepCost,
        skipping: bool,
        arrivals: Arrivals,
        done: Callable[[], None],
    ) -> None:
        """Take the arrivals of the whole trace, and whom to tell when a request is done with."""
        nobody: Iterable[Request] = ()
        super().__init__(nobody, scheduler, recorder, cost, skipping, None)
        self.number = number
        self.end_ps = NEVER
        self.sequences = self.prompt_tokens = 0
        self.inbox = Inbox(arrivals)
        self.arrivals = self.inbox
        self._tell_done = done
        self._plan: Plan | None = None  # of the step in progress, unless nothing had to be scheduled
        self._stretch: Stretch | None = None  # if more steps like it may follow
        self._settled = True  # all steps of the stretch, up to its end, have been taken
        self._limit = 0  # steps that it can have
        self._start_ps = self._first_ps = self._increment_ps = 0

    # ---------------------------------------------------------------- arrivals

    def deliver(self, request: Request, arrival_ps: int, content: Content | None) -> None:
        """Take a request that is routed here at `arrival_ps`, now; or reject it."""
        job = Job(request, request.num_sequences)
        if self.scheduler.accepts_arrivals():
            self.settle(arrival_ps)
        cause = self.scheduler.reject_cause(job)
        if cause:
            self._reject(request, arrival_ps, cause)
            return
        job.arrival_ps = arrival_ps
        job.content = content
        self._accept(job)
        self.inbox.put(job, arrival_ps)

    def _accept(self, job: Job) -> None:
        """Count a job that is not rejected among those in flight."""
        self.sequences += job.samples
        self.prompt_tokens += job.request.prompt_tokens

    def take_arrivals(self, now_ps: int) -> None:
        inbox, waiting = self.inbox, self.scheduler.waiting
        while inbox.next_ps <= now_ps:
            waiting.append(inbox.take())

    def view(self, request: Request, content: Content) -> ReplicaView:
        """Return what a routing policy sees; the replica must be settled."""
        manager, scheduler = self.scheduler.manager, self.scheduler
        return ReplicaView(
            self.number,
            scheduler.sequences,
            self.sequences - scheduler.sequences,
            self.prompt_tokens,
            manager.logical_tokens,
            manager.available_blocks,
            manager.num_blocks,
            lambda: manager.lookup(content, request.salt).hit_tokens,
        )

    # ---------------------------------------------------------------- steps

    @property
    def next_ps(self) -> int:
        """Return when something happens here next, as far as is known."""
        return self.end_ps

    def end(self, now_ps: int) -> None:
        """End the stretch if it has come to its end by itself, now; not if somebody may still cut it here."""
        if (
            not self._skipping
            and not self._settled
            and self._stretch is not None
            and self._stretch.may_go_on()
        ):
            return
        self.settle(now_ps)
        self._end_stretch(now_ps)

    def go_on(self, now_ps: int) -> None:
        """Begin the next step, or stretch of steps, unless one is in progress or there is nothing to do."""
        if self.end_ps == now_ps:
            stretch = self._stretch
            if not self._settled and stretch is not None and stretch.step():
                self.end_ps = stretch.end_ps
                return
            self._end_stretch(now_ps)
        if self.end_ps == NEVER:
            self._begin(now_ps)

    def settle(self, now_ps: int) -> None:
        """Take the steps that have begun by now, and let the stretch end with the one in progress."""
        if self._settled:
            return
        self._settled = True
        ends_before = now_ps < self.end_ps
        if self._plan is None:
            first, increment, steps = self._first_ps, self._increment_ps, self._limit
            if ends_before:
                steps, taken = steps_until(now_ps - self._start_ps, first, increment)
                self.end_ps = self._start_ps + taken
            self.take_coast(self._start_ps, self.end_ps, steps, first, increment)
        elif self._stretch is not None and self._skipping:
            self._stretch.extend(self._stretch.steps_until(now_ps) if ends_before else self._limit)
            self.end_ps = self._stretch.end_ps

    def _begin(self, now_ps: int) -> None:
        scheduler = self.scheduler
        self.take_arrivals(now_ps)
        if not scheduler.running and not scheduler.waiting:
            return
        self.set_clock(now_ps)
        if self.retains:
            self._expiry_ps = self.next_expiry()
        self._start_ps = now_ps
        self._stretch = self._plan = None
        idle = scheduler.idle_steps() if self._skipping else 0
        affine = self.decode_affine(len(scheduler.decoding)) if idle else None
        if affine is not None:
            self._first_ps, self._increment_ps = first, increment = self.coast_ps(*affine)
            if self.retains:
                idle = self.steps_to_expiry(now_ps, idle, first, increment)
            self._settled, self._limit = False, idle
            self.end_ps = now_ps + idle * first + increment * (idle * (idle - 1) // 2)
            return
        plan = self.schedule(now_ps)
        if plan.is_empty:
            return  # who waits needs room that only a transfer's end makes
        self._plan = plan
        self._first_ps = self.step_ps(plan)
        self.end_ps = now_ps + self._first_ps
        self._settled = not plan.is_quiet
        if plan.is_quiet:
            stretch = self._stretch = Stretch(self, plan, now_ps, self._first_ps)
            if self._skipping:
                self._limit = 1 + stretch.bound()
                self.end_ps = stretch.end_after(self._limit)

    def _end_stretch(self, now_ps: int) -> None:
        self.end_ps = NEVER
        plan, scheduler = self._plan, self.scheduler
        if self._stretch is not None:
            self._stretch.record()
        elif plan is not None:
            self.record(plan, self._start_ps, now_ps, 1, self._first_ps, 0, None)
        self.set_clock(now_ps)
        if scheduler.end_tick == scheduler.batch.tick:
            self.end_decodes(now_ps)
        if plan is not None and plan.completed:
            self.end_prefills(plan, now_ps)
        self.sample_map(now_ps)

    def end_prefills(self, plan: Plan, now_ps: int) -> None:
        for job in plan.completed:
            if not job.generated and job.first_ps < 0:  # nor is it a search that begins anew
                self.prompt_tokens -= job.request.prompt_tokens
        super().end_prefills(plan, now_ps)

    def _finish(self, job: Job, now_ps: int) -> None:
        self.sequences -= job.samples
        super()._finish(job, now_ps)

    def check_done(self) -> None:
        """Raise AssertionError if something is still counted as in flight. For when nothing happens any more."""
        scheduler = self.scheduler
        left = (
            self.sequences,
            self.prompt_tokens,
            scheduler.sequences,
            len(scheduler.apart),
            scheduler.final_blocks,
        )
        assert not any(left), f"replica {self.number} is done, but for {left}"

    def _count_done(self) -> None:
        self._tell_done()
