"""Sequences that decode in lockstep."""

from __future__ import annotations

from hypothesis import strategies as st

from allocator.content import TokenContent
from allocator.oracle import MAX_LIVE
from allocator.rules.base import CHUNKS, FEW, INDEX, TOKEN_BITS, WAITS, ManagerMachine
from allocator.rules.operation import operation
from allocator.shadow import Prompt


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

    @operation(
        when=lambda self: len(self.batch) > 0 and len(self.stories) < MAX_LIVE,
        index=INDEX,
        count=st.integers(1, 9),
        bits=st.sampled_from([None, *range(16)]),
        chunk=CHUNKS,
    )
    def follow(self, index: int, count: int, bits: int | None, chunk: int) -> None:
        """Decode the batch step by step while nobody looks; then admit a prompt that a member has just said."""
        self.append_unwatched(self.batch, count, bits)
        story = self.stories[self.batch[index % len(self.batch)]]
        said = story.named()
        if said:
            prompt = self.learn(Prompt(TokenContent([*said, 0]), (*said, 0)))
            self.admit_prompt(prompt, story.salt, chunk)
        self.did("follow")
