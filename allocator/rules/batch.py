"""Sequences that decode in lockstep."""

from __future__ import annotations

from allocator.rules.base import FEW, INDEX, TOKEN_BITS, WAITS, ManagerMachine
from allocator.rules.operation import operation


class BatchRules(ManagerMachine):
    """Sequences that decode in lockstep."""

    @operation(when=lambda self: any(self.complete(s) for s in self.stories))
    def join_all(self) -> None:
        """Let all join that can."""
        for sequence in self.stories:
            if self.alone(sequence):
                self.batch.add(sequence)
                self.did("join")

    @operation(when=lambda self: any(self.complete(s) for s in self.stories), index=INDEX)
    def join_or_leave(self, index: int) -> None:
        """Let a sequence join the batch, or leave it."""
        sequence = self.live(index, self.complete)
        assert sequence is not None
        if sequence in self.batch:
            self.batch.remove(sequence)
            self.did("leave")
        else:
            self.batch.add(sequence)
            self.did("join")

    @operation(when=lambda self: len(self.batch) > 0, count=FEW, bits=TOKEN_BITS, wait=WAITS)
    def append_batch(self, count: int, bits: int | None, wait: int) -> None:
        """Decode the whole batch for a step or several."""
        self.append_to(self.batch, count, bits, wait)
        self.did("append batch")
