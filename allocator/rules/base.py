"""The rules without which nothing happens, and the strategies that all rules draw from."""

from __future__ import annotations

import sys
from collections.abc import Callable

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from allocator.oracle import MAX_LIVE, Oracle
from allocator.sequence import KVSequence
from allocator.shadow import PromptSpec

PROMPTS = st.builds(
    PromptSpec,
    kind=st.sampled_from(["runs", "tokens", "chunks", "unique"]),
    symbols=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    cut=st.integers(0, 3),
    named=st.booleans(),
    granularity=st.sampled_from([1, 2, 3, 4, 6]),
)
SALTS = st.sampled_from(["", "", "", "other"])
INDEX = st.integers(0, MAX_LIVE - 1)
SOME = st.integers(1, 9)
WAITS = st.sampled_from([0, 0, 0, 2, 4])
CHUNKS = st.sampled_from([1, 2, 3, 5, 9, 99])
FEW = st.sampled_from([1, 1, 1, 2, 3, 5])
TOKEN_BITS = st.none() | st.integers(0, 15)


class ManagerMachine(Oracle, RuleBasedStateMachine):
    """The rules without which nothing happens; see `Oracle` for what a subclass may replace."""

    @initialize(
        num_blocks=st.integers(3, 12),
        tokens_per_block=st.sampled_from([1, 2, 4]),
        reuse=st.sampled_from([True, True, True, False]),
        policy=st.integers(0, 99),
        ghosts=st.sampled_from([None, 0, 2]),
        log=st.integers(0, 99),
        host_blocks=st.sampled_from([4, 8, 0, 2, 20]),
        lag=st.booleans(),
        partial=st.integers(0, 11),
        window=st.integers(0, 15),
        num_sinks=st.integers(0, 3),
    )
    def start(
        self,
        num_blocks: int,
        tokens_per_block: int,
        reuse: bool,
        policy: int,
        ghosts: int | None,
        log: int,
        host_blocks: int = 0,
        lag: bool = False,
        partial: int = 0,
        window: int = 0,
        num_sinks: int = 0,
    ) -> None:
        """Make a pool; host blocks are for machines that serve them, with transfers that take time if `lag`."""
        chosen = self.choose_window(window)
        self.begin(
            num_blocks, tokens_per_block, reuse, policy, ghosts, log, host_blocks, partial, chosen, num_sinks
        )
        self.host.lag = lag

    def came_back(self, sequence: KVSequence) -> None:
        """Note that a sequence was swapped in."""

    age = 0
    """Steps of the program so far."""

    def choose_window(self, drawn: int) -> int | None:
        """Return the window for a number drawn from 0 to 15; a machine without `WindowRules` has none."""
        return None

    @invariant()
    def check(self) -> None:
        """Check everything that holds after every step."""
        self.tally.steps += 1
        self.age += 1
        if hasattr(self, "manager"):
            self.check_all()

    def teardown(self) -> None:
        # What is broken already, Hypothesis is on its way to report: what breaks here in consequence says nothing.
        if hasattr(self, "manager") and sys.exc_info()[0] is None:
            self.drain()

    @precondition(lambda self: len(self.stories) < MAX_LIVE)
    @rule(prompt=PROMPTS, salt=SALTS, chunk=CHUNKS)
    def admit(self, prompt: PromptSpec, salt: str, chunk: int) -> None:
        """Admit a new prompt."""
        made = self.learn(prompt.make(self.size))
        self.admit_prompt(made, salt, chunk)
        self.did("admit")

    @precondition(lambda self: self.prompts and len(self.stories) < MAX_LIVE)
    @rule(index=INDEX, salt=SALTS, chunk=CHUNKS)
    def admit_again(self, index: int, salt: str, chunk: int) -> None:
        """Admit a prompt that was seen before."""
        self.admit_prompt(self.prompts[index % len(self.prompts)], salt, chunk)
        self.did("admit again")

    @precondition(lambda self: not all(self.complete(s) for s in self.stories))
    @rule(index=INDEX, count=SOME)
    def extend(self, index: int, count: int) -> None:
        """Prefill the next chunk of a prompt."""
        sequence = self.live(index, lambda s: not self.complete(s))
        if sequence is not None:
            self.prefill(sequence, count)
            self.did("extend")

    @precondition(lambda self: any(self.alone(s) for s in self.stories))
    @rule(chosen=st.integers(1, 2**MAX_LIVE - 1), count=FEW, bits=TOKEN_BITS, wait=WAITS)
    def append(self, chosen: int, count: int, bits: int | None, wait: int) -> None:
        """Decode some of the sequences that are in no batch, the later ones first every other time."""
        ready = [s for s in self.stories if self.alone(s)]
        sequences = [s for i, s in enumerate(ready) if chosen >> i & 1] or ready[:1]
        if chosen & 1:
            sequences.reverse()
        if sequences:
            self.append_to(sequences, count, bits, wait)
            self.did("append")

    @precondition(lambda self: any(self.alone(s) for s in self.stories))
    @rule(bits=TOKEN_BITS, wait=WAITS)
    def decode(self, bits: int | None, wait: int) -> None:
        """Let all sequences that are in no batch go on by a token."""
        self.append_to([s for s in self.stories if self.alone(s)], 1, bits, wait)
        self.did("decode")

    @precondition(lambda self: self.stories)
    @rule(index=INDEX, count=st.integers(1, 4))
    def release(self, index: int, count: int) -> None:
        """End a sequence, or several: that makes room."""
        for _ in range(count):
            sequence = self.live(index)
            if sequence is None:
                break
            self.end_step_of(sequence)
            self.manager.release(sequence)
            del self.stories[sequence]
            self.did("release")

    @precondition(lambda self: self.stories)
    @rule(index=INDEX)
    def misuse(self, index: int) -> None:
        """Ask for what must be refused as bad input."""
        sequence = self.live(index)
        assert sequence is not None
        manager, story = self.manager, self.stories[sequence]
        left = story.prompt - story.length
        calls: list[Callable[[], object]] = [
            lambda: manager.extend(sequence, max(left, 0) + 1),
            lambda: manager.append([sequence, sequence]),
            lambda: manager.truncate(sequence, story.length + 1),
            lambda: manager.reorder_beams([sequence], [1]),
        ]
        if left > 0 or sequence in self.batch:
            calls.append(lambda: manager.append([sequence]))
        least = self.least_length(sequence)
        if least > 1:  # what a window has passed cannot come back
            calls.append(lambda: manager.truncate(sequence, least - 1))
        before = self.snapshot()
        for call in calls:
            try:
                call()
            except ValueError:
                continue
            raise AssertionError("bad input was accepted")
        assert self.snapshot() == before, "a refused call changed something"
        self.did("misuse")
