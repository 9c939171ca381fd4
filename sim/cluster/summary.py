"""What summary.json says of several replicas beyond what it says of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.distributions import Ints, exact_sum, summary_of_values
from sim.records import Columns, RunResult, finished_mask
from sim.request import PS_PER_S

Occupancy = Callable[[RunResult, int], dict[str, Any]]


def cluster_figures(result: RunResult, span_ps: int, occupancy: Occupancy) -> dict[str, Any]:
    """Return the figures of each replica, and of the transfers between them; of one that is alone, nothing.

    `occupancy` gives those of a pool over `span_ps`. Times are in seconds.

    replicas   of each, in the order of their numbers: role (prefill or decode) where the two are apart; the requests
               that were routed to it, or handed over; how many finished there, and their output tokens; busy, the
               share of the time in which a step was in progress; kv_utilization by block; hit rates, of what was
               looked up there for the first time; evicted blocks and preemptions
    transfers  where prefill and decode are apart: requests that were handed over and finished; blocks that came over
               the links for them, and those that did not have to, hit_blocks; wait_s from the end of the prompt to
               the transfer's start, when its blocks are taken; transfer_s from there to its end, the wait for the
               transfers before it included
    """
    if not result.replicas:
        return {}
    requests = result.requests
    done = finished_mask(result)
    first = second = _ints(requests, "replica")
    apart = result.prefill_replicas > 0
    if apart:
        decoding = _ints(requests, "decode_replica")
        second = np.where(decoding >= 0, decoding, first)
    output = _ints(requests, "output_tokens") * _ints(requests, "num_samples")
    found = []
    for number, part in enumerate(result.replicas):
        ended = done & (second == number)
        rows, cache = part.timeline, part.cache
        busy = exact_sum(_ints(rows, "end_ps") - _ints(rows, "start_ps"))
        use = occupancy(part, span_ps)["kv_utilization"]["block"]
        role = {"role": "prefill" if number < result.prefill_replicas else "decode"} if apart else {}
        found.append(
            {
                "replica": number,
                **role,
                "requests": int(((first == number) | (second == number)).sum()),
                "finished": int(ended.sum()),
                "output_tokens": exact_sum(output[ended]),
                "busy": busy / span_ps if span_ps else None,
                "kv_utilization": {"mean": use["mean"], "max": use["max"]},
                "hit_rate_tokens": cache.hit_tokens / cache.query_tokens if cache.query_tokens else None,
                "hit_rate_blocks": cache.hit_blocks / cache.query_blocks if cache.query_blocks else None,
                "evicted_blocks": int(cache.evicted_blocks),
                "preemptions": exact_sum(_ints(rows, "preemptions")),
            }
        )
    return {"replicas": found, **(_transfers(result, done) if apart else {})}


def _transfers(result: RunResult, done: NDArray[np.bool_]) -> dict[str, Any]:
    requests = result.requests
    moved = done & (_ints(requests, "decode_replica") >= 0)
    first, start, end = (
        _ints(requests, name)[moved] for name in ("first_token_ps", "transfer_start_ps", "transfer_end_ps")
    )
    blocks = exact_sum(_ints(requests, "transferred_blocks")[moved])
    return {
        "transfers": {
            "requests": int(moved.sum()),
            "blocks": blocks,
            "hit_blocks": exact_sum(_ints(requests, "query_blocks")[moved]) - blocks,
            "wait_s": summary_of_values(start - first, PS_PER_S),
            "transfer_s": summary_of_values(end - start, PS_PER_S),
        }
    }


def _ints(columns: Columns, name: str) -> Ints:
    return np.asarray(columns[name]).astype(np.int64)
