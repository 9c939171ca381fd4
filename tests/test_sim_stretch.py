"""Where a stretch of steps has to end: found with floating point, exact all the same."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from sim.stretch import steps_until


@given(
    first=st.integers(1, 10**13),
    increment=st.integers(0, 10**13),
    steps=st.integers(1, 10**6),
    beside=st.integers(-2, 2),
)
@example(first=1, increment=0, steps=1, beside=0)
@example(first=1, increment=1, steps=10**6, beside=0)
@example(first=10**13, increment=1, steps=10**6, beside=1)
@example(first=2**53 + 1, increment=0, steps=2**9 + 1, beside=1)
@example(first=9 * 10**12, increment=9 * 10**12, steps=1414, beside=-1)
def test_the_fewest_steps_that_take_so_long(first: int, increment: int, steps: int, beside: int) -> None:
    """The times asked for lie at the ends of steps, and a little beside, where rounding would show."""

    def end(count: int) -> int:
        return count * first + increment * (count * (count - 1) // 2)

    increment = min(increment, first)
    time = max(end(steps) + beside, 1)
    found, taken = steps_until(time, first, increment)
    assert found >= 1
    assert taken == end(found) >= time
    assert found == 1 or end(found - 1) < time
