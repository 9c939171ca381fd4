"""A host tier: sequences that are swapped out and in, and transfers that are done some time later.

Offloading and onboarding need no rules: evictions and hits bring them about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from hypothesis.stateful import precondition, rule

from allocator.oracle import MAX_LIVE
from allocator.rules.base import CHUNKS, INDEX, ManagerMachine
from allocator.sequence import KVSequence


class TierRules(ManagerMachine):
    """Sequences swapped out and in, between steps or while one is being scheduled; slow transfers."""

    serves_host: ClassVar[bool] = True

    def swapped_out(self, index: int) -> KVSequence | None:
        """Return one of the swapped-out sequences, or None."""
        found = list(self.host.swapped)
        return found[index % len(found)] if found else None

    @precondition(lambda self: self.host.num_blocks and any(s not in self.batch for s in self.stories))
    @rule(index=INDEX)
    def swap_out(self, index: int) -> None:
        """Swap a sequence out, if the host has room."""
        sequence = self.live(index, lambda s: s not in self.batch)
        if sequence is None or len(self.host.swapped) >= MAX_LIVE:
            return
        self.end_step_of(sequence)
        if not self.host.can_read(sequence):
            before = self.snapshot()
            try:
                self.manager.swap_out(sequence)
            except ValueError:
                assert self.snapshot() == before, "a refused call changed something"
            else:
                raise AssertionError("swapped out before its blocks were filled")
            self.flush()
        least = most = 0
        if self.settled and not self.host.in_flight:
            least, most = self.host.host_needed(sequence)
        done = self.refusing(
            least, most, lambda: self.manager.swap_out(sequence) or True, self.host.available
        )
        if done is not None:
            self.host.swapped[sequence] = self.stories.pop(sequence)
            self.did("swap out")

    @precondition(lambda self: self.host.swapped)
    @rule(index=INDEX)
    def swap_in(self, index: int) -> None:
        """Swap a sequence in, if the GPU has room."""
        sequence = self.swapped_out(index)
        if sequence is None or len(self.stories) >= MAX_LIVE:
            return
        least = most = 0
        if self.settled and not self.host.in_flight:
            least, most = self.host.gpu_needed(sequence)
        done = self.refusing(least, most, lambda: self.manager.swap_in(sequence) or True)
        if done is not None:
            self.stories[sequence] = self.host.swapped.pop(sequence)
            self.did("swap in")

    @precondition(lambda self: self.host.swapped)
    @rule(index=INDEX)
    def release_swapped(self, index: int) -> None:
        """End a sequence that is swapped out."""
        sequence = self.swapped_out(index)
        if sequence is not None:
            self.manager.release(sequence)
            del self.host.swapped[sequence]
            self.did("release swapped")

    @precondition(lambda self: self.host.in_flight)
    @rule(index=INDEX)
    def finish_transfers(self, index: int) -> None:
        """Let some transfers be done, not always the oldest."""
        self.host.finish(index)
        self.did("finish transfers")

    @precondition(lambda self: self.host.num_blocks and len(self.prompts) > 1)
    @rule(index=INDEX, chunk=CHUNKS)
    def come_back(self, index: int, chunk: int) -> None:
        """Admit an older prompt again, and end another sequence to make room: what was offloaded is onboarded."""
        victim = self.live(index + 1)
        if victim is not None and len(self.stories) > 2:
            self.end_step_of(victim)
            self.manager.release(victim)
            del self.stories[victim]
        if self.admit_prompt(self.prompts[index % len(self.prompts)], "", chunk):
            self.did("come back")

    @precondition(lambda self: self.host.swapped or self.host.pending)
    @rule(index=INDEX)
    def misuse_tiers(self, index: int) -> None:
        """Ask for what must be refused as bad input."""
        manager = self.manager
        calls: list[Callable[[], object]] = []
        swapped, running = self.swapped_out(index), self.live(index)
        if swapped is not None:
            calls += [
                lambda: manager.swap_out(swapped),
                lambda: manager.append([swapped]),
                lambda: manager.fork(swapped),
                lambda: manager.truncate(swapped, 1),
                lambda: self.batch.add(swapped),
            ]
        if running is not None:
            calls.append(lambda: manager.swap_in(running))
            if running in self.batch:
                calls.append(lambda: manager.swap_out(running))
        if self.host.pending:
            calls.append(manager.pending_copies)
        if self.host.finished is not None:
            finished = self.host.finished
            calls.append(lambda: manager.transfers_done(finished))
        before = self.snapshot()
        for call in calls:
            try:
                call()
            except ValueError:
                continue
            raise AssertionError("bad input was accepted")
        assert self.snapshot() == before, "a refused call changed something"
        self.did("misuse tiers")
