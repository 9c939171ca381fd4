"""StepCost: what a model of time is asked. Part of sim.cost, apart because its methods are looked at, not compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from sim.cost import StepBatch


class StepCost(Protocol):
    """The duration of a step, in integer picoseconds so that sums in closed form are exact.

    A cost that finds the duration by doing the work has an attribute `needs_work` that is true. One to which it
    matters how many keys lie in attention windows says so with two more attributes, tuples of equal length:
    `windows`, different numbers of keys, and `window_slopes`, picoseconds a key that lies in each.
    """

    def step(self, batch: StepBatch) -> int:
        """Return the duration of a step that computes `batch`. Pure: equal batches take equally long."""
        ...

    def decode_affine(self, decode_sequences: int) -> tuple[int, int] | None:
        """Return (base, slope) in picoseconds such that, for every context C that `decode_sequences` sequences
        can have, step(StepBatch(decode_sequences, C)) == base + slope · C, exactly. With `windows`, in which
        K keys lie, it is base + slope · C + Σ window_slopes · K.

        None says that no such pair exists; decode steps are then computed one by one.
        """
        ...
