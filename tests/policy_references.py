"""The naive block manager with one of the references of allocator.rules in place of its own order."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from naive_manager import Identity, NaiveManager, NaiveSequence

from allocator.rules.references import Reference
from allocator.rules.retention import wish_of


class _Noted(dict):  # type: ignore[type-arg]
    """The naive manager's cached blocks; tells the reference what enters and what is taken back."""

    reference: Reference

    def __setitem__(self, block: Identity, value: Any) -> None:
        super().__setitem__(block, value)
        self.reference.cached(block)

    def __delitem__(self, block: Identity) -> None:
        super().__delitem__(block)
        self.reference.uncached(block)


class PolicyManager(NaiveManager):
    """The naive manager, evicting what the reference says."""

    def __init__(
        self, num_blocks: int, size: int, reference: Reference, reuse: bool, ghosts: int, partial: str = ""
    ) -> None:
        super().__init__(num_blocks, size, "", reuse, ghosts, partial)
        self.reference = reference
        self.cached = _Noted()
        self.cached.reference = reference

    def take(self) -> int:
        if self.free:
            return self.free.pop()
        parents = {one[0] for one in self.cached}
        victim = self.reference.victim({one for one in self.idle if one not in parents})
        del self.reference.order[victim]
        self.reference.evicted(victim)
        del self.idle[victim]
        self.evicted.append(victim)
        self.remember(victim)
        return self.cached.pop(victim).block

    def hold(self, one: Identity) -> None:
        if one in self.idle:
            self.reference.referenced(one)
        super().hold(one)

    def drop(self, one: Identity) -> None:
        super().drop(one)
        if one in self.idle:
            self.reference.released(one)

    def hit(self, one: Identity) -> None:
        super().hit(one)
        self.reference.hit(one)

    def pass_time(self, now: int) -> None:
        self.reference.pass_time(now)

    def retain(self, sequence: NaiveSequence, first: int) -> None:
        for position, one in enumerate(sequence.path[first:], first):
            said = sequence.wish(position)
            if said is not None:
                self.reference.retained(one, *said)

    def index(self, sequence: NaiveSequence, forking: bool = False) -> None:
        known = len(sequence.path)
        super().index(sequence, forking)
        self.retain(sequence, known)

    def admit(
        self,
        prompt: Sequence[Hashable],
        salt: Hashable,
        num_tokens: int,
        retention: Any = None,
        part: Identity | None = None,
        part_tokens: int = 0,
    ) -> NaiveSequence:
        sequence = super().admit(prompt, salt, num_tokens, retention, part, part_tokens)
        if retention is not None:
            sequence.wish = wish_of(retention, len(prompt), self.size)
            self.retain(sequence, 0)
        return sequence
