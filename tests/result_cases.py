"""RunResults to test the output side with: arbitrary small ones, and plausible ones from a naive engine."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from allocator.manager import CacheStats
from allocator.stats import MISS_CAUSES
from sim.records import CACHED, FREE, SHARED, TIMELINE_COLUMNS, BlockMap, RunResult, WeightedTimes

REQUEST_COLUMNS = (
    "request_id",
    "arrival_ps",
    "status",
    "reject_cause",
    "prompt_tokens",
    "output_tokens",
    "num_samples",
    "admit_ps",
    "first_token_ps",
    "finish_ps",
    "query_blocks",
    "hit_blocks",
    "hit_tokens",
    "preemptions",
    "recomputed_tokens",
    "blocks",
    "cow_copies",
)
TEXT_COLUMNS = ("status", "reject_cause")


def columns(rows: list[dict], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Turn a list of rows into columns, int64 but for the texts."""
    return {
        name: np.array([row[name] for row in rows], dtype=np.str_ if name in TEXT_COLUMNS else np.int64)
        for name in names
    }


@st.composite
def _requests(draw: st.DrawFn) -> list[dict]:
    rows = []
    for number in range(draw(st.integers(0, 8))):
        row = dict.fromkeys(REQUEST_COLUMNS, 0) | {
            "request_id": number,
            "arrival_ps": draw(st.integers(0, 10**13)),
            "status": "rejected",
            "reject_cause": draw(st.sampled_from(("exceeds_pool", "exceeds_max_seq_len"))),
            "prompt_tokens": draw(st.integers(1, 5000)),
            "output_tokens": draw(st.integers(1, 50)),
            "num_samples": draw(st.integers(1, 4)),
            "admit_ps": -1,
            "first_token_ps": -1,
            "finish_ps": -1,
        }
        if draw(st.booleans()):
            admit = row["arrival_ps"] + draw(st.integers(0, 4 * 10**12))
            first = admit + draw(st.integers(1, 10**12))
            decode = draw(st.integers(1, 10**12)) if row["output_tokens"] > 1 else 0
            tokens = (row["prompt_tokens"] + row["output_tokens"] - 1) * row["num_samples"]
            row |= {
                "status": "finished",
                "reject_cause": "",
                "admit_ps": admit,
                "first_token_ps": first,
                "finish_ps": first + decode,
                "preemptions": draw(st.integers(0, 2)),
                "recomputed_tokens": draw(st.integers(0, 10)),
                "blocks": tokens // 4 + draw(st.integers(1, 9)),
            }
        rows.append(row)
    return rows


@st.composite
def _timeline(draw: st.DrawFn, num_blocks: int, tokens_per_block: int) -> list[dict]:
    rows, clock = [], 0
    for _ in range(draw(st.integers(0, 8))):
        clock += draw(st.sampled_from((0, 0, 0, 10**11)))
        steps = draw(st.integers(1, 6))
        first, increment = draw(st.integers(1, 10**11)), draw(st.integers(0, 10**9))
        length = sum(first + j * increment for j in range(steps))
        at_last = draw(st.integers(0, num_blocks))
        at_first = at_last if steps == 1 else draw(st.integers(0, at_last))
        tokens = draw(st.integers(at_last, at_last * tokens_per_block))
        free = draw(st.integers(0, num_blocks - at_last))
        sequences = draw(st.integers(0, 5))
        rows.append(
            {
                "start_ps": clock,
                "end_ps": clock + length,
                "steps": steps,
                "running": sequences + 1,
                "waiting": draw(st.integers(0, 9)),
                "decode_sequences": sequences,
                "prefill_sequences": 1,
                "prefill_tokens": draw(st.integers(0, 99)),
                "first_step_ps": first,
                "step_increment_ps": increment,
                "itl_tokens": sequences,
                "free_blocks": free,
                "evictable_blocks": num_blocks - at_last - free,
                "referenced_blocks": at_last,
                "logical_blocks": at_last + draw(st.integers(0, 5)),
                "kv_tokens": tokens,
                "logical_tokens": tokens,
                "saved_blocks": draw(st.integers(0, 5)),
                "referenced_blocks_first": at_first,
                "kv_tokens_first": tokens
                if steps == 1
                else draw(st.integers(0, min(tokens, at_first * tokens_per_block))),
                "preemptions": draw(st.integers(0, 2)),
                "out_of_block_steps": draw(st.integers(0, 1)),
                "evicted_blocks": draw(st.integers(0, 5)),
            }
        )
        clock += length
    return rows


@st.composite
def results(draw: st.DrawFn) -> RunResult:
    """Draw a small RunResult whose columns obey the rules that sim.records states, and little else."""
    num_blocks = draw(st.integers(1, 50))
    tokens_per_block = 2 ** draw(st.integers(0, 5))
    queried = draw(st.integers(0, 100))
    hit = draw(st.integers(0, queried))
    spans = st.tuples(st.integers(0, 10**12), st.integers(0, 5))
    lifetimes = {}
    for name in ("lifetime", "idle_before_evict", "reuse_gap"):
        pairs = draw(st.lists(spans, max_size=5))
        lifetimes[name] = WeightedTimes(
            np.array([value for value, _ in pairs], np.int64), np.array([w for _, w in pairs], np.int64)
        )
    return RunResult(
        requests=columns(draw(_requests()), REQUEST_COLUMNS),
        timeline=columns(draw(_timeline(num_blocks, tokens_per_block)), TIMELINE_COLUMNS),
        gaps_ps=np.array(draw(st.lists(st.integers(1, 10**12), max_size=4)), np.int64),
        cache=cache_stats(
            num_blocks,
            tokens_per_block,
            query_blocks=queried,
            hit_blocks=hit,
            query_tokens=queried * tokens_per_block,
            hit_tokens=hit * tokens_per_block,
        ),
        lifetimes=lifetimes,
        wall_s=draw(st.floats(0, 10)),
    )


def cache_stats(num_blocks: int, tokens_per_block: int, **counts: int) -> CacheStats:
    """Return the CacheStats of a drained manager, with the given counts and zero for the others."""
    zero = dict.fromkeys(CacheStats.__dataclass_fields__, 0)
    misses = dict.fromkeys(MISS_CAUSES, 0)
    misses["cold"] = counts.get("query_blocks", 0) - counts.get("hit_blocks", 0)
    known = {
        "num_blocks": num_blocks,
        "tokens_per_block": tokens_per_block,
        "free_blocks": num_blocks,
        "miss_blocks": misses,
    }
    return CacheStats(**(zero | {"host": None} | known | counts))


@dataclass
class _Running:
    number: int
    family: int
    prompt: int
    output: int
    arrival: int
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    last_token: int = -1
    row: dict = field(default_factory=dict)


class NaiveEngine:
    """A toy serving engine, one step at a time: whole prompts, a shared head a family, LRU, recompute.

    It exists to make results that look and add up like real ones; it is nobody's oracle for scheduling.
    `token_gaps` keeps every inter-token gap as it happened, `step_states` every step's (duration, referenced
    blocks, written tokens): what the compressed rows of its RunResult must account for.
    """

    def __init__(self, seed: int, num_requests: int = 60, num_blocks: int = 120, tokens_per_block: int = 16):
        self.size, self.num_blocks = tokens_per_block, num_blocks
        rng = np.random.default_rng(seed)
        self.trace = deque(
            _Running(i, int(f), int(p), int(o), int(a))
            for i, (f, p, o, a) in enumerate(
                zip(
                    rng.integers(0, 6, num_requests),
                    np.clip(rng.lognormal(5.4, 0.6, num_requests), 20, num_blocks * tokens_per_block // 3),
                    np.clip(rng.lognormal(4.0, 0.7, num_requests), 1, 300),
                    np.cumsum(rng.exponential(0.1e12, num_requests)),
                    strict=True,
                )
            )
        )
        self.free = list(range(num_blocks - 1, -1, -1))
        self.holders: dict[int, int] = {}  # block -> references
        self.owner: dict[int, int] = {}
        self.cached: dict[tuple[int, int], int] = {}  # (family, index) -> block, unreferenced or not
        self.idle: dict[int, tuple[int, int]] = {}  # evictable blocks, least recently used first
        self.key_of: dict[int, tuple[int, int]] = {}
        self.running: list[_Running] = []
        self.waiting: deque[_Running] = deque()
        self.now = self.evicted = self.queried = self.hit = 0
        self.requests: list[dict] = []
        self.rows: list[dict] = []
        self.samples: list[tuple[int, list[int]]] = []
        self.token_gaps: list[int] = []
        self.spanning_gaps: list[int] = []
        self.step_states: list[tuple[int, int, int]] = []

    def _take(self) -> int | None:
        if self.free:
            return self.free.pop()
        if not self.idle:
            return None
        block, key = next(iter(self.idle.items()))
        del self.idle[block], self.cached[key], self.key_of[block]
        self.evicted += 1
        return block

    def _hold(self, request: _Running, block: int) -> None:
        request.blocks.append(block)
        self.holders[block] = self.holders.get(block, 0) + 1
        self.owner.setdefault(block, request.number)

    def _release(self, request: _Running) -> None:
        for block in reversed(request.blocks):
            self.holders[block] -= 1
            if self.holders[block]:
                continue
            del self.holders[block], self.owner[block]
            if block in self.key_of:
                self.idle[block] = self.key_of[block]
            else:
                self.free.append(block)
        request.blocks = []

    def _admit(self, request: _Running) -> bool:
        need = -(-(request.prompt + request.done) // self.size)
        shared = min(8, (request.prompt - 1) // self.size)
        hits = []
        for index in range(shared):
            block = self.cached.get((request.family, index))
            if block is None:
                break
            hits.append(block)
        spare = len(self.free) + sum(block not in hits for block in self.idle)
        if spare < need - len(hits) or len(self.running) >= 24:
            return False
        first_time = request.row.get("admit_ps", -1) < 0
        for block in hits:
            self.idle.pop(block, None)
            self._hold(request, block)
        for index in range(len(hits), need):
            block = self._take()
            assert block is not None
            self._hold(request, block)
            if index < shared:
                self.cached[request.family, index] = block
                self.key_of[block] = (request.family, index)
        if first_time:
            self.queried += need
            self.hit += len(hits)
            request.row |= {
                "admit_ps": self.now,
                "query_blocks": need,
                "hit_blocks": len(hits),
                "hit_tokens": len(hits) * self.size,
            }
        return True

    def _step(self) -> None:
        evicted, preempted = self.evicted, 0
        for request in list(self.running):
            if request not in self.running:
                continue
            while len(request.blocks) * self.size < request.prompt + request.done:
                block = self._take()
                if block is not None:
                    self._hold(request, block)
                    continue
                victim = self.running.pop()
                self._release(victim)
                self.waiting.appendleft(victim)
                victim.row["preemptions"] += 1
                preempted += 1
                if victim is request:
                    break
        decoding = list(self.running)
        prefills: list[_Running] = []
        while not preempted and self.waiting and self._admit(self.waiting[0]):
            prefills.append(self.waiting.popleft())
            self.running.append(prefills[-1])
        if not self.running:
            raise AssertionError("the toy pool must hold any one request")
        context = sum(request.prompt + request.done for request in decoding)
        prefill_tokens = sum(request.prompt + request.done for request in prefills)
        length = 8 * 10**9 + 2 * 10**6 * context + 6 * 10**7 * prefill_tokens
        start, self.now = self.now, self.now + length
        written = {}
        for request in self.running:
            for index, block in enumerate(request.blocks):
                filled = min(self.size, request.prompt + request.done - index * self.size)
                written[block] = max(filled, written.get(block, 0))
        tokens = sum(written.values())
        self.rows.append(
            {
                "start_ps": start,
                "end_ps": self.now,
                "steps": 1,
                "running": len(self.running),
                "waiting": len(self.waiting),
                "decode_sequences": len(decoding),
                "prefill_sequences": len(prefills),
                "prefill_tokens": prefill_tokens,
                "first_step_ps": length,
                "step_increment_ps": 0,
                "itl_tokens": len(decoding),
                "free_blocks": len(self.free),
                "evictable_blocks": len(self.idle),
                "referenced_blocks": len(self.holders),
                "logical_blocks": sum(self.holders.values()),
                "kv_tokens": tokens,
                "logical_tokens": sum(request.prompt + request.done for request in self.running),
                "saved_blocks": sum(self.holders.values()) - len(self.holders),
                "referenced_blocks_first": len(self.holders),
                "kv_tokens_first": tokens,
                "preemptions": preempted,
                "out_of_block_steps": int(preempted > 0),
                "evicted_blocks": self.evicted - evicted,
            }
        )
        self.step_states.append((length, len(self.holders), tokens))
        self.samples.append((self.now, [self._state(block) for block in range(self.num_blocks)]))
        for request in decoding + prefills:
            if request.last_token >= 0:
                gap = self.now - request.last_token
                self.token_gaps.append(gap)
                if request in prefills:
                    self.spanning_gaps.append(gap)
            else:
                request.row["first_token_ps"] = self.now
            request.last_token = self.now
            request.done += 1
            if request.done == request.output:
                request.row |= {
                    "finish_ps": self.now,
                    "status": "finished",
                    "blocks": len(request.blocks),
                }
                self.running.remove(request)
                self._release(request)

    def _state(self, block: int) -> int:
        if block in self.idle:
            return CACHED
        if block not in self.holders:
            return FREE
        return SHARED if self.holders[block] > 1 else self.owner[block]

    def run(self, *, compress: bool = True) -> RunResult:
        """Run the whole trace; with `compress`, join equal decode steps into stretches."""
        while self.trace or self.waiting or self.running:
            if not (self.waiting or self.running):
                self.now = max(self.now, self.trace[0].arrival)
            while self.trace and self.trace[0].arrival <= self.now:
                request = self.trace.popleft()
                request.row = dict.fromkeys(REQUEST_COLUMNS, 0) | {
                    "request_id": request.number,
                    "arrival_ps": request.arrival,
                    "reject_cause": "",
                    "prompt_tokens": request.prompt,
                    "output_tokens": request.output,
                    "num_samples": 1,
                    "admit_ps": -1,
                }
                self.requests.append(request.row)
                self.waiting.append(request)
            self._step()
        rows = self._compressed() if compress else self.rows
        every = max(1, len(self.samples) // 160)
        sampled = self.samples[::every]
        return RunResult(
            requests=columns(self.requests, REQUEST_COLUMNS),
            timeline=columns(rows, TIMELINE_COLUMNS),
            gaps_ps=np.array(self.spanning_gaps, np.int64),
            cache=cache_stats(
                self.num_blocks,
                self.size,
                query_blocks=self.queried,
                hit_blocks=self.hit,
                query_tokens=self.queried * self.size,
                hit_tokens=self.hit * self.size,
                evicted_blocks=self.evicted,
            ),
            lifetimes={},
            block_map=BlockMap(
                np.array([when for when, _ in sampled], np.int64),
                np.arange(self.num_blocks),
                np.array([states for _, states in sampled], np.int64).reshape(-1, self.num_blocks),
            ),
            wall_s=0.25,
        )

    def _compressed(self) -> list[dict]:
        """Join rows of pure decode that follow each other with equal batch and evenly growing durations."""
        same = ("running", "waiting", "decode_sequences", "prefill_sequences", "itl_tokens")
        joined: list[dict] = []
        for row in self.rows:
            tail = joined[-1] if joined else None
            quiet = not (row["prefill_tokens"] or row["preemptions"] or row["evicted_blocks"])
            if tail and quiet and not tail["prefill_tokens"] and tail["end_ps"] == row["start_ps"]:
                growth = row["first_step_ps"] - (
                    tail["first_step_ps"] + (tail["steps"] - 1) * tail["step_increment_ps"]
                )
                even = tail["steps"] == 1 or growth == tail["step_increment_ps"]
                if even and growth >= 0 and all(tail[name] == row[name] for name in same):
                    first = {name: tail[name] for name in ("referenced_blocks_first", "kv_tokens_first")}
                    kept = {
                        name: tail[name] for name in ("preemptions", "evicted_blocks", "out_of_block_steps")
                    }
                    tail |= (
                        row
                        | first
                        | kept
                        | {
                            "start_ps": tail["start_ps"],
                            "first_step_ps": tail["first_step_ps"],
                            "step_increment_ps": growth,
                            "steps": tail["steps"] + 1,
                        }
                    )
                    continue
            joined.append(dict(row))
        return joined
