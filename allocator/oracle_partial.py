"""What a partial hit must be, by comparing a prompt with every block that is cached. Used between steps only."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from math import gcd
from typing import TYPE_CHECKING

from allocator.shadow import Prompt
from allocator.windows import AttentionWindow

if TYPE_CHECKING:
    from allocator.oracle_recount import Recount


@dataclass(frozen=True)
class PartExpected:
    """The most tokens that a cached block has in common with what a prompt misses first.

    num_tokens  0 if there is no such block
    free        the blocks with so many that nobody holds and nothing builds on: to be stolen
    idle        those that nobody holds, but something builds on: to be copied, and kept until then
    held        those that somebody holds: to be copied
    """

    num_tokens: int = 0
    free: frozenset[int] = frozenset()
    idle: frozenset[int] = frozenset()
    held: frozenset[int] = frozenset()

    def after_evictions(self) -> PartExpected:
        """Return the same once anything that nobody holds may have been evicted, and the sources left bare."""
        return replace(self, free=self.free | self.idle)


def unit_tokens(prompt: Prompt, tokens_per_block: int) -> int:
    """Return how many tokens a prompt's content cannot tell apart."""
    family = prompt.content.family()
    return 1 if family == "tokens" else gcd(int(str(family)), tokens_per_block)


def expected_part(oracle: Recount, prompt: Prompt, salt: Hashable, hit_blocks: int) -> PartExpected:
    """Return what a lookup of a prompt has to find beyond its `hit_blocks` whole blocks."""
    size = oracle.size
    if not oracle.partial or not oracle.reuse:
        return PartExpected()
    blocks = -(-prompt.num_tokens // size)
    if oracle.window is not None and blocks > oracle.num_blocks:  # it can be computed in chunks
        blocks = AttentionWindow(oracle.window, oracle.num_sinks, size).blocks_held(prompt.num_tokens)
    if oracle.partial == "copy" and blocks >= oracle.num_blocks:
        return PartExpected()  # no room for a copy beside its source
    wanted = oracle.shadow.states(salt, prompt.tokens[: prompt.num_tokens - 1])[hit_blocks * size :][:size]
    unit = unit_tokens(prompt, size)
    cached = oracle.cached_blocks()
    tables = {block for sequence in oracle.stories for block in oracle.table(sequence)}
    states = oracle.held_states()
    on_host = oracle.host.states().keys()
    here = {oracle.shadow.block(block) for block in cached}
    parents = {oracle.shadow.block_before(state) for state in here | on_host}

    common: dict[int, int] = {}
    kinds: dict[str, set[int]] = {"free": set(), "idle": set(), "held": set()}
    for block in cached:
        state = oracle.shadow.block(block)
        if block in tables or state in states:
            possible = ["held"]
        elif oracle.host.in_flight:
            possible = ["held", "idle", "free"]  # transfers hold what lies on the way to what they move
        else:
            possible = ["idle" if state in parents or state in on_host else "free"]
        if "free" in possible or oracle.partial == "copy":
            for kind in possible:
                kinds[kind].add(block)
            found = oracle.shadow.read([block], size)
            agreed = next((i for i, state in enumerate(wanted) if found[i] != state), len(wanted))
            common[block] = agreed // unit * unit
    most = max(common.values(), default=0)
    if not most:
        return PartExpected()
    best = {block for block, tokens in common.items() if tokens == most}
    return PartExpected(most, **{kind: frozenset(blocks & best) for kind, blocks in kinds.items()})
