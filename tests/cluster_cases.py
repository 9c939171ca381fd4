"""Scenarios for several replicas, and the laws that hold for every run of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from engine_cases import LinearCost, Scenario, assert_identical, check_conservation, scenarios
from hypothesis import strategies as st

from sim.cluster.cluster import NOWHERE, simulate_cluster
from sim.cluster.config import ClusterConfig
from sim.cluster.routing import LeastLoaded, LongestPrefix, ReplicaView, RoutingPolicy
from sim.records import RunResult
from sim.request import Request


@dataclass(frozen=True)
class ClusterScenario(Scenario):
    """A run on several replicas; `num_blocks` is of each."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def run(self, skipping: bool = True) -> RunResult:
        result = simulate_cluster(
            self.requests,
            self.build,
            self.cache,
            dataclasses.replace(self.engine, event_skipping=skipping),
            self.cluster,
            num_blocks=self.num_blocks,
            num_host_blocks=self.num_host_blocks,
            cost=self.cost,
        )
        check_cluster(result, self)
        return result

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
    for number, part in enumerate(result.replicas):
        share = scenario.share(result, number)
        rows = np.isin(part.requests["request_id"], np.flatnonzero(nowhere), invert=True)
        at_home = {name: column[rows] for name, column in part.requests.items()}
        assert at_home["request_id"].tolist() == np.flatnonzero(requests["replica"] == number).tolist()
        pauses = {
            **part.pauses,
            "request_id": np.searchsorted(at_home["request_id"], part.pauses["request_id"]),
        }
        check_conservation(dataclasses.replace(part, requests=at_home, pauses=pauses), share)


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

    seen: list[tuple[int, ...]] = []  # noqa: RUF012  # of the run in progress, whoever made it

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
    """What `scenarios` draws, on up to three replicas. A step that decodes takes time."""
    found = draw(scenarios())
    cost = found.cost
    if isinstance(cost, LinearCost) and not (cost.base or cost.sequence or cost.key):
        cost = dataclasses.replace(cost, base=10)
    names = ["round_robin", "least_loaded", "longest_prefix", "cluster_cases:Close"]
    cluster = ClusterConfig(draw(st.integers(1, 3)), routing or draw(st.sampled_from(names)))
    engine = dataclasses.replace(found.engine, block_map_samples=0)
    fields = {each.name: getattr(found, each.name) for each in dataclasses.fields(found)}
    return ClusterScenario(**{**fields, "cost": cost, "engine": engine, "cluster": cluster})
