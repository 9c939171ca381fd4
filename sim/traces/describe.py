"""describe: what a trace is made of, as figures and as the text that the command prints."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.request import PS_PER_S
from sim.traces.sharing import TOKENS_PER_CHUNK, Sharing, sharing
from sim.traces.trace import Trace

PERCENTILES = (50, 90, 99)


def describe(trace: Trace) -> dict[str, Any]:
    """Return the figures of a trace, ready for JSON.

    name, format, sha256, requests, skipped
    duration_s               from the first arrival to the last
    requests_per_s           one over the mean gap between arrivals; None for a trace without duration
    arrival_cv               standard deviation of those gaps over their mean; a Poisson process has 1
    prompt_tokens, output_tokens
                             mean, p50, p90, p99, max of their lengths (percentiles interpolated linearly, as
                             published statistics of traces are), and total
    sampled_requests         requests that ask for several outputs
    sessions                 None without any; else count (of those with two turns or more), turns_mean, turns_max,
                             think_s_mean
    content                  None without content ids; else granularity, prompt_chunks, distinct_chunks,
                             reused_chunks (distinct ones that are hit), hit_rate_chunks and hit_rate_tokens of an
                             infinite cache, reuse_gap_s and reuse_distance_chunks (mean, percentiles, max of the
                             time, and of the distinct other chunks, between two uses). See Sharing.
    """
    arrivals = np.array([request.arrival_ps for request in trace], dtype=np.int64)
    gaps = np.diff(arrivals).astype(np.float64)
    mean_gap = float(gaps.mean()) if gaps.size else 0.0
    return {
        "name": trace.name,
        "format": trace.format,
        "sha256": trace.sha256,
        "requests": len(trace),
        "skipped": trace.skipped,
        "duration_s": trace.duration_ps / PS_PER_S,
        "requests_per_s": PS_PER_S / mean_gap if mean_gap else None,
        "arrival_cv": float(gaps.std()) / mean_gap if mean_gap else None,
        "prompt_tokens": _lengths([request.prompt_tokens for request in trace]),
        "output_tokens": _lengths([request.output_tokens for request in trace]),
        "sampled_requests": sum(request.num_samples > 1 for request in trace),
        "sessions": _sessions(trace),
        "content": _content(trace, sharing(trace)),
    }


def _distribution(values: NDArray[Any]) -> dict[str, float] | None:
    if not values.size:
        return None
    found = {"mean": float(values.mean())}
    for percent, value in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True):
        found[f"p{percent}"] = float(value)
    found["max"] = float(values.max())
    return found


def _lengths(values: list[int]) -> dict[str, float] | None:
    found = _distribution(np.array(values, dtype=np.int64))
    return None if found is None else {**found, "total": sum(values)}


def _sessions(trace: Trace) -> dict[str, float] | None:
    turns: dict[int, int] = {}
    session_of: list[int] = []
    for request in trace:
        session = request.request_id if request.parent < 0 else session_of[request.parent]
        session_of.append(session)
        turns[session] = turns.get(session, 0) + 1
    several = [count for count in turns.values() if count > 1]
    if not several:
        return None
    thinks = [request.think_ps for request in trace if request.parent >= 0]
    return {
        "count": len(several),
        "turns_mean": sum(several) / len(several),
        "turns_max": max(several),
        "think_s_mean": sum(thinks) / len(thinks) / PS_PER_S,
    }


def _content(trace: Trace, found: Sharing) -> dict[str, Any] | None:
    if not found.prompt_chunks:
        return None
    grains = {request.granularity for request in trace if request.chunk_ids is not None}
    if any(request.token_ids is not None for request in trace):
        grains.add(TOKENS_PER_CHUNK)
    return {
        "granularity": sorted(grains),
        "prompt_chunks": found.prompt_chunks,
        "distinct_chunks": found.distinct_chunks,
        "reused_chunks": found.reused_chunks,
        "hit_rate_chunks": found.hit_chunks / found.prompt_chunks,
        "hit_rate_tokens": found.hit_tokens / found.prompt_tokens,
        "reuse_gap_s": _distribution(found.reuse_gaps_ps / PS_PER_S),
        "reuse_distance_chunks": _distribution(found.reuse_distances),
    }


def render(figures: dict[str, Any]) -> str:
    """Return the figures of `describe` as lines of text, labels left and numbers right of them."""
    rows = [
        ("trace", f"{' '.join(figures['name'].splitlines())} ({figures['format']})"),
        ("sha256", figures["sha256"]),
        ("requests", f"{figures['requests']:,}"),
    ]
    if figures["skipped"]:
        rows.append(("malformed rows skipped", f"{figures['skipped']:,}"))
    rows.append(("duration", f"{figures['duration_s']:,.1f} s"))
    if figures["requests_per_s"] is not None:
        rows.append(
            ("arrivals", f"{figures['requests_per_s']:,.2f}/s, gaps with CV {figures['arrival_cv']:.2f}")
        )
    rows.append(("prompt tokens", _spread(figures["prompt_tokens"])))
    rows.append(("output tokens", _spread(figures["output_tokens"])))
    if figures["sampled_requests"]:
        rows.append(("with several outputs", f"{figures['sampled_requests']:,} requests"))
    if sessions := figures["sessions"]:
        rows.append(
            (
                "sessions",
                f"{sessions['count']:,} of several turns: {sessions['turns_mean']:.2f} on average, "
                f"{sessions['turns_max']} at most, {sessions['think_s_mean']:,.1f} s to think",
            )
        )
    content = figures["content"]
    if content is None:
        rows.append(("content", "not known: no prompt shares anything"))
    else:
        grains = ", ".join(map(str, content["granularity"]))
        rows += [
            ("content", f"{content['prompt_chunks']:,} chunks of {grains} tokens in the prompts"),
            (
                "distinct chunks",
                f"{content['distinct_chunks']:,}, {content['reused_chunks']:,} of them reused",
            ),
            (
                "infinite-cache hit",
                f"{content['hit_rate_chunks']:.3f} of chunks, {content['hit_rate_tokens']:.3f} of tokens",
            ),
        ]
        if content["reuse_gap_s"]:
            rows.append(("time between uses", _spread(content["reuse_gap_s"], " s")))
            rows.append(("chunks between uses", _spread(content["reuse_distance_chunks"])))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _spread(found: dict[str, float], unit: str = "") -> str:
    names = ["mean", *(f"p{percent}" for percent in PERCENTILES), "max"]
    values = [f"{found[name]:,.0f}" if found[name] >= 100 else f"{found[name]:.3g}" for name in names]
    return f"{' / '.join(values)}{unit} ({' / '.join(names)})"
