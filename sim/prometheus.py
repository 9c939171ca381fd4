"""The final counters of a run in Prometheus' text format, under the names and buckets of vLLM's /metrics.

So dashboards and scripts that are written for a server read a simulation. Names, meanings and bucket boundaries are
those of vllm/v1/metrics (loggers.py, buckets.py) at https://github.com/vllm-project/vllm, and the names that earlier
versions gave to the same: gpu_cache_usage_perc, gpu_prefix_cache_*, time_per_output_token_seconds. The format is text
0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats).

A server is asked while it runs, a run when it has ended, with nothing running or waiting. Hence two differences: the
share of the pool in use is the mean over time, and there are no gauges of running and waiting requests. All figures
are those of summary.json, of what it counts.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from sim.distributions import Ints, Progressions, exact_dot
from sim.export import RUN_FILES
from sim.manifest import RunSpec
from sim.metrics import float_sum, int_column, inter_token_gaps, summarise
from sim.records import Columns, RunResult, finished_mask
from sim.request import PS_PER_S
from sim.stored import StoredTimes, counts_at_most
from sim.target import check_target, same_file
from sim.window import Window

_REQUEST_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
    *(20, 40, 80, 160, 640, 2560),
)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_BLOCK_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60),
    *(120, 300, 600, 1200, 1800),
)
_STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class _Histogram:
    """How many observations there are at most as large as each limit, how many in all, and their sum."""

    limits: Sequence[float]
    at_most: Sequence[int]
    count: int
    total: float

    @classmethod
    def of(cls, values: Ints, limits: Sequence[float], scale: int, weights: Ints | None = None) -> _Histogram:
        """Count integers, each standing for value / scale, `weights` times."""
        times = np.ones_like(values) if weights is None else weights
        at_most = counts_at_most(values, times, _scaled(limits, scale))
        return cls(limits, at_most, int(times.sum()), exact_dot(values, times) / scale)

    @classmethod
    def of_progressions(cls, values: Progressions, limits: Sequence[float], scale: int) -> _Histogram:
        """Count what is listed as progressions."""
        at_most = [values.count_at_most(limit) for limit in _scaled(limits, scale)]
        return cls(limits, at_most, values.count(), values.total() / scale)

    @classmethod
    def of_stored(cls, times: StoredTimes, limits: Sequence[float], scale: int) -> _Histogram:
        """Count what lies on disk."""
        count, total = times.total()
        return cls(limits, times.counts_at_most(_scaled(limits, scale)), count, total / scale)


def _scaled(limits: Sequence[float], scale: int) -> list[int]:
    """Return limits · scale exactly: as the decimal numbers that are written, not their nearest binary fractions."""
    return [int(Fraction(str(limit)) * scale) for limit in limits]


def _one_two_five(most: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50, … up to `most`."""
    digits = range(len(str(most)))
    return tuple(float(m * 10**e) for e in digits for m in (1, 2, 5) if m * 10**e <= most)


def prometheus_text(result: RunResult, spec: RunSpec) -> str:
    """Return the run's counters as text."""
    return "".join(line + "\n" for line in _lines(result, spec))


def _lines(result: RunResult, spec: RunSpec) -> Iterator[str]:
    summary = summarise(result, spec.engine)
    cache = Window.of(result, spec.engine).cut(result).cache
    model = {"model_name": spec.model.name}

    def metric(kind: str, name: str, meaning: str, value: float, labels: dict[str, str]) -> Iterator[str]:
        yield from _head(name, meaning, kind)
        yield _sample(name, labels, value)

    config = {
        "block_size": str(cache.tokens_per_block),
        "cache_dtype": spec.cache.kv_dtype,
        "enable_prefix_caching": str(spec.cache.enable_block_reuse),
        "num_gpu_blocks": str(cache.num_blocks),
    }
    yield from metric("gauge", "vllm:cache_config_info", "Configuration of the KV cache.", 1, config)
    use = summary["kv_utilization"]["block"]["mean"] or 0.0
    for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
        meaning = "Share of the pool's blocks that are referenced, mean over time (1 = 100%)."
        yield from metric("gauge", f"vllm:{name}", meaning, use, model)
    for name, meaning, value in (
        ("num_preemptions", "Preemptions.", summary["preemptions"]),
        ("prompt_tokens", "Prompt tokens of finished requests.", summary["prompt_tokens"]),
        (
            "generation_tokens",
            "Output tokens of finished requests, of all samples.",
            summary["output_tokens"],
        ),
        ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", cache.query_tokens),
        ("prefix_cache_hits", "Prompt tokens found in the prefix cache.", cache.hit_tokens),
        ("gpu_prefix_cache_queries", "As vllm:prefix_cache_queries_total.", cache.query_tokens),
        ("gpu_prefix_cache_hits", "As vllm:prefix_cache_hits_total.", cache.hit_tokens),
    ):
        yield from metric("counter", f"vllm:{name}_total", meaning, value, model)
    # A simulated request ends when it has as many tokens as the trace says.
    reason = model | {"finished_reason": "length"}
    yield from metric(
        "counter", "vllm:request_success_total", "Finished requests.", summary["finished"], reason
    )
    for name, meaning, histogram in _histograms(result, spec):
        yield from _head(f"vllm:{name}", meaning, "histogram")
        for limit, count in zip(histogram.limits, histogram.at_most, strict=True):
            yield _sample(f"vllm:{name}_bucket", model | {"le": repr(float(limit))}, count)
        yield _sample(f"vllm:{name}_bucket", model | {"le": "+Inf"}, histogram.count)
        yield _sample(f"vllm:{name}_count", model, histogram.count)
        yield _sample(f"vllm:{name}_sum", model, histogram.total)


def _histograms(result: RunResult, spec: RunSpec) -> Iterator[tuple[str, str, _Histogram]]:
    measured = Window.of(result, spec.engine).cut(result)
    requests, rows = measured.requests, measured.timeline
    done = finished_mask(measured)

    def between(first: str, last: str) -> Ints:
        return (int_column(requests, last) - int_column(requests, first))[done]

    def times(first: str, last: str, limits: Sequence[float] = _REQUEST_S) -> _Histogram:
        return _Histogram.of(between(first, last), limits, PS_PER_S)

    arrival, admit, first, finish = "arrival_ps", "admit_ps", "first_token_ps", "finish_ps"
    yield (
        "time_to_first_token_seconds",
        "From arrival to the first token.",
        times(arrival, first, _FIRST_TOKEN_S),
    )
    gaps = _Histogram.of_progressions(inter_token_gaps(measured), _TOKEN_S, PS_PER_S)
    yield "inter_token_latency_seconds", "From each token to the next.", gaps
    yield "time_per_output_token_seconds", "As vllm:inter_token_latency_seconds.", gaps
    yield (
        "request_time_per_output_token_seconds",
        "Time per output token after the first, a mean for each request.",
        _per_token(between(first, finish), int_column(requests, "output_tokens")[done] - 1),
    )
    yield "e2e_request_latency_seconds", "From arrival to the last token.", times(arrival, finish)
    yield "request_queue_time_seconds", "From arrival to the first admission.", times(arrival, admit)
    yield "request_prefill_time_seconds", "From admission to the first token.", times(admit, first)
    yield "request_decode_time_seconds", "From the first token to the last.", times(first, finish)
    yield "request_inference_time_seconds", "From admission to the last token.", times(admit, finish)
    lengths = _one_two_five(spec.build.max_seq_len)
    for name, column in (("prompt", "prompt_tokens"), ("generation", "output_tokens")):
        tokens = int_column(requests, column)[done]
        if name == "generation":
            tokens *= int_column(requests, "num_samples")[done]
        yield (
            f"request_{name}_tokens",
            f"{name.title()} tokens of each request.",
            _Histogram.of(tokens, lengths, 1),
        )
    yield "iteration_tokens_total", "Tokens computed in each engine step.", _step_tokens(rows)
    for name, kind, meaning in (
        ("kv_block_lifetime_seconds", "lifetime", "From filled to evicted, of each cached block."),
        ("kv_block_idle_before_evict_seconds", "idle_before_evict", "From last use to evicted."),
        ("kv_block_reuse_gap_seconds", "reuse_gap", "From a use to the next."),
    ):
        yield name, meaning, _lifetimes(measured, kind)


def _per_token(decode_ps: Ints, tokens: Ints) -> _Histogram:
    """Count decode / tokens, where there are any; rounded up they exceed the same limits, which are integers."""
    decode_ps, tokens = decode_ps[tokens > 0], tokens[tokens > 0]
    whole = -(-decode_ps // tokens)
    at_most = counts_at_most(whole, np.ones_like(whole), _scaled(_TOKEN_S, PS_PER_S))
    return _Histogram(_TOKEN_S, at_most, tokens.size, float_sum(decode_ps / tokens) / PS_PER_S)


def _step_tokens(rows: Columns) -> _Histogram:
    tokens = int_column(rows, "decode_sequences") + int_column(rows, "prefill_tokens")
    return _Histogram.of(tokens, _STEP_TOKENS, 1, int_column(rows, "steps"))


def _lifetimes(result: RunResult, kind: str) -> _Histogram:
    times = result.lifetimes.get(kind)
    if isinstance(times, StoredTimes):
        return _Histogram.of_stored(times, _BLOCK_S, PS_PER_S)
    empty: Ints = np.empty(0, np.int64)
    values, weights = (empty, empty) if times is None else (times.values_ps, times.weights)
    return _Histogram.of(values.astype(np.int64), _BLOCK_S, PS_PER_S, weights.astype(np.int64))


def _head(name: str, meaning: str, kind: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    texts = {
        label: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        for label, text in labels.items()
    }
    shown = ",".join(f'{label}="{text}"' for label, text in texts.items())
    return f"{name}{{{shown}}} {value}"


def check_place(path: Path, trace: str, results: Path) -> None:
    """Raise ValueError where `write_whole` would, or would replace the trace or what a run leaves in `results`."""
    try:
        target = check_target(path)
    except OSError as error:
        raise ValueError(f"prometheus ({path}) cannot be written: {error.strerror}") from None
    if same_file(path, trace):
        raise ValueError(f"prometheus ({path}) must not be the trace")
    if target in {Path(os.path.realpath(results / name)) for name in RUN_FILES}:
        raise ValueError(f"prometheus ({path}) must not be a file that the run leaves in out ({results})")


def write_whole(text: str, path: Path) -> None:
    """Write the text to a file, at once: whoever collects it sees all of it or what was there before.

    Raises ValueError where the file cannot be written.
    """
    try:
        target = check_target(path)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as folder:
            whole = Path(folder) / target.name
            whole.write_text(text, encoding="utf-8")
            os.replace(whole, target)
    except OSError as error:
        raise ValueError(f"prometheus ({path}) cannot be written: {error.strerror}") from None
