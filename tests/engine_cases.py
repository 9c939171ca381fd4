"""Scenarios for the engine's tests: tiny workloads that collide, costs that are easy to follow, laws that hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from hypothesis import strategies as st
from naive_engine import NaiveEngine, NaiveRun
from naive_windowed_engine import NaiveWindowedEngine

from allocator.config import BuildConfig, CacheConfig
from sim.cost import StepBatch, StepCost
from sim.engine import simulate
from sim.records import PAUSE_COLUMNS, RunResult
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.scheduler.retention import RetentionOptions


@dataclass(frozen=True)
class LinearCost:
    """A step takes `base`, and so much for each decoding sequence, key, prefill token, and token swapped or copied."""

    base: int = 10
    sequence: int = 0
    key: int = 0
    prefill: int = 0
    swap: int = 0
    copy: int = 0
    affine: bool = True
    """Whether it says so, so that steps can be skipped."""
    windows: tuple[int, ...] = ()
    window_slopes: tuple[int, ...] = ()
    """What a key in each window takes besides."""

    def step(self, batch: StepBatch) -> int:
        moved = self.swap * batch.swapped_tokens + self.copy * batch.copied_tokens
        if not batch.decode_sequences and not batch.prefills:
            return moved
        decode = self.sequence * batch.decode_sequences + self.key * batch.decode_context
        if batch.decode_sequences:
            decode += sum(a * b for a, b in zip(self.window_slopes, batch.window_keys, strict=True))
        return moved + self.base + decode + self.prefill * sum(tokens for tokens, _ in batch.prefills)

    def decode_affine(self, decode_sequences: int) -> tuple[int, int] | None:
        return (self.base + self.sequence * decode_sequences, self.key) if self.affine else None


class Bounded:
    """Another cost, for a bounded number of steps: what would go on for ever fails instead."""

    def __init__(self, cost: StepCost, steps: int) -> None:
        self.decode_affine = cost.decode_affine
        self.windows = getattr(cost, "windows", ())
        self.window_slopes = getattr(cost, "window_slopes", ())
        self._cost = cost
        self._steps = steps

    def step(self, batch: StepBatch) -> int:
        self._steps -= 1
        assert self._steps >= 0, "the run does not come to an end"
        return self._cost.step(batch)


def alike(*rows: tuple[int, ...], granularity: int = 1) -> list[Request]:
    """Return requests that all say the same as far as they go.

    A row is arrival, prompt tokens, output tokens, named tokens (default: all) and samples (default: 1).
    """
    requests = []
    for row, (arrival, prompt, output, *rest) in enumerate(rows):
        named = rest[0] if rest else prompt + output
        ids = np.zeros(-(-named // granularity), dtype=np.int64)
        samples = rest[1] if len(rest) > 1 else 1
        requests.append(
            Request(row, arrival, prompt, output, ids, granularity, named_tokens=named, num_samples=samples)
        )
    return requests


def unlike(*rows: tuple[int, ...]) -> list[Request]:
    """Return requests that share nothing; a row is arrival, prompt tokens, output tokens, samples (default: 1)."""
    return [
        Request(row, arrival, prompt, output, num_samples=rest[0] if rest else 1)
        for row, (arrival, prompt, output, *rest) in enumerate(rows)
    ]


@dataclass(frozen=True)
class Scenario:
    """A run, small enough to print."""

    requests: Sequence[Request]
    build: BuildConfig
    num_blocks: int
    cache: CacheConfig = field(default_factory=CacheConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    cost: StepCost = LinearCost()
    num_host_blocks: int = 0
    retention: RetentionOptions | None = None

    def run(self, skipping: bool = True) -> RunResult:
        """Run it on the real engine, and check what holds for every run."""
        engine = dataclasses.replace(self.engine, event_skipping=skipping)
        tokens = sum(r.prompt_tokens + r.output_tokens * r.num_sequences for r in self.requests)
        cost = Bounded(self.cost, 20 * (tokens + len(self.requests)))
        result = simulate(
            self.requests,
            self.build,
            self.cache,
            engine,
            num_blocks=self.num_blocks,
            num_host_blocks=self.num_host_blocks,
            retention=self.retention,
            cost=cost,
        )
        check_conservation(result, self)
        return result

    def naive(self) -> NaiveRun:
        """Run it on the naive engine."""
        windowed = self.cache.window is not None and self.build.enable_paged_kv_cache
        naive = NaiveWindowedEngine if windowed else NaiveEngine
        args = (self.requests, self.build, self.cache, self.engine, self.num_blocks, self.cost)
        return naive(*args, self.retention, self.num_host_blocks).simulate()

    @property
    def pool(self) -> tuple[int, int]:
        """Return (blocks, tokens of each); without paging a block is a whole sequence."""
        if self.build.enable_paged_kv_cache:
            return self.num_blocks, self.build.tokens_per_block
        length = self.build.max_seq_len
        return self.num_blocks * self.build.tokens_per_block // length, length


# ------------------------------------------------------------------ comparison


def assert_identical(one: RunResult, other: RunResult) -> None:
    """Compare two runs bit for bit, wall time aside."""
    for kind in ("requests", "timeline", "pauses"):
        ours, theirs = getattr(one, kind), getattr(other, kind)
        assert list(ours) == list(theirs)
        for name, column in ours.items():
            assert column.dtype == theirs[name].dtype
            np.testing.assert_array_equal(column, theirs[name], err_msg=f"{kind}.{name}")
    np.testing.assert_array_equal(one.gaps_ps, other.gaps_ps)
    assert one.cache == other.cache
    assert one.lifetimes.keys() == other.lifetimes.keys()
    for name, times in one.lifetimes.items():
        np.testing.assert_array_equal(times.values_ps, other.lifetimes[name].values_ps)
        np.testing.assert_array_equal(times.weights, other.lifetimes[name].weights)
    assert (one.block_map is None) == (other.block_map is None)
    if one.block_map is not None and other.block_map is not None:
        np.testing.assert_array_equal(one.block_map.times_ps, other.block_map.times_ps)
        np.testing.assert_array_equal(one.block_map.owners, other.block_map.owners)


def assert_as_naive(result: RunResult, naive: NaiveRun) -> None:
    """Compare the real engine's columns with what the naive one saw, request by request and step by step."""
    for name in naive.requests[0] if naive.requests else ():
        assert result.requests[name].tolist() == [row[name] for row in naive.requests], name
    assert result.gaps_ps.tolist() == naive.gaps
    pauses = [result.pauses[name].tolist() for name in PAUSE_COLUMNS]
    assert list(zip(*pauses, strict=True)) == naive.pauses
    assert {cause: blocks for cause, blocks in result.cache.miss_blocks.items() if blocks} == naive.misses
    assert result.cache.evicted_blocks == naive.evicted

    for name, blocks in naive.host.items():
        assert getattr(result.cache.host, name) == blocks, name

    rows = result.timeline
    names = naive.steps[0] if naive.steps else ()
    steps = {name: np.array([step[name] for step in naive.steps], dtype=np.int64) for name in names}
    last = np.cumsum(rows["steps"]) - 1
    first = last - rows["steps"] + 1
    assert len(naive.steps) == (last[-1] + 1 if last.size else 0)
    for name, column in steps.items():
        if name in ("preemptions", "out_of_block_steps", "evicted_blocks"):
            expected = np.add.reduceat(column, first)
        else:
            expected = column[first if name == "start_ps" else last]
        np.testing.assert_array_equal(rows[name], expected, err_msg=name)
    for name in ("referenced_blocks", "kv_tokens") if names else ():
        np.testing.assert_array_equal(rows[f"{name}_first"], steps[name][first], err_msg=f"{name}_first")
    for row in range(last.size):
        j = np.arange(rows["steps"][row])
        durations = rows["first_step_ps"][row] + j * rows["step_increment_ps"][row]
        at = slice(first[row], last[row] + 1)
        np.testing.assert_array_equal(durations, steps["end_ps"][at] - steps["start_ps"][at])


# ------------------------------------------------------------------ what holds for every run


def check_pauses(result: RunResult) -> None:
    """Check that each preemption is a pause of a running request's sample, and that a sample's do not overlap."""
    requests, pauses = result.requests, result.pauses
    of, paused, resumed = pauses["request_id"], pauses["paused_ps"], pauses["resumed_ps"]
    assert (np.bincount(of, minlength=len(requests["preemptions"])) == requests["preemptions"]).all()
    assert (requests["admit_ps"][of] <= paused).all()
    assert (resumed <= requests["finish_ps"][of]).all()
    assert (pauses["sample"] < requests["num_samples"][of]).all()
    last: dict[tuple[int, int], int] = {}
    rows = zip(of.tolist(), pauses["sample"].tolist(), paused.tolist(), resumed.tolist(), strict=True)
    for request, sample, begin, end in rows:
        assert last.get((request, sample), 0) <= begin <= end
        last[request, sample] = end


def check_conservation(result: RunResult, scenario: Scenario) -> None:
    """Check what no run may break, from its columns alone."""
    requests, rows = result.requests, result.timeline
    finished = requests["status"] == "finished"
    rejected = requests["status"] == "rejected"
    assert (finished ^ rejected).all()
    assert ((requests["reject_cause"] != "") == rejected).all()
    for name in ("admit_ps", "first_token_ps", "finish_ps"):
        assert (requests[name][rejected] == -1).all()
    times = [requests[name][finished] for name in ("arrival_ps", "admit_ps", "first_token_ps", "finish_ps")]
    for earlier, later in pairwise(times):
        assert (earlier <= later).all()
    parents = np.array([request.parent for request in scenario.requests], dtype=np.int64)
    for turn in np.flatnonzero(finished & (parents >= 0)):
        think_ps = scenario.requests[turn].think_ps
        stated_ps = scenario.requests[turn].arrival_ps
        ready_ps = requests["finish_ps"][parents[turn]] + think_ps
        assert requests["arrival_ps"][turn] == max(stated_ps, ready_ps)

    num_blocks, size = scenario.pool
    prompt, output, samples = (
        requests[n][finished] for n in ("prompt_tokens", "output_tokens", "num_samples")
    )
    hit_blocks = requests["hit_blocks"][finished]
    in_part = requests["hit_tokens"][finished] - hit_blocks * size
    assert ((in_part >= 0) & (in_part < (size if scenario.cache.enable_partial_reuse else 1))).all()
    assert result.cache.hit_tokens == requests["hit_tokens"][finished].sum()
    assert (requests["hit_tokens"][finished] < prompt).all()
    assert (requests["query_blocks"][finished] == -(-prompt // size)).all()
    assert result.cache.hit_blocks == hit_blocks.sum()
    missed = sum(result.cache.miss_blocks.values())
    assert result.cache.query_blocks == hit_blocks.sum() + missed
    tables = np.where(output == 1, 1, samples)
    at_end = tables * -(-(prompt + output - 1) // size)
    windowed = scenario.cache.window is not None and scenario.build.enable_paged_kv_cache
    assert (requests["blocks"][finished] <= at_end).all()
    assert windowed or (requests["blocks"][finished] == at_end).all()

    free, evictable, referenced = (rows[f"{s}_blocks"] for s in ("free", "evictable", "referenced"))
    assert (free + evictable + referenced == num_blocks).all()
    assert (np.minimum(np.minimum(free, evictable), referenced) >= 0).all()
    assert (rows["kv_tokens"] <= referenced * size).all()
    assert (rows["logical_tokens"] <= rows["logical_blocks"] * size).all()
    assert (rows["running"] <= scenario.build.max_batch_size).all()
    tokens = rows["decode_sequences"] + rows["prefill_tokens"]
    assert (tokens <= scenario.build.max_num_tokens).all()

    start, end, steps = rows["start_ps"], rows["end_ps"], rows["steps"]
    assert (start[1:] >= end[:-1]).all()
    first_ps, increment_ps = rows["first_step_ps"], rows["step_increment_ps"]
    assert (end - start == steps * first_ps + increment_ps * (steps * (steps - 1) // 2)).all()
    # Every token is sampled by a decode step or at the end of a prefill: a request's first, one for all samples,
    # and one after each preemption of a job that had sampled some already; each of these leaves a gap.
    # So does waiting while prompts are computed in steps of their own, or in host memory.
    decoded = (rows["decode_sequences"] * steps).sum()
    late = decoded - (rows["itl_tokens"] * steps).sum()
    # A beam search that is preempted begins anew, and samples again what it had.
    widths = np.array([request.beam_width for request in scenario.requests], dtype=np.int64)
    begins_anew = bool(requests["preemptions"][widths > 1].any())
    sampled, wanted = decoded - late + result.gaps_ps.size, (samples * (output - 1)).sum()
    assert sampled >= wanted if begins_anew else sampled == wanted
    assert late == 0 or not scenario.engine.mixed_steps or scenario.engine.preemption != "recompute"
    assert (result.gaps_ps >= 0).all()
    assert rows["preemptions"].sum() == requests["preemptions"].sum()
    check_pauses(result)
    assert rows["evicted_blocks"].sum() == result.cache.evicted_blocks
    # Of each admission's target, what was not found is computed, once more after each preemption: up to the last
    # token written that counts as recomputed, and one token further the gap ends. A prompt that was preempted
    # halfway may find more than it had written, and computes less.
    computed = rows["prefill_tokens"].sum()
    needed = (prompt - requests["hit_tokens"][finished]).sum()
    needed += requests["recomputed_tokens"].sum() + result.gaps_ps.size - late
    may_find_more = begins_anew or (scenario.cache.enable_block_reuse and rows["preemptions"].any())
    assert computed <= needed if may_find_more else computed == needed
    assert result.cache.free_blocks + result.cache.evictable_blocks == num_blocks
    assert result.cache.logical_blocks == result.cache.logical_tokens == result.cache.kv_tokens == 0


# ------------------------------------------------------------------ strategies


@st.composite
def _requests(draw: st.DrawFn, longest: int) -> list[Request]:
    """Requests whose prompts and outputs are much alike, nearly all of them described in one and the same way."""
    requests: list[Request] = []
    arrival = 0
    granularity = draw(st.sampled_from([1, 1, 2, 3, 4]))
    kind = draw(st.sampled_from(["chunks", "chunks", "tokens"]))
    one_in_ten = st.integers(0, 9).map(lambda number: number == 9)
    length = st.one_of(st.integers(1, longest), st.integers(longest // 2, longest), st.just(1))
    for row in range(draw(st.integers(2, 8))):
        arrival += draw(st.sampled_from([0, 10, 15, 30, 120]))
        prompt, output = draw(length), draw(length)
        beams = draw(st.sampled_from([1, 1, 1, 1, 1, 2, 3]))
        named = prompt + (draw(st.integers(0, output)) if draw(one_in_ten) else output)
        if beams > 1:
            named = prompt
        fields: dict[str, object] = {"named_tokens": named}
        if draw(one_in_ten):
            fields = {}
        elif kind == "chunks":
            ids = draw(_symbols(-(-named // granularity)))
            fields.update(chunk_ids=np.array(ids, dtype=np.int64), granularity=granularity)
        else:
            fields.update(token_ids=np.array(draw(_symbols(named)), dtype=np.int32))
        has_parent = row and draw(one_in_ten)
        requests.append(
            Request(
                request_id=row,
                arrival_ps=arrival,
                prompt_tokens=prompt,
                output_tokens=output,
                num_samples=draw(st.sampled_from([1, 1, 1, 2, 3])) if beams == 1 else 1,
                beam_width=beams,
                parent=draw(st.integers(0, row - 1)) if has_parent else -1,
                think_ps=draw(st.sampled_from([0, 50])) if has_parent else 0,
                salt="other" if draw(one_in_ten) else "",
                priority=draw(st.sampled_from([0, 0, 1, 2])),
                **fields,  # type: ignore[arg-type]
            )
        )
    return requests


@st.composite
def _symbols(draw: st.DrawFn, count: int) -> list[int]:
    """A row of equal symbols, but for one at most: so that prefixes collide often, and part somewhere."""
    symbols = [0] * count
    if draw(st.sampled_from([False, False, True])):
        symbols[draw(st.integers(0, count - 1))] = 1
    return symbols


@st.composite
def scenarios(draw: st.DrawFn) -> Scenario:
    """Everything at once: a few requests that share content, in a pool that is hardly large enough."""
    longest = draw(st.sampled_from([16, 24, 8]))
    requests = draw(_requests(longest))
    size = draw(st.sampled_from([2, 1, 4, 4, 8]))
    paged = draw(st.integers(0, 9)) != 9
    max_batch_size = draw(st.sampled_from([2, 3, 4, 8]))
    build = BuildConfig(
        max_batch_size=max_batch_size,
        max_num_tokens=max_batch_size + draw(st.sampled_from([0, 1, 3, 30])),
        max_seq_len=2 * longest - draw(st.sampled_from([0, 0, 0, longest // 2])),
        enable_paged_kv_cache=paged,
        tokens_per_block=size,
    )
    if paged:
        needed = max(-(-(r.prompt_tokens + r.output_tokens - 1) // size) for r in requests)
        num_blocks = max(1, needed + draw(st.sampled_from([0, 1, 2, needed // 2, needed, 2 * needed, -1])))
    else:
        num_blocks = -(-build.max_seq_len // size) * draw(st.integers(1, 3))
    engine = EngineConfig(
        admission=draw(
            st.sampled_from(["guaranteed_no_evict", "max_utilization", "max_utilization", "static_batch"])
        ),
        queue_order=draw(st.sampled_from(["fcfs", "fcfs", "fcfs", "priority", "shortest", "longest_prefix"])),
        mixed_steps=draw(st.sampled_from([True, True, False])),
        victim=draw(
            st.sampled_from(["last_started", "last_started", "last_arrived", "least_progress", "cheapest"])
        ),
        enable_chunked_prefill=draw(st.sampled_from([True, True, False])),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.2])),
        block_map_samples=draw(st.sampled_from([0, 3, 1000])),
    )
    cache = CacheConfig(
        enable_block_reuse=draw(st.integers(0, 9)) != 9, policy=draw(st.sampled_from(["lru", "fifo"]))
    )
    cost = LinearCost(
        base=draw(st.sampled_from([10, 10, 3, 0])),
        sequence=draw(st.sampled_from([0, 0, 1])),
        key=draw(st.sampled_from([0, 0, 1])),
        prefill=draw(st.sampled_from([0, 0, 1])),
        copy=draw(st.sampled_from([0, 0, 1, 3])),
        affine=draw(st.integers(0, 9)) != 9,
    )
    windows = draw(st.sampled_from([(), (), (), (5,), (longest // 2, longest)]))
    cost = dataclasses.replace(cost, windows=windows, window_slopes=(1, 2)[: len(windows)])
    return Scenario(requests, build, num_blocks, cache, engine, cost)
