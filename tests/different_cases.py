"""Property tests whose examples differ.

In one call, Hypothesis draws the first tenth of its examples small, and from the tenth example on five in six are
variations of others: of 200 small workloads, some 60 have a configuration of their own. In calls of a few, nearly all
have, so that half as many examples try more that is new. A failure is still made as short as it can be. (With
`--hypothesis-seed`, all calls of a test draw the same.)
"""

from __future__ import annotations

import functools
import unittest
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from allocator.fuzz import BATCH


def _batches(share: float) -> int:
    return max(1, round(share * settings().max_examples / BATCH))


def different_examples(share: float = 0.5) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a test with @given try `share` times as many examples as the profile says, in calls of a few."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        few = settings(max_examples=BATCH)(test)

        @functools.wraps(few)
        def run(*args: Any, **kwargs: Any) -> None:
            for _ in range(_batches(share)):
                few(*args, **kwargs)

        return run

    return decorate


def different_programs(machine: Any, share: float = 0.5) -> type[unittest.TestCase]:
    """Return a test case of a state machine that runs `share` times as many programs as the profile has examples."""

    class DifferentPrograms(unittest.TestCase):
        def runTest(self) -> None:
            for _ in range(_batches(share)):
                run_state_machine_as_test(machine, settings=settings(max_examples=BATCH))

        vars(runTest)["is_hypothesis_test"] = True  # so that pytest shows its statistics

    DifferentPrograms.__qualname__ = DifferentPrograms.__name__ = machine.__name__
    return DifferentPrograms
