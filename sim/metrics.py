"""What a run is judged by: the figures of summary.json, each defined once, here.

All sums and percentiles are exact: they are taken over the integers the engine recorded (picoseconds, blocks,
tokens), and only the last division is in floating point, so the same run gives the same digits anywhere.
Percentiles are nearest-rank. A statistic of nothing is None, never NaN.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from allocator.stats import HostStats
from sim.bounds import CacheBound
from sim.cluster.summary import cluster_figures
from sim.distributions import Ints, Levels, Progressions, exact_dot, exact_sum, summary_of_values
from sim.records import REJECTED, Columns, RunResult, finished_mask
from sim.request import PS_PER_S
from sim.scheduler.config import EngineConfig
from sim.stored import StoredColumns, StoredTimes
from sim.window import Window

if TYPE_CHECKING:
    from sim.overload import Overload

_PIECE = 1 << 16


def int_column(columns: Columns, name: str) -> Ints:
    """Return a column as int64 [rows], the caller's own."""
    # What comes from disk is nobody else's.
    return np.asarray(columns[name]).astype(np.int64, copy=not isinstance(columns, StoredColumns))


def _parts(columns: Columns, names: Sequence[str]) -> Iterator[tuple[Ints, ...]]:
    """Yield these columns as `int_column` returns them, some rows at a time if they are on disk."""
    if not isinstance(columns, StoredColumns):
        yield tuple(int_column(columns, name) for name in names)
        return
    for first, last in columns.spans():
        yield tuple(columns.part(name, first, last).astype(np.int64, copy=False) for name in names)


@dataclass(frozen=True)
class Latencies:
    """Latencies of the finished requests, in integer picoseconds, in trace order.

    With t_arrive, t_admit, t_first and t_end the times of arrival, first admission, first and last token:
    queue = t_admit − t_arrive, ttft = t_first − t_arrive, e2e = t_end − t_arrive,
    tpot = (t_end − t_first) / (output_tokens − 1) of each request with two output tokens or more. TPOT is
    kept as its numerator and denominator here, since the quotient is no integer.
    """

    queue: Ints
    ttft: Ints
    e2e: Ints
    decode: Ints
    decode_tokens: Ints

    @classmethod
    def of(cls, result: RunResult) -> Latencies:
        """Compute them from the records of a run."""
        done = finished_mask(result)
        arrive, admit, first, end = (
            int_column(result.requests, name)[done]
            for name in ("arrival_ps", "admit_ps", "first_token_ps", "finish_ps")
        )
        return cls(
            queue=admit - arrive,
            ttft=first - arrive,
            e2e=end - arrive,
            decode=end - first,
            decode_tokens=int_column(result.requests, "output_tokens")[done] - 1,
        )

    def tpot_s(self) -> NDArray[np.float64]:
        """Seconds per output token after the first, ascending, float64 [requests with two or more]."""
        return _tpot_s(self.decode, self.decode_tokens)


def _tpot_s(decode_ps: Ints, decode_tokens: Ints) -> NDArray[np.float64]:
    several = decode_tokens > 0
    if not several.all():
        decode_ps, decode_tokens = decode_ps[several], decode_tokens[several]
    found = decode_ps / decode_tokens
    found /= PS_PER_S
    found.sort()
    return found


def inter_token_gaps(result: RunResult) -> Progressions:
    """Return every gap between consecutive tokens of a sequence, in picoseconds.

    Step j of a stretch lasts first_step_ps + j · step_increment_ps and is the gap of `itl_tokens` tokens;
    gaps that span a preemption are listed apart.
    """
    names = ("first_step_ps", "step_increment_ps", "steps", "itl_tokens")
    within = [Progressions.of(*columns) for columns in _parts(result.timeline, names)]
    return Progressions.joined([*within, Progressions.plain(result.gaps_ps.astype(np.int64))])


def _between(result: RunResult, first: str, last: str, done: NDArray[np.bool_]) -> Ints:
    """Return the time from one moment of each request that is done to another, picoseconds."""
    times = int_column(result.requests, last)
    times -= int_column(result.requests, first)
    return times[done]


def latency_figures(result: RunResult) -> dict[str, dict[str, float | None]]:
    """Return mean, percentiles and maximum of TTFT, TPOT, ITL, end-to-end and queueing time, in seconds."""
    done = finished_mask(result)

    def between(first: str, last: str) -> Ints:
        return _between(result, first, last, done)

    def tokens() -> Ints:
        return int_column(result.requests, "output_tokens")[done] - 1

    # One after the other, so that few columns are in memory at once.
    return {
        "ttft_s": summary_of_values(between("arrival_ps", "first_token_ps"), PS_PER_S),
        "tpot_s": _float_summary(_tpot_s(between("first_token_ps", "finish_ps"), tokens())),
        "itl_s": inter_token_gaps(result).summary(PS_PER_S),
        "e2e_s": summary_of_values(between("arrival_ps", "finish_ps"), PS_PER_S),
        "queue_s": summary_of_values(between("arrival_ps", "admit_ps"), PS_PER_S),
    }


def _float_summary(ascending: NDArray[np.float64]) -> dict[str, float | None]:
    """Return mean, nearest-rank p50, p90, p99 and max of sorted floats; the mean by exactly rounded sum."""
    count = ascending.size
    if not count:
        return dict.fromkeys(("mean", "p50", "p90", "p99", "max"))
    found = {"mean": float_sum(ascending) / count}
    for percent in (50, 90, 99):
        found[f"p{percent}"] = float(ascending[-(-percent * count // 100) - 1])
    found["max"] = float(ascending[-1])
    return found  # type: ignore[return-value]


def float_sum(values: NDArray[np.float64]) -> float:
    """Return the exactly rounded sum of floats, a piece of which at a time becomes a list."""
    return math.fsum(_listed(values))


def _listed(values: NDArray[np.float64]) -> Iterator[float]:
    """Return the values one by one, a piece of which at a time becomes a list."""
    pieces = np.split(values, range(_PIECE, values.size, _PIECE))
    return chain.from_iterable(map(np.ndarray.tolist, pieces))


@dataclass(frozen=True)
class _Stretches:
    """The timeline's clock: how long each row lasts, and how its time divides between its two ends.

    A quantity that grows linearly over a stretch of n steps from v0 to v1, each step weighted with its own
    duration d_j = f + j · i, has the integral Σ d_j · (v0 + (v1 − v0) · j / (n − 1)) = w0 · v0 + w1 · v1 with
    w1 = Σ j · d_j / (n − 1) = n · (3f + (2n − 1) · i) / 6 and w0 = Σ d_j − w1. Kept six-fold, as integers.
    """

    duration: Ints
    sixfold_w0: Ints
    sixfold_w1: Ints

    NAMES: ClassVar = ("steps", "start_ps", "end_ps", "first_step_ps", "step_increment_ps")

    @classmethod
    def of(cls, steps: Ints, start: Ints, end: Ints, first: Ints, increment: Ints) -> _Stretches:
        """Compute it from the columns of NAMES."""
        duration = end - start
        w1 = steps * (
            3 * first + (2 * steps - 1) * increment
        )  # of a single step, any share: its ends are equal
        return cls(duration, 6 * duration - w1, w1)

    @classmethod
    def parts(cls, rows: Columns, names: Sequence[str] = ()) -> Iterator[tuple[_Stretches, list[Ints]]]:
        """Yield the clock of some rows at a time, with these columns of theirs."""
        for columns in _parts(rows, (*cls.NAMES, *names)):
            count = len(cls.NAMES)
            yield cls.of(*columns[:count]), list(columns[count:])

    def sixfold_integral(self, at_first: Ints, at_last: Ints) -> int:
        """Return 6 · ∫ value dt, in value · picoseconds."""
        return exact_dot(self.sixfold_w0, at_first) + exact_dot(self.sixfold_w1, at_last)

    def ratio_terms(
        self, top_first: Ints, top_last: Ints, bottom_first: Ints, bottom_last: Ints
    ) -> Iterator[float]:
        """Return terms that sum up to ∫ top / bottom dt over the time that bottom > 0, in picoseconds."""
        busy = bottom_last > 0
        w0, w1 = self.sixfold_w0[busy] / 6, self.sixfold_w1[busy] / 6
        at_first = np.divide(top_first[busy], np.maximum(bottom_first[busy], 1))
        at_last = np.divide(top_last[busy], bottom_last[busy])
        return _listed(w0 * at_first + w1 * at_last)


def _mean_ratio(rows: Columns, top: str, bottom: str) -> float | None:
    """Return the time-weighted mean of top / bottom over the time bottom > 0; None if it never is."""
    names = (f"{top}_first", top, f"{bottom}_first", bottom)
    time = sum(
        exact_sum(clock.duration[columns[-1] > 0]) for clock, columns in _Stretches.parts(rows, names[-1:])
    )
    terms = (clock.ratio_terms(*columns) for clock, columns in _Stretches.parts(rows, names))
    return math.fsum(chain.from_iterable(terms)) / time if time else None


def _over_time(rows: Columns, name: str, scale: int, span_ps: int, pools: int) -> dict[str, float | None]:
    """Return mean, 99th percentile and maximum of a column over the time of so many pools, divided by `scale`."""
    sixfold = busy = 0
    levels = Levels()
    for clock, (first, last) in _Stretches.parts(rows, (f"{name}_first", name)):
        sixfold += clock.sixfold_integral(first, last)
        busy += exact_sum(clock.duration)
        levels.add(last, clock.duration)
    levels.add(np.zeros(1, np.int64), np.array([max(0, span_ps * pools - busy)]))
    peak = levels.progressions()
    p99, largest = peak.percentile(99), peak.max()
    return {
        "mean": sixfold / 6 / (span_ps * pools) / scale if span_ps else None,
        "p99": None if p99 is None else p99 / scale,
        "max": None if largest is None else largest / scale,
    }


def _slots_at_the_end(result: RunResult, tokens_per_block: int) -> tuple[int, int]:
    """Return how many slots of the tables of finished requests were left unused, and how many slots those had."""
    done, first, unused, slots = finished_mask(result), 0, 0, 0
    names = ("prompt_tokens", "output_tokens", "num_samples", "blocks")
    for columns in _parts(result.requests, names):
        counted = done[first : first + columns[0].size]
        first += columns[0].size
        prompt, output, samples, blocks = (column[counted] for column in columns)
        tables = np.where(output == 1, 1, samples)  # one token: not forked
        # In last blocks alone, whatever has left a window before.
        unused += exact_sum(tables * (-(prompt + output - 1) % tokens_per_block))
        slots += exact_sum(blocks) * tokens_per_block
    return unused, slots


def occupancy(result: RunResult, span_ps: int) -> dict[str, Any]:
    """Return the figures about the pool over time: utilisation, fragmentation, sharing.

    Of several replicas, each with a pool of its own, each one's time counts.
    """
    rows, cache = result.timeline, result.cache
    pools = max(len(result.replicas), 1)
    num_blocks, tokens_per_block = cache.num_blocks // pools, cache.tokens_per_block
    filled = _mean_ratio(rows, "kv_tokens", "referenced_blocks")
    sixfold_saved, most_saved = 0, -1
    for clock, (saved,) in _Stretches.parts(rows, ("saved_blocks",)):
        sixfold_saved += clock.sixfold_integral(saved, saved)
        most_saved = max(most_saved, int(saved.max(initial=-1)))
    unused, slots = _slots_at_the_end(result, tokens_per_block)
    return {
        "kv_utilization": {
            "block": _over_time(rows, "referenced_blocks", num_blocks, span_ps, pools),
            "token": _over_time(rows, "kv_tokens", num_blocks * tokens_per_block, span_ps, pools),
        },
        "internal_fragmentation": {
            "mean": None if filled is None else 1 - filled / tokens_per_block,
            "final": unused / slots if slots else None,
        },
        "sharing_saved_blocks": {
            "mean": sixfold_saved / 6 / span_ps if span_ps else None,
            "max": None if most_saved < 0 else most_saved,
        },
    }


def _rejections(result: RunResult) -> dict[str, int]:
    """Return how many requests were rejected, by cause, causes in alphabetical order."""
    if isinstance(result.requests, StoredColumns):
        return {
            cause: n for cause, n in sorted(result.requests.counts("reject_cause").items()) if cause and n
        }
    rejected = np.asarray(result.requests["status"] == REJECTED, dtype=np.bool_)
    causes, counts = np.unique(result.requests["reject_cause"][rejected], return_counts=True)
    return {str(cause): int(count) for cause, count in zip(causes, counts, strict=True)}


def _goodput(result: RunResult, span_ps: int, engine: EngineConfig) -> dict[str, float | None]:
    done = finished_mask(result)
    requests = int(done.size)
    on_time = _between(result, "arrival_ps", "first_token_ps", done) <= round(engine.slo_ttft_s * PS_PER_S)
    most_ps = (int_column(result.requests, "output_tokens")[done] - 1) * round(engine.slo_tpot_s * PS_PER_S)
    good = int((on_time & (_between(result, "first_token_ps", "finish_ps", done) <= most_ps)).sum())
    return {
        "share": good / requests if requests else None,
        "rate": good / (span_ps / PS_PER_S) if span_ps else None,
    }


_HOST = (
    "num_blocks",
    "hit_blocks",
    "offloaded_blocks",
    "onboarded_blocks",
    "evicted_blocks",
    "swapped_out_blocks",
    "swapped_in_blocks",
)


def _host(host: HostStats | None) -> dict[str, int] | None:
    return None if host is None else {name: int(getattr(host, name)) for name in _HOST}


def summarise(
    result: RunResult,
    engine: EngineConfig,
    *,
    total_wall_s: float | None = None,
    bound: CacheBound | None = None,
    overload: Overload | None = None,
    skipped_rows: int = 0,
) -> dict[str, Any]:
    """Return the figures of a run, with the keys of summary.json, in its order.

    Time runs from 0 to the end of the last step, `simulated_s`; time without a step counts as an empty pool. With a
    warm-up, all but simulated_s and the wall times is of what follows it, `measured_s` (see Window): of the
    requests that are counted, and of the steps since then.

    warm_up                        requests and seconds that were left out at the beginning
    skipped_rows                   malformed rows of the trace that were left out
    requests, finished, rejected   requests counted; how many finished; how many were refused, by cause
    overload                       of the whole run, if requests came faster than they were served: the rates up to
                                   the last arrival at which they arrived and finished, and how many waited then
                                   (see sim.overload); else None
    wall_s, total_wall_s           real seconds: of the engine's loop; of everything from the trace's first byte
    steps                          engine iterations
    prompt_tokens, output_tokens   of finished requests; each of n samples counts its own output tokens
    throughput_tokens_per_s        output_tokens / measured_s
    ttft_s, tpot_s, e2e_s, queue_s see Latencies; one value a finished request
    itl_s                          see inter_token_gaps; one value a generated token but the first of a sequence
    slo, goodput                   a request is good if it finished with TTFT ≤ slo_ttft_s and
                                   TPOT ≤ slo_tpot_s; share = good / requests, rate = good / measured_s
    hit_rate_tokens                hit_tokens / prompt tokens looked up, at first admission
    hit_rate_blocks                hit blocks / ⌈prompt / tokens_per_block⌉ looked up, at first admission
    infinite_cache_hit_rate_tokens, infinite_cache_hit_rate_blocks
                                   what the two could at most be: see sim.bounds; None if not known
    computed_prompt_tokens         prompt tokens looked up and not found: without a cache, in this run, and at
                                   least, with an infinite cache
    miss_blocks                    the blocks that were looked up and missed, by cause
    kv_utilization                 by block: referenced blocks / num_blocks; by token: written slots of
                                   referenced blocks / all slots. Means are integrals over measured_s; p99 is
                                   weighted with time and, like max, takes a stretch at its last, fullest step
    internal_fragmentation         mean: of 1 − written slots / slots of referenced blocks, over the time any
                                   is referenced; final: Σ unused slots / Σ slots over the block tables of
                                   finished requests (prompt + output − 1 tokens each, the last block's rest unused)
    sharing_saved_blocks           Σ over tables of their blocks − blocks that are in any table, over time
    evicted_blocks                 blocks of the pool that were given to others with content in them, also where
                                   that moved to host memory
    swapped_blocks                 blocks that moved between GPU and host memory, either way: the sum of host's
                                   offloaded, onboarded, swapped_out and swapped_in
    host                           of host memory, None if there is none, of the whole run: its blocks; hit_blocks,
                                   those of the hits that came from it; offloaded_blocks, evicted from the GPU and
                                   kept there; onboarded_blocks, moved back for who hit them; evicted_blocks, given
                                   up; swapped_out_blocks and swapped_in_blocks, of sequences that were preempted
    preemptions                    how often a running sequence had to give up its blocks, or its place
    cow_copies, cow_tokens         blocks that were copied before a sequence wrote to them, as others held them or the
                                   cache had them, and the tokens in them
    recomputed_tokens              tokens computed again after a preemption, net of what was hit again
    out_of_block_steps             steps that could not take the blocks they wanted
    block_lifetime_s, block_idle_before_evict_s, block_reuse_gap_s
                                   of the cache's blocks: from filled to evicted, from last use to evicted,
                                   from last use to next hit
    replicas, transfers            of several replicas: see sim.cluster.summary. What is not of one replica is of all:
                                   counts are sums, and of kv_utilization and internal_fragmentation each replica's
                                   time counts
    """
    ends = int_column(result.timeline, "end_ps")
    end_ps = int(ends.max()) if ends.size else 0
    window = Window.of(result, engine)
    result = window.cut(result)
    span_ps = max(end_ps - window.start_ps, 0)
    requests, cache = result.requests, result.cache
    done = finished_mask(result)
    output = int_column(requests, "output_tokens")[done] * int_column(requests, "num_samples")[done]
    output_tokens = exact_sum(output)

    def total(columns: Columns, name: str) -> int:
        return exact_sum(int_column(columns, name))

    def times(name: str) -> dict[str, float | None]:
        recorded = result.lifetimes.get(name)
        if recorded is None:
            return Progressions.plain(np.empty(0, np.int64)).summary(PS_PER_S)
        if isinstance(recorded, StoredTimes):
            return recorded.summary(PS_PER_S)
        return Progressions.weighted(
            recorded.values_ps.astype(np.int64), recorded.weights.astype(np.int64)
        ).summary(PS_PER_S)

    return {
        "warm_up": {
            "requests": int(window.counted.size - done.size),
            "s": window.start_ps / PS_PER_S,
        },
        "skipped_rows": skipped_rows,
        "requests": int(done.size),
        "finished": int(done.sum()),
        "rejected": _rejections(result),
        "overload": None if overload is None else dataclasses.asdict(overload),
        "simulated_s": end_ps / PS_PER_S,
        "measured_s": span_ps / PS_PER_S,
        "wall_s": result.wall_s,
        "total_wall_s": total_wall_s,
        "steps": total(result.timeline, "steps"),
        "prompt_tokens": exact_sum(int_column(requests, "prompt_tokens")[done]),
        "output_tokens": output_tokens,
        "throughput_tokens_per_s": output_tokens / (span_ps / PS_PER_S) if span_ps else None,
        **latency_figures(result),
        "slo": {"ttft_s": engine.slo_ttft_s, "tpot_s": engine.slo_tpot_s},
        "goodput": _goodput(result, span_ps, engine),
        "hit_tokens": int(cache.hit_tokens),
        "hit_rate_tokens": cache.hit_tokens / cache.query_tokens if cache.query_tokens else None,
        "hit_rate_blocks": cache.hit_blocks / cache.query_blocks if cache.query_blocks else None,
        "infinite_cache_hit_rate_tokens": bound and bound.hit_rate_tokens,
        "infinite_cache_hit_rate_blocks": bound and bound.hit_rate_blocks,
        "computed_prompt_tokens": {
            "no_cache": int(cache.query_tokens),
            "run": int(cache.query_tokens - cache.hit_tokens),
            "infinite_cache": bound and bound.query_tokens - bound.hit_tokens,
        },
        "miss_blocks": {str(cause): int(blocks) for cause, blocks in sorted(cache.miss_blocks.items())},
        "evicted_blocks": int(cache.evicted_blocks),
        "preemptions": total(result.timeline, "preemptions"),
        "recomputed_tokens": total(requests, "recomputed_tokens"),
        "swapped_blocks": int(cache.swapped_blocks),
        "host": _host(cache.host),
        "cow_copies": int(cache.cow_copies),
        "cow_tokens": int(cache.cow_tokens),
        **occupancy(result, span_ps),
        "out_of_block_steps": total(result.timeline, "out_of_block_steps"),
        "block_lifetime_s": times("lifetime"),
        "block_idle_before_evict_s": times("idle_before_evict"),
        "block_reuse_gap_s": times("reuse_gap"),
        **cluster_figures(result, span_ps, occupancy),
    }
