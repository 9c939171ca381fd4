"""The block manager under its own state machines, and the machines under managers that are wrong."""

from __future__ import annotations

from typing import ClassVar

import pytest
from hypothesis import strategies as st

from allocator.fuzz import (
    AllocatorMachine,
    BatchMachine,
    PartialMachine,
    PolicyMachine,
    QuotaMachine,
    RetentionMachine,
    RetentionSharingMachine,
    ReuseMachine,
    SharingMachine,
    TierMachine,
    TierPartialMachine,
    WindowMachine,
    WindowPartialMachine,
    WindowRetentionMachine,
    WindowTierMachine,
    run_machine,
)
from allocator.retention import RetentionConfig, TokenRange
from allocator.rules.operation import operation
from allocator.shadow import PromptSpec

# Collected by pytest; `--hypothesis-profile=deep` runs them for as long as there is patience.
TestAllocator = AllocatorMachine.TestCase
TestReuse = ReuseMachine.TestCase
TestPartial = PartialMachine.TestCase
TestSharing = SharingMachine.TestCase
TestTier = TierMachine.TestCase
TestTierPartial = TierPartialMachine.TestCase
TestBatch = BatchMachine.TestCase
TestWindow = WindowMachine.TestCase
TestWindowPartial = WindowPartialMachine.TestCase
TestWindowRetention = WindowRetentionMachine.TestCase
TestWindowTier = WindowTierMachine.TestCase
TestQuota = QuotaMachine.TestCase
TestPolicy = PolicyMachine.TestCase
TestRetention = RetentionMachine.TestCase
TestRetentionSharing = RetentionSharingMachine.TestCase


def test_a_run_counts_what_it_did() -> None:
    tally = run_machine(AllocatorMachine, 300, seed_=3)
    again = run_machine(AllocatorMachine, 300, seed_=3)
    assert tally.steps >= 300
    assert tally.operations == again.operations
    assert tally.refusals == again.refusals
    assert sum(count for name, count in tally.operations.items() if name.startswith("admit")) > 0
    assert "refusals" in str(tally)


def machine(num_blocks: int, *, partial: int = 0) -> AllocatorMachine:
    """Return a machine with a pool of blocks of two tokens, begun."""
    state = AllocatorMachine()
    state.start(num_blocks, 2, reuse=True, policy=0, ghosts=None, log=0, partial=partial)
    return state


def test_found_block_filled_again_with_what_was_cut_off() -> None:
    """The oracle expected it to be kept as before."""
    state = machine(6)
    whole = RetentionConfig.whole(50)
    state.admit_retained(PromptSpec("tokens", [0, 1, 0, 0, 1]), again=0, salt="", chunk=99, retention=whole)
    state.check()
    state.release(index=0, count=1)
    state.admit_again(index=0, salt="", chunk=99)
    state.truncate(index=0, keep=2)
    state.check()
    state.append(chosen=1, count=1, bits=0, wait=0)
    state.check()
    state.teardown()


def test_found_block_stolen_and_filled_with_the_same() -> None:
    """Likewise; the prompt's last token is computed in the block that holds it."""
    state = machine(3, partial=2)
    whole = RetentionConfig((TokenRange(0, None, 50),))
    state.admit_retained(PromptSpec("tokens", [0, 1]), again=0, salt="", chunk=99, retention=whole)
    state.check()
    state.release(index=0, count=1)
    state.check()
    state.admit_again(index=0, salt="", chunk=99)
    state.check()
    state.teardown()


def test_found_fork_that_says_the_same_without_reuse() -> None:
    """The beams' blocks are twins of the one that is cut and written in again; the oracle knew of no copy for them."""
    state = AllocatorMachine()
    state.start(7, 4, reuse=False, policy=0, ghosts=None, log=0, window=11)
    state.admit(
        prompt=PromptSpec(kind="runs", symbols=[0], cut=1, named=False, granularity=1), salt="", chunk=3
    )
    state.check()
    state.serve(symbols=[0, 1, 1], salt="", chunk=1, count=1, in_batch=False)
    state.check()
    state.release(index=0, count=1)
    state.check()
    state.admit(
        prompt=PromptSpec(kind="tokens", symbols=[0], cut=0, named=False, granularity=1), salt="", chunk=3
    )
    state.check()
    state.release(index=0, count=1)
    state.check()
    state.search(index=0, n=1, parents=(0, 0, 0, 0), bits=None)
    state.check()
    state.sample(index=0, n=1, bits=None, wait=0, ends=False)
    state.check()
    state.search(index=0, n=3, parents=(0, 0, 0, 0), bits=12)
    state.check()
    state.truncate(index=0, keep=1)
    state.check()
    state.decode(bits=None, wait=0)
    state.check()
    state.teardown()


def test_found_beam_that_takes_over_a_longer_table_than_its_quota_leaves() -> None:
    """Of two beams of four tokens, one has let go of what its window of two passed; then both have four blocks."""
    state = AllocatorMachine()
    state.start(10, 1, reuse=True, policy=0, ghosts=None, log=0, window=11)
    state.admit(PromptSpec("unique", [0] * 4), salt="", chunk=99)
    state.admit(PromptSpec("unique", [0] * 3), salt="", chunk=99)
    state.check()
    state.append(chosen=2, count=1, bits=None, wait=0)
    state.check()
    state.set_quota(salt="", quota=1)
    before = state.manager.tenant_blocks("")
    state.reorder_beams(index=0, width=2, parents=(0, 0, 0, 0))
    state.check()
    assert state.manager.tenant_blocks("") > before
    state.teardown()


def test_a_machine_draws_its_own_operations_and_those_of_its_bases() -> None:
    class Mine(ReuseMachine):
        misuse = None  # type: ignore[assignment]
        weights: ClassVar = {"wait": 40}

        @operation(when=lambda self: len(self.stories) > 1, turns=st.integers(1, 3))
        def wait(self, turns: int) -> None:
            assert len(self.stories) > 1
            assert 1 <= turns <= 3
            self.did("wait")

    tally = run_machine(Mine, 400, seed_=1)
    assert tally.operations["wait"] > 0.2 * tally.steps
    assert tally.operations["admit"] > 0
    assert tally.operations["misuse"] == 0


@pytest.mark.slow
def test_two_hundred_thousand_steps_are_clean() -> None:
    tally = run_machine(AllocatorMachine, 200_000, seed_=0)
    print(tally)
    assert tally.evictions > 1000
    assert tally.copies > 1000
    assert tally.refusals > 1000
