"""describe: what a trace is made of, as figures and as the text that the command prints."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np

from sim.distributions import Ints, summary_of_values
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
                             mean, p50, p90, p99, max of their lengths, and total
    sampled_requests         requests that ask for several outputs
    searched_requests        requests for which a beam search is made
    sessions                 None without any; else count (of those with two turns or more), turns_mean, turns_max,
                             think_s_mean (None if every one is 0: the trace does not say when answers end)
    content                  None without content ids; else granularity, prompt_chunks, distinct_chunks,
                             reused_chunks (distinct ones that are hit), hit_rate_chunks and hit_rate_tokens of an
                             infinite cache, reuse_gap_s and reuse_distance_chunks (mean, percentiles, max of the
                             time, and of the distinct other chunks, between two uses). See Sharing.

    Percentiles are nearest-rank, as in the summary of a run: p90 is the smallest value that 90% of all do not exceed.
    """
    survey = _Survey(trace)
    gaps = np.diff(survey.arrivals_ps).astype(np.float64)
    mean_gap = float(gaps.mean()) if gaps.size else 0.0
    return {
        "name": trace.name,
        "format": trace.format,
        "sha256": trace.sha256,
        "requests": survey.arrivals_ps.size,
        "skipped": trace.skipped,
        "duration_s": int(survey.arrivals_ps[-1] - survey.arrivals_ps[0]) / PS_PER_S if gaps.size else 0.0,
        "requests_per_s": PS_PER_S / mean_gap if mean_gap else None,
        "arrival_cv": float(gaps.std()) / mean_gap if mean_gap else None,
        "prompt_tokens": _lengths(survey.prompt_tokens),
        "output_tokens": _lengths(survey.output_tokens),
        "sampled_requests": survey.sampled_requests,
        "searched_requests": survey.searched_requests,
        "sessions": _sessions(survey),
        "content": _content(survey.granularities, sharing(trace)) if survey.granularities else None,
    }


class _Survey:
    """What a single walk through a trace finds out of each request, in 8 bytes a number."""

    def __init__(self, trace: Trace) -> None:
        arrivals, prompts, outputs, parents = (array("q") for _ in range(4))
        self.sampled_requests = self.searched_requests = self.think_ps = 0
        self.granularities: set[int] = set()
        for request in trace:
            arrivals.append(request.arrival_ps)
            prompts.append(request.prompt_tokens)
            outputs.append(request.output_tokens)
            parents.append(request.parent)
            self.sampled_requests += request.num_samples > 1
            self.searched_requests += request.beam_width > 1
            if request.parent >= 0:
                self.think_ps += request.think_ps
            if request.named_tokens:
                self.granularities.add(request.granularity or TOKENS_PER_CHUNK)
        self.arrivals_ps = np.array(arrivals, dtype=np.int64)
        self.prompt_tokens = np.array(prompts, dtype=np.int64)
        self.output_tokens = np.array(outputs, dtype=np.int64)
        self.parents = np.array(parents, dtype=np.int64)


def _distribution(values: Ints, scale: int = 1) -> dict[str, float | None] | None:
    """Return mean, percentiles and maximum of values / scale; None without any."""
    return summary_of_values(values.copy(), scale, PERCENTILES) if values.size else None


def _lengths(values: Ints) -> dict[str, float | None] | None:
    found = _distribution(values)
    return None if found is None else {**found, "total": int(values.sum())}


def _sessions(survey: _Survey) -> dict[str, float | None] | None:
    later = np.flatnonzero(survey.parents >= 0)
    if not later.size:
        return None
    session = np.arange(survey.parents.size)
    for row in later.tolist():  # a parent comes before its turns
        session[row] = session[survey.parents[row]]
    turns = np.bincount(session)
    several = turns[turns > 1]
    return {
        "count": int(several.size),
        "turns_mean": float(several.mean()),
        "turns_max": int(several.max()),
        "think_s_mean": survey.think_ps / later.size / PS_PER_S if survey.think_ps else None,
    }


def _content(granularities: set[int], found: Sharing) -> dict[str, Any]:
    return {
        "granularity": sorted(granularities),
        "prompt_chunks": found.prompt_chunks,
        "distinct_chunks": found.distinct_chunks,
        "reused_chunks": found.reused_chunks,
        "hit_rate_chunks": found.hit_chunks / found.prompt_chunks,
        "hit_rate_tokens": found.hit_tokens / found.prompt_tokens,
        "reuse_gap_s": _distribution(found.reuse_gaps_ps, PS_PER_S),
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
    if figures["searched_requests"]:
        rows.append(("with a beam search", f"{figures['searched_requests']:,} requests"))
    if sessions := figures["sessions"]:
        think = sessions["think_s_mean"]
        rows.append(
            (
                "sessions",
                f"{sessions['count']:,} of several turns: {sessions['turns_mean']:.2f} on average, "
                f"{sessions['turns_max']} at most, "
                + ("time to think not known" if think is None else f"{think:,.1f} s to think"),
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
