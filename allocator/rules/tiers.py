"""A host tier: sequences that are swapped out and in, and transfers that are done some time later.

Offloading and onboarding need no rules: evictions and hits bring them about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from hypothesis import strategies as st

from allocator.oracle import MAX_LIVE
from allocator.rules.base import CHUNKS, INDEX, SALTS, TOKEN_BITS, ManagerMachine
from allocator.rules.operation import operation
from allocator.sequence import KVSequence
from allocator.shadow import PromptSpec


class TierRules(ManagerMachine):
    """Sequences swapped out and in, between steps or while one is being scheduled; slow transfers."""

    serves_host: ClassVar[bool] = True

    def swapped_out(self, index: int) -> KVSequence | None:
        """Return one of the swapped-out sequences, or None."""
        found = list(self.host.swapped)
        return found[index % len(found)] if found else None

    @operation(
        when=lambda self: self.host.num_blocks and any(s not in self.batch for s in self.stories),
        index=INDEX,
        blocks=st.none() | st.integers(1, 6),
    )
    def swap_out(self, index: int, blocks: int | None) -> None:
        """Swap a sequence out, if the host has room; bring it back after others took `blocks` blocks, if given."""
        sequence = self.live(index, lambda s: s not in self.batch)
        if sequence is None:
            return
        left = self.swap_sequence_out(sequence)
        self.did("swap out")
        if left and blocks is not None:
            self.push(PromptSpec("runs", [2 + index] * blocks))
            self.swap_sequence_in(sequence)

    def swap_sequence_out(self, sequence: KVSequence) -> bool:
        """Swap a sequence out; return whether the host had room."""
        if len(self.host.swapped) >= MAX_LIVE:
            return False
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
        if done is None:
            return False
        self.host.swapped[sequence] = self.stories.pop(sequence)
        return True

    @operation(
        when=lambda self: (
            self.host.num_blocks and len(self.stories) < MAX_LIVE and any(self.alone(s) for s in self.stories)
        ),
        index=INDEX,
        keep=st.integers(0, 24),
        bits=TOKEN_BITS,
    )
    def part(self, index: int, keep: int, bits: int | None) -> None:
        """Fork a sequence, swap the fork out, and let the other go on, perhaps from an earlier token."""
        sequence = self.live(index, self.alone)
        assert sequence is not None
        self.end_step_of(sequence)
        (child,) = self.refusing(0, 0, lambda: self.manager.fork(sequence, 1)) or (None,)
        if child is None:
            return
        story = self.stories[sequence]
        self.stories[child] = story.fork()
        if not self.swap_sequence_out(child):
            return
        if keep and not self.hold:
            self.flush()
            length = max(1 + keep % story.length, self.least_length(sequence))
            if length < story.length:
                self.manager.truncate(sequence, length)
                story.truncate(length)
                self.check_all()
        self.append_to([sequence], 1, bits, 0)
        self.did("part")

    @operation(when=lambda self: self.host.swapped, index=INDEX)
    def swap_in(self, index: int) -> None:
        """Swap a sequence in, if the GPU has room."""
        sequence = self.swapped_out(index)
        if sequence is not None:
            self.swap_sequence_in(sequence)

    def swap_sequence_in(self, sequence: KVSequence) -> None:
        """Swap a sequence in, if the GPU has room."""
        if len(self.stories) >= MAX_LIVE:
            return
        least = most = 0
        if self.settled and not self.host.in_flight:
            least, most = self.host.gpu_needed(sequence)
        done = self.refusing(least, most, lambda: self.manager.swap_in(sequence) or True)
        if done is not None:
            self.stories[sequence] = self.host.swapped.pop(sequence)
            self.came_back(sequence)
        self.did("swap in")

    @operation(when=lambda self: self.host.swapped, index=INDEX)
    def release_swapped(self, index: int) -> None:
        """End a sequence that is swapped out."""
        sequence = self.swapped_out(index)
        if sequence is not None:
            self.manager.release(sequence)
            del self.host.swapped[sequence]
            self.did("release swapped")

    @operation(when=lambda self: self.host.in_flight, index=INDEX)
    def finish_transfers(self, index: int) -> None:
        """Let some transfers be done, not always the oldest."""
        self.host.finish(index)
        self.did("finish transfers")

    @operation(
        when=lambda self: self.prompts and self.host.num_blocks and self.host.cached_blocks(),
        index=INDEX,
        salt=SALTS,
        chunk=CHUNKS,
        leaves=st.booleans(),
    )
    def come_back(self, index: int, salt: str, chunk: int, leaves: bool) -> None:
        """Admit a prompt whose beginning only the host holds, if there is one; end sequences that are in the way.

        It may end again at once, and be pushed out.
        """
        order = self.prompts[index % len(self.prompts) :] + self.prompts[: index % len(self.prompts)]
        matches = (self.manager.lookup(prompt.content, each) for each in (salt, "") for prompt in order)
        match = next((match for match in matches if match.host_blocks), None)
        if match is None:
            return
        prompt, salt = self.known[id(match.content)], match.salt
        while self.stories and (len(self.stories) >= MAX_LIVE or not self.manager.can_admit(match, 1)):
            self.end(index)
        before = set(self.stories)
        self.did("come back")
        if self.admit_prompt(prompt, salt, chunk) and leaves:
            self.end_new(before)
            self.push(PromptSpec("unique", [0] * max(self.manager.available_blocks, 1) * self.size))

    @operation(
        when=lambda self: self.host.num_blocks and len(self.stories) < MAX_LIVE,
        blocks=st.integers(1, 6),
        symbol=st.integers(2, 6),
        ends=st.integers(0, 3),
    )
    def press(self, blocks: int, symbol: int, ends: int) -> None:
        """Let the end of some, and something short-lived that may have been there before, push out what is cached."""
        for _ in range(min(ends, len(self.stories))):
            self.end(0)
        self.push(PromptSpec("runs", [symbol] * blocks))
        self.did("press")

    def push(self, spec: PromptSpec) -> bool:
        """Admit a prompt and end it."""
        before = set(self.stories)
        prompt = spec.make(self.size)
        admitted = self.admit_prompt(prompt, "", prompt.num_tokens)
        if admitted:
            self.end_new(before)
        return admitted

    def end(self, index: int) -> None:
        """End a sequence."""
        sequence = self.live(index)
        assert sequence is not None
        self.end_step_of(sequence)
        self.manager.release(sequence)
        del self.stories[sequence]

    def end_new(self, before: set[KVSequence]) -> None:
        """Run the step, and end the one sequence that was not there before."""
        self.hold = 0
        self.check_all()
        (sequence,) = set(self.stories) - before
        self.manager.release(sequence)
        del self.stories[sequence]

    @operation(when=lambda self: self.host.swapped or self.host.pending, index=INDEX)
    def misuse_tiers(self, index: int) -> None:
        """Ask for what must be refused as bad input."""
        manager = self.manager
        calls: dict[str, Callable[[], object]] = {}
        swapped, running = self.swapped_out(index), self.live(index)
        if swapped is not None:
            calls = {
                "swap_out what is swapped out": lambda: manager.swap_out(swapped),
                "append to what is swapped out": lambda: manager.append([swapped]),
                "fork what is swapped out": lambda: manager.fork(swapped),
                "truncate what is swapped out": lambda: manager.truncate(swapped, 1),
                "add what is swapped out to a batch": lambda: self.batch.add(swapped),
            }
        if running is not None:
            calls["swap_in what runs"] = lambda: manager.swap_in(running)
            if running in self.batch:
                calls["swap_out a member of a batch"] = lambda: manager.swap_out(running)
        if self.host.pending:
            calls["pending_copies while transfers are pending"] = manager.pending_copies
        if self.host.finished is not None:
            finished = self.host.finished
            calls["transfers_done twice"] = lambda: manager.transfers_done(finished)
        self.must_refuse(calls)
