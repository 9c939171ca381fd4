"""Routing: which of several replicas gets a request.

A policy is one class with one method. It sees each replica as it is at that very moment, the engine step in progress
included: what that step computes counts as computed, and whoever it finishes is still there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar, Generic, Protocol, TypeVar

from allocator.content import Content
from sim.request import Request
from sim.user_code import require_methods


@dataclass(frozen=True, slots=True, eq=False)
class ReplicaView:
    """One replica, as a policy sees it when a request arrives.

    number             the replica, from 0
    running_sequences  sequences with blocks, each sample counted, also those still to come of a prompt in progress
    waiting_sequences  sequences without: of requests that have not started, or were preempted
    prompt_tokens      of requests whose prompt is not computed yet, waiting or running; all of it
    context_tokens     tokens that have a slot in the running sequences' tables
    available_blocks   blocks that could be taken: free ones, and cached ones that nobody uses
    num_blocks         blocks of the pool
    """

    number: int
    running_sequences: int
    waiting_sequences: int
    prompt_tokens: int
    context_tokens: int
    available_blocks: int
    num_blocks: int
    _look_up: Callable[[], int]

    @property
    def sequences(self) -> int:
        """Return the sequences in flight, waiting and running."""
        return self.running_sequences + self.waiting_sequences

    @property
    def hit_tokens(self) -> int:
        """Return how many tokens of the request's prompt would be found in the replica's cache. Looks them up."""
        return self._look_up()

    @classmethod
    def unseen(cls, number: int) -> ReplicaView:
        """Return the view that a policy has which does not look: the number, and −1 for all else."""
        return cls(number, -1, -1, -1, -1, -1, -1, lambda: -1)


class RoutingPolicy(ABC):
    """Choose a replica for each request, in the order of arrival; made once a run, without arguments.

    `looks` says whether the choice depends on the state of the replicas. Where it does, runs of engine steps end at
    every arrival, so that it is known.
    """

    looks: ClassVar[bool] = True

    @abstractmethod
    def choose(self, request: Request, replicas: Sequence[ReplicaView]) -> ReplicaView:
        """Return one of `replicas`, of which there are two or more, in the order of their numbers."""


class RoundRobin(RoutingPolicy):
    """Each replica in turn, whatever it has to do."""

    looks = False

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: Request, replicas: Sequence[ReplicaView]) -> ReplicaView:
        chosen = replicas[self._turn % len(replicas)]
        self._turn += 1
        return chosen


class LeastLoaded(RoutingPolicy):
    """The replica with the fewest sequences in flight; of equals, the one with the most blocks available; of equals,
    the first.
    """

    def choose(self, request: Request, replicas: Sequence[ReplicaView]) -> ReplicaView:
        return least_loaded(replicas)


class LongestPrefix(RoutingPolicy):
    """The replica that has most tokens of the prompt in its cache; of equals, the least loaded.

    The least loaded, whatever is cached, if the replicas are out of balance: the most sequences in flight exceed the
    fewest by more than `most_ahead` and are more than `most_times` as many. And if no cache has more than
    `least_share` of the prompt. These are rules and defaults of the cache-aware policy of SGLang's router, which
    keeps an approximate radix tree for each replica where this one asks the cache itself.
    """

    most_ahead: ClassVar[int] = 64
    most_times: ClassVar[float] = 1.5
    least_share: ClassVar[float] = 0.3

    def choose(self, request: Request, replicas: Sequence[ReplicaView]) -> ReplicaView:
        loads = [replica.sequences for replica in replicas]
        fewest, most = min(loads), max(loads)
        if most - fewest > self.most_ahead and most > self.most_times * fewest:
            return least_loaded(replicas)
        hits = [replica.hit_tokens for replica in replicas]
        longest = max(hits)
        if longest <= self.least_share * request.prompt_tokens:
            return least_loaded(replicas)
        return least_loaded(
            [replica for replica, tokens in zip(replicas, hits, strict=True) if tokens == longest]
        )


def least_loaded(replicas: Sequence[ReplicaView]) -> ReplicaView:
    """Return the replica that LeastLoaded chooses."""
    return min(replicas, key=lambda replica: (replica.sequences, -replica.available_blocks))


ROUTING: dict[str, type[RoutingPolicy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "longest_prefix": LongestPrefix,
}
"""Policies by name."""


Served = TypeVar("Served", bound="Routable")


class Routable(Protocol):
    """What a router asks of a replica."""

    number: int

    def settle(self, now_ps: int) -> None:
        """Make the state what it is at this moment, now."""
        ...

    def view(self, request: Request, content: Content) -> ReplicaView:
        """Return what a policy sees; the replica must be settled."""
        ...


class Router(Generic[Served]):
    """A policy, made by its name, in front of some replicas."""

    def __init__(self, routing: str, replicas: Sequence[Served]) -> None:
        self._policy = make_routing(routing)
        self._replicas = replicas
        self._unseen = [ReplicaView.unseen(replica.number) for replica in replicas]

    def route(self, request: Request, content: Content | None, now_ps: int) -> tuple[Served, Content | None]:
        """Return the replica that gets a request now, and the prompt's content, made if somebody looked at it.

        A single replica gets all, and nobody looks. Raises ValueError if the policy chooses another's view.
        """
        replicas, policy = self._replicas, self._policy
        if len(replicas) == 1:
            return replicas[0], content
        views = self._unseen
        if policy.looks:
            content = content or request.content()
            for replica in replicas:
                replica.settle(now_ps)
            views = [replica.view(request, content) for replica in replicas]
        chosen = policy.choose(request, views)
        for replica, view in zip(replicas, views, strict=True):
            if view is chosen:
                return replica, content
        raise ValueError(f"routing must choose one of the replicas, not {chosen!r}")


def check_routing(name: str) -> None:
    """Raise ValueError unless `name` could be a policy's."""
    if ":" not in name and name not in ROUTING:
        raise ValueError(f"routing ({name}) must be one of {', '.join(ROUTING)}, or package.module:Class")


def make_routing(name: str) -> RoutingPolicy:
    """Return a new policy of that name. Raises ValueError if it cannot be imported or made."""
    check_routing(name)
    if ":" not in name:
        return ROUTING[name]()
    module, _, kind = name.partition(":")
    try:
        made = getattr(import_module(module), kind)()
    except Exception as error:  # whatever a user's module does when imported
        raise ValueError(f"routing ({name}) cannot be made: {error}") from None
    if not isinstance(made, RoutingPolicy):
        raise ValueError(f"routing ({name}) must be a sim.cluster.routing.RoutingPolicy")
    require_methods("routing", name, made, RoutingPolicy)
    return made
