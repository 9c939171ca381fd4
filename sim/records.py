"""What a run leaves behind: plain columns, written once by the engine and read by metrics, export and figures.

Times are integer picoseconds since the start of the simulation; -1 stands for "never happened".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from allocator.event_log import EventLog
from allocator.manager import CacheStats
from sim.stored import StoredColumns, StoredTimes

Columns = Mapping[str, NDArray[np.generic]]
"""Columns of equal length: a dict, or a StoredColumns where they do not fit in memory."""

TIMELINE_COLUMNS = (
    "start_ps",
    "end_ps",
    "steps",
    "running",
    "waiting",
    "decode_sequences",
    "prefill_sequences",
    "prefill_tokens",
    "first_step_ps",
    "step_increment_ps",
    "itl_tokens",
    "free_blocks",
    "evictable_blocks",
    "referenced_blocks",
    "logical_blocks",
    "kv_tokens",
    "logical_tokens",
    "saved_blocks",
    "referenced_blocks_first",
    "kv_tokens_first",
    "preemptions",
    "out_of_block_steps",
    "evicted_blocks",
)
"""Columns of the timeline, in the order of `RunResult`'s docstring."""

PAUSE_COLUMNS = ("request_id", "sample", "paused_ps", "resumed_ps")
"""Columns of the pauses: which of its request's samples a sequence is, and when it had to go and came back."""

FINISHED, REJECTED = "finished", "rejected"
"""What the status of a request can be."""

FREE = -1
CACHED = -2
SHARED = -3


@dataclass(frozen=True)
class BlockMap:
    """Who owned which block of the pool, sampled over time.

    times_ps   int64 [samples]
    block_ids  int64 [rows]           the blocks that were watched (all of them in a small pool)
    owners     int64 [samples, rows]  request id of the one holder, or FREE, CACHED, SHARED
    """

    times_ps: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    owners: NDArray[np.int64]


@dataclass(frozen=True)
class WeightedTimes:
    """Durations in picoseconds, each standing for `weights` blocks."""

    values_ps: NDArray[np.int64]
    weights: NDArray[np.int64]


@dataclass(frozen=True)
class RunResult:
    """The complete outcome of one simulated run.

    `requests` has one row a request of the trace, in trace order:
        request_id, arrival_ps, status ("finished" or "rejected"), reject_cause, prompt_tokens, output_tokens,
        num_samples (or beams), admit_ps, first_token_ps, finish_ps, query_blocks, hit_blocks, hit_tokens (all
        three at first admission), preemptions, recomputed_tokens, blocks (in its tables at the end), cow_copies.

    `timeline` has one row a stretch, a run of engine steps that differ in nothing but context length:
        start_ps, end_ps, steps, running, waiting, decode_sequences, prefill_sequences, prefill_tokens;
        first_step_ps, step_increment_ps: step j of the stretch lasts first + j · increment;
        itl_tokens: tokens a step whose gap to their predecessor is that step's duration;
        free_blocks, evictable_blocks, referenced_blocks, logical_blocks (sum over tables), kv_tokens (written
        slots of referenced blocks, shared ones counted once), logical_tokens, saved_blocks (logical_blocks less
        the blocks that are in any table): at the stretch's last step;
        referenced_blocks_first, kv_tokens_first: at its first step (they only grow in between);
        preemptions, out_of_block_steps, evicted_blocks: within the stretch.

    `events` is the cache's log if it was kept, and `sequences` the request of each sequence it numbers, forks apart.

    `pauses` has one row a preemption, in the order in which they were over:
        request_id, sample (from 0; a prompt's own sequence is its first sample's), paused_ps, resumed_ps.

    `gaps_ps` are the inter-token gaps that span a preemption, which no `itl_tokens` covers.

    Of several replicas, `replicas` has the result of each, what it served alone; requests and timeline then have a
    column `replica` (-1 for a turn that never arrived), and `cache` has sums (see sim.cluster.results). If the first
    `prefill_replicas` only compute prompts, requests also have decode_replica, transferred_blocks, transfer_start_ps
    and transfer_end_ps (see sim.cluster.placement).
    """

    requests: Columns
    timeline: Columns
    gaps_ps: NDArray[np.int64]
    cache: CacheStats
    lifetimes: Mapping[str, WeightedTimes | StoredTimes] = field(default_factory=dict)
    block_map: BlockMap | None = None
    events: EventLog | None = None
    sequences: dict[int, int] = field(default_factory=dict)
    pauses: Columns = field(default_factory=dict)
    wall_s: float = 0.0
    replicas: tuple[RunResult, ...] = ()
    prefill_replicas: int = 0


def finished_mask(result: RunResult) -> NDArray[np.bool_]:
    """Return which requests finished, bool [requests]."""
    if isinstance(result.requests, StoredColumns):
        return result.requests.equals("status", FINISHED)
    return np.asarray(result.requests["status"] == FINISHED, dtype=np.bool_)
