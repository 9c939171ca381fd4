"""HostOracle: what the host's slots would hold, and what its blocks must be, by the oracle's account.

Histories move between the shadows of GPU and host exactly when a transfer list is executed, in the documented
order. Which blocks are moved and why is the manager's business; that everybody then reads what they said is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from allocator.sequence import KVSequence
from allocator.shadow import State, Story

if TYPE_CHECKING:
    from allocator.oracle import Oracle

MAX_IN_FLIGHT = 4
"""Transfer lists that are in flight at once; then the oldest is done."""


class InFlight:
    """A transfer list that was executed: what its ends must still hold when the manager is told that it is done.

    gpu      what arrived in cached blocks, which nobody may write, but for those that this very step fills up
    host     what was written to the host, or read there
    filling  the GPU blocks that nothing was written in since they arrived. Who writes in a block comes after what
             fills it, so one that was written in, cached, let go of and evicted can be filled anew
    """

    def __init__(self, transfers: Any, oracle: HostOracle) -> None:
        self.transfers = transfers
        self.sources = {int(block) for block in transfers.swap_outs[:, 0]}
        self.host_written = {int(block) for block in transfers.swap_outs[:, 1]}
        self.host_read = {int(block) for block in transfers.swap_ins[:, 0]}
        self.gpu_written = {int(block) for block in transfers.swap_ins[:, 1]}
        self.filling = set(self.gpu_written)
        cached = oracle.oracle.cached_blocks()
        cached -= {slot // oracle.oracle.size for _, slots, _ in oracle.oracle.writes for slot in slots}
        self.gpu = {block: oracle.oracle.shadow.slots(block) for block in self.gpu_written & cached}
        self.host = {block: oracle.shadow.slots(block) for block in self.host_written | self.host_read}

    def check(self, oracle: HostOracle) -> None:
        """See that no end was given to another use."""
        for block, slots in self.gpu.items():
            assert oracle.oracle.shadow.slots(block) == slots, f"block {block} was written while being filled"
        for block, slots in self.host.items():
            assert oracle.shadow.slots(block) == slots, f"host block {block} was written while in transfer"


class HostOracle:
    """The host's side of an oracle: a shadow of `num_blocks` host blocks, and the transfers in flight.

    swapped    the sequences that are swapped out
    in_flight  transfer lists that were executed, and of whose end the manager has not been told
    """

    def __init__(self, oracle: Oracle, num_blocks: int) -> None:
        self.oracle = oracle
        self.num_blocks = num_blocks
        self.shadow = oracle.shadow.twin()
        self.swapped: dict[KVSequence, Story] = {}
        self.in_flight: list[InFlight] = []
        self.lag = False  # whether transfers stay in flight for some time
        self.finished: Any = None
        self.moved_out = self.moved_in = 0

    @property
    def manager(self) -> Any:
        """Return the manager under test."""
        return self.oracle.manager

    @property
    def pending(self) -> bool:
        """Return whether transfers wait for the step to be run."""
        return self.num_blocks > 0 and len(self.manager.host_tier.queue) > 0

    # ------------------------------------------------ executing

    def run(self) -> bool:
        """Execute the pending transfers; return whether there were any."""
        if not self.num_blocks:
            return False
        if not self.pending:  # nor are there arrays to be made
            return False
        transfers = self.manager.pending_swaps()
        outs, ins = transfers.swap_outs.tolist(), transfers.swap_ins.tolist()
        if not outs and not ins:
            return False
        for pairs in (outs, ins):
            destinations = [destination for _, destination in pairs]
            assert len(set(destinations)) == len(destinations), f"{pairs} writes a block twice"
        for each in self.in_flight:
            for _, block in outs:
                assert block not in each.host_written, f"host block {block} is still being filled"
                assert block not in each.host_read, f"host block {block} is still being read"
            for _, block in ins:
                assert block not in each.filling, f"block {block} is still being filled"
        self.oracle.shadow.move(outs, self.shadow)
        self.shadow.move(ins, self.oracle.shadow)
        self.moved_out += len(outs)
        self.moved_in += len(ins)
        self.in_flight.append(InFlight(transfers, self))
        if not self.lag or len(self.in_flight) > MAX_IN_FLIGHT:
            self.finish(0)
        return True

    def wrote(self, slots: Sequence[int]) -> None:
        """Note that a step wrote in some slots of the GPU."""
        for each in self.in_flight:
            each.filling.difference_update(slot // self.oracle.size for slot in slots)

    def finish(self, index: int) -> None:
        """Tell the manager that one of the lists in flight is done."""
        done = self.in_flight.pop(index % len(self.in_flight))
        done.check(self)
        self.finished = done.transfers
        self.manager.transfers_done(self.finished)

    def can_read(self, sequence: KVSequence) -> bool:
        """Return whether what would have to be moved is there, and not only once the pending lists have run."""
        kept = {block for e in self.manager.index.extents() if e.host is not None for block in e.ids}
        held = {block for e in self.manager.tables.held_extents(sequence) for block in e.ids}
        moved = held.union(self.oracle.table(sequence)) - kept
        filling = {block for _, block in self.manager.host_tier.queue.pending_swap_ins()}
        return filling.isdisjoint(moved)

    def gpu_ends(self) -> set[int]:
        """Return the GPU blocks that what is in flight reads or writes."""
        return {block for each in self.in_flight for block in each.sources | each.gpu_written}

    def host_ends(self) -> set[int]:
        """Return the host blocks that what is in flight reads or writes."""
        return {block for each in self.in_flight for block in each.host}

    # ------------------------------------------------ what the manager says; to be replaced for another manager

    def cached_blocks(self) -> set[int]:
        """Return the host blocks of the prefix index."""
        return {block for e in self.manager.index.extents() if e.host is not None for block in e.host}

    def table(self, sequence: KVSequence) -> list[int]:
        """Return the host blocks of a swapped-out sequence."""
        return list(self.manager.host_tier.host_table(sequence))

    def snapshot(self) -> object:
        """Return all that a refused call must leave as it was."""
        if not self.num_blocks:
            return None
        tier = self.manager.host_tier
        return (
            tier.host.free_ids().tolist(),
            list(tier.host.limbo),
            list(tier.host.order),
            len(tier.queue),
            [(s, s.num_tokens, list(s.host or []), s.anchor) for s in tier.swapped],
            [(e.host and e.host[:], e.host_references) for e in self.manager.index.extents()],
        )

    # ------------------------------------------------ checks

    def states(self) -> dict[State, int]:
        """Return which history each cached host block ends. Only between steps."""
        if not self.num_blocks:
            return {}
        found: dict[State, int] = {}
        for block in self.cached_blocks():
            state = self.shadow.block(block)
            assert state, f"host block {block} is cached, but does not hold one prefix"
            assert state not in found or not self.oracle.reuse, (
                f"host blocks {block} and {found[state]} cache the same"
            )
            found[state] = block
        return found

    def prefixes(self, states: Sequence[State]) -> set[State]:
        """Return the histories that these, each of whole blocks, build on, themselves included."""
        found: set[State] = set()
        for state in states:
            while state and state not in found:
                found.add(state)
                state = self.shadow.block_before(state)
        return found

    def check(self, on_gpu: Mapping[State, int]) -> None:
        """Check everything on the host, given which histories the GPU has cached. Only between steps."""
        if not self.num_blocks:
            return
        for each in self.in_flight:
            each.check(self)
        oracle, stats = self.oracle, self.manager.stats().host
        tables: set[int] = set()
        for sequence, story in self.swapped.items():
            table = self.table(sequence)
            tables |= set(table)
            assert sequence.num_tokens == story.length
            positions = oracle.positions_held(story)
            assert len(table) == -(-len(positions) // oracle.size)
            assert self.shadow.read(table, len(positions)) == [story.states[p] for p in positions], (
                f"{sequence} was not kept on the host"
            )
            assert not self.oracle.table(sequence), f"{sequence} is swapped out, but has GPU blocks"
        states = self.states()
        cached = set(states.values()) if oracle.reuse else self.cached_blocks()
        if oracle.reuse and oracle.window is None:
            reachable = on_gpu.keys() | states.keys()
            for state in states:
                before = self.shadow.block_before(state)
                assert before in reachable or self.shadow.is_root(before), (
                    "the host holds what is out of reach"
                )
        blocks = (stats.free_blocks, stats.evictable_blocks, stats.held_blocks, stats.in_transfer_blocks)
        assert sum(blocks) == stats.num_blocks == self.num_blocks
        assert stats.free_blocks == self.num_blocks - len(cached | tables | self.host_ends())
        assert stats.evictable_blocks <= len(cached - tables)
        assert stats.held_blocks <= len(cached | tables)
        if not self.in_flight:
            assert stats.in_transfer_blocks == 0
            assert stats.evictable_blocks == len(cached - tables)
            both = [state for state, block in states.items() if block not in tables]
            assert not oracle.reuse or not on_gpu.keys() & set(both), "held by both tiers"
        assert stats.offloaded_blocks + stats.swapped_out_blocks == self.moved_out
        assert stats.onboarded_blocks + stats.swapped_in_blocks == self.moved_in

    def most_held(self) -> int:
        """Return how many cached GPU blocks that no sequence holds what is in flight may hold. Between steps."""
        ends, shadow, cached = self.gpu_ends(), self.oracle.shadow, self.oracle.cached_blocks()
        if self.oracle.window is not None:
            return len(ends & cached)
        held = self.prefixes([shadow.block(block) for block in ends & cached])
        return sum(block in ends or shadow.block(block) in held for block in cached)

    def available(self) -> int:
        """Recount what the host could give. Only with nothing in flight."""
        return self.num_blocks - len({block for sequence in self.swapped for block in self.table(sequence)})

    def host_needed(self, sequence: KVSequence) -> tuple[int, int]:
        """Return the fewest and the most host blocks that swapping a sequence out takes. Only between steps."""
        oracle = self.oracle
        table = oracle.table(sequence)
        if not oracle.reuse:  # equal content is not shared, so what is held cannot be told by content
            return 0, len(table)
        states, cached = self.states(), oracle.cached_blocks()
        if oracle.window is not None:
            needed = sum(block not in cached or oracle.shadow.block(block) not in states for block in table)
            return needed, needed
        full = oracle.stories[sequence].full_states()
        # a last block that is partly used can be cached all the same: then all of it is moved or held
        known = full + [oracle.shadow.block(block) for block in table[len(full) :] if block in cached]
        needed = len(table) - sum(state in states for state in known)
        return needed, needed

    def gpu_needed(self, sequence: KVSequence) -> tuple[int, int]:
        """Return the fewest and the most blocks by which swapping in lessens what is available."""
        oracle, story = self.oracle, self.swapped[sequence]
        total = -(-story.length // oracle.size) - sequence.left
        if not oracle.reuse:
            return 0, total
        tables = {block for s in oracle.stories for block in oracle.table(s)}
        if oracle.window is not None:
            here, there = oracle.cached_states(), self.cached_blocks()
            known = [self.shadow.block(block) for block in self.table(sequence) if block in there]
            total -= sum(state in here and here[state] in tables for state in known)
            return total, total
        held = {state for other in oracle.stories.values() for state in other.full_states()}
        cached = oracle.cached_states()
        full = story.full_states()
        free = sum(state in cached and (cached[state] in tables or state in held) for state in full)
        # whether the last, partly used block is a cached one, only the manager knows
        return len(full) - free, total - free

    def drain(self) -> None:
        """Finish and release all, and see that nothing is left."""
        while self.in_flight:
            self.finish(0)
        for sequence in list(self.swapped):
            self.manager.release(sequence)
        self.swapped.clear()

    def check_drained(self) -> None:
        """See that every host block is free or evictable."""
        if self.num_blocks:
            stats = self.manager.stats().host
            assert stats.free_blocks + stats.evictable_blocks == self.num_blocks, "host blocks leaked"
