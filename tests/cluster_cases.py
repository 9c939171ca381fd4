"""Scenarios for several replicas, and the laws that hold for every run of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from engine_cases import Bounded, LinearCost, Scenario, assert_identical, check_conservation, scenarios
from hypothesis import strategies as st

from allocator.config import MODEL_PRESETS, BuildConfig
from sim.cluster.cluster import simulate_cluster
from sim.cluster.config import ClusterConfig
from sim.cluster.link import TransferCost
from sim.cluster.placement import NOWHERE
from sim.cluster.routing import LeastLoaded, LongestPrefix, ReplicaView, RoutingPolicy
from sim.cost import RooflineCost
from sim.hardware import GPU_PRESETS
from sim.records import RunResult
from sim.replay import main
from sim.request import Request
from sim.scheduler.config import EngineConfig
from sim.workload import WorkloadConfig, generate

PLAIN = EngineConfig(block_map_samples=0)


@dataclass(frozen=True)
class ClusterScenario(Scenario):
    """A run on several replicas; `num_blocks` is of each."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    transfer: TransferCost = field(default_factory=lambda: TransferCost(block_ps=3, latency_ps=4))

    def run(self, skipping: bool = True) -> RunResult:
        result = self.simulate(self.requests, skipping=skipping)
        check_cluster(result, self)
        return result

    def simulate(
        self, requests: Collection[Request], folder: Path | None = None, *, skipping: bool = True
    ) -> RunResult:
        """Run it, without a check, on its requests or a stream of them, with records in memory or in a folder."""
        tokens = sum(r.prompt_tokens + r.output_tokens * r.num_sequences for r in self.requests)
        return simulate_cluster(
            requests,
            self.build,
            self.cache,
            dataclasses.replace(self.engine, event_skipping=skipping),
            self.cluster,
            num_blocks=self.num_blocks,
            num_host_blocks=self.num_host_blocks,
            retention=self.retention,
            cost=Bounded(self.cost, 20 * (tokens + len(self.requests)) * self.cluster.num_replicas),
            transfer=self.transfer,
            folder=folder,
        )

    def share(self, result: RunResult, number: int) -> Scenario:
        """Return what one replica served, as a scenario of its own: requests as they arrived there."""
        mine = np.flatnonzero(result.requests["replica"] == number).tolist()
        mine.sort(key=lambda row: (result.requests["arrival_ps"][row], row))
        requests = [
            dataclasses.replace(
                self.requests[row],
                request_id=place,
                arrival_ps=int(result.requests["arrival_ps"][row]),
                parent=-1,
                think_ps=0,
            )
            for place, row in enumerate(mine)
        ]
        names = [each.name for each in dataclasses.fields(Scenario) if each.name != "requests"]
        return Scenario(requests, **{name: getattr(self, name) for name in names})


def check_cluster(result: RunResult, scenario: ClusterScenario) -> None:
    """Check what no run of several replicas may break."""
    requests = result.requests
    assert requests["request_id"].tolist() == list(range(len(scenario.requests)))
    finished = requests["status"] == "finished"
    assert (finished ^ (requests["status"] == "rejected")).all()
    nowhere = requests["replica"] == NOWHERE
    assert (nowhere == (requests["reject_cause"] == "follows_rejected")).all()
    assert ((requests["replica"] >= NOWHERE) & (requests["replica"] < scenario.cluster.num_replicas)).all()
    for request in scenario.requests:
        row, parent = request.request_id, request.parent
        if parent >= 0 and not nowhere[row]:
            ready_ps = int(requests["finish_ps"][parent]) + request.think_ps
            assert requests["arrival_ps"][row] == max(request.arrival_ps, ready_ps)
    assert len(result.replicas) == scenario.cluster.num_replicas
    if scenario.cluster.prefill_replicas:
        check_transfers(result, scenario)
        return
    for number, part in enumerate(result.replicas):
        share = scenario.share(result, number)
        mine = np.flatnonzero(~np.isin(part.requests["request_id"], np.flatnonzero(nowhere)))
        mine = mine[np.lexsort((mine, part.requests["arrival_ps"][mine]))]
        at_home = {name: column[mine] for name, column in part.requests.items()}
        ids = at_home["request_id"].tolist()
        assert sorted(ids) == np.flatnonzero(requests["replica"] == number).tolist()
        places = [ids.index(request) for request in part.pauses["request_id"].tolist()]
        pauses = {**part.pauses, "request_id": np.array(places, dtype=np.int64)}
        check_conservation(dataclasses.replace(part, requests=at_home, pauses=pauses), share)


def check_transfers(result: RunResult, scenario: ClusterScenario) -> None:
    """Check what no run may break where prefill and decode are apart."""
    requests, first = result.requests, scenario.cluster.prefill_replicas
    finished = requests["status"] == "finished"
    moved = finished & (requests["output_tokens"] > 1)
    assert (requests["replica"] < first).all()
    for name in ("decode_replica", "transfer_start_ps", "transfer_end_ps"):
        assert ((requests[name] >= 0) == moved).all(), name
    names = ("arrival_ps", "admit_ps", "first_token_ps", "transfer_start_ps", "transfer_end_ps", "finish_ps")
    times = [requests[name][moved] for name in names]
    for earlier, later in pairwise(times):
        assert (earlier <= later).all()
    assert (times[-1] > times[2]).all() or isinstance(scenario.cost, LinearCost)
    size = scenario.build.tokens_per_block
    blocks = requests["transferred_blocks"]
    assert ((blocks >= 1) == moved).all()
    assert (blocks <= -(-requests["prompt_tokens"] // size)).all()
    prompt, output, samples = (
        requests[n][finished] for n in ("prompt_tokens", "output_tokens", "num_samples")
    )
    tables = np.where(output == 1, 1, samples)
    assert (requests["blocks"][finished] == tables * -(-(prompt + output - 1) // size)).all()
    assert result.cache.query_tokens == prompt.sum()
    assert result.cache.hit_tokens == requests["hit_tokens"][finished].sum()
    computed = decoded = on_time = 0
    for number, part in enumerate(result.replicas):
        rows = part.timeline
        free, evictable, referenced = (rows[f"{s}_blocks"] for s in ("free", "evictable", "referenced"))
        assert (free + evictable + referenced == scenario.num_blocks).all()
        assert (np.minimum(np.minimum(free, evictable), referenced) >= 0).all()
        assert (rows["kv_tokens"] <= referenced * size).all()
        assert (rows["running"] <= scenario.build.max_batch_size).all()
        assert (rows["start_ps"][1:] >= rows["end_ps"][:-1]).all()
        assert part.cache.free_blocks + part.cache.evictable_blocks == scenario.num_blocks
        assert part.cache.logical_blocks == part.cache.kv_tokens == 0
        assert rows["evicted_blocks"].sum() <= part.cache.evicted_blocks
        assert (rows["prefill_tokens"] + rows["decode_sequences"] <= scenario.build.max_num_tokens).all()
        computed += rows["prefill_tokens"].sum()
        decoded += (rows["decode_sequences"] * rows["steps"]).sum()
        on_time += (rows["itl_tokens"] * rows["steps"]).sum()
        if number < first:
            assert not rows["decode_sequences"].any()
            continue
        assert part.cache.query_tokens == 0
        assert rows["preemptions"].any() or not rows["prefill_tokens"].any()
        here = np.flatnonzero(requests["decode_replica"] == number)
        here = here[np.lexsort((requests["transfer_end_ps"][here], requests["transfer_start_ps"][here]))]
        idle_from = 0
        for row in here:  # one link, one transfer after the other
            begins = max(idle_from, int(requests["transfer_start_ps"][row]))
            idle_from = begins + int(blocks[row]) * scenario.transfer.block_ps
            assert requests["transfer_end_ps"][row] == idle_from + scenario.transfer.latency_ps
    # Every token is sampled at the end of a prompt, or decoded: with a gap, if it comes after a transfer or a pause.
    # A beam search that is preempted begins anew, and samples again what it had.
    widths = np.array([request.beam_width for request in scenario.requests], dtype=np.int64)
    sampled, wanted = on_time + result.gaps_ps.size, (samples * (output - 1)).sum()
    begins_anew = bool(requests["preemptions"][widths > 1].any())
    assert sampled >= wanted if begins_anew else sampled == wanted
    preempted = result.timeline["preemptions"].sum()
    assert preempted == requests["preemptions"].sum()
    assert (result.gaps_ps >= 0).all()
    if not preempted:
        assert computed == (prompt - requests["hit_tokens"][finished]).sum()
        assert decoded == (samples * (output - 1)).sum()
        assert result.gaps_ps.size == samples[output > 1].sum()


def assert_same_cluster(one: RunResult, other: RunResult) -> None:
    """Compare two runs bit for bit, with those of each replica."""
    assert_identical(one, other)
    assert len(one.replicas) == len(other.replicas)
    for ours, theirs in zip(one.replicas, other.replicas, strict=True):
        assert_identical(ours, theirs)


def steps_of(timeline: dict[str, np.ndarray]) -> dict[str, list[int]]:
    """Return the steps of a timeline one by one: the same however it is cut into stretches."""
    found: dict[str, list[int]] = {"start_ps": [], "decode_sequences": [], "prefill_tokens": []}
    for row in range(len(timeline["steps"])):
        time = int(timeline["start_ps"][row])
        for step in range(int(timeline["steps"][row])):
            found["start_ps"].append(time)
            for name in ("decode_sequences", "prefill_tokens"):
                found[name].append(int(timeline[name][row]))
            time += int(timeline["first_step_ps"][row]) + step * int(timeline["step_increment_ps"][row])
    return found


class Spy(RoutingPolicy):
    """Mixes policies by the request, and writes down all that it sees."""

    seen: ClassVar[list[tuple[int, ...]]] = []  # of the run in progress, whoever made it

    def choose(self, request: Request, replicas: Sequence[ReplicaView]) -> ReplicaView:
        for view in replicas:
            figures = [getattr(view, each.name) for each in dataclasses.fields(view)[:-1]]
            self.seen.append((request.request_id, *figures, view.hit_tokens))
        policies = (LeastLoaded(), LongestPrefix())
        return policies[request.request_id % 2].choose(request, replicas)


class Close(LongestPrefix):
    """Longest prefix, for replicas that hold a handful of requests."""

    most_ahead = 1


@st.composite
def cluster_scenarios(draw: st.DrawFn, routing: str | None = None) -> ClusterScenario:
    """What `scenarios` draws, on up to three replicas. A step takes time."""
    found = draw(scenarios())
    cost = found.cost
    if isinstance(cost, LinearCost) and not cost.base:
        cost = dataclasses.replace(cost, base=7)
    names = ["round_robin", "least_loaded", "longest_prefix", "cluster_cases:Close"]
    cluster = ClusterConfig(draw(st.integers(1, 3)), routing or draw(st.sampled_from(names)))
    fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
    return ClusterScenario(**{**fields, "cost": cost, "cluster": cluster})


@st.composite
def disaggregated_scenarios(draw: st.DrawFn) -> ClusterScenario:
    """The same, with prefill and decode apart."""
    found = draw(cluster_scenarios())
    prefill, decode = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    cluster = ClusterConfig(prefill + decode, found.cluster.routing, prefill)
    return dataclasses.replace(
        found,
        cluster=cluster,
        build=dataclasses.replace(found.build, enable_paged_kv_cache=True),
        transfer=TransferCost(draw(st.sampled_from([3, 0, 40, 200])), draw(st.sampled_from([4, 0, 100]))),
    )


def session_scenario(requests_per_s: float) -> ClusterScenario:
    """Return 150 requests in sessions with shared system prompts, sampling and preemptions, on small pools."""
    workload = WorkloadConfig(
        num_requests=150,
        requests_per_s=requests_per_s,
        system_prompts=3,
        system_prompt_tokens=256,
        turns_mean=3.0,
        session_tokens_max=2048,
        think_s_mean=0.5,
        output_tokens_mean=60.0,
        output_tokens_max=512,
        user_tokens_max=1024,
        sampling_share=0.2,
    )
    return ClusterScenario(
        list(generate(workload)),
        BuildConfig(16, 512, tokens_per_block=16),
        num_blocks=200,
        engine=dataclasses.replace(PLAIN, admission="max_utilization"),
        cost=RooflineCost(MODEL_PRESETS["llama-3-8b"], GPU_PRESETS["a100-80gb"]),
    )


# ------------------------------------------------------------------ from the command line

BASE = ["synthetic", "--num-requests", "80", "--user-tokens-max", "600", "--output-tokens-max", "120"]
SHARED = [*BASE, "--system-prompts", "4", "--turns-mean", "2", "--session-tokens-max", "2048"]
TIGHT = ["--model", "llama-3-8b", "--num-blocks", "180", "--tokens-per-block", "16", "--requests-per-s", "30"]
CLUSTER = [*SHARED, *TIGHT, "--num-replicas", "3", "--routing", "longest_prefix"]
APART = [*SHARED, *TIGHT, "--num-replicas", "3", "--prefill-replicas", "1", "--routing", "least_loaded"]
TABLES = ("requests.parquet", "timeline.parquet")


def replay(arguments: list[str], out: Path) -> dict[str, Any]:
    """Run a command line that must succeed; return its summary."""
    assert main([*arguments, "--out", str(out)]) == 0
    return json.loads((out / "summary.json").read_text())
