"""Every policy evicts, block by block, what its published algorithm evicts, and not what another does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from random import Random
from typing import Any, ClassVar

import numpy as np
import pytest
from different_cases import different_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_manager import Identity, NaiveSequence, Refused
from policy_references import PolicyManager
from test_allocator_naive import BesideNaive, Pair

from allocator.content import TokenContent
from allocator.eviction import POLICIES, EvictionPolicy, make_policy
from allocator.eviction.belady import Belady
from allocator.eviction.gdsf import GDSF
from allocator.eviction.lfu import LFU
from allocator.eviction.s3fifo import S3FIFO
from allocator.eviction.slru import SLRU
from allocator.eviction.weighted import WeightedBelady
from allocator.fuzz import AllocatorMachine, run_machine
from allocator.manager import KVCacheManager, OutOfBlocks
from allocator.retention import Retention, RetentionConfig
from allocator.rules import references
from allocator.rules.policies import PolicyRules
from allocator.rules.references import REFERENCES, Reference
from allocator.rules.retention import RETENTIONS, make_retention
from allocator.sequence import KVSequence

CLASSES: dict[str, type[EvictionPolicy]] = {**POLICIES, "belady": Belady}

Tokens = tuple[int, ...]

FEW = max(10, settings.default.max_examples // 4)
"""Examples for variations of what has been tested already."""


@dataclass(frozen=True)
class Program:
    """Requests one after the other; each is (prompt, tokens to decode, sequences that may run beside it).

    `wishes` says, round and round, what they want kept and how much time passes before them.
    """

    num_blocks: int
    tokens_per_block: int
    requests: list[tuple[Tokens, Tokens, int]]
    wishes: Sequence[tuple[RetentionConfig | None, int]] = ((None, 0),)


def random_wish(random: Random) -> tuple[RetentionConfig | None, int]:
    """Return what a request wants kept, if anything, and how much time passes before it."""
    said = [Retention(random.choice([0, 20, 35, 60, 100]), random.choice([None, 2, 9])) for _ in range(4)]
    cuts = [random.randint(0, 9) for _ in range(3)]
    retention = make_retention(cuts, [random.choice([None, wish]) for wish in said], said[3], is_open=True)
    return random.choice([None, retention]), random.randint(0, 3)


def random_program(seed: int, requests: int = 120) -> Program:
    """Return a program in which few prompts recur often, and many do not."""
    random = Random(seed)
    size, longest = random.choice([1, 2]), random.choice([6, 6, 12])
    known: list[Tokens] = [()]
    rows = []
    for _ in range(requests):
        prefix = known[int(len(known) * random.random() ** 3)]
        prompt = prefix[: random.randint(0, len(prefix))]
        prompt += tuple(random.randint(0, 2) for _ in range(random.randint(1, longest * size // 2)))
        prompt = prompt[: longest * size]
        known.append(prompt)
        rows.append((prompt, tuple(random.randint(0, 1) for _ in range(random.randint(0, 3))), 2))
    num_blocks = random.randint(longest + 4, 3 * longest)
    return Program(num_blocks, size, rows, [random_wish(random) for _ in range(requests)])


_symbols = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
programs = st.builds(
    Program,
    num_blocks=st.integers(10, 16),
    tokens_per_block=st.sampled_from([1, 2]),
    requests=st.lists(
        st.tuples(_symbols, st.lists(st.integers(0, 1), max_size=3).map(tuple), st.integers(0, 2)),
        min_size=10,
        max_size=40,
    ),
    wishes=st.lists(st.tuples(st.none() | RETENTIONS, st.integers(0, 3)), min_size=1, max_size=5),
) | st.integers(0, 2**32).map(random_program)


class Both:
    """A real manager with a policy and the naive one with a reference; what they evict, by content."""

    def __init__(self, program: Program, policy: EvictionPolicy, reference: Reference) -> None:
        self.size = program.tokens_per_block
        self.real = KVCacheManager(program.num_blocks, self.size, policy=policy)
        self.naive = PolicyManager(program.num_blocks, self.size, reference, True, 16 * program.num_blocks)
        self.running: list[tuple[KVSequence, NaiveSequence]] = []
        self.evicted: list[Tokens] = []
        self.real.pool.drains = False  # so that the policy is asked for each part of a victim
        choose = policy.victim

        def victim(wanted: int) -> Any:
            extent, count = choose(wanted)
            keys = b"".join(bytes(each.keys) for each in reversed(list(extent.path())))
            tokens = tuple(np.frombuffer(keys, np.int32).tolist())
            self.evicted += [tokens[: len(tokens) - i * self.size] for i in range(count)]
            return extent, count

        policy.victim = victim  # type: ignore[method-assign]

    @staticmethod
    def said(block: Identity) -> Tokens:
        tokens: Tokens = ()
        while block[0] != "root":
            tokens = (*block[1], *tokens)
            block = block[0]
        return tokens

    def release(self, count: int) -> None:
        for real, naive in self.running[:count]:
            self.real.release(real)
            self.naive.release(naive)
        del self.running[:count]

    def admit(self, prompt: Tokens, retention: RetentionConfig | None) -> bool:
        content = TokenContent(prompt)
        new = len(prompt) - self.real.lookup(content).hit_tokens
        try:
            real = self.real.admit(content, new, retention=retention)
        except OutOfBlocks:
            with pytest.raises(Refused):
                self.naive.admit(prompt, "", new)
            return False
        self.running.append((real, self.naive.admit(prompt, "", new, retention)))
        return True

    def decode(self, token: int) -> bool:
        real, naive = self.running[-1]
        try:
            self.real.append([real], [token])
        except OutOfBlocks:
            with pytest.raises(Refused):
                self.naive.write([naive], [[token]])
            return False
        self.naive.write([naive], [[token]])
        return True

    def request(
        self, prompt: Tokens, answer: Tokens, beside: int, retention: RetentionConfig | None, wait: int
    ) -> None:
        self.release(max(0, len(self.running) - beside))
        self.real.now += wait
        self.naive.pass_time(self.real.now)
        while not self.admit(prompt, retention):
            self.release(1)
        for token in answer:
            while not self.decode(token):
                self.release(1)
                if not self.running:  # alone it lacked a block too: its own repeats cached ones that it holds
                    return


def disagreement(program: Program, policy: EvictionPolicy, reference: Reference) -> int | None:
    """Run a program; return before which request policy and reference evicted different blocks, if they did."""
    both = Both(program, policy, reference)
    foreseen = [prompt for prompt, _, _ in program.requests]
    if isinstance(policy, Belady):
        for prompt in foreseen:
            policy.foresee(TokenContent(prompt), program.tokens_per_block)
    if isinstance(reference, references.Belady):
        reference.future = [both.naive.identities(("root", ""), prompt) for prompt in foreseen]
    for i, request in enumerate(program.requests):
        if isinstance(policy, Belady):
            policy.begin(i)
        if isinstance(reference, references.Belady):
            reference.begun.add(i)
        both.request(*request, *program.wishes[i % len(program.wishes)])
        if both.evicted != [Both.said(block) for block in both.naive.evicted]:
            return i
    both.release(len(both.running))
    both.real.check_invariants()
    return None


@pytest.mark.parametrize("name", sorted(CLASSES))
@different_examples()
@given(program=programs)
def test_every_eviction_is_the_references(name: str, program: Program) -> None:
    assert disagreement(program, CLASSES[name](), REFERENCES[name](program.num_blocks)) is None


@pytest.mark.parametrize("share", [0.1, 0.3])
@settings(max_examples=FEW)
@given(program=programs)
def test_a_small_protected_segment_demotes(share: float, program: Program) -> None:
    assert disagreement(program, SLRU(share), references.SLRU(program.num_blocks, share)) is None


@pytest.mark.parametrize("share", [0.3, 0.6])
@settings(max_examples=FEW)
@given(program=programs)
def test_a_larger_small_queue_fills_the_main_one(share: float, program: Program) -> None:
    reference = references.S3FIFO(program.num_blocks, share)
    assert disagreement(program, S3FIFO(share), reference) is None


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_lies_between_0_and_1(share: float) -> None:
    with pytest.raises(ValueError, match=rf"protected_share \({share}\) must lie between 0 and 1"):
        SLRU(share)
    with pytest.raises(ValueError, match=rf"small_share \({share}\) must lie between 0 and 1"):
        S3FIFO(share)


@pytest.mark.parametrize("attention_blocks", [0, 1, 5])
@settings(max_examples=FEW)
@given(program=programs)
def test_depth_weighs_more_where_attention_is_dear(attention_blocks: int, program: Program) -> None:
    reference = references.GDSF(program.num_blocks, attention_blocks)
    assert disagreement(program, GDSF(attention_blocks), reference) is None


def test_gdsf_refuses_a_negative_depth() -> None:
    with pytest.raises(ValueError, match=r"attention_blocks \(-1\) must not be negative"):
        GDSF(-1)


@settings(max_examples=FEW)
@given(program=programs, data=st.data())
def test_the_future_may_come_in_another_order_and_late(program: Program, data: st.DataObject) -> None:
    """Requests begin in any order, and some are foreseen only once others have begun."""
    policy, reference = Belady(), references.Belady(program.num_blocks)
    both = Both(program, policy, reference)
    known: list[int] = []
    left = list(range(len(program.requests)))
    while left:
        while len(known) < len(program.requests) and (not set(left) & set(known) or data.draw(st.booleans())):
            prompt = program.requests[len(known)][0]
            known.append(policy.foresee(TokenContent(prompt), program.tokens_per_block))
            reference.future.append(both.naive.identities(("root", ""), prompt))
        number = data.draw(st.sampled_from([i for i in left if i in known]))
        left.remove(number)
        policy.begin(number)
        reference.begun.add(number)
        both.request(*program.requests[number], None, 0)
        assert both.evicted == [Both.said(block) for block in both.naive.evicted]
    with pytest.raises(ValueError, match=r"number \(0\) must be that of a request that has not begun"):
        policy.begin(0)


@pytest.mark.parametrize("attention_blocks", [0, 1, 40])
@settings(max_examples=FEW)
@given(program=programs)
def test_a_weighted_future_is_the_references(attention_blocks: int, program: Program) -> None:
    reference = references.WeightedBelady(program.num_blocks, attention_blocks)
    assert disagreement(program, WeightedBelady(attention_blocks), reference) is None


def saved_cost(policy: Belady) -> int:
    """Return what a pool of five blocks and one for last tokens saves; block i of a prompt costs 1 + i."""
    deep, shallow, other = [0, 0, 1, 1, 2, 2, 3, 3, 9], [5, 5, 9], [6, 6, 9]
    contents = [TokenContent(ids) for ids in (deep, shallow, other, shallow, deep)]
    manager = KVCacheManager(6, 2, policy=policy)
    numbers = [policy.foresee(content, 2) for content in contents]
    saved = 0
    for number, content in zip(numbers, contents, strict=True):
        policy.begin(number)
        match = manager.lookup(content)
        saved += sum(1 + i for i in range(match.hit_blocks))
        manager.release(manager.admit(content, content.num_prompt_tokens - match.hit_tokens, match))
    return saved


def test_weighing_saves_more_where_the_next_to_be_used_is_cheap() -> None:
    """The plain policy gives up the last, dearest block of the deep prompt, as the shallow one comes before it."""
    assert saved_cost(Belady()) == 1 + (1 + 2 + 3)
    assert saved_cost(WeightedBelady(1)) == 1 + 2 + 3 + 4
    with pytest.raises(ValueError, match=r"attention_blocks \(-1\) must not be negative"):
        WeightedBelady(-1)


@pytest.mark.parametrize(("name", "other"), list(permutations(sorted(CLASSES), 2)))
def test_no_policy_is_another(name: str, other: str) -> None:
    assert any(
        disagreement(program, CLASSES[name](), REFERENCES[other](program.num_blocks)) is not None
        for program in map(random_program, range(8))
    )


def test_every_policy_has_a_reference() -> None:
    assert set(REFERENCES) == set(CLASSES)


def test_the_future_cannot_be_asked_for_by_name() -> None:
    with pytest.raises(ValueError, match=r"policy \(belady\) must be told the future"):
        make_policy("belady")


class LFUThatNeverCounts(LFU):
    def hit(self, extent: Any) -> None: ...


def test_an_lfu_that_never_counts_is_an_lru() -> None:
    program = random_program(0)
    assert disagreement(program, LFUThatNeverCounts(), REFERENCES["lru"](program.num_blocks)) is None
    assert disagreement(program, LFUThatNeverCounts(), REFERENCES["lfu"](program.num_blocks)) is not None


def beside_reference(name: str) -> Any:
    """Return the machine with every operation, beside the naive manager with the policy's reference."""

    class BesideReference(BesideNaive):
        policies: ClassVar = (CLASSES[name],)
        set_quota = rebuild = lookup = misuse = None  # type: ignore[assignment]  # they evict nothing

        def make_manager(self, num_blocks: int, tokens_per_block: int, reuse: bool) -> Any:
            ghosts = 16 * num_blocks if self.ghosts is None else self.ghosts
            real = AllocatorMachine.make_manager(self, num_blocks, tokens_per_block, reuse)
            reference = REFERENCES[name](num_blocks)
            naive = PolicyManager(num_blocks, tokens_per_block, reference, reuse, ghosts, self.partial)
            return Pair(self, real, naive)

    return BesideReference


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_forks_beams_and_truncation_change_nothing(name: str) -> None:
    tally = run_machine(beside_reference(name), 500, seed_=2)
    assert tally.evictions > 20
    assert tally.copies > 0


def test_belady_survives_the_fuzz_machine() -> None:
    """The others do, each with a witness, in test_allocator_eviction."""
    machine = type("Fuzzed", (PolicyRules, AllocatorMachine), {"policies": (Belady,)})
    assert run_machine(machine, 800, seed_=4).evictions > 20
