"""State machines that fuzz a KV cache manager against a shadow of the pool. Needs hypothesis.

    class MyPolicyMachine(AllocatorMachine):
        policies = (MyPolicy,)

    class MyManagerMachine(AllocatorMachine):
        def make_manager(self, num_blocks, tokens_per_block, reuse): ...
        def cached_blocks(self): ...
        def snapshot(self): ...

    TestMyPolicy = MyPolicyMachine.TestCase          # collected by pytest
    print(run_machine(MyPolicyMachine, steps=10_000))

`AllocatorMachine` has every rule; `SharingMachine`, `ReuseMachine` and `BatchMachine` have those of one
concern, and so find its bugs in fewer steps. Pools are tiny, prompts made of two symbols: everything collides.

The oracle (`allocator.oracle`, with what a subclass may replace) does not know how a manager works. It compares
with a shadow of the pool:

    every running sequence reads exactly its own history, at every position, hits included
    a lookup finds the longest cached prefix, and never the last token
    OutOfBlocks comes exactly when more blocks are needed than are free or evictable, and changes nothing
    copy lists can run in parallel; counters agree with a recount; nothing leaks
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from allocator.oracle import MAX_LIVE, Oracle, Tally
from allocator.sequence import KVSequence
from allocator.shadow import PromptSpec

__all__ = [
    "AllocatorMachine",
    "BatchMachine",
    "ManagerMachine",
    "ReuseMachine",
    "SharingMachine",
    "Tally",
    "run_machine",
]

_prompts = st.builds(
    PromptSpec,
    kind=st.sampled_from(["runs", "tokens", "chunks", "unique"]),
    symbols=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    cut=st.integers(0, 3),
    named=st.booleans(),
    granularity=st.sampled_from([1, 2, 3, 4, 6]),
)
_salts = st.sampled_from(["", "", "", "other"])
_index = st.integers(0, MAX_LIVE - 1)
_some = st.integers(1, 9)
_waits = st.sampled_from([0, 0, 0, 2, 4])
_chunks = st.sampled_from([1, 2, 3, 5, 9, 99])
_few = st.sampled_from([1, 1, 1, 2, 3, 5])
_token_bits = st.none() | st.integers(0, 15)


class ManagerMachine(Oracle, RuleBasedStateMachine):
    """The rules without which nothing happens; see `Oracle` for what a subclass may replace."""

    @initialize(
        num_blocks=st.integers(3, 12),
        tokens_per_block=st.sampled_from([1, 2, 4]),
        reuse=st.sampled_from([True, True, True, False]),
        policy=st.integers(0, 99),
        ghosts=st.sampled_from([None, 0, 2]),
    )
    def start(
        self, num_blocks: int, tokens_per_block: int, reuse: bool, policy: int, ghosts: int | None
    ) -> None:
        """Make a pool."""
        self.begin(num_blocks, tokens_per_block, reuse, policy, ghosts)

    @invariant()
    def check(self) -> None:
        """Check everything that holds after every step."""
        self.tally.steps += 1
        if hasattr(self, "manager"):
            self.check_all()

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            self.drain()

    @rule(prompt=_prompts, salt=_salts, chunk=_chunks)
    def admit(self, prompt: PromptSpec, salt: str, chunk: int) -> None:
        """Admit a new prompt."""
        made = self.learn(prompt.make(self.size))
        if self.admit_prompt(made, salt, chunk):
            self.did("admit")

    @precondition(lambda self: self.prompts)
    @rule(index=_index, salt=_salts, chunk=_chunks)
    def admit_again(self, index: int, salt: str, chunk: int) -> None:
        """Admit a prompt that was seen before."""
        if self.admit_prompt(self.prompts[index % len(self.prompts)], salt, chunk):
            self.did("admit again")

    @precondition(lambda self: not all(self.complete(s) for s in self.stories))
    @rule(index=_index, count=_some)
    def extend(self, index: int, count: int) -> None:
        """Prefill the next chunk of a prompt."""
        sequence = self.live(index, lambda s: not self.complete(s))
        if sequence is None:
            return
        story = self.stories[sequence]
        count = min(count, story.prompt - story.length)
        growth = -(-(story.length + count) // self.size) - len(self.table(sequence))
        least, most = self.copies_due([sequence])
        slots = self.refusing(growth + least, growth + most, lambda: self.manager.extend(sequence, count))
        if slots is not None:
            self.note(sequence, slots.tolist(), story.say(count))
            self.did("extend")

    @precondition(lambda self: any(self.alone(s) for s in self.stories))
    @rule(chosen=st.integers(1, 2**MAX_LIVE - 1), count=_few, bits=_token_bits, wait=_waits)
    def append(self, chosen: int, count: int, bits: int | None, wait: int) -> None:
        """Decode some of the sequences that are in no batch, the later ones first every other time."""
        ready = [s for s in self.stories if self.alone(s)]
        sequences = [s for i, s in enumerate(ready) if chosen >> i & 1] or ready[:1]
        if chosen & 1:
            sequences.reverse()
        if sequences and self.append_to(sequences, count, bits, wait):
            self.did("append")

    @precondition(lambda self: any(self.alone(s) for s in self.stories))
    @rule(bits=_token_bits, wait=_waits)
    def decode(self, bits: int | None, wait: int) -> None:
        """Let all sequences that are in no batch go on by a token."""
        if self.append_to([s for s in self.stories if self.alone(s)], 1, bits, wait):
            self.did("decode")

    @precondition(lambda self: self.stories)
    @rule(index=_index, count=st.integers(1, 4))
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
    @rule(index=_index)
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
        before = self.snapshot()
        for call in calls:
            try:
                call()
            except ValueError:
                continue
            raise AssertionError("bad input was accepted")
        assert self.snapshot() == before, "a refused call changed something"
        self.did("misuse")


class ReuseRules(ManagerMachine):
    """Hits across requests: matches that grow stale, preempted sequences that come back."""

    @rule(prompt=_prompts, again=_index, salt=_salts)
    def lookup(self, prompt: PromptSpec, again: int, salt: str) -> None:
        """Look a prompt up and keep the match for later."""
        old = self.prompts and again % 4
        made = self.prompts[again % len(self.prompts)] if old else self.learn(prompt.make(self.size))
        before = self.snapshot()
        match = self.manager.lookup(made.content, salt)
        assert self.snapshot() == before, "a lookup changed something"
        self.check_match(made, salt, match)
        self.matches = [*self.matches[-3:], (made, salt, match)]
        self.did("lookup")

    @precondition(lambda self: self.matches)
    @rule(index=_index, chunk=_chunks)
    def admit_with_match(self, index: int, chunk: int) -> None:
        """Admit with a match that may be stale by now."""
        prompt, salt, match = self.matches[index % len(self.matches)]
        if self.admit_prompt(prompt, salt, chunk, match):
            self.did("admit with a match")

    @precondition(lambda self: self.stories)
    @rule(index=_index)
    def preempt(self, index: int) -> None:
        """Release a sequence that is to be computed again."""
        sequence = self.live(index)
        if sequence is not None:
            self.end_step_of(sequence)
            story = self.stories.pop(sequence)
            prompt = self.learn(story.resumed(sequence.content()))
            self.manager.release(sequence)
            self.waiting = [*self.waiting[-3:], (prompt, story.salt)]
            self.did("preempt")

    @precondition(lambda self: self.waiting)
    @rule(chunk=_chunks)
    def readmit(self, chunk: int) -> None:
        """Admit the sequence preempted last again."""
        prompt, salt = self.waiting[-1]
        if self.admit_prompt(prompt, salt, chunk, readmission=True):
            self.waiting.pop()
            self.did("readmit")


class SharingRules(ManagerMachine):
    """Tables that share blocks: fork, beam search, truncation."""

    def forked(self, parent: KVSequence, children: list[KVSequence]) -> None:
        """Note the children of a fork."""
        for child in children:
            self.stories[child] = self.stories[parent].fork()

    @precondition(lambda self: 0 < len(self.stories) < MAX_LIVE)
    @rule(index=_index, n=st.integers(1, 3))
    def fork(self, index: int, n: int) -> None:
        """Fork a sequence."""
        sequence = self.live(index)
        if sequence is None or len(self.stories) == MAX_LIVE:
            return
        n = min(n, MAX_LIVE - len(self.stories))
        self.end_step_of(sequence)
        self.forked(sequence, self.manager.fork(sequence, n))
        self.did("fork")

    @precondition(lambda self: any(self.alone(s) for s in self.stories) and len(self.stories) < MAX_LIVE)
    @rule(index=_index, n=st.integers(1, 3), bits=_token_bits, wait=_waits, ends=st.booleans())
    def sample(self, index: int, n: int, bits: int | None, wait: int, ends: bool) -> None:
        """Fork a sequence and let the children decode at once, with their parent unless that `ends`."""
        sequence = self.live(index, self.alone)
        assert sequence is not None
        self.end_step_of(sequence)
        children = self.manager.fork(sequence, min(n, MAX_LIVE - len(self.stories)))
        self.forked(sequence, children)
        writers = children if ends else [sequence, *children]
        if self.append_to(writers, 1, bits, wait) and ends:
            self.manager.release(sequence)
            del self.stories[sequence]
        self.did("sample")

    @precondition(lambda self: len(self.stories) > 1)
    @rule(index=_index, width=st.integers(2, 4), parents=st.lists(_index, min_size=4, max_size=4))
    def reorder_beams(self, index: int, width: int, parents: list[int]) -> None:
        """Let beams of equal length go on from others, all in the batch or none."""
        one = self.live(index, self.complete)
        if one is None:
            return
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
        for i, (beam, heir) in enumerate(zip(beams, stories, strict=True)):
            if chosen[i] != i:
                self.stories[beam] = heir
        self.did("reorder beams")

    @precondition(lambda self: any(self.alone(s) for s in self.stories))
    @rule(index=_index, keep=st.integers(1, 24))
    def truncate(self, index: int, keep: int) -> None:
        """Forget the last tokens of a sequence."""
        sequence = self.live(index, self.alone)
        if sequence is None:
            return
        story = self.stories[sequence]
        length = 1 + keep % story.length
        if length == story.length:
            return
        self.end_step_of(sequence)
        self.manager.truncate(sequence, length)
        story.truncate(length)
        self.did("truncate")


class BatchRules(ManagerMachine):
    """Sequences that decode in lockstep."""

    @precondition(lambda self: any(self.complete(s) for s in self.stories))
    @rule()
    def join_all(self) -> None:
        """Let all join that can."""
        for sequence in self.stories:
            if self.alone(sequence):
                self.batch.add(sequence)
                self.did("join")

    @precondition(lambda self: any(self.complete(s) for s in self.stories))
    @rule(index=_index)
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

    @precondition(lambda self: len(self.batch) > 0)
    @rule(count=_few, bits=_token_bits, wait=_waits)
    def append_batch(self, count: int, bits: int | None, wait: int) -> None:
        """Decode the whole batch for a step or several."""
        if self.append_to(self.batch, count, bits, wait):
            self.did("append batch")


class ReuseMachine(ReuseRules):
    """Prefix reuse and eviction."""


class SharingMachine(SharingRules):
    """Fork, beams, truncation, copy-on-write."""


class BatchMachine(BatchRules, SharingRules):
    """Batches, and the copies that their members need."""


class AllocatorMachine(ReuseRules, SharingRules, BatchRules):
    """Everything at once."""


def run_machine(
    machine: type[ManagerMachine],
    steps: int,
    seed_: int = 0,
    *,
    steps_per_program: int = 80,
    tally: Tally | None = None,
) -> Tally:
    """Run programs of a machine, without shrinking, until `steps` steps are done; return what they did.

    The same seed runs the same programs. A failure is raised as it was found, with the program in its notes;
    `tally`, if given, then still says after how many steps.
    """
    tally = Tally() if tally is None else tally
    began = time.perf_counter()
    counted = type(machine.__name__, (machine,), {"tally": tally})
    try:
        while tally.steps < steps:
            programs = min(max(1, (steps - tally.steps) // (steps_per_program + 1)), 500)
            run_state_machine_as_test(
                seed(seed_ + tally.steps)(counted),
                settings=settings(
                    max_examples=programs,
                    stateful_step_count=steps_per_program,
                    deadline=None,
                    database=None,
                    phases=(Phase.generate,),
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        tally.seconds = time.perf_counter() - began
    return tally
