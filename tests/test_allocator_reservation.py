"""Contiguous reservations: no slot is owned twice, none is lost, and every slot is accounted for."""

from __future__ import annotations

import pickle
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from allocator.ranges import BestFitSpace, BuddySpace
from allocator.reservation import (
    PLACEMENTS,
    RULES,
    OutOfSlots,
    Reservation,
    ReservationPool,
    reserved_tokens,
)
from allocator.rules.cost import count_lines

SPACES = (BuddySpace, BestFitSpace)


class ReservationMachine(RuleBasedStateMachine):
    """Drive one pool; a plain array of owners, written slot by slot, is the oracle."""

    @rule(data=st.data(), slots=st.integers(1, 200))
    @precondition(lambda self: not hasattr(self, "pool"))
    def build(self, data: st.DataObject, slots: int) -> None:
        self.pool = ReservationPool(
            slots, data.draw(st.sampled_from(RULES)), data.draw(st.sampled_from(PLACEMENTS))
        )
        self.owners: list[int | None] = [None] * slots
        self.live: dict[int, Reservation] = {}
        self.count = 0

    @rule(prompt=st.integers(1, 20), output=st.integers(0, 40), spare=st.integers(0, 30))
    @precondition(lambda self: hasattr(self, "pool"))
    def allocate(self, prompt: int, output: int, spare: int) -> None:
        final = prompt + output
        before = self.pool.usage()
        try:
            reservation = self.pool.allocate(prompt, final, final + spare)
        except OutOfSlots as error:
            refusal = error
        else:
            refusal = None
        if refusal is not None:
            assert refusal.needed > refusal.largest == before.largest_free
            assert self.pool.usage() == before
            return
        assert reservation.length <= before.largest_free
        for slot in range(reservation.start, reservation.start + reservation.length):
            assert self.owners[slot] is None, "two sequences own a slot"
            self.owners[slot] = self.count
        self.live[self.count] = reservation
        self.count += 1

    @rule(data=st.data(), tokens=st.integers(1, 8))
    @precondition(lambda self: getattr(self, "live", None))
    def grow(self, data: st.DataObject, tokens: int) -> None:
        reservation = self.live[data.draw(st.sampled_from(sorted(self.live)))]
        if reservation.num_tokens + tokens > reservation.final_tokens:
            with pytest.raises(ValueError, match="must not exceed the sequence's final"):
                self.pool.grow(reservation, tokens)
            return
        self.pool.grow(reservation, tokens)
        last = reservation.slot(reservation.num_tokens - 1)
        assert reservation.start <= last < reservation.start + reservation.length

    @rule(data=st.data())
    @precondition(lambda self: getattr(self, "live", None))
    def free(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.live)))
        reservation = self.live.pop(owner)
        self.pool.free(reservation)
        self.owners = [None if o == owner else o for o in self.owners]
        with pytest.raises(ValueError, match="must be a live one"):
            self.pool.free(reservation)

    @invariant()
    def accounts_for_every_slot(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_invariants()
        usage = self.pool.usage()
        parts = usage.tokens + usage.reserved + usage.internal + usage.rounding + usage.free
        assert parts == usage.num_slots
        assert usage.free == self.owners.count(None)
        assert usage.tokens == sum(r.num_tokens for r in self.live.values())
        assert self.pool.num_sequences == len(self.live)
        assert self.pool.taken_slots == len(self.owners) - self.owners.count(None)

    def teardown(self) -> None:
        if not hasattr(self, "pool"):
            return
        for reservation in self.live.values():
            self.pool.free(reservation)
        fresh = ReservationPool(self.pool.num_slots, self.pool.rule, self.pool.placement)
        assert self.pool.usage() == fresh.usage(), "freed ranges have not joined up again"


TestReservationMachine = ReservationMachine.TestCase


@pytest.mark.parametrize("space", SPACES)
@given(data=st.data())
def test_freeing_in_any_order_restores_the_whole_memory(space: type, data: st.DataObject) -> None:
    memory = space(data.draw(st.integers(1, 5000)))
    whole = memory.free_ranges()
    starts = []
    for size in data.draw(st.lists(st.integers(1, 400), max_size=40)):
        taken = memory.take(size)
        if taken is None:
            assert memory.largest_free() < size
        else:
            assert taken[1] >= size
            starts.append(taken[0])
    for start in data.draw(st.permutations(starts)):
        memory.give(start)
    assert memory.free_ranges() == whole


@given(num_slots=st.integers(1, 10**6), sizes=st.lists(st.integers(1, 5000), max_size=30))
def test_buddy_ranges_are_aligned_powers_of_two_of_less_than_twice_the_size(
    num_slots: int, sizes: list[int]
) -> None:
    memory = BuddySpace(num_slots)
    for size in sizes:
        taken = memory.take(size)
        if taken is not None:
            start, length = taken
            assert size <= length < 2 * size
            assert length.bit_count() == 1
            assert start % length == 0
            assert start + length <= num_slots


def test_buddy_splits_the_smallest_range_at_the_lowest_address() -> None:
    memory = BuddySpace(13)
    assert memory.free_ranges() == [(0, 8), (8, 4), (12, 1)]
    assert memory.take(1) == (12, 1)
    assert memory.take(1) == (8, 1)
    assert memory.take(2) == (10, 2)
    assert memory.take(3) == (0, 4)
    assert memory.take(5) is None
    memory.give(8)
    memory.give(10)
    assert memory.free_ranges() == [(4, 4), (8, 4)]


def test_best_fit_takes_the_smallest_hole_that_holds() -> None:
    memory = BestFitSpace(30)
    assert [memory.take(size) for size in (10, 1, 5, 1)] == [(0, 10), (10, 1), (11, 5), (16, 1)]
    memory.give(0)
    memory.give(11)
    assert memory.take(4) == (11, 4)
    assert memory.free_ranges() == [(0, 10), (15, 1), (17, 13)]


@pytest.mark.parametrize("space", SPACES)
def test_space_refuses_what_it_never_gave(space: type) -> None:
    memory = space(64)
    with pytest.raises(ValueError, match=r"start \(3\) must be that of a range taken"):
        memory.give(3)
    with pytest.raises(ValueError, match=r"size \(0\) must be at least 1"):
        memory.take(0)
    with pytest.raises(ValueError, match=r"num_slots \(0\) must be at least 1"):
        space(0)


def _lines_run(memory: BuddySpace, rounds: int) -> int:
    """Return how many lines a fixed churn executes."""
    random_ = random.Random(5)
    taken: list[int] = []

    def churn() -> None:
        for _ in range(rounds):
            if len(taken) > 32:
                memory.give(taken.pop(random_.randrange(len(taken))))
            got = memory.take(random_.randint(1, 60))
            if got is not None:
                taken.append(got[0])

    return count_lines(churn)


def test_buddy_cost_grows_with_the_logarithm_of_the_memory() -> None:
    small, large = _lines_run(BuddySpace(1 << 12), 2000), _lines_run(BuddySpace(1 << 24), 2000)
    assert large < 2.5 * small


def test_buddy_keeps_no_trace_of_past_splits() -> None:
    memory = BuddySpace(1 << 10)
    for _ in range(5000):
        start, _length = memory.take(1) or (0, 0)
        memory.give(start)
    assert sum(map(len, memory._heaps)) < 400


@given(
    prompt=st.integers(1, 500),
    output=st.integers(0, 500),
    spare=st.integers(0, 500),
    rule=st.sampled_from(RULES),
)
def test_rules_reserve_enough_and_no_more_than_they_say(
    prompt: int, output: int, spare: int, rule: str
) -> None:
    final = prompt + output
    asked = reserved_tokens(rule, prompt, final, final + spare)
    assert final <= asked <= final + spare
    if rule == "maximum":
        assert asked == final + spare
    elif rule == "exact":
        assert asked == final
    else:
        assert asked - prompt < 2 * output or output == 0 == asked - prompt


def test_power_of_two_rounds_the_output_as_in_the_paper() -> None:
    assert reserved_tokens("power_of_two", 10, 10 + 25, 2048) == 10 + 32
    assert reserved_tokens("power_of_two", 10, 10 + 32, 2048) == 10 + 32
    assert reserved_tokens("power_of_two", 2000, 2000 + 40, 2048) == 2048


def test_memory_of_15700_slots_holds_seven_maximum_reservations() -> None:
    # OPT-13B on an A100 in the paper: 15.7 K slots, 2048 tokens a request, 7.00 requests in every batch.
    pool = ReservationPool(15_700, "maximum")
    for _ in range(7):
        pool.allocate(100, 500, 2048)
    with pytest.raises(OutOfSlots) as refusal:
        pool.allocate(100, 500, 2048)
    assert (refusal.value.needed, refusal.value.largest, refusal.value.free) == (
        2048,
        1024,
        15_700 - 7 * 2048,
    )
    assert str(refusal.value) == "2048 contiguous slots needed, the largest free range has 1024 of 1364 free"
    assert str(pickle.loads(pickle.dumps(refusal.value))) == str(refusal.value)


def test_refusals_of_bad_input_name_the_value_and_the_rule() -> None:
    pool = ReservationPool(64, "exact")
    with pytest.raises(
        ValueError, match=r"final_tokens \(9\) must lie in prompt_tokens \(10\) to max_tokens"
    ):
        pool.allocate(10, 9, 20)
    with pytest.raises(ValueError, match=r"final_tokens \(21\) must lie in .* to max_tokens \(20\)"):
        pool.allocate(10, 21, 20)
    with pytest.raises(ValueError, match=r"rule \('best'\) must be one of maximum, power_of_two, exact"):
        ReservationPool(64, "best")
    with pytest.raises(ValueError, match=r"placement \('first'\) must be one of buddy, best_fit"):
        ReservationPool(64, "exact", "first")
    with pytest.raises(ValueError, match=r"num_slots \(0\) must be at least 1"):
        ReservationPool(0)
    reservation = pool.allocate(4, 6, 6)
    with pytest.raises(ValueError, match=r"position \(4\) must lie in 0 to 3"):
        reservation.slot(4)
    with pytest.raises(ValueError, match="must be a live one of this pool"):
        ReservationPool(64, "exact").grow(reservation)
