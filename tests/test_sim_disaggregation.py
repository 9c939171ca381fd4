"""Prefill and decode apart: skipping against stepping, both halves against oracles, and two schedules by hand."""

from __future__ import annotations

import dataclasses
from collections import deque

import numpy as np
import pytest
from cluster_cases import (
    PLAIN,
    ClusterScenario,
    Spy,
    assert_same_cluster,
    disaggregated_scenarios,
    session_scenario,
    steps_of,
)
from different_cases import different_examples
from engine_cases import LinearCost, Scenario, unlike
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import BuildConfig, CacheConfig
from sim.cluster.cluster import simulate_cluster
from sim.cluster.config import ClusterConfig
from sim.cluster.link import TransferCost
from sim.cost import StepBatch
from sim.records import RunResult
from sim.request import Request
from sim.scheduler.config import Admission, EngineConfig, Preemption, QueueOrder

PAIR = ClusterConfig(2, prefill_replicas=1)


def _check(scenario: ClusterScenario) -> RunResult:
    result = scenario.run()
    assert_same_cluster(result, scenario.run(skipping=False))
    return result


@different_examples(1)
@given(disaggregated_scenarios())
def test_skipping_equals_stepping(scenario: ClusterScenario) -> None:
    _check(scenario)


@different_examples(1)
@given(
    disaggregated_scenarios(),
    st.sampled_from(["recompute", "swap", "swap", "cheaper"]),
    st.integers(1, 20),
    st.sampled_from([0, 1, 3]),
    st.booleans(),
)
def test_skipping_equals_stepping_with_host_memory_and_partial_reuse(
    scenario: ClusterScenario, preemption: Preemption, host: int, swap: int, partial: bool
) -> None:
    cache = dataclasses.replace(
        scenario.cache, enable_partial_reuse=partial and scenario.cache.enable_block_reuse
    )
    result = _check(
        dataclasses.replace(
            scenario,
            cache=cache,
            engine=dataclasses.replace(scenario.engine, preemption=preemption),
            cost=dataclasses.replace(scenario.cost, swap=swap),
            num_host_blocks=host,
        )
    )
    if preemption == "recompute":
        assert all(part.cache.host is not None for part in result.replicas)
        assert sum(part.cache.host.swapped_out_blocks for part in result.replicas if part.cache.host) == 0


@different_examples()
@given(disaggregated_scenarios())
def test_policies_see_the_same_skipping_or_not(scenario: ClusterScenario) -> None:
    cluster = dataclasses.replace(scenario.cluster, num_replicas=4, prefill_replicas=2)
    cluster = dataclasses.replace(cluster, routing="cluster_cases:Spy")
    scenario = dataclasses.replace(scenario, cluster=cluster)
    seen = []
    for skipping in (True, False):
        Spy.seen.clear()
        scenario.run(skipping)
        seen.append(list(Spy.seen))
    assert seen[0] == seen[1]


def test_skipping_equals_stepping_on_a_larger_workload_with_sessions() -> None:
    scenario = dataclasses.replace(
        session_scenario(20.0),
        cluster=ClusterConfig(4, "longest_prefix", prefill_replicas=2),
        transfer=TransferCost(block_ps=82 * 10**6, latency_ps=10**7),
    )
    result = _check(scenario)
    assert set(result.requests["decode_replica"]) >= {2, 3}
    assert result.timeline["steps"].max() > 4
    assert result.timeline["preemptions"].any()


# ------------------------------------------------------------------ each half, where there is room


def _roomy(scenario: ClusterScenario) -> ClusterScenario:
    """Return the scenario with so many blocks that nobody waits for one, nor is anything evicted."""
    tokens = sum((r.prompt_tokens + r.output_tokens) * r.num_sequences for r in scenario.requests)
    build = dataclasses.replace(scenario.build, max_batch_size=32, max_num_tokens=64)
    engine = dataclasses.replace(scenario.engine, queue_order="fcfs", watermark=0.0)
    return dataclasses.replace(scenario, num_blocks=2 * tokens, build=build, engine=engine)


@different_examples()
@given(disaggregated_scenarios())
def test_prefill_replicas_serve_requests_of_one_token(scenario: ClusterScenario) -> None:
    """With room, what a prefill replica does is what the plain engine does with the prompts alone.

    Not with partial reuse: blocks that a transfer holds are copied, where the plain engine takes them over.
    """
    scenario = _roomy(scenario)
    result = _check(scenario)
    for number in range(scenario.cluster.prefill_replicas):
        share = scenario.share(result, number)
        prompts = [
            dataclasses.replace(
                request,
                output_tokens=1,
                num_samples=1,
                named_tokens=min(request.named_tokens, request.prompt_tokens),
                token_ids=None if request.token_ids is None else request.token_ids[: request.prompt_tokens],
                chunk_ids=None
                if request.chunk_ids is None
                else request.chunk_ids[: -(-request.prompt_tokens // request.granularity)],
            )
            for request in share.requests
        ]
        if any(request.named_tokens % request.granularity for request in prompts if request.granularity):
            continue  # the last chunk says something else when less of it is named
        alone = dataclasses.replace(share, requests=prompts).run()
        mine = np.flatnonzero(result.requests["replica"] == number)
        mine = mine[np.lexsort((mine, result.requests["arrival_ps"][mine]))]
        if (result.requests["status"][mine] == "rejected").any():
            continue  # what is too long once it has decoded
        for name in ("admit_ps", "first_token_ps", "hit_tokens", "hit_blocks"):
            assert result.requests[name][mine].tolist() == alone.requests[name].tolist(), name
        assert steps_of(result.replicas[number].timeline) == steps_of(alone.timeline)


def _naive_decodes(
    handed: list[tuple[int, int, int, int, int]], cost: LinearCost, transfer: TransferCost, static: bool
) -> list[tuple[int, int]]:
    """Decode step by step on one replica with room; return when the transfer started, and the last token came.

    handed  of each request, in order: when its prompt was complete, tokens of it, blocks to transfer, output tokens
            and samples
    static  nobody starts once one of those who came together decodes, until all of them are done
    """
    coming: deque[int] = deque()
    ends: dict[int, int] = {}
    starts: dict[int, int] = {}
    done: dict[int, int] = {}
    decoding: dict[int, int] = {}  # request: tokens that it still has to sample
    now = free = 0
    closed = False
    waiting = deque(range(len(handed)))
    while len(done) < len(handed):
        for request in [request for request in coming if ends[request] <= now]:
            coming.remove(request)
            decoding[request] = handed[request][3] - 1
            closed = static
        closed = closed and bool(coming or decoding)
        while not closed and waiting and handed[waiting[0]][0] <= now:
            request = waiting.popleft()
            starts[request] = now
            free = max(free, now) + handed[request][2] * transfer.block_ps
            ends[request] = free + transfer.latency_ps
            coming.append(request)
        if not decoding:
            moments = [ends[request] for request in coming]
            if not closed:
                moments += [handed[request][0] for request in waiting]
            now = min(moments)
            continue
        keys = sum(
            handed[request][4] * (handed[request][1] + handed[request][3] - left)
            for request, left in decoding.items()
        )
        now += cost.step(StepBatch(sum(handed[request][4] for request in decoding), keys))
        for request in list(decoding):
            decoding[request] -= 1
            if not decoding[request]:
                done[request] = now
                del decoding[request]
    return [(starts[request], done[request]) for request in range(len(handed))]


@different_examples()
@given(disaggregated_scenarios(), st.sampled_from([0, 1, 7]))
def test_decode_replicas_go_on_as_a_naive_one_does(scenario: ClusterScenario, key: int) -> None:
    """With room: transfers one after the other, each sequence from the first step after its own has ended."""
    cost = LinearCost(base=10, sequence=2, key=key)
    scenario = dataclasses.replace(_roomy(scenario), cost=cost)
    result = _check(scenario)
    requests = result.requests
    for number in range(scenario.cluster.prefill_replicas, scenario.cluster.num_replicas):
        mine = np.flatnonzero(requests["decode_replica"] == number)
        # They were handed over in the order in which the link served them.
        mine = mine[np.argsort(requests["transfer_end_ps"][mine], kind="stable")]
        names = ("first_token_ps", "prompt_tokens", "transferred_blocks", "output_tokens", "num_samples")
        handed = list(zip(*(requests[name][mine].tolist() for name in names), strict=True))
        static = scenario.engine.admission == "static_batch"
        expected = _naive_decodes(handed, cost, scenario.transfer, static)
        found = zip(
            requests["transfer_start_ps"][mine].tolist(), requests["finish_ps"][mine].tolist(), strict=True
        )
        assert list(found) == expected


# ------------------------------------------------------------------ by hand


def _build(tokens_per_block: int = 2) -> BuildConfig:
    return BuildConfig(4, 32, 64, tokens_per_block=tokens_per_block)


def _columns(result: RunResult, *names: str) -> list[list[int]]:
    return [result.requests[name].tolist() for name in names]


def test_a_transfer_by_hand() -> None:
    """One replica of each kind; a step takes 10 ps, a transfer 3 ps a block of 2 tokens, and 4.

    t = 0   requests 0 (4 tokens in, 3 out) and 1 (6 in, 2 out) are prefilled together until 10: their first tokens.
    t = 10  both are given blocks on the decode replica. The link brings the 2 of request 0 until 16, the 3 of
            request 1 until 25; 4 later they are there, at 20 and 29.
    t = 12  request 2 says what 0 says, and wants one token: it hits a block, ends at 22, and goes nowhere.
    t = 20  request 0 decodes until 40. Request 1 joins it at 30, when a step ends, and ends at 40, too.
    t = 22  request 3 says what 0 says, too; its prompt is complete at 32. The decode replica is in a step until 40.
    t = 40  it takes blocks there, of which it hits one; the other comes until 43, and is there at 47.
    t = 47  request 3 decodes its second token until 57.
    """
    a, b = np.zeros(4, np.int32), np.ones(6, np.int32)
    rows = [(0, a, 3), (0, b, 2), (12, a, 1), (15, a, 2)]
    requests = [
        Request(row, arrival, len(ids), output, token_ids=ids, named_tokens=len(ids))
        for row, (arrival, ids, output) in enumerate(rows)
    ]
    scenario = ClusterScenario(requests, _build(), 20, engine=PLAIN, cost=LinearCost(10), cluster=PAIR)
    result = _check(scenario)
    assert _columns(result, "replica", "decode_replica") == [[0, 0, 0, 0], [1, 1, -1, 1]]
    assert _columns(result, "admit_ps", "first_token_ps") == [[0, 0, 12, 22], [10, 10, 22, 32]]
    assert _columns(result, "hit_tokens", "transferred_blocks") == [[0, 0, 2, 2], [2, 3, 0, 1]]
    assert _columns(result, "transfer_start_ps", "transfer_end_ps") == [[10, 10, -1, 40], [20, 29, -1, 47]]
    assert result.requests["finish_ps"].tolist() == [40, 40, 22, 57]
    assert sorted(result.gaps_ps.tolist()) == [20, 25, 30]  # from first to second tokens
    decode = result.replicas[1].timeline
    assert decode["start_ps"].tolist() == [20, 30, 47]
    assert decode["decode_sequences"].tolist() == [1, 2, 1]
    # At 20, request 1 holds 3 blocks that are on their way, and request 0 a third one for its next token. At 47,
    # request 3 has what came of its prompt beside the same that is cached, as any prompt has that repeats one.
    assert decode["referenced_blocks"].tolist() == [6, 7, 4]


def test_a_stretch_ends_where_a_transfer_does() -> None:
    """Request 1's 11 blocks are there at 16 + 33 + 4 = 53: it joins request 0 when a step ends, at 60."""
    requests = unlike((0, 4, 8), (0, 22, 2))
    scenario = ClusterScenario(requests, _build(), 40, engine=PLAIN, cost=LinearCost(10), cluster=PAIR)
    result = _check(scenario)
    assert _columns(result, "transfer_end_ps", "finish_ps") == [[20, 53], [90, 70]]
    decode = result.replicas[1].timeline
    assert decode["start_ps"].tolist() == [20, 30, 60, 70]
    assert decode["steps"].tolist() == [1, 3, 1, 2]


def test_room_by_hand() -> None:
    """Pools of 3 blocks of 2 tokens; requests of 4 tokens in and 3 out, which take all 3 when they decode.

    t = 0   request 0's prompt takes 2 blocks until 10; 1 does not find as many.
    t = 20  request 0's blocks have come to the decode replica: the prefill replica lets go, and starts request 1.
    t = 30  request 1 is handed over, but finds no room there until request 0 ends at 40. Till then, and while they
            are on their way, it keeps its blocks here, and request 2 waits.
    t = 50  they have come. Request 2 starts here, and request 1 decodes there until 70.
    t = 70  request 2, complete since 60, is given blocks; they come at 80, and it decodes until 100.
    """
    requests = unlike((0, 4, 3), (0, 4, 3), (0, 4, 3))
    scenario = ClusterScenario(requests, _build(), 3, engine=PLAIN, cost=LinearCost(10), cluster=PAIR)
    result = _check(scenario)
    assert _columns(result, "admit_ps", "first_token_ps") == [[0, 20, 50], [10, 30, 60]]
    assert _columns(result, "transfer_start_ps", "transfer_end_ps") == [[10, 40, 70], [20, 50, 80]]
    assert result.requests["finish_ps"].tolist() == [40, 70, 100]


def test_who_is_on_the_way_has_been_promised_its_end() -> None:
    """Pools of 5 blocks of 2 tokens, for two prompts of 2 blocks, but not for the 3 that each takes at its end.

    Both are complete at t = 10. The decode replica, where nobody runs yet, gives request 0 its blocks, and request 1
    none before 0, which decodes from 20 to 40, has finished.
    """
    requests = unlike((0, 4, 3), (0, 4, 3))
    scenario = ClusterScenario(requests, _build(), 5, engine=PLAIN, cost=LinearCost(10), cluster=PAIR)
    result = _check(scenario)
    assert _columns(result, "first_token_ps", "transfer_start_ps") == [[10, 10], [10, 40]]
    assert _columns(result, "transfer_end_ps", "finish_ps") == [[20, 50], [40, 70]]


def test_a_prompt_waits_for_all_its_blocks_while_others_are_on_their_way() -> None:
    """Pools of 6 blocks of 2 tokens; prompts of 4 blocks, computed in two chunks.

    Request 0's is complete at t = 20, and its blocks are on their way until 20 + 4 · 3 + 4 = 36. The 2 other blocks
    would do for the first chunk of request 1, which would then hold them in vain.
    """
    requests = unlike((0, 8, 3), (0, 8, 3))
    build = BuildConfig(max_batch_size=4, max_num_tokens=4, tokens_per_block=2)
    scenario = ClusterScenario(requests, build, 6, engine=PLAIN, cost=LinearCost(10), cluster=PAIR)
    result = _check(scenario)
    assert _columns(result, "admit_ps", "first_token_ps") == [[0, 36], [20, 56]]
    assert result.requests["preemptions"].tolist() == [0, 0]


def test_all_samples_go_on_from_one_transfer() -> None:
    requests = unlike((0, 3, 3, 3))
    scenario = ClusterScenario(requests, _build(), 20, engine=PLAIN, cost=LinearCost(10), cluster=PAIR)
    result = _check(scenario)
    # 2 blocks by 20, then 2 tokens for each of 3 samples, of which two have to copy the block that they share.
    assert _columns(result, "transferred_blocks", "transfer_end_ps", "finish_ps") == [[2], [20], [40]]
    assert result.gaps_ps.tolist() == [10 + 10] * 3
    assert result.requests["cow_copies"].tolist() == [2]


def test_each_replica_has_a_host_tier_by_hand() -> None:
    """Pools of 6 blocks of 2 tokens; moving a token to or from the host takes 1 ps.

    Prompts A, B and A again, of 4 blocks and one token of output, so that the prefill replica is done with them.
    t = 20  B finds 2 blocks free; the 2 last of A move to the host, 4 tokens.
    t = 50  A hits 2 blocks here and 1 there, and computes its last. For these two, 2 of B move out, and 1 of A back.
    """
    ids = {"A": np.arange(8, dtype=np.int32), "B": np.arange(8, 16, dtype=np.int32)}
    requests = [
        Request(row, at, 8, 1, token_ids=ids[name], named_tokens=8)
        for row, (at, name) in enumerate([(0, "A"), (20, "B"), (50, "A")])
    ]
    scenario = ClusterScenario(
        requests, _build(), 6, engine=PLAIN, cost=LinearCost(10, swap=1), num_host_blocks=8, cluster=PAIR
    )
    result = _check(scenario)
    assert result.requests["finish_ps"].tolist() == [10, 20 + 10 + 4, 50 + 10 + 6]
    assert result.requests["hit_blocks"].tolist() == [0, 0, 3]
    prefill, decode = (part.cache.host for part in result.replicas)
    assert prefill is not None
    assert decode is not None
    assert (prefill.offloaded_blocks, prefill.hit_blocks) == (4, 1)
    assert (decode.offloaded_blocks, decode.hit_blocks) == (0, 0)


def test_who_is_swapped_out_where_it_decodes_comes_back_there() -> None:
    """Pools of 5 blocks of 2 tokens, for two prompts of 1 block that grow to 4 each: one has to wait on the host."""
    requests = unlike((0, 2, 7), (0, 2, 7))
    engine = dataclasses.replace(PLAIN, admission="max_utilization", preemption="swap")
    scenario = ClusterScenario(
        requests, _build(), 5, engine=engine, cost=LinearCost(10, swap=1), num_host_blocks=8, cluster=PAIR
    )
    result = _check(scenario)
    assert result.requests["preemptions"].sum() > 0
    assert result.requests["recomputed_tokens"].tolist() == [0, 0]
    prefill, decode = (part.cache.host for part in result.replicas)
    assert prefill is not None
    assert decode is not None
    assert prefill.swapped_out_blocks == 0
    assert (
        decode.swapped_out_blocks >= decode.swapped_in_blocks > 0
    )  # what the GPU still has need not come back


def test_static_batches_by_hand() -> None:
    """Two prompts a step at most; a step takes 10 ps, a transfer 3 ps a block of 2 tokens, and 4.

    t = 0   requests 0 (4 tokens in, 4 out) and 1 (4 in, 2 out) are a batch of the prefill replica until 10. Then 2,
            which came at 5, is one by itself until 20, though 0 and 1 still keep their blocks here.
    t = 10  0 and 1 are given blocks on the decode replica; they come at 20 and, by the one link, at 26.
    t = 20  0 decodes until 50, and with it the batch is closed to 2, which is handed over now. 1 is of the batch, and
            decodes from 30 to 40.
    t = 50  2 is given its blocks; they come at 60, and it decodes until 70. 3, complete since 45, is
            there at 66, and decodes from 70 to 80.
    """
    requests = unlike((0, 4, 4), (0, 4, 2), (5, 4, 2), (35, 4, 2))
    engine = dataclasses.replace(PLAIN, admission="static_batch")
    build = dataclasses.replace(_build(), max_batch_size=2)
    scenario = ClusterScenario(requests, build, 40, engine=engine, cost=LinearCost(10), cluster=PAIR)
    result = _check(scenario)
    assert _columns(result, "admit_ps", "first_token_ps") == [[0, 0, 10, 35], [10, 10, 20, 45]]
    assert _columns(result, "transfer_start_ps", "transfer_end_ps") == [[10, 10, 50, 50], [20, 26, 60, 66]]
    assert result.requests["finish_ps"].tolist() == [50, 40, 70, 80]
    plain = _check(dataclasses.replace(scenario, engine=PLAIN))
    assert plain.requests["transfer_start_ps"].tolist() == [10, 10, 40, 50]


# ------------------------------------------------------------------ no livelock


@pytest.mark.parametrize("admission", ["guaranteed_no_evict", "max_utilization", "static_batch"])
@pytest.mark.parametrize("queue_order", ["fcfs", "priority", "shortest", "longest_prefix"])
@pytest.mark.parametrize("mixed_steps", [True, False])
def test_pools_of_one_sequence(admission: Admission, queue_order: QueueOrder, mixed_steps: bool) -> None:
    """Whatever the policy, everybody finishes where only one can at a time."""
    ids = np.zeros(16, np.int32)
    requests = [
        Request(row, 5 * row, 7, 9, token_ids=ids if row % 2 else ids + row, named_tokens=16)
        for row in range(8)
    ]
    engine = EngineConfig(
        admission=admission,
        queue_order=queue_order,
        mixed_steps=mixed_steps,
        block_map_samples=0,
    )
    for num_blocks in (8, 9, 11):
        for cluster in (PAIR, ClusterConfig(4, "longest_prefix", prefill_replicas=2)):
            scenario = ClusterScenario(
                requests, _build(), num_blocks, engine=engine, cost=LinearCost(10), cluster=cluster
            )
            result = _check(scenario)
            assert (result.requests["status"] == "finished").all()


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"cache": CacheConfig(window=4)}, r"window \(4\) must be None with prefill_replicas"),
        (
            {"build": dataclasses.replace(_build(), enable_paged_kv_cache=False)},
            r"enable_paged_kv_cache \(False\) must be True with prefill_replicas",
        ),
    ],
)
def test_what_does_not_go_together(changes: dict, rule: str) -> None:
    fields = {"engine": PLAIN, "build": _build(), "cluster": PAIR, "num_blocks": 64} | changes
    with pytest.raises(ValueError, match=rule):
        ClusterScenario(unlike((0, 4, 3)), **fields).run()


def test_bad_figures() -> None:
    with pytest.raises(ValueError, match=r"prefill_replicas \(2\) must be fewer than num_replicas \(2\)"):
        ClusterConfig(2, prefill_replicas=2)
    with pytest.raises(ValueError, match=r"kv_link_gb_s \(0\) must be in"):
        ClusterConfig(2, kv_link_gb_s=0)
    with pytest.raises(ValueError, match=r"kv_link_latency_us \(-1\) must be in"):
        ClusterConfig(2, kv_link_latency_us=-1)
    scenario = Scenario(unlike((0, 4, 3)), _build(), 64)
    with pytest.raises(ValueError, match=r"prefill_replicas \(1\) needs a TransferCost"):
        simulate_cluster(
            scenario.requests,
            scenario.build,
            scenario.cache,
            PLAIN,
            PAIR,
            num_blocks=64,
            cost=LinearCost(10),
        )
