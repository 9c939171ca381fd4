"""Retention: how dearly, and for how long, a request wants its blocks kept once nobody references them.

    RetentionConfig((TokenRange(0, 512, priority=100), TokenRange(512, None, priority=10)), decode_priority=60)

A priority is a whole number from 0 to 100; blocks of which nothing was said have 35. It is a request's wish and
a policy's to grant: the policy named `priority` does, the others look at other things.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from allocator.checks import require_int, require_optional_int

DEFAULT_PRIORITY = 35
MAX_PRIORITY = 100

FOREVER = 2**62
"""Beyond every position of a block."""


class Retention(NamedTuple):
    """What one request wants for a block: a priority, and how long it lasts (None: for good)."""

    priority: int
    duration: int | None = None


def _require_priority(name: str, value: int) -> None:
    require_int(name, value, 0)
    if value > MAX_PRIORITY:
        raise ValueError(f"{name} ({value}) must be at most {MAX_PRIORITY}")


@dataclass(frozen=True)
class TokenRange:
    """Tokens start … end − 1 of a prompt, and how its blocks are to be kept. Raises ValueError on a broken rule.

    end       None for the prompt's end
    priority  0 (first to go) to 100
    duration  units of the manager's `now` from the moment the block is unreferenced; None for good
    """

    start: int
    end: int | None
    priority: int = DEFAULT_PRIORITY
    duration: int | None = None

    def __post_init__(self) -> None:
        require_int("start", self.start, 0)
        require_optional_int("end", self.end, 1)
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"end ({self.end}) must be greater than start ({self.start})")
        _require_priority("priority", self.priority)
        require_optional_int("duration", self.duration, 1)


@dataclass(frozen=True)
class RetentionConfig:
    """What a request wants for its blocks, by token ranges of its prompt and for what it generates.

    ranges           in any order, not overlapping
    decode_priority  of blocks that begin behind the prompt
    decode_duration  as TokenRange.duration

    TensorRT-LLM's KvCacheRetentionConfig, except where it says so:

    - A block has the range that its *first token* lies in. Of a prompt's block in no range nothing is said.
    - The newest word counts. A request that finds a block in the cache, at admission or when it fills a block
      whose content is cached already, replaces priority and duration if it says something of that block. If it
      says nothing, both stay. (There, the priority stays, and loses its duration.)
    - A duration begins when the last reference to a block goes, and ends early if it is referenced again; then
      it begins anew. When it is over, the block is one of priority 35, the most recently used of them.
    - A block that is taken out of the cache to be written in (by its only holder, once truncated, or as a part that
      a request steals) is a new one when it is full again, with the wish of whoever wrote it, be it equal content.
    - What leaves the GPU leaves its priority behind: content that the host tier brings back is of the default one,
      until a request says otherwise. A sequence that is swapped in says again what it said at admission.
    - In a windowed cache a request speaks of the blocks that its window and sinks hold, one after the other, and
      their time begins when they have left. Of what it finds in the cache that is the window at the end alone.
    - A priority of 35 is the default, and has nothing to expire to.

    Raises ValueError for ranges that overlap, and whatever else breaks a rule.
    """

    ranges: tuple[TokenRange, ...] = ()
    decode_priority: int = DEFAULT_PRIORITY
    decode_duration: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ranges, Iterable) or not all(isinstance(r, TokenRange) for r in self.ranges):
            raise ValueError(f"ranges ({self.ranges!r}) must be TokenRanges")
        ranges = tuple(sorted(self.ranges, key=lambda r: r.start))
        object.__setattr__(self, "ranges", ranges)
        for one, other in itertools.pairwise(ranges):
            if one.end is None or one.end > other.start:
                raise ValueError(f"ranges ({one.start} to {one.end}, from {other.start}) must not overlap")
        _require_priority("decode_priority", self.decode_priority)
        require_optional_int("decode_duration", self.decode_duration, 1)

    @classmethod
    def whole(cls, priority: int, duration: int | None = None) -> RetentionConfig:
        """Return the wish for all blocks alike, prompt and answer: what pins a session across a tool call."""
        return cls((TokenRange(0, None, priority, duration),), priority, duration)

    def plan(self, num_prompt_tokens: int, tokens_per_block: int) -> RetentionPlan | None:
        """Return the same by blocks, or None if nothing is said of any."""
        prompt = -(-num_prompt_tokens // tokens_per_block)
        plan = RetentionPlan()
        for each in self.ranges:
            plan.extend(min(-(-each.start // tokens_per_block), prompt), None)
            end = prompt if each.end is None else min(-(-each.end // tokens_per_block), prompt)
            plan.extend(end, Retention(each.priority, each.duration))
        plan.extend(prompt, None)
        decode = Retention(self.decode_priority, self.decode_duration)
        plan.extend(FOREVER, None if decode.priority == DEFAULT_PRIORITY else decode)
        return None if plan.wishes == [None] else plan


class RetentionPlan:
    """What a sequence wants for each of its blocks, in runs of equal wishes; None where it says nothing."""

    __slots__ = ("ends", "wishes")

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.wishes: list[Retention | None] = []

    def extend(self, end: int, wish: Retention | None) -> None:
        """Let the blocks from where the plan ends up to `end` have this wish."""
        if end <= (self.ends[-1] if self.ends else 0):
            return
        if self.wishes and self.wishes[-1] == wish:
            self.ends[-1] = end
        else:
            self.ends.append(end)
            self.wishes.append(wish)

    def at(self, block: int) -> tuple[Retention | None, int]:
        """Return the wish for the block at this position, and where the run that it is in ends."""
        run = bisect_right(self.ends, block)
        return self.wishes[run], self.ends[run]


def kept(wish: Retention | None) -> Retention | None:
    """Return what an extent remembers of a wish: nothing if it is the default."""
    return None if wish is None or wish.priority == DEFAULT_PRIORITY else wish
