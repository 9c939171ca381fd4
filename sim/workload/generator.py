"""generate: put the turns of many sessions into one trace, in order of arrival."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

from sim.request import MAX_TIME_PS, PS_PER_S, Request
from sim.stream import RequestStream
from sim.traces.trace import Trace
from sim.workload.config import WorkloadConfig
from sim.workload.draws import Draws
from sim.workload.sessions import Sessions, Turn

STREAMED_REQUESTS = 2**20
"""Workloads of more requests than this, a million or so, are not kept in memory but drawn anew each time."""

_DAY_PS = 86400 * PS_PER_S


def generate(config: WorkloadConfig) -> Trace:
    """Return the workload's requests, in order of arrival, the first at time 0.

    A later turn names its predecessor as `parent` and its pause as `think_ps`; its own arrival_ps is the earliest
    it can have, the predecessor's plus the pause. In a closed loop the predecessor of a session's first turn is the
    client's last request. Where content may be shared at all it has ids, unique to a session but for the chunks of
    system prompts and documents. Outputs are named where a later turn of the session repeats them.

    Raises ValueError when the arrivals would not fit the simulator's clock.
    """
    span_ps = 0
    if config.arrivals != "closed_loop":
        span_ps = round(config.num_requests / config.requests_per_s * PS_PER_S)
        if span_ps > MAX_TIME_PS / 2:
            raise ValueError(
                f"requests_per_s ({config.requests_per_s}) must be higher: {config.num_requests} requests would "
                f"take {span_ps // _DAY_PS} days, and the simulator's clock ends at {MAX_TIME_PS // _DAY_PS}"
            )
    stream = RequestStream(lambda: _requests(config), config.num_requests, span_ps, config.shares_content)
    kept = stream if config.num_requests > STREAMED_REQUESTS else list(stream)
    return Trace("synthetic", "synthetic", config.sha256, kept)


def _requests(config: WorkloadConfig) -> Iterator[Request]:
    draws = Draws(config)
    turns = _closed_loop(config, draws) if config.arrivals == "closed_loop" else _open_loop(config, draws)
    granularity = config.content_tokens_per_chunk if config.shares_content else 0
    for request_id, turn in zip(range(config.num_requests), turns, strict=False):
        if turn.arrival_ps > MAX_TIME_PS:
            raise ValueError(
                f"requests_per_s ({config.requests_per_s}) must be higher or think_s_mean ({config.think_s_mean}) "
                f"lower: request {request_id} would arrive after {turn.arrival_ps // _DAY_PS} days, and the "
                f"simulator's clock ends at {MAX_TIME_PS // _DAY_PS}"
            )
        turn.request_id = request_id
        yield Request(
            request_id=request_id,
            arrival_ps=turn.arrival_ps,
            prompt_tokens=turn.prompt_tokens,
            output_tokens=turn.output_tokens,
            chunk_ids=turn.chunk_ids(granularity) if granularity else None,
            granularity=granularity,
            named_tokens=turn.named_tokens if granularity else 0,
            num_samples=turn.num_samples,
            beam_width=turn.beam_width,
            parent=turn.waits_for,
            think_ps=turn.think_ps if turn.waits_for >= 0 else 0,
        )


_Due = list[tuple[int, int, int, Turn]]
"""Heap of turns that are known: arrival, session, place in the session."""


def _open_loop(config: WorkloadConfig, draws: Draws) -> Iterator[Turn]:
    """Yield turns in order of arrival, sessions beginning when they do, whatever becomes of them."""
    sessions, due = Sessions(config, draws), _Due()
    next_ps = next(draws.start_ps)
    while True:
        if not due or next_ps < due[0][0]:
            _push(due, sessions.next(), next_ps)
            next_ps = next(draws.start_ps)
            continue
        yield (turn := heappop(due)[3])
        for follower in turn.followers:
            _follow(due, turn, follower)


def _closed_loop(config: WorkloadConfig, draws: Draws) -> Iterator[Turn]:
    """Yield turns in order of their earliest arrival: each client begins a session when its last has ended."""
    sessions, due = Sessions(config, draws), _Due()
    for _ in range(min(config.clients, config.num_requests)):
        _push(due, sessions.next(), 0)
    while True:
        yield (turn := heappop(due)[3])
        if turn.followers:
            (follower,) = turn.followers
        else:
            follower = sessions.next()
        _follow(due, turn, follower)


def _follow(due: _Due, turn: Turn, follower: Turn) -> None:
    follower.waits_for = turn.request_id
    _push(due, follower, turn.arrival_ps + follower.think_ps)


def _push(due: _Due, turn: Turn, arrival_ps: int) -> None:
    turn.arrival_ps = arrival_ps
    heappush(due, (arrival_ps, turn.session, turn.index, turn))
