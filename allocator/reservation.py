"""Contiguous KV caches, which paging is compared with: each sequence reserves one range before it starts.

The three rules are the baselines of the PagedAttention paper (SOSP'23, arXiv 2309.06180, section 6.1, where
they are called Orca), which place every range by the buddy algorithm:

    maximum       max_tokens slots, whatever the sequence will need ("Orca (Max)")
    power_of_two  the prompt, and the output rounded up to a power of two: it over-reserves the output by less
                  than 2x ("Orca (Pow2)": an output of 25 reserves 32); never more than max_tokens
    exact         the final length, which only an oracle knows ("Orca (Oracle)")

A buddy system rounds each range up to a power of two, exact ones too; that rounding is most of the external
fragmentation which the paper reports for the last two. With placement "best_fit" nothing is rounded, and what
remains is the price of contiguity itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from allocator.checks import require_choice, require_int
from allocator.field_docs import with_field_docs
from allocator.ranges import AddressSpace, BestFitSpace, BuddySpace

RULES = ("maximum", "power_of_two", "exact")
PLACEMENTS = ("buddy", "best_fit")


class OutOfSlots(Exception):
    """No free range is long enough. The call that raised it has changed nothing."""

    def __init__(self, needed: int, largest: int, free: int) -> None:
        super().__init__(
            f"{needed} contiguous slots needed, the largest free range has {largest} of {free} free"
        )
        self.needed = needed
        self.largest = largest
        self.free = free

    def __reduce__(self) -> tuple[type[OutOfSlots], tuple[int, int, int]]:
        return type(self), (self.needed, self.largest, self.free)


@dataclass(eq=False)
class Reservation:
    """One sequence's range: slots [start, start + length), of which the first `num_tokens` are written."""

    start: int
    length: int
    """Slots taken from the memory, the placement's rounding included."""
    reserved_tokens: int
    """Slots that the rule asked for."""
    final_tokens: int
    """Tokens the sequence will hold when it ends; known to the accounting, and to the rules that may look."""
    num_tokens: int
    released: bool = False

    def slot(self, position: int) -> int:
        """Return the slot of the token at `position`. Raises ValueError for a token not written yet."""
        if not 0 <= position < self.num_tokens:
            raise ValueError(f"position ({position}) must lie in 0 to {self.num_tokens - 1}")
        return self.start + position


@with_field_docs
@dataclass(frozen=True)
class SlotUsage:
    """Where every slot of the memory goes, in slots; the five shares add up to `num_slots`.

    The paper's figure 2 has four shares. Its external fragmentation is `rounding`, plus `free` for as long as
    a request waits that `free` cannot serve.
    """

    num_slots: int
    tokens: int
    """Written: they hold a token's state."""
    reserved: int
    """Not written yet, but the sequence that has them will."""
    internal: int
    """Reserved by the rule beyond the sequence's final length: never written."""
    rounding: int
    """Added by the placement to what the rule asked for: never written."""
    free: int
    largest_free: int
    """The longest range that could be taken, part of `free`."""


def reserved_tokens(rule: str, prompt_tokens: int, final_tokens: int, max_tokens: int) -> int:
    """Return the slots that `rule` asks for: see the module's table. Raises ValueError on a broken rule.

    `final_tokens` are the slots that prompt and output fill in the end, from prompt_tokens to max_tokens.
    """
    require_choice("rule", rule, RULES)
    require_int("prompt_tokens", prompt_tokens, 1)
    if not prompt_tokens <= final_tokens <= max_tokens:
        raise ValueError(
            f"final_tokens ({final_tokens}) must lie in prompt_tokens ({prompt_tokens}) "
            f"to max_tokens ({max_tokens})"
        )
    if rule == "maximum":
        return max_tokens
    output = final_tokens - prompt_tokens
    if rule == "power_of_two" and output:
        output = 1 << (output - 1).bit_length()
    return min(prompt_tokens + output, max_tokens)


class ReservationPool:
    """A contiguous KV cache of `num_slots` token slots under one of RULES and one of PLACEMENTS.

    A life: `allocate` (the prompt is written at once) → `grow` → `free`. All calls cost O(log num_slots).
    """

    def __init__(self, num_slots: int, rule: str = "maximum", placement: str = "buddy") -> None:
        require_int("num_slots", num_slots, 1)
        require_choice("rule", rule, RULES)
        require_choice("placement", placement, PLACEMENTS)
        self.num_slots = num_slots
        self.rule = rule
        self.placement = placement
        self._space: AddressSpace = BuddySpace(num_slots) if placement == "buddy" else BestFitSpace(num_slots)
        self._live: dict[int, Reservation] = {}
        self._tokens = self._final = self._asked = self._taken = 0

    def allocate(self, prompt_tokens: int, final_tokens: int, max_tokens: int) -> Reservation:
        """Reserve a range for a sequence and write its prompt.

        Raises OutOfSlots when no free range is long enough, ValueError for lengths out of order.
        """
        asked = reserved_tokens(self.rule, prompt_tokens, final_tokens, max_tokens)
        taken = self._space.take(asked)
        if taken is None:
            free = self.num_slots - self._taken
            raise OutOfSlots(asked, self._space.largest_free(), free)
        start, length = taken
        reservation = Reservation(start, length, asked, final_tokens, prompt_tokens)
        self._live[start] = reservation
        self._tokens += prompt_tokens
        self._final += final_tokens
        self._asked += asked
        self._taken += length
        return reservation

    def grow(self, reservation: Reservation, num_tokens: int = 1) -> None:
        """Write `num_tokens` more tokens. Raises ValueError beyond the final length or after `free`."""
        self._require_live(reservation)
        require_int("num_tokens", num_tokens, 1)
        tokens = reservation.num_tokens + num_tokens
        if tokens > reservation.final_tokens:
            raise ValueError(
                f"num_tokens ({tokens}) must not exceed the sequence's final {reservation.final_tokens}"
            )
        reservation.num_tokens = tokens
        self._tokens += num_tokens

    def free(self, reservation: Reservation) -> None:
        """Give the range back. Raises ValueError when that was done before."""
        self._require_live(reservation)
        self._space.give(reservation.start)
        del self._live[reservation.start]
        reservation.released = True
        self._tokens -= reservation.num_tokens
        self._final -= reservation.final_tokens
        self._asked -= reservation.reserved_tokens
        self._taken -= reservation.length

    def _require_live(self, reservation: Reservation) -> None:
        if self._live.get(reservation.start) is not reservation:
            raise ValueError(f"reservation at {reservation.start} must be a live one of this pool")

    @property
    def num_sequences(self) -> int:
        """Sequences that hold a range."""
        return len(self._live)

    @property
    def taken_slots(self) -> int:
        """Slots that no other sequence can have: all but the free ones."""
        return self._taken

    def usage(self) -> SlotUsage:
        """Return where every slot goes now."""
        return SlotUsage(
            num_slots=self.num_slots,
            tokens=self._tokens,
            reserved=self._final - self._tokens,
            internal=self._asked - self._final,
            rounding=self._taken - self._asked,
            free=self.num_slots - self._taken,
            largest_free=self._space.largest_free(),
        )

    def check_invariants(self) -> None:
        """Recount from the ranges. Raises AssertionError if they overlap, leave a gap, or miscount."""
        live = list(self._live.values())
        ranges = sorted([(r.start, r.length) for r in live] + self._space.free_ranges())
        end = 0
        for start, length in ranges:
            assert start == end, f"slot {min(start, end)} is owned twice, or by nobody"
            assert length > 0, f"range at {start} is empty"
            end = start + length
        assert end == self.num_slots, f"ranges end at {end}, not at num_slots ({self.num_slots})"
        for r in live:
            assert r.num_tokens <= r.final_tokens <= r.reserved_tokens <= r.length, f"{r} breaks its order"
        usage = self.usage()
        assert usage.tokens == sum(r.num_tokens for r in live)
        assert usage.reserved == sum(r.final_tokens - r.num_tokens for r in live)
        assert usage.internal == sum(r.reserved_tokens - r.final_tokens for r in live)
        assert usage.rounding == sum(r.length - r.reserved_tokens for r in live)
        assert usage.free == sum(length for _, length in self._space.free_ranges())
        assert usage.largest_free == max((length for _, length in self._space.free_ranges()), default=0)
