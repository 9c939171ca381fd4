"""The counters in Prometheus' format, parsed independently: they are the summary's, and every value is counted."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from result_cases import NaiveEngine, results

from sim.distributions import Progressions
from sim.metrics import summarise
from sim.options import parse
from sim.prometheus import prometheus_text
from sim.records import RunResult
from sim.replay import main
from sim.stored import ColumnFiles, StoredTimes, counts_at_most

SPEC = parse(["synthetic", "--out", "o", "--max-seq-len", "6000"])[0].spec(None)
PS = 10**12

_SAMPLE = re.compile(r'([a-zA-Z_:][a-zA-Z0-9_:]*)\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\} (\S+)')
_LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\.)*)"')


class Parsed:
    """What a text in the exposition format says. It fails where the format's rules are broken."""

    def __init__(self, text: str) -> None:
        assert text.endswith("\n")
        self.kinds: dict[str, str] = {}
        self.values: dict[str, float] = {}
        self.labels: dict[str, dict[str, str]] = {}
        self.buckets: dict[str, list[tuple[str, int]]] = {}
        lines = iter(text.splitlines())
        for line in lines:
            if line.startswith("# HELP "):
                name, meaning = line[7:].split(" ", 1)
                assert meaning
                kind_of, kind = next(lines)[7:].split(" ")
                assert kind_of == name
                assert name not in self.kinds, f"{name} comes twice"
                assert kind in ("counter", "gauge", "histogram")
                self.kinds[name] = kind
                continue
            found = _SAMPLE.fullmatch(line)
            assert found, line
            self._sample(name, found[1], dict(_LABEL.findall(found[2])), found[3])

    def _sample(self, family: str, name: str, labels: dict[str, str], value: str) -> None:
        if self.kinds[family] != "histogram":
            assert name == family, "samples follow their metric"
            assert (self.kinds[family] == "counter") == name.endswith("_total")
        elif name.endswith("_bucket"):
            assert name == f"{family}_bucket"
            self.buckets.setdefault(family, []).append((labels["le"], int(value)))
            return
        else:
            assert name in (f"{family}_count", f"{family}_sum")
        assert name not in self.values
        self.values[name], self.labels[name] = float(value), labels


def parsed(result: RunResult, spec: object = SPEC) -> Parsed:
    return Parsed(prometheus_text(result, spec))


def gaps(result: RunResult) -> Iterator[int]:
    """Yield every inter-token gap, one by one."""
    names = ("first_step_ps", "step_increment_ps", "steps", "itl_tokens")
    for first, increment, steps, tokens in zip(*(result.timeline[n].tolist() for n in names), strict=True):
        for step in range(steps):
            yield from [first + step * increment] * tokens
    yield from result.gaps_ps.tolist()


def observations(result: RunResult) -> dict[str, list[Fraction]]:
    """Return what each histogram has to count, value by value."""
    found: dict[str, list[Fraction]] = {}
    names = (
        "arrival_ps",
        "admit_ps",
        "first_token_ps",
        "finish_ps",
        "prompt_tokens",
        "output_tokens",
        "num_samples",
    )
    rows = [
        dict(zip(names, values, strict=True))
        for status, *values in zip(*(result.requests[n].tolist() for n in ("status", *names)), strict=True)
        if status == "finished"
    ]
    spans = {
        "time_to_first_token_seconds": ("arrival_ps", "first_token_ps"),
        "e2e_request_latency_seconds": ("arrival_ps", "finish_ps"),
        "request_queue_time_seconds": ("arrival_ps", "admit_ps"),
        "request_prefill_time_seconds": ("admit_ps", "first_token_ps"),
        "request_decode_time_seconds": ("first_token_ps", "finish_ps"),
        "request_inference_time_seconds": ("admit_ps", "finish_ps"),
    }
    for name, (begin, end) in spans.items():
        found[name] = [Fraction(row[end] - row[begin], PS) for row in rows]
    found["request_time_per_output_token_seconds"] = [
        Fraction(row["finish_ps"] - row["first_token_ps"], PS * (row["output_tokens"] - 1))
        for row in rows
        if row["output_tokens"] > 1
    ]
    found["inter_token_latency_seconds"] = [Fraction(gap, PS) for gap in gaps(result)]
    found["time_per_output_token_seconds"] = found["inter_token_latency_seconds"]
    found["request_prompt_tokens"] = [Fraction(row["prompt_tokens"]) for row in rows]
    found["request_generation_tokens"] = [Fraction(r["output_tokens"] * r["num_samples"]) for r in rows]
    found["iteration_tokens_total"] = [
        Fraction(decode + prefill)
        for decode, prefill, steps in zip(
            *(result.timeline[n].tolist() for n in ("decode_sequences", "prefill_tokens", "steps")),
            strict=True,
        )
        for _ in range(steps)
    ]
    for name in ("lifetime", "idle_before_evict", "reuse_gap"):
        times = result.lifetimes[name]
        pairs = zip(times.values_ps.tolist(), times.weights.tolist(), strict=True)
        found[f"kv_block_{name}_seconds"] = [Fraction(value, PS) for value, n in pairs for _ in range(n)]
    return found


def check_histograms(found: Parsed, expected: dict[str, list[Fraction]]) -> None:
    assert {name for name, kind in found.kinds.items() if kind == "histogram"} == {
        f"vllm:{n}" for n in expected
    }
    for name, values in expected.items():
        buckets = found.buckets[f"vllm:{name}"]
        limits = [Fraction(limit) for limit, _ in buckets[:-1]]
        assert limits == sorted(set(limits))
        assert [count for _, count in buckets[:-1]] == [
            sum(v <= limit for v in values) for limit in limits
        ], name
        assert buckets[-1] == ("+Inf", len(values))
        assert found.values[f"vllm:{name}_count"] == len(values)
        assert math.isclose(found.values[f"vllm:{name}_sum"], sum(values), abs_tol=1e-12), name


def check_counters(found: Parsed, summary: dict) -> None:
    """Compare with a summary.json."""
    values = {name.removeprefix("vllm:"): value for name, value in found.values.items()}
    assert values["num_preemptions_total"] == summary["preemptions"]
    assert values["prompt_tokens_total"] == summary["prompt_tokens"]
    assert values["generation_tokens_total"] == summary["output_tokens"]
    assert values["request_success_total"] == summary["finished"]
    for prefix in ("", "gpu_"):
        assert values[f"{prefix}prefix_cache_queries_total"] == summary["computed_prompt_tokens"]["no_cache"]
        assert values[f"{prefix}prefix_cache_hits_total"] == summary["hit_tokens"]
    for name in ("kv_cache_usage_perc", "gpu_cache_usage_perc"):
        assert values[name] == (summary["kv_utilization"]["block"]["mean"] or 0)
    for name, key in (
        ("time_to_first_token", "ttft_s"),
        ("inter_token_latency", "itl_s"),
        ("request_time_per_output_token", "tpot_s"),
        ("e2e_request_latency", "e2e_s"),
        ("request_queue_time", "queue_s"),
        ("kv_block_lifetime", "block_lifetime_s"),
        ("kv_block_idle_before_evict", "block_idle_before_evict_s"),
        ("kv_block_reuse_gap", "block_reuse_gap_s"),
    ):
        count, mean = values[f"{name}_seconds_count"], summary[key]["mean"]
        assert (count > 0) == (mean is not None)
        if mean is not None:
            assert math.isclose(values[f"{name}_seconds_sum"] / count, mean)
    assert values["iteration_tokens_total_count"] == summary["steps"]


@given(results())
def test_says_what_the_summary_says(result: RunResult) -> None:
    found = parsed(result)
    check_counters(found, summarise(result, SPEC.engine))
    check_histograms(found, observations(result))


def test_of_a_warm_up_nothing_is_counted() -> None:
    result = NaiveEngine(3).run()
    engine = dataclasses.replace(SPEC.engine, warm_up_requests=20)
    found = parsed(result, dataclasses.replace(SPEC, engine=engine))
    check_counters(found, summarise(result, engine))
    assert (
        found.values["vllm:request_success_total"] == parsed(result).values["vllm:request_success_total"] - 20
    )


def test_labels_say_model_pool_and_reason() -> None:
    found = parsed(NaiveEngine(3, num_blocks=77).run(), SPEC)
    assert found.labels["vllm:request_success_total"] == {
        "model_name": "llama-2-7b",
        "finished_reason": "length",
    }
    assert found.labels["vllm:cache_config_info"] == {
        "block_size": "16",
        "cache_dtype": "auto",
        "enable_prefix_caching": "True",
        "num_gpu_blocks": "77",
    }
    named = dataclasses.replace(SPEC, model=dataclasses.replace(SPEC.model, name='a "model"\\b\nc'))
    label = parsed(NaiveEngine(3, 5).run(), named).labels["vllm:prompt_tokens_total"]
    assert label == {"model_name": r"a \"model\"\\b\nc"}


def test_the_buckets_are_the_servers() -> None:
    """A sample of those that a dashboard's quantiles are interpolated from."""
    limits = {
        name: [limit for limit, _ in buckets]
        for name, buckets in parsed(NaiveEngine(3, 5).run()).buckets.items()
    }
    first = limits["vllm:time_to_first_token_seconds"]
    assert (first[:4], first[-3:]) == (["0.001", "0.005", "0.01", "0.02"], ["640.0", "2560.0", "+Inf"])
    assert len(first) == 23
    request = limits["vllm:e2e_request_latency_seconds"]
    assert (request[:4], request[-3:], len(request)) == (
        ["0.3", "0.5", "0.8", "1.0"],
        ["1920.0", "7680.0", "+Inf"],
        22,
    )
    assert limits["vllm:request_queue_time_seconds"] == request
    token = limits["vllm:inter_token_latency_seconds"]
    assert (token[:4], token[-2:], len(token)) == (["0.01", "0.025", "0.05", "0.075"], ["80.0", "+Inf"], 20)
    assert limits["vllm:request_prompt_tokens"][-4:] == ["1000.0", "2000.0", "5000.0", "+Inf"]


@given(results())
def test_the_official_parser_reads_the_same(result: RunResult) -> None:
    official = pytest.importorskip(
        "prometheus_client.parser", reason="the package prometheus_client is not installed"
    )
    text = prometheus_text(result, SPEC)
    found = Parsed(text)
    values, buckets, kinds = {}, {}, {}
    for family in official.text_string_to_metric_families(text):
        kinds[family.name] = family.type
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                name = sample.name.removesuffix("_bucket")
                buckets.setdefault(name, []).append((sample.labels["le"], int(sample.value)))
            else:
                values[sample.name] = sample.value
    assert values == found.values
    assert buckets == found.buckets
    assert kinds == {
        name if kind == "histogram" else name.removesuffix("_total"): kind
        for name, kind in found.kinds.items()
    }


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4))),
    st.lists(st.integers(0, 50), min_size=1, unique=True).map(sorted),
)
def test_counts_at_most(tmp_path_factory: pytest.TempPathFactory, rows: list, limits: list[int]) -> None:
    values, weights = (np.array([row[i] for row in rows], np.int64) for i in (0, 1))
    expected = [sum(weight for value, weight in rows if value <= limit) for limit in limits]
    assert counts_at_most(values, weights, limits) == expected
    progressions = Progressions.weighted(values, weights)
    assert [progressions.count_at_most(limit) for limit in limits] == expected
    files = ColumnFiles(tmp_path_factory.mktemp("times"), ("values_ps", "weights"))
    for row in range(len(rows)):
        files.write(np.array([rows[row]], np.int64))
    assert StoredTimes(files).counts_at_most(limits) == expected


@given(st.integers(0, 9), st.integers(0, 5), st.integers(1, 9), st.integers(1, 3), st.integers(-2, 60))
def test_counts_of_a_progression(first: int, increment: int, steps: int, weight: int, limit: int) -> None:
    columns = [np.array([value], np.int64) for value in (first, increment, steps, weight)]
    expected = weight * sum(first + step * increment <= limit for step in range(steps))
    assert Progressions.of(*columns).count_at_most(limit) == expected


@pytest.mark.parametrize("replicas", [[], ["--num-replicas", "2"]], ids=["one engine", "two replicas"])
def test_the_command_writes_it(tmp_path: Path, replicas: list[str]) -> None:
    path = tmp_path / "metrics.prom"
    flags = ["synthetic", "--num-requests", "80", "--num-blocks", "160", "--tokens-per-block", "16"]
    flags += ["--system-prompts", "2", "--admission", "max_utilization", "--no-figures"]
    path.write_text("of another run\n")
    assert main([*flags, *replicas, "--out", str(tmp_path / "out"), "--prometheus", str(path)]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["preemptions"] > 0
    assert summary["hit_tokens"] > 0
    check_counters(Parsed(path.read_text()), summary)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.prom", "out"]


def test_what_is_there_is_replaced_only_if_it_is_a_file_of_the_users(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pipe, link, kept = (tmp_path / name for name in ("out", "pipe", "link", "kept.prom"))
    os.mkfifo(pipe)
    kept.write_text("earlier")
    link.symlink_to(kept)
    trace = tmp_path / "trace.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,48,10\n")
    hard = tmp_path / "hard.csv"
    hard.hardlink_to(trace)
    for path in (out / ".." / trace.name, hard):
        assert main([str(trace), "--out", str(out), "--prometheus", str(path)]) == 2
        assert "must not be the trace" in capsys.readouterr().err
    assert hard.samefile(trace)
    flags = ["synthetic", "--num-requests", "3", "--no-figures", "--out", str(out)]
    for path, reason in [
        (pipe, "cannot be written: it exists and is not a regular file"),
        (out / "summary.json", f"must not be a file that the run leaves in out ({out})"),
        (out / ".." / "out" / "figures" / "latency.png", "must not be a file that the run leaves"),
    ]:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        assert main([*flags, "--prometheus", str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: prometheus ({path}) ")
        assert reason in error
    assert pipe.is_fifo()
    assert main([*flags, "--prometheus", str(link)]) == 0
    assert link.is_symlink()
    assert kept.read_text().startswith("# HELP")


@pytest.mark.parametrize(
    ("name", "reason"), [("", "Is a directory"), ("none/m.prom", "No such file or directory")]
)
def test_a_file_that_cannot_be_written_is_known_before_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, reason: str
) -> None:
    path = tmp_path / name
    assert main(["none.csv", "--out", str(tmp_path / "out"), "--prometheus", str(path)]) == 2
    assert capsys.readouterr().err == f"error: prometheus ({path}) cannot be written: {reason}\n"
    assert not (tmp_path / "out").exists()
