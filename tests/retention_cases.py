"""Scenarios in which requests want their blocks kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from engine_cases import Scenario, scenarios
from hypothesis import strategies as st

from sim.request import PS_PER_S, Request
from sim.scheduler.retention import RetentionOptions


def says(row: int, arrival_ps: int, blocks: str, output: int = 1, **fields: Any) -> Request:
    ids = np.array([ord(block) for block in blocks], dtype=np.int64)
    tokens = 4 * len(blocks)
    return Request(row, arrival_ps, tokens, output, ids, 4, named_tokens=tokens, **fields)


PRIORITIES = st.sampled_from([None, None, 0, 20, 35, 36, 90])
DURATIONS_PS = st.sampled_from([None, None, 1, 5, 10, 14, 25, 60, 200])


def seconds(duration_ps: int | None) -> float | None:
    return None if duration_ps is None else duration_ps / PS_PER_S


@st.composite
def _options(draw: st.DrawFn, has_sessions: bool) -> RetentionOptions:
    parts: dict[str, Any] = {}
    for part in ("head", "prompt", "output"):
        parts[f"{part}_priority"] = priority = draw(PRIORITIES)
        if priority not in (None, 35):
            parts[f"{part}_duration_s"] = seconds(draw(DURATIONS_PS))
    if parts["head_priority"] is not None:
        parts["head_tokens"] = draw(st.integers(1, 20))
    if has_sessions:
        parts["session_priority"] = draw(PRIORITIES)
    return RetentionOptions(**parts)


def _begins_with(request: Request, symbol: int) -> Request:
    """Return the same request, if it says anything, with another beginning."""
    changes: dict[str, Any] = {}
    for name in ("chunk_ids", "token_ids"):
        if (ids := getattr(request, name)) is not None:
            changes[name] = ids.copy()
            changes[name][0] = symbol
    return dataclasses.replace(request, **changes)


@st.composite
def _conversations(draw: st.DrawFn, requests: Sequence[Request]) -> list[Request]:
    """Twice as many requests, which begin in one of four ways, and some of which follow others."""
    found: list[Request] = []
    for request in (*requests, *requests):
        row, parent = len(found), -1
        if row and draw(st.integers(0, 2)) == 0:
            parent = draw(st.integers(max(0, row - 2), row - 1))
        again = dataclasses.replace(
            request,
            request_id=row,
            arrival_ps=(found[-1].arrival_ps if row else 0) + draw(st.sampled_from([0, 10, 15, 30, 90])),
            parent=parent,
            think_ps=0 if parent < 0 else draw(st.sampled_from([0, 3, 20, 50, 100])),
        )
        found.append(_begins_with(again, draw(st.integers(10, 13))))
    return found


@st.composite
def retaining(draw: st.DrawFn) -> Scenario:
    """A scenario in which requests want their blocks kept, and some of them follow others."""
    scenario = draw(scenarios())
    requests = draw(_conversations(scenario.requests))
    options = draw(_options(any(request.parent >= 0 for request in requests)))
    cache = dataclasses.replace(
        scenario.cache,
        policy="priority",
        enable_block_reuse=True,
        enable_partial_reuse=draw(st.sampled_from([False, False, True])),
        copy_on_partial_reuse=draw(st.booleans()),
    )
    build = dataclasses.replace(scenario.build, enable_paged_kv_cache=True)
    engine = dataclasses.replace(
        scenario.engine, protect_waiting_hits=draw(st.sampled_from([False, False, True]))
    )
    scenario = dataclasses.replace(
        scenario,
        requests=requests,
        num_blocks=scenario.num_blocks + draw(st.integers(0, scenario.num_blocks)),
        cache=cache,
        build=build,
        engine=engine,
        retention=options,
    )
    if is_refused(scenario):
        return dataclasses.replace(scenario, retention=RetentionOptions(prompt_priority=90))
    return scenario


def is_refused(scenario: Scenario) -> bool:
    assert scenario.retention is not None
    try:
        scenario.retention.check(scenario.build, scenario.cache, has_host=scenario.num_host_blocks > 0)
    except ValueError:
        return True
    return False
