"""The block manager under its own state machines, and the machines under managers that are wrong."""

from __future__ import annotations

import pytest

from allocator.fuzz import (
    AllocatorMachine,
    BatchMachine,
    PartialMachine,
    PolicyMachine,
    QuotaMachine,
    RetentionMachine,
    ReuseMachine,
    SharingMachine,
    TierMachine,
    WindowMachine,
    run_machine,
)

# Collected by pytest; `--hypothesis-profile=deep` runs them for as long as there is patience.
TestAllocator = AllocatorMachine.TestCase
TestReuse = ReuseMachine.TestCase
TestPartial = PartialMachine.TestCase
TestSharing = SharingMachine.TestCase
TestTier = TierMachine.TestCase
TestBatch = BatchMachine.TestCase
TestWindow = WindowMachine.TestCase
TestQuota = QuotaMachine.TestCase
TestPolicy = PolicyMachine.TestCase
TestRetention = RetentionMachine.TestCase


def test_a_run_counts_what_it_did() -> None:
    tally = run_machine(AllocatorMachine, 300, seed_=3)
    again = run_machine(AllocatorMachine, 300, seed_=3)
    assert tally.steps >= 300
    assert tally.operations == again.operations
    assert tally.refusals == again.refusals
    assert sum(count for name, count in tally.operations.items() if name.startswith("admit")) > 0
    assert "refusals" in str(tally)


@pytest.mark.slow
def test_two_hundred_thousand_steps_are_clean() -> None:
    tally = run_machine(AllocatorMachine, 200_000, seed_=0)
    print(tally)
    assert tally.evictions > 1000
    assert tally.copies > 1000
    assert tally.refusals > 1000
