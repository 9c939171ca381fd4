"""The rules without which nothing happens, and the strategies that all rules draw from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from allocator.oracle import MAX_LIVE, Oracle
from allocator.rules.operation import Call, Operation, calls, operation, operations_of, switched_off
from allocator.sequence import KVSequence
from allocator.shadow import PromptSpec


def symbols_up_to(longest: int) -> st.SearchStrategy[list[int]]:
    """Return a strategy for lists of zeros and ones, of all lengths alike. It draws once: draws cost most of a step."""
    lengths = [[list(each) for each in product((0, 1), repeat=length)] for length in range(1, longest + 1)]
    return st.sampled_from([each for lists in lengths for each in lists * (2**longest // len(lists))])


PROMPTS = st.builds(
    PromptSpec,
    kind=st.sampled_from(["runs", "tokens", "chunks", "unique"]),
    symbols=symbols_up_to(4),
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
TOKEN_BITS = st.sampled_from([*[None] * 12, *range(16)])
PARENTS = st.tuples(INDEX, INDEX, INDEX, INDEX)


class ManagerMachine(Oracle, RuleBasedStateMachine):
    """The operations without which nothing happens; see `Oracle` for what a subclass may replace."""

    weights: ClassVar[Mapping[str, int]] = {}
    """How often an operation counts among those to choose from, if not once; with 0 it is never done."""
    operations: ClassVar[dict[str, Operation]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.operations = operations_of(cls)

    @rule(call=calls())
    def do(self, call: Call | None) -> None:
        """Do what was drawn. In a program that is pasted, it has been done when it gets here."""
        if call is not None:
            getattr(self, call.name)(**call.arguments)

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
        without=switched_off(always=("admit",)),
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
        without: Sequence[str] = (),
    ) -> None:
        """Make a pool; host blocks are for machines that serve them, with transfers that take time if `lag`.

        Operations named in `without` are not drawn while there is anything else that can be done.
        """
        self.never = {name for name, weight in self.weights.items() if not weight}
        names = [name for name in self.operations if name not in without]
        self.slots = [self.operations[name] for name in names for _ in range(self.weights.get(name, 1))]
        chosen = self.choose_window(window)
        self.begin(
            num_blocks, tokens_per_block, reuse, policy, ghosts, log, host_blocks, partial, chosen, num_sinks
        )
        self.host.lag = lag

    def came_back(self, sequence: KVSequence) -> None:
        """Note that a sequence was swapped in."""

    reordered = False
    """Whether beams changed places since the counters were checked."""

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

    @operation(when=lambda self: len(self.stories) < MAX_LIVE, prompt=PROMPTS, salt=SALTS, chunk=CHUNKS)
    def admit(self, prompt: PromptSpec, salt: str, chunk: int) -> None:
        """Admit a new prompt."""
        made = self.learn(prompt.make(self.size))
        self.admit_prompt(made, salt, chunk)
        self.did("admit")

    @operation(
        when=lambda self: self.prompts and len(self.stories) < MAX_LIVE, index=INDEX, salt=SALTS, chunk=CHUNKS
    )
    def admit_again(self, index: int, salt: str, chunk: int) -> None:
        """Admit a prompt that was seen before."""
        self.admit_prompt(self.prompts[index % len(self.prompts)], salt, chunk)
        self.did("admit again")

    @operation(when=lambda self: not all(self.complete(s) for s in self.stories), index=INDEX, count=SOME)
    def extend(self, index: int, count: int) -> None:
        """Prefill the next chunk of a prompt."""
        sequence = self.live(index, lambda s: not self.complete(s))
        if sequence is not None:
            self.prefill(sequence, count)
            self.did("extend")

    @operation(
        when=lambda self: any(self.alone(s) for s in self.stories),
        chosen=st.integers(1, 2**MAX_LIVE - 1),
        count=FEW,
        bits=TOKEN_BITS,
        wait=WAITS,
    )
    def append(self, chosen: int, count: int, bits: int | None, wait: int) -> None:
        """Decode some of the sequences that are in no batch, the later ones first every other time."""
        ready = [s for s in self.stories if self.alone(s)]
        sequences = [s for i, s in enumerate(ready) if chosen >> i & 1] or ready[:1]
        if chosen & 1:
            sequences.reverse()
        if sequences:
            self.append_to(sequences, count, bits, wait)
            self.did("append")

    @operation(when=lambda self: any(self.alone(s) for s in self.stories), bits=TOKEN_BITS, wait=WAITS)
    def decode(self, bits: int | None, wait: int) -> None:
        """Let all sequences that are in no batch go on by a token."""
        self.append_to([s for s in self.stories if self.alone(s)], 1, bits, wait)
        self.did("decode")

    @operation(when=lambda self: self.stories, index=INDEX, count=st.integers(1, 4))
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

    @operation(when=lambda self: self.stories, index=INDEX)
    def misuse(self, index: int) -> None:
        """Ask for what must be refused as bad input."""
        sequence = self.live(index)
        assert sequence is not None
        manager, story = self.manager, self.stories[sequence]
        left = story.prompt - story.length
        calls: dict[str, Callable[[], object]] = {
            "extend beyond the prompt": lambda: manager.extend(sequence, max(left, 0) + 1),
            "append to a sequence twice": lambda: manager.append([sequence, sequence]),
            "truncate to more tokens than there are": lambda: manager.truncate(sequence, story.length + 1),
            "reorder_beams with a parent that is none": lambda: manager.reorder_beams([sequence], [1]),
        }
        if left > 0 or sequence in self.batch:
            calls["append before the prompt is complete, or to a member of a batch"] = lambda: manager.append(
                [sequence]
            )
        least = self.least_length(sequence)
        if least > 1:
            calls["truncate to what a window has passed"] = lambda: manager.truncate(sequence, least - 1)
        self.must_refuse(calls)

    def complete_newest(self, chunk: int) -> KVSequence | None:
        """Complete the prompt admitted last, chunk by chunk, and return its sequence; None if there is no room."""
        self.flush()
        sequence = next(reversed(self.stories))
        while not self.complete(sequence):
            if not self.prefill(sequence, chunk):
                return None
            self.flush()
            self.check_reads()
        return sequence

    def decode_on(self, sequence: KVSequence, count: int, bits: int | None, in_batch: bool) -> None:
        """Let a sequence and its batch, which it joins or is in, go on step by step as long as there is room."""
        if in_batch and sequence not in self.batch:
            self.batch.add(sequence)
        writers: Sequence[KVSequence] = self.batch if sequence in self.batch else [sequence]
        for _ in range(count):
            if not self.append_to(writers, 1, bits, 0):
                return
            self.flush()
            self.check_reads()

    def must_refuse(self, calls: Mapping[str, Callable[[], object]]) -> None:
        """Check that each call, described in words, raises ValueError, and that none changes anything."""
        before = self.snapshot()
        for what, call in calls.items():
            try:
                call()
            except ValueError:
                continue
            raise AssertionError(f"bad input was accepted: {what}")
        assert self.snapshot() == before, "a refused call changed something"
        self.did("misuse")
