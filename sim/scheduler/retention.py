"""Retention: how a run's requests want their blocks kept, and what each of them says of it when it is admitted."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from allocator.checks import require_int
from allocator.config import BuildConfig, CacheConfig
from allocator.eviction import POLICIES
from allocator.field_docs import with_field_docs
from allocator.retention import DEFAULT_PRIORITY, MAX_PRIORITY, Retention, RetentionConfig, TokenRange
from sim.request import PS_PER_S, Request
from sim.scheduler.job import Job

_MOST_S = 1e6
"""Longest duration, eleven days: longer than anything that is replayed."""


@with_field_docs
@dataclass(frozen=True)
class RetentionOptions:
    """How blocks are to be kept once nobody references them, by a priority from 0, the first to go, to 100.

    Blocks of which nothing is said have 35. The policy named `priority` evicts by it, and host memory takes what has
    `offload_min_priority`. A duration is of simulated time, and begins when nobody references a block any more; when it
    is over, the block has 35 and counts as just used. Raises ValueError on a broken rule.
    """

    head_tokens: int = 0
    """First tokens of each prompt that head_priority is for, a system prompt for example. A block counts by its first
    token."""
    head_priority: int | None = None
    """Priority of the first head_tokens of each prompt, from 0, the first to go, to 100."""
    head_duration_s: float | None = None
    """For how long they have it, seconds from when nobody references a block any more; None for good."""
    prompt_priority: int | None = None
    """Priority of each prompt behind head_tokens. None says nothing of it: what is found in the cache stays as it
    was."""
    prompt_duration_s: float | None = None
    """For how long prompts have it, seconds; None for good."""
    output_priority: int | None = None
    """Priority of what is generated."""
    output_duration_s: float | None = None
    """For how long outputs have it, seconds; None for good."""
    session_priority: int | None = None
    """Priority, in place of prompt_priority and output_priority, of requests that other turns of the trace follow,
    until the last of them is due: so their blocks are pinned while a tool works or a user thinks. Of what it finds,
    a session's last turn says prompt_priority, or else 35."""

    def __post_init__(self) -> None:
        require_int("head_tokens", self.head_tokens, 0)
        for part in ("head", "prompt", "output", "session"):
            name = f"{part}_priority"
            priority = getattr(self, name)
            if priority is not None:
                require_int(name, priority, 0)
                if priority > MAX_PRIORITY:
                    raise ValueError(f"{name} ({priority}) must be at most {MAX_PRIORITY}")
        for part in ("head", "prompt", "output"):
            self._check_duration(part)
        if self.head_priority is not None and not self.head_tokens:
            raise ValueError(f"head_priority ({self.head_priority}) needs head_tokens, to say of how many")
        if self.head_tokens and self.head_priority is None:
            raise ValueError(f"head_tokens ({self.head_tokens}) needs head_priority")

    def _check_duration(self, part: str) -> None:
        name = f"{part}_duration_s"
        duration, priority = getattr(self, name), getattr(self, f"{part}_priority")
        if duration is None:
            return
        if not 0 < duration <= _MOST_S:
            raise ValueError(f"{name} ({duration}) must be above 0 and at most {_MOST_S:g}")
        if priority is None or priority == DEFAULT_PRIORITY:
            raise ValueError(
                f"{name} ({duration}) needs a {part}_priority other than {DEFAULT_PRIORITY}, to which it returns"
            )

    @property
    def is_given(self) -> bool:
        """Return whether anything is said at all."""
        return self._first_given is not None

    @property
    def _first_given(self) -> tuple[str, int] | None:
        for name in ("head_priority", "prompt_priority", "output_priority", "session_priority"):
            if (priority := getattr(self, name)) is not None:
                return name, priority
        return None

    @property
    def priorities(self) -> set[int]:
        """Return the priorities that blocks can have as long as no duration is over."""
        others = [self.prompt_priority, self.output_priority]
        found = {DEFAULT_PRIORITY if priority is None else priority for priority in others}
        return found | {each for each in (self.head_priority, self.session_priority) if each is not None}

    @property
    def _keeps_all_alike(self) -> bool:
        """Return whether the order in which blocks go is the one in which they were used, as if nothing were said.

        So it is with one priority for all, be it that it sinks after one and the same duration. Where that is the usual
        one, to say so changes nothing either, but is meant to: other values are to be compared with it.
        """
        if len(self.priorities) > 1 or self.session_priority is not None:
            return False
        durations = {self.prompt_duration_s, self.output_duration_s}
        if self.head_priority is not None:
            durations.add(self.head_duration_s)
        (priority,) = self.priorities
        return len(durations) == 1 and (
            priority > DEFAULT_PRIORITY or (None in durations and priority < DEFAULT_PRIORITY)
        )

    def check(self, build: BuildConfig, cache: CacheConfig, *, has_host: bool) -> None:
        """Raise ValueError where what is said makes no difference: the cache keeps nothing, its policy looks at other
        things, or all is to be kept alike.

        has_host  whether evicted blocks can go to host memory
        """
        given = self._first_given
        if given is None:
            return
        said = f"{given[0]} ({given[1]})"
        needed = {
            "enable_paged_kv_cache": build.enable_paged_kv_cache,
            "enable_block_reuse": cache.enable_block_reuse,
        }
        for name, is_on in needed.items():
            if not is_on:
                raise ValueError(f"{said} needs {name}: without, nothing is kept")
        least = cache.offload_min_priority
        usual = least <= DEFAULT_PRIORITY
        if has_host and any((priority >= least) != usual for priority in self.priorities):
            return  # host memory takes other blocks
        if cache.policy in POLICIES and cache.policy != "priority":
            other = (
                f", or offload_min_priority ({least}) between it and {DEFAULT_PRIORITY}" if has_host else ""
            )
            raise ValueError(f"{said} needs policy priority{other}: {cache.policy} looks at other things")
        if cache.policy == "priority" and self._keeps_all_alike:
            raise ValueError(
                f"{said} needs a part that is kept otherwise: all would be kept alike, as if nothing were said"
            )


class Turns:
    """When the turns that follow each request are due, as far as that can be told before they arrive."""

    def __init__(self, requests: Collection[Request]) -> None:
        """Walk through the trace."""
        # Of those that follow a request: the longest time to think, −1 for none, and the latest arrival of the trace's.
        self._think_ps = array("q", [-1]) * len(requests)
        self._arrival_ps = array("q", [0]) * len(requests)
        for request in requests:
            parent = request.parent
            if 0 <= parent < len(requests):
                self._think_ps[parent] = max(self._think_ps[parent], request.think_ps)
                self._arrival_ps[parent] = max(self._arrival_ps[parent], request.arrival_ps)

    @property
    def exist(self) -> bool:
        """Whether any request follows another."""
        return any(think_ps >= 0 for think_ps in self._think_ps)

    def wait_ps(self, request: Request, parent_ended_ps: int, now_ps: int) -> int:
        """Return for how long, from its end on, a request that is admitted now has turns to wait for; else 0.

        parent_ended_ps  when the turn finished that the request follows, if it follows any

        These are the turns that follow it, and those that follow the same turn as it does: they share what it found.
        Where what a turn waits for is its arrival in the trace, the time until then is counted from now.
        """
        due_ps = now_ps
        own, parent = request.request_id, request.parent
        if self._think_ps[own] >= 0:
            due_ps = max(self._arrival_ps[own], now_ps + self._think_ps[own])
        if parent >= 0:
            due_ps = max(due_ps, self._arrival_ps[parent], parent_ended_ps + self._think_ps[parent])
        return due_ps - now_ps


class Wishes:
    """What each request says at admission of how its blocks are to be kept.

    ended_ps  returns when a request finished, which has; to be set by whoever knows before anybody is admitted
    """

    ended_ps: Callable[[int], int]

    def __init__(self, options: RetentionOptions, requests: Collection[Request]) -> None:
        """Take all requests of the run, of which those that follow others are looked for if sessions are pinned.

        Raises ValueError if there are none then.
        """
        self._head_tokens = options.head_tokens
        self._head = _wish(options.head_priority, options.head_duration_s)
        self._prompt = _wish(options.prompt_priority, options.prompt_duration_s)
        self._output = _wish(options.output_priority, options.output_duration_s)
        if options.output_priority == DEFAULT_PRIORITY:
            self._output = None
        self._pinned = options.session_priority
        self._turns: Turns | None = None
        if options.session_priority is not None:
            self._turns = Turns(requests)
            if not self._turns.exist:
                raise ValueError(
                    f"session_priority ({options.session_priority}) needs a trace with sessions: no request in it "
                    "follows another"
                )
            if self._prompt is None:
                self._prompt = Retention(DEFAULT_PRIORITY)
        self._usual = RetentionConfig(*self._parts(None, self._prompt, self._output))

    def of(self, job: Job, now_ps: int) -> RetentionConfig:
        """Return what a job says that is admitted now."""
        prompt, output = self._prompt, self._output
        wait_ps = 0
        if self._turns is not None and self._pinned is not None:
            parent = job.request.parent
            wait_ps = self._turns.wait_ps(job.request, self.ended_ps(parent) if parent >= 0 else 0, now_ps)
            if wait_ps > 0:
                prompt = output = Retention(self._pinned, wait_ps)
        if not job.preemptions and wait_ps <= 0:
            return self._usual
        return RetentionConfig(*self._parts(job.request.prompt_tokens, prompt, output))

    def _parts(
        self, prompt_tokens: int | None, prompt: Retention | None, output: Retention | None
    ) -> tuple[tuple[TokenRange, ...], int, int | None]:
        """Return the arguments of a RetentionConfig.

        prompt_tokens  of the request, where more than that is computed again as a prompt; None where it is not
        """
        ranges = tuple(self._ranges(prompt_tokens, prompt, output))
        return ranges, *(output or Retention(DEFAULT_PRIORITY))

    def _ranges(
        self, prompt_tokens: int | None, prompt: Retention | None, output: Retention | None
    ) -> Iterator[TokenRange]:
        head_tokens = self._head_tokens
        if prompt_tokens is not None:
            head_tokens = min(head_tokens, prompt_tokens)
        if self._head is not None:
            yield TokenRange(0, head_tokens, *self._head)
        if prompt is not None and head_tokens != prompt_tokens:
            yield TokenRange(head_tokens, prompt_tokens, *prompt)
        if output is not None and prompt_tokens is not None:
            yield TokenRange(prompt_tokens, None, *output)


def make_wishes(
    options: RetentionOptions | None,
    build: BuildConfig,
    cache: CacheConfig,
    requests: Collection[Request],
    *,
    has_host: bool,
) -> Wishes | None:
    """Return what the requests of a run say; None if nothing. Raises ValueError where it would make no difference."""
    if options is None or not options.is_given:
        return None
    options.check(build, cache, has_host=has_host)
    return Wishes(options, requests)


def _wish(priority: int | None, duration_s: float | None) -> Retention | None:
    if priority is None:
        return None
    return Retention(priority, None if duration_s is None else max(1, round(duration_s * PS_PER_S)))
