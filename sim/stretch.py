"""Stretch: a run of engine steps that differ only in the lengths of what they decode, a row of the timeline."""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

from sim.arrivals import NEVER
from sim.scheduler.plan import Plan

if TYPE_CHECKING:
    from sim.replica import Replica


def steps_until(time_ps: int, first_ps: int, increment_ps: int) -> tuple[int, int]:
    """Return the fewest steps s, at least 1, that take at least that time, which is positive; and how long they take.

    They take s · first + increment · s (s − 1) / 2, which is time or more if s >= 4 · time / (b + sqrt(b² + 8 ·
    increment · time)) with b = 2 · first − increment, at least increment itself, since the first step attends to a key
    for every sequence. Numbers of 53 bits lead there, or a few steps beside it; integers decide.
    """
    time, b = float(time_ps), 2.0 * first_ps - increment_ps
    steps = int(4.0 * time / (b + sqrt(b * b + 8.0 * increment_ps * time))) or 1
    taken = steps * first_ps + increment_ps * (steps * (steps - 1) // 2)
    while taken < time_ps:
        taken += first_ps + increment_ps * steps
        steps += 1
    last = first_ps + increment_ps * (steps - 1)
    while taken - last >= time_ps and steps > 1:
        taken -= last
        last -= increment_ps
        steps -= 1
    return steps, taken


class Stretch:
    """A step that only decodes, as scheduled, and those like it that follow.

    Skipping takes the run as one, with a closed form for its duration; stepping takes its steps one by one. Both
    end at the same step: with the first arrival that could be admitted, the first retention that is over, or where
    `Scheduler.quiet_steps` says.
    """

    def __init__(self, replica: Replica, plan: Plan, start_ps: int, first_ps: int) -> None:
        self._replica = replica
        self._plan = plan
        self._scheduler = replica.scheduler
        self.start_ps = start_ps
        self.steps = 1
        self.first_ps = first_ps
        self.increment_ps = 0
        self.end_ps = start_ps + first_ps
        self.at_first: tuple[int, int] | None = None  # referenced blocks and written slots, if it goes on
        self._more: int | None = None  # steps that may still follow, once known

    def bound(self) -> int:
        """Return how many steps may follow the first, arrivals apart. Sets the increment."""
        decoding = self._plan.decoding
        affine = self._replica.decode_affine(decoding)
        if affine is None:
            return 0  # durations follow no formula: every step is a stretch
        self.increment_ps = self._replica.step_increment(affine[1])
        more = self._scheduler.quiet_steps()
        if more and self._replica.retains:
            more = (
                self._replica.steps_to_expiry(self.start_ps, 1 + more, self.first_ps, self.increment_ps) - 1
            )
        return more

    def end_after(self, steps: int) -> int:
        """Return when so many steps of the stretch end."""
        return self.start_ps + steps * self.first_ps + self.increment_ps * (steps * (steps - 1) // 2)

    def _go_on(self, steps: int) -> None:
        """Take more steps."""
        if self.at_first is None:
            manager = self._scheduler.manager
            self.at_first = manager.pool.num_referenced, manager.kv_tokens
        self._scheduler.decode(steps)

    def _stop_ps(self) -> int:
        """Return the arrival that ends the stretch, if there is one."""
        return self._replica.arrivals.next_ps if self._scheduler.accepts_arrivals() else NEVER

    def skip(self) -> None:
        """Extend the stretch as far as it goes."""
        steps = 1 + self.bound()
        stop_ps = self._stop_ps()
        if stop_ps < self.end_after(steps):
            steps = self.steps_until(stop_ps)
        self.extend(steps)

    def steps_until(self, time_ps: int) -> int:
        """Return how many steps it takes, at least 1, to end at that time or later."""
        return steps_until(time_ps - self.start_ps, self.first_ps, self.increment_ps)[0]

    def extend(self, steps: int) -> None:
        """Take so many steps in all as one; the last one begins by now."""
        if steps > 1:
            self._go_on(steps - 1)
            self._scheduler.manager.end_step()
            self.steps = steps
            self.end_ps = self.end_after(steps)
            self._replica.take_arrivals(self.end_after(steps - 1))

    def may_go_on(self) -> bool:
        """Return whether one more step may follow those taken, arrivals apart."""
        if self._more is None:
            self._more = self.bound()
        return self._more > 0

    def step(self) -> bool:
        """Take one more step, if one may follow; return whether it did."""
        if not self.may_go_on() or self.end_ps >= self._stop_ps():
            return False
        assert self._more is not None
        self._more -= 1
        self._replica.take_arrivals(self.end_ps)
        self._go_on(1)
        self.steps += 1
        self._scheduler.count_keys(self._plan)
        self.end_ps += self._replica.step_ps(self._plan)
        return True

    def record(self) -> None:
        """Write the timeline row of the steps taken, the last of which ends now."""
        self._replica.record(
            self._plan,
            self.start_ps,
            self.end_ps,
            self.steps,
            self.first_ps,
            self.increment_ps,
            self.at_first,
        )
