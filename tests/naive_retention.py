"""What requests say of how their blocks are to be kept, told the naive way: block by block, all requests looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sim.request import PS_PER_S, Request
from sim.scheduler.retention import RetentionOptions

Wish = tuple[int, int | None]
"""A priority, and for how many picoseconds; None for good."""
Said = Callable[[int], Wish | None]
"""What is said of the block at a position; None if nothing."""

USUAL = 35


def nothing(position: int) -> Wish | None:
    return None


def wishes(
    options: RetentionOptions | None,
    requests: Sequence[Request],
    request: Request,
    size: int,
    parent_ended_ps: int,
    now: int,
) -> Said:
    """Return what a request says that is admitted now; its parent, if it has one, ended at some time."""
    if options is None:
        return nothing
    head = _wish(options.head_priority, options.head_duration_s)
    prompt = _wish(options.prompt_priority, options.prompt_duration_s)
    output = _wish(options.output_priority, options.output_duration_s)
    if options.session_priority is not None:
        if prompt is None:
            prompt = (USUAL, None)
        wait = _wait_ps(requests, request, parent_ended_ps, now)
        if wait > 0:
            prompt = output = (options.session_priority, wait)

    def said(position: int) -> Wish | None:
        token = position * size
        if token >= request.prompt_tokens:
            return output if output is not None and output[0] != USUAL else None
        return head if token < options.head_tokens else prompt

    return said


def _wait_ps(requests: Sequence[Request], request: Request, parent_ended_ps: int, now: int) -> int:
    due = [now]
    for other in requests:
        if other.parent == request.request_id:
            due += [other.arrival_ps, now + other.think_ps]
        elif other.parent == request.parent >= 0:
            due += [other.arrival_ps, parent_ended_ps + other.think_ps]
    return max(due) - now


def _wish(priority: int | None, duration_s: float | None) -> Wish | None:
    if priority is None:
        return None
    return priority, None if duration_s is None else round(duration_s * PS_PER_S)
