"""Test cases of state machines, whose programs are all different."""

from __future__ import annotations

import unittest
from typing import Any

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from allocator.fuzz import BATCH


def different_programs(machine: Any, share: int = 2) -> type[unittest.TestCase]:
    """Return a test case that runs one program for every `share` examples of the profile, each drawn anew.

    `machine.TestCase` makes one call of Hypothesis. Of its programs the first are small, and from the tenth on five in
    six are variations of others: half as many, in calls of a few, do more that is new.
    """
    programs = settings().max_examples // share

    class DifferentPrograms(unittest.TestCase):
        def runTest(self) -> None:
            for done in range(0, programs, BATCH):
                batch = settings(max_examples=min(BATCH, programs - done))
                run_state_machine_as_test(machine, settings=batch)

        runTest.is_hypothesis_test = True  # type: ignore[attr-defined]  # so that pytest shows its statistics

    DifferentPrograms.__qualname__ = DifferentPrograms.__name__ = machine.__name__
    return DifferentPrograms
