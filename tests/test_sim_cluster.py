"""Several replicas: each against an engine of its own, skipping against stepping, and routing by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from cluster_cases import (
    PLAIN,
    ClusterScenario,
    Spy,
    assert_same_cluster,
    cluster_scenarios,
    session_scenario,
    steps_of,
)
from different_cases import different_examples
from engine_cases import LinearCost, Scenario, assert_identical, unlike
from hypothesis import given

from allocator.config import BuildConfig
from sim.cluster.config import ClusterConfig
from sim.cluster.routing import ReplicaView, RoundRobin
from sim.event_table import event_frame
from sim.request import Request
from sim.scheduler.beams import beam_parents

# ------------------------------------------------------------------ exactness


@different_examples(1)
@given(cluster_scenarios())
def test_skipping_equals_stepping(scenario: ClusterScenario) -> None:
    assert_same_cluster(scenario.run(), scenario.run(skipping=False))


@different_examples()
@given(cluster_scenarios(routing="cluster_cases:Spy"))
def test_policies_see_the_same_skipping_or_not(scenario: ClusterScenario) -> None:
    Spy.seen.clear()
    scenario.run()
    skipped = list(Spy.seen)
    Spy.seen.clear()
    scenario.run(skipping=False)
    assert skipped == Spy.seen


@different_examples(1)
@given(cluster_scenarios())
def test_each_replica_is_an_engine_of_its_own(scenario: ClusterScenario) -> None:
    """What a replica did is what the plain engine does with the requests that the replica got, when it got them."""
    with pytest.MonkeyPatch.context() as patch:  # beams go by the place in the trace
        patch.setattr(
            "sim.scheduler.beams.beam_parents", lambda _, tokens, width: beam_parents(0, tokens, width)
        )
        _check_engines_of_their_own(scenario)


def _check_engines_of_their_own(scenario: ClusterScenario) -> None:
    result = scenario.run()
    looks = scenario.cluster.routing != "round_robin" and scenario.cluster.num_replicas > 1
    for number, part in enumerate(result.replicas):
        alone = scenario.share(result, number).run()
        there = np.flatnonzero(result.requests["replica"] == number)
        order = np.lexsort((there, result.requests["arrival_ps"][there]))
        for name, column in alone.requests.items():
            if name != "request_id":
                assert column.tolist() == result.requests[name][there[order]].tolist(), name
        assert part.gaps_ps.tolist() == alone.gaps_ps.tolist()
        assert part.cache == alone.cache
        assert steps_of(part.timeline) == steps_of(alone.timeline)
        if not looks:  # nor is it cut otherwise
            for name, column in alone.timeline.items():
                assert column.tolist() == part.timeline[name].tolist(), name


@different_examples()
@given(cluster_scenarios())
def test_one_replica_behind_a_router_is_the_plain_engine(scenario: ClusterScenario) -> None:
    cluster = dataclasses.replace(scenario.cluster, num_replicas=1)
    engine = dataclasses.replace(scenario.engine, events=True)
    scenario = dataclasses.replace(scenario, cluster=cluster, engine=engine)
    result = scenario.run()
    alone = Scenario(
        **{each.name: getattr(scenario, each.name) for each in dataclasses.fields(Scenario)}
    ).run()
    same = dataclasses.replace(
        result,
        requests={name: column for name, column in result.requests.items() if name != "replica"},
        timeline={name: column for name, column in result.timeline.items() if name != "replica"},
        block_map=result.replicas[0].block_map,
    )
    assert_identical(same, alone)
    (replica,) = result.replicas
    assert replica.events is not None
    assert alone.events is not None
    ours, theirs = (event_frame(each.events, each.sequences) for each in (replica, alone))
    assert ours.equals(theirs)


def test_skipping_equals_stepping_on_a_larger_workload_with_sessions() -> None:
    scenario = dataclasses.replace(session_scenario(30.0), cluster=ClusterConfig(3, "longest_prefix"))
    result = scenario.run()
    assert_same_cluster(result, scenario.run(skipping=False))
    assert set(result.requests["replica"]) == {0, 1, 2}
    assert result.timeline["steps"].max() > 4
    assert result.cache.hit_tokens


# ------------------------------------------------------------------ who gets what, by hand


def _placed(scenario: ClusterScenario) -> list[int]:
    result = scenario.run()
    assert_same_cluster(result, scenario.run(skipping=False))
    return result.requests["replica"].tolist()


def _build(tokens_per_block: int = 2, max_batch_size: int = 4) -> BuildConfig:
    return BuildConfig(max_batch_size, 32, 64, tokens_per_block=tokens_per_block)


def test_round_robin_takes_turns() -> None:
    requests = unlike((0, 2, 9), (0, 2, 1), (0, 2, 1), (50, 2, 1), (50, 2, 1))
    scenario = ClusterScenario(
        requests, _build(), 20, engine=PLAIN, cost=LinearCost(10), cluster=ClusterConfig(3, "round_robin")
    )
    assert _placed(scenario) == [0, 1, 2, 0, 1]


def test_least_loaded_by_hand() -> None:
    """Two replicas, steps of 10 ps, blocks of 2 tokens; a prompt is computed in one step.

    t = 0   request 0 (2 tokens in, 5 out) finds both empty: the first. Request 1 (4 in, 2 out) then finds one
            sequence there: the second. Both compute their prompts until 10.
    t = 5   one sequence each; request 0's prompt takes a block, request 1's two: more are available at the first.
    t = 10  request 2 starts beside request 0.
    t = 20  request 1 has its second token and leaves before request 3 arrives: the second is empty. Request 4 finds
            two sequences at the first and one at the second.
    t = 50  request 0 leaves the first, where request 2 ran until 30: it is empty. Requests 3 and 4, prompts computed
            from 20 to 30, have 5 tokens at 70: request 5 goes to the first.
    """
    requests = unlike((0, 2, 5), (0, 4, 2), (5, 2, 2), (20, 2, 5), (20, 2, 5), (50, 2, 1))
    scenario = ClusterScenario(
        requests, _build(), 20, engine=PLAIN, cost=LinearCost(10), cluster=ClusterConfig(2, "least_loaded")
    )
    assert _placed(scenario) == [0, 1, 0, 1, 1, 0]
    result = scenario.run()
    assert result.requests["finish_ps"].tolist() == [50, 20, 30, 70, 70, 60]
    assert result.requests["first_token_ps"].tolist() == [10, 10, 20, 30, 30, 60]


def test_longest_prefix_by_hand() -> None:
    """Two replicas; a load of two more than elsewhere is out of balance.

    t = 0   nothing is cached: requests 0 (what A says) and 1 (B) go to the least loaded, one each.
    t = 40  both have left, and their prompts of 4 blocks stay cached. Request 2 says A: the first replica.
    t = 41  request 3 says B: the second.
    t = 42  request 4 says A. One sequence each: the first replica, as it has the prefix.
    t = 43  request 5 says A: the first has 2 sequences, the second 1, which is not out of balance: the first.
    t = 44  request 6 says A, but now it is 3 to 1: the second.
    t = 45  request 7 says A in one block of 4, and then C: little enough not to matter: 3 to 2, the second.
    """
    a, b = np.zeros(8, np.int32), np.ones(8, np.int32)
    c = np.concatenate([a[:2], np.full(6, 2, np.int32)])
    rows = [(0, a), (0, b), (40, a), (41, b), (42, a), (43, a), (44, a), (45, c)]
    requests = [
        Request(row, arrival, 8, 3, token_ids=ids, named_tokens=8) for row, (arrival, ids) in enumerate(rows)
    ]
    scenario = ClusterScenario(
        requests,
        _build(),
        40,
        engine=PLAIN,
        cost=LinearCost(10),
        cluster=ClusterConfig(2, "cluster_cases:Close"),
    )
    assert _placed(scenario) == [0, 1, 0, 1, 0, 0, 1, 1]
    # Of 4 blocks, the last one is computed again for the last token's sake. Requests 6 and 7 start together, at 50,
    # and the second of them finds the block that the first one computes.
    assert scenario.run().requests["hit_tokens"].tolist() == [0, 0, 6, 6, 6, 6, 0, 2]


def test_a_turn_arrives_before_anybody_goes_on() -> None:
    """Request 0 ends at 20, and its next turn arrives then: it is seen at the moment at which others' steps end."""
    first = Request(0, 0, 2, 2)
    requests = [first, Request(1, 0, 2, 8), Request(2, 0, 2, 2, parent=0), Request(3, 20, 2, 1)]
    scenario = ClusterScenario(
        requests, _build(), 20, engine=PLAIN, cost=LinearCost(10), cluster=ClusterConfig(2, "least_loaded")
    )
    result = scenario.run()
    assert result.requests["arrival_ps"].tolist() == [0, 0, 20, 20]
    assert _placed(scenario) == [0, 1, 0, 0]
    assert result.requests["admit_ps"].tolist() == [0, 0, 20, 20]


# ------------------------------------------------------------------ what is refused


class Stranger(RoundRobin):
    """Chooses a replica that there is not."""

    def choose(self, request: Request, replicas: Sequence[ReplicaView]) -> ReplicaView:
        return ReplicaView.unseen(7)


@pytest.mark.parametrize(
    ("routing", "rule"),
    [
        (
            "nearest",
            r"routing \(nearest\) must be one of round_robin, least_loaded, longest_prefix, or package",
        ),
        ("nowhere:Policy", r"routing \(nowhere:Policy\) cannot be made: No module named 'nowhere'"),
        ("sim.cost:StepBatch", r"routing \(sim.cost:StepBatch\) cannot be made"),
        ("collections:OrderedDict", r"routing \(collections:OrderedDict\) must be a sim.cluster"),
        ("test_sim_cluster:Stranger", r"routing must choose one of the replicas"),
    ],
)
def test_a_routing_that_is_none(routing: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        ClusterScenario(unlike((0, 1, 1)), _build(), 9, engine=PLAIN, cluster=ClusterConfig(2, routing)).run()


def test_at_least_one_replica() -> None:
    with pytest.raises(ValueError, match=r"num_replicas \(0\) must be"):
        ClusterConfig(0)
