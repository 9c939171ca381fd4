"""The engine against the naive one, and against what theory says."""

from __future__ import annotations

from engine_cases import Scenario, assert_as_naive, assert_identical, scenarios
from hypothesis import given


@given(scenarios())
def test_equals_the_naive_engine_skipping_or_not(scenario: Scenario) -> None:
    skipping = scenario.run()
    assert_as_naive(skipping, scenario.naive())
    assert_identical(skipping, scenario.run(skipping=False))
