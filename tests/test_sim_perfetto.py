"""The Perfetto trace: decoded independently, it says what the columns of the run say."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from cluster_cases import ClusterScenario, disaggregated_scenarios
from engine_cases import LinearCost, Scenario, alike, scenarios, unlike
from hypothesis import given, settings
from hypothesis import strategies as st
from perfetto_decoder import Decoded, Instant, Slice
from result_cases import NaiveEngine, results

import sim.perfetto
from allocator.config import BuildConfig, CacheConfig
from sim.cluster.cluster import simulate_cluster
from sim.cluster.config import ClusterConfig
from sim.cluster.link import TransferCost
from sim.engine import simulate
from sim.perfetto import write_perfetto
from sim.perfetto_packets import varint
from sim.records import Columns, RunResult
from sim.replay import main
from sim.scheduler.config import EngineConfig

GREEDY = EngineConfig(admission="max_utilization")
COUNTERS = {
    "free blocks": "free_blocks",
    "evictable blocks": "evictable_blocks",
    "referenced blocks": "referenced_blocks",
    "running": "running",
    "waiting": "waiting",
}
ORDER = ("queued", "prefill", "wait for room", "transfer", "decode")
NOTES = ("prompt_tokens", "output_tokens", "num_samples", "hit_tokens", "preemptions", "recomputed_tokens")


def written(result: RunResult, folder: Path) -> bytes:
    path = folder / "t.perfetto-trace"
    write_perfetto(result, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("traces")


def group_of(result: RunResult, row: int, kind: str = "requests") -> str:
    columns = getattr(result, kind)
    return group_name(result, columns["replica"][row]) if "replica" in result.timeline else "engine"


def group_name(result: RunResult, replica: int) -> str:
    number, apart = max(replica, 0), result.prefill_replicas
    return f"replica {number}" + (f", {'prefill' if number < apart else 'decode'}" if apart else "")


def expected_slices(result: RunResult) -> list[Slice]:
    """Return all slices, from the columns of requests and pauses."""
    found = []
    columns, pauses = result.requests, result.pauses
    for row in np.flatnonzero(columns["status"] == "finished").tolist():
        group, name = group_of(result, row), f"request {columns['request_id'][row]}"
        arrival, admit, first, finish = (
            int(columns[f"{moment}_ps"][row]) for moment in ("arrival", "admit", "first_token", "finish")
        )
        notes = {note: int(columns[note][row]) for note in NOTES}
        decodes = first
        if result.prefill_replicas and columns["decode_replica"][row] >= 0:
            notes |= {note: int(columns[note][row]) for note in ("decode_replica", "transferred_blocks")}
            start, decodes = (int(columns[f"transfer_{moment}_ps"][row]) for moment in ("start", "end"))
            for phase, begin, end in (("wait for room", first, start), ("transfer", start, decodes)):
                found.append(Slice(group, "requests", (name, phase), begin // 1000, end // 1000, {}))
        found.append(Slice(group, "queued", (name,), arrival // 1000, admit // 1000, {}))
        found.append(Slice(group, "requests", (name,), admit // 1000, finish // 1000, notes))
        found.append(Slice(group, "requests", (name, "prefill"), admit // 1000, first // 1000, {}))
        if finish > first:
            found.append(Slice(group, "requests", (name, "decode"), decodes // 1000, finish // 1000, {}))
        paused: list[list[int]] = []
        if pauses:
            own = pauses["request_id"] == row
            spans = zip(pauses["paused_ps"][own].tolist(), pauses["resumed_ps"][own].tolist(), strict=True)
            for begin, end in sorted(spans):
                if paused and begin <= paused[-1][1]:
                    paused[-1][1] = max(paused[-1][1], end)
                else:
                    paused.append([begin, end])
        for begin, end in paused:
            phase = "prefill" if begin < first or finish == first else "decode"
            found.append(Slice(group, "requests", (name, phase, "preempted"), begin // 1000, end // 1000, {}))
    return found


def key(item: Slice | Instant) -> tuple:
    return (*item[:-1], sorted(item.notes.items()))


def check(result: RunResult, decoded: Decoded) -> None:
    """Compare all that a trace says with the columns it was made of."""
    assert sorted(map(key, decoded.slices)) == sorted(map(key, expected_slices(result)))
    by_track = {
        track: [i for i in decoded.instants if i.track == track] for _, track in decoded.tracks.values()
    }
    rows, requests = result.timeline, result.requests
    evicted = np.flatnonzero(rows["evicted_blocks"])
    assert [(i.group, i.time_ns, i.name, i.notes) for i in by_track["evictions"]] == [
        (group_of(result, r, "timeline"), rows["start_ps"][r] // 1000, "evicted", {"blocks": blocks})
        for r, blocks in zip(evicted.tolist(), rows["evicted_blocks"][evicted].tolist(), strict=True)
    ]
    if result.pauses:
        preempted = Counter(i.name for i in by_track["preemptions"])
        numbers = requests["preemptions"].tolist()
        assert preempted == Counter({f"request {r}": n for r, n in enumerate(numbers) if n})
        times = sorted(i.time_ns for i in by_track["preemptions"])
        assert times == sorted((result.pauses["paused_ps"] // 1000).tolist())
    rejected = np.flatnonzero(requests["status"] == "rejected").tolist()
    assert sorted((i.time_ns, i.name) for i in by_track["rejected"]) == sorted(
        (requests["arrival_ps"][r] // 1000, f"request {r}: {requests['reject_cause'][r]}") for r in rejected
    )
    for name, column in COUNTERS.items():
        for group in set(decoded.groups.values()):
            own = [r for r in range(rows["steps"].size) if group_of(result, r, "timeline") == group]
            check_counter(result, np.array(own, np.int64), column, decoded.counters.get((group, name), []))


def check_counter(result: RunResult, own: np.ndarray, column: str, points: list[tuple[int, int]]) -> None:
    """See that a counter's steps are those of the column: at each stretch's last step, and 0 while nothing runs."""
    rows = {name: values[own] for name, values in result.timeline.items()}
    last_ps = rows["end_ps"] - rows["first_step_ps"] - (rows["steps"] - 1) * rows["step_increment_ps"]
    said = []
    for row in range(len(own)):
        said.append((int(last_ps[row]), int(rows[column][row])))
        idle = row + 1 == len(own) or rows["end_ps"][row] < rows["start_ps"][row + 1]
        if idle and column in ("referenced_blocks", "running", "waiting"):
            said.append((int(rows["end_ps"][row]), 0))
    changes = [pair for i, pair in enumerate(said) if i == 0 or pair[1] != said[i - 1][1]]
    assert points == [(time // 1000, value) for time, value in changes]


@given(results())
def test_says_what_the_columns_say(folder: Path, result: RunResult) -> None:
    check(result, Decoded(written(result, folder)))


@settings(max_examples=60)
@given(disaggregated_scenarios(), st.sampled_from([1, 1000]))
def test_covers_a_life_where_prefill_and_decode_are_apart(
    folder: Path, scenario: ClusterScenario, scale: int
) -> None:
    """Queued, prefill, wait for room, transfer, decode: each begins where the one before ends."""
    result = in_units_of(scale, scenario.run())
    decoded = Decoded(written(result, folder))
    check(result, decoded)
    lives: dict[str, list[Slice]] = {}
    for item in decoded.slices:
        if len(item.path) + (item.track == "queued") == 2:
            lives.setdefault(item.path[0], []).append(item)
    columns = result.requests
    finished = np.flatnonzero(columns["status"] == "finished").tolist()
    assert lives.keys() == {f"request {row}" for row in finished}
    for row in finished:
        life = lives[f"request {row}"]  # in the order in which they end
        life.sort(key=lambda item: ORDER.index(item.path[-1] if len(item.path) > 1 else "queued"))
        moments = [(item.begin_ns, item.end_ns) for item in life]
        assert moments[0][0] == columns["arrival_ps"][row] // 1000
        assert moments[-1][1] == columns["finish_ps"][row] // 1000
        for (begin, end), (following, _) in pairwise(moments):
            assert begin <= end == following
        moved = columns["decode_replica"][row] >= 0
        assert [item.path[-1] for item in life[1:]] == list(ORDER[1:] if moved else ORDER[1:2])
    for item in decoded.slices:  # what lies in another does not stick out of it
        for outer in decoded.slices:
            if outer.path == item.path[:-1] and outer.track == item.track:
                assert outer.begin_ns <= item.begin_ns <= item.end_ns <= outer.end_ns


def in_units_of(scale: int, result: RunResult) -> RunResult:
    """Return a result whose times are `scale` times as long, so that they are whole nanoseconds."""

    def scaled(columns: Columns) -> Columns:
        return {
            name: np.where(column >= 0, column * scale, column) if name.endswith("_ps") else column
            for name, column in columns.items()
        }

    return dataclasses.replace(
        result, **{kind: scaled(getattr(result, kind)) for kind in ("requests", "timeline", "pauses")}
    )


def test_preemptions_are_marked_where_they_happened(folder: Path) -> None:
    """Two requests share a decode replica of 5 blocks of 1 token, which both outgrow."""
    result = simulate_cluster(
        alike((0, 2, 4), (0, 2, 4)),
        BuildConfig(4, 8, 16, tokens_per_block=1),
        CacheConfig(enable_block_reuse=False),
        dataclasses.replace(GREEDY, block_map_samples=0),
        ClusterConfig(2, "round_robin", 1),
        num_blocks=5,
        cost=LinearCost(base=1_000_000),
        transfer=TransferCost(block_ps=1000, latency_ps=5000),
    )
    assert result.requests["preemptions"].sum() > 0
    decoded = Decoded(written(result, folder))
    assert set(decoded.groups.values()) == {"replica 0, prefill", "replica 1, decode"}
    where = {instant.group for instant in decoded.instants if instant.track == "preemptions"}
    assert where == {"replica 1, decode"}
    lives = {
        (item.path[-1]): (item.begin_ns, item.end_ns) for item in decoded.slices if "request 0" in item.path
    }
    assert lives["prefill"] == (0, 1000)
    assert lives["wait for room"] == (1000, 1000)
    assert lives["transfer"] == (1000, 1007)
    assert lives["decode"][0] == 1007


@settings(max_examples=40)
@given(scenarios())
def test_says_what_happened_in_the_engine(folder: Path, scenario: Scenario) -> None:
    result = scenario.run()
    data = written(result, folder)
    check(result, Decoded(data))
    assert data == written(scenario.run(skipping=False), folder)


def _ns(*rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(row[0] * 1000, *row[1:]) for row in rows]


def small_run() -> RunResult:
    """Two prompts of 3 and 2 tokens and a third that never fits, in 4 blocks of 2; a step takes a microsecond."""
    requests = unlike(*_ns((0, 3, 4), (500, 2, 4), (600, 9, 9)))
    return simulate(
        requests,
        BuildConfig(4, 8, 32, tokens_per_block=2),
        CacheConfig(enable_block_reuse=False),
        GREEDY,
        num_blocks=4,
        cost=LinearCost(base=1_000_000),
    )


def test_a_run_to_follow_by_hand(folder: Path) -> None:
    """
    step  request 0                     request 1                              blocks held
    0     prompt, 3 tokens              (arrives at 500 ns)                    2
    1     its 4th token                 prompt, 2 tokens                       2 + 1
    2     its 5th token, in a 3rd block its 3rd token finds no block: it goes  3
    3     its 6th token, finishes       may come back from the next step on    3
    4                                   prompt and the 1st sampled again       2
    5                                   its 4th token                          2
    6                                   its 5th token, finishes                3
    """
    decoded = Decoded(written(small_run(), folder))
    assert decoded.groups == {1: "engine"}
    times = {path: (s.begin_ns, s.end_ns) for s in decoded.slices for path in [(s.track, *s.path)]}
    assert times == {
        ("queued", "request 0"): (0, 0),
        ("requests", "request 0"): (0, 4000),
        ("requests", "request 0", "prefill"): (0, 1000),
        ("requests", "request 0", "decode"): (1000, 4000),
        ("queued", "request 1"): (500, 1000),
        ("requests", "request 1"): (1000, 7000),
        ("requests", "request 1", "prefill"): (1000, 2000),
        ("requests", "request 1", "decode"): (2000, 7000),
        ("requests", "request 1", "decode", "preempted"): (2000, 4000),
    }
    assert [(i.track, i.time_ns, i.name) for i in decoded.instants] == [
        ("rejected", 600, "request 2: exceeds_pool"),
        ("preemptions", 2000, "request 1"),
    ]
    assert decoded.counters["engine", "running"] == [(0, 1), (1000, 2), (2000, 1), (7000, 0)]
    assert decoded.counters["engine", "waiting"] == [(0, 0), (2000, 1), (4000, 0)]
    assert decoded.counters["engine", "referenced blocks"] == [
        (0, 2),
        (1000, 3),
        (4000, 2),
        (6000, 3),
        (7000, 0),
    ]


def test_samples_that_pause_at_once_are_drawn_once(folder: Path) -> None:
    requests = alike((0, 1, 6, 7, 4))
    result = simulate(
        requests,
        BuildConfig(4, 8, 16, tokens_per_block=1),
        CacheConfig(enable_block_reuse=False),
        GREEDY,
        num_blocks=8,
        cost=LinearCost(base=1_000_000),
    )
    assert result.requests["preemptions"][0] > 1
    decoded = Decoded(written(result, folder))
    check(result, decoded)
    drawn = [s for s in decoded.slices if s.path[-1] == "preempted"]
    assert 0 < len(drawn) < result.requests["preemptions"][0]


def test_reads_and_writes_a_few_rows_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = NaiveEngine(3, 9).run()
    whole = written(result, folder)
    monkeypatch.setattr(sim.perfetto, "_ROWS", 3)
    assert written(result, folder) == whole


def test_each_replica_has_a_group_of_tracks(folder: Path) -> None:
    result = NaiveEngine(3, 9).run()
    rng = np.random.default_rng(0)
    with_replicas = dataclasses.replace(
        result,
        **{
            kind: columns | {"replica": rng.integers(0, 2, columns[first].size)}
            for kind, first in (("requests", "request_id"), ("timeline", "steps"))
            for columns in [dict(getattr(result, kind))]
        },
    )
    decoded = Decoded(written(with_replicas, folder))
    assert sorted(decoded.groups.values()) == ["replica 0", "replica 1"]
    check(with_replicas, decoded)


@given(results())
def test_the_official_schema_reads_it_and_writes_the_same_bytes(folder: Path, result: RunResult) -> None:
    schema = pytest.importorskip(
        "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="the package perfetto is not installed"
    )
    data = written(result, folder)
    trace = schema.Trace.FromString(data)
    assert trace.SerializeToString() == data
    slices = [p.track_event for p in trace.packet if p.track_event.type == schema.TrackEvent.TYPE_SLICE_BEGIN]
    assert Counter(event.name for event in slices) == Counter(s.path[-1] for s in Decoded(data).slices)
    counters = {p.track_descriptor.name for p in trace.packet if p.track_descriptor.HasField("counter")}
    assert counters == set(COUNTERS)


@given(st.integers(-(2**63), 2**64 - 1))
def test_varints_are_base_128(value: int) -> None:
    digits = varint(value)
    assert all(byte & 128 for byte in digits[:-1])
    assert digits[-1] < 128
    assert sum((byte & 127) << 7 * i for i, byte in enumerate(digits)) == value % 2**64


def test_the_command_writes_it_and_removes_a_stale_one(tmp_path: Path) -> None:
    flags = ["synthetic", "--num-requests", "30", "--no-figures", "--out", str(tmp_path)]
    tight = ["--num-blocks", "160", "--tokens-per-block", "16", "--admission", "max_utilization"]
    path = tmp_path / "timeline.perfetto-trace"
    assert main([*flags, *tight, "--perfetto"]) == 0
    first = path.read_bytes()
    decoded = Decoded(first)
    finished = json.loads((tmp_path / "summary.json").read_text())["finished"]
    assert len({s.path[0] for s in decoded.slices}) == finished > 25
    assert main(["--from-manifest", str(tmp_path / "manifest.json"), *flags[3:], "--perfetto"]) == 0
    assert path.read_bytes() == first
    assert main([*flags, *tight, "--num-replicas", "2", "--perfetto"]) == 0
    assert set(Decoded(path.read_bytes()).groups.values()) == {"replica 0", "replica 1"}
    assert main([*flags, *tight]) == 0
    assert not path.exists()
