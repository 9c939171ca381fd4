"""Tables that share blocks."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from allocator.oracle import MAX_LIVE
from allocator.rules.base import INDEX, PARENTS, TOKEN_BITS, WAITS, ManagerMachine
from allocator.rules.operation import operation
from allocator.sequence import KVSequence


class SharingRules(ManagerMachine):
    """Tables that share blocks: fork, beam search, truncation."""

    def forked(self, parent: KVSequence, children: list[KVSequence]) -> None:
        """Note the children of a fork."""
        for child in children:
            self.stories[child] = self.stories[parent].fork()

    @operation(when=lambda self: 0 < len(self.stories) < MAX_LIVE, index=INDEX, n=st.integers(1, 3))
    def fork(self, index: int, n: int) -> None:
        """Fork a sequence."""
        sequence = self.live(index)
        if sequence is None or len(self.stories) == MAX_LIVE:
            return
        n = min(n, MAX_LIVE - len(self.stories))
        self.end_step_of(sequence)
        children = self.refusing(0, 0, lambda: self.manager.fork(sequence, n))
        if children is not None:
            self.forked(sequence, children)
            self.did("fork")

    @operation(
        when=lambda self: any(self.alone(s) for s in self.stories) and len(self.stories) < MAX_LIVE,
        index=INDEX,
        n=st.integers(1, 3),
        bits=TOKEN_BITS,
        wait=WAITS,
        ends=st.booleans(),
    )
    def sample(self, index: int, n: int, bits: int | None, wait: int, ends: bool) -> None:
        """Fork a sequence and let the children decode at once, with their parent unless that `ends`."""
        sequence = self.live(index, self.alone)
        assert sequence is not None
        self.end_step_of(sequence)
        n = min(n, MAX_LIVE - len(self.stories))
        children = self.refusing(0, 0, lambda: self.manager.fork(sequence, n))
        if children is None:
            return
        self.forked(sequence, children)
        writers = children if ends else [sequence, *children]
        if self.append_to(writers, 1, bits, wait) and ends:
            self.manager.release(sequence)
            del self.stories[sequence]
        self.did("sample")

    @operation(
        when=lambda self: len(self.stories) > 1,
        index=INDEX,
        width=st.integers(2, 4),
        parents=PARENTS,
    )
    def reorder_beams(self, index: int, width: int, parents: Sequence[int]) -> None:
        """Let beams of equal length go on from others, all in the batch or none."""
        one = self.live(index, self.complete)
        if one is None:
            return
        self.reorder(one, width, parents)
        self.did("reorder beams")

    def reorder(self, one: KVSequence, width: int, parents: Sequence[int]) -> None:
        """Let a sequence and those that can be beams of one group with it go on from others."""
        story = self.stories[one]
        beams = [
            s
            for s in self.stories
            if s.num_tokens == one.num_tokens
            and (s in self.batch) == (one in self.batch)
            and self.complete(s)
            and self.stories[s].salt == story.salt
        ][:width]
        chosen = [parent % len(beams) for parent in parents[: len(beams)]]
        for beam in beams:
            self.end_step_of(beam)
        stories = [self.stories[beams[parent]].fork() for parent in chosen]
        self.manager.reorder_beams(beams, chosen)
        self.reordered = True
        for i, (beam, heir) in enumerate(zip(beams, stories, strict=True)):
            if chosen[i] != i:
                self.stories[beam] = heir

    @operation(
        when=lambda self: any(self.complete(s) for s in self.stories) and len(self.stories) < MAX_LIVE,
        index=INDEX,
        n=st.integers(1, 3),
        parents=PARENTS,
        bits=TOKEN_BITS,
    )
    def search(self, index: int, n: int, parents: Sequence[int], bits: int | None) -> None:
        """Fork a sequence into beams that decode in the batch, and let them go on from one another, twice."""
        sequence = self.live(index, self.complete)
        assert sequence is not None
        self.end_step_of(sequence)
        n = min(n, MAX_LIVE - len(self.stories))
        children = self.refusing(0, 0, lambda: self.manager.fork(sequence, n))
        if children is None:
            return
        self.forked(sequence, children)
        beams = [sequence, *children]
        for beam in beams:
            if beam not in self.batch:
                self.batch.add(beam)
        for _ in range(2):
            if not self.append_to(self.batch, 1, bits, 0):
                break
            self.flush()
            self.check_all()  # what a beam has said and cached outlasts it
            self.reorder(sequence, len(beams), parents)
        if self.append_to(self.batch, 1, bits, 0):
            self.flush()
            self.check_reads()
        for beam in beams:
            self.batch.remove(beam)
        self.did("search")

    @operation(
        when=lambda self: any(self.alone(s) for s in self.stories), index=INDEX, keep=st.integers(1, 24)
    )
    def truncate(self, index: int, keep: int) -> None:
        """Forget the last tokens of a sequence."""
        sequence = self.live(index, self.alone)
        if sequence is None:
            return
        story = self.stories[sequence]
        least = self.least_length(sequence)
        if least == story.length:
            return
        length = least + keep % (story.length - least)
        self.end_step_of(sequence)
        self.manager.truncate(sequence, length)
        story.truncate(length)
        self.did("truncate")
