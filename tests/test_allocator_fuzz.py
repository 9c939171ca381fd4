"""The block manager under its own state machines, and the machines under managers that are wrong."""

from __future__ import annotations

from typing import ClassVar

import pytest
from different_cases import different_programs
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
from allocator.rules.operation import operation

# Collected by pytest; `--hypothesis-profile=deep` runs them for as long as there is patience.
TestAllocator = different_programs(AllocatorMachine)
TestReuse = different_programs(ReuseMachine)
TestPartial = different_programs(PartialMachine)
TestSharing = different_programs(SharingMachine)
TestTier = different_programs(TierMachine)
TestTierPartial = different_programs(TierPartialMachine)
TestBatch = different_programs(BatchMachine)
TestWindow = different_programs(WindowMachine)
TestWindowPartial = different_programs(WindowPartialMachine)
TestWindowRetention = different_programs(WindowRetentionMachine)
TestWindowTier = different_programs(WindowTierMachine)
TestQuota = different_programs(QuotaMachine)
TestPolicy = different_programs(PolicyMachine)
TestRetention = different_programs(RetentionMachine)
TestRetentionSharing = different_programs(RetentionSharingMachine)


def test_a_run_counts_what_it_did() -> None:
    tally = run_machine(AllocatorMachine, 300, seed_=3)
    again = run_machine(AllocatorMachine, 300, seed_=3)
    assert tally.steps >= 300
    assert tally.operations == again.operations
    assert tally.refusals == again.refusals
    assert sum(count for name, count in tally.operations.items() if name.startswith("admit")) > 0
    assert "refusals" in str(tally)


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
