"""State machines that fuzz a KV cache manager against a shadow of the pool. Needs hypothesis.

    class MyPolicyMachine(AllocatorMachine):
        policies = (MyPolicy,)

    class MyManagerMachine(AllocatorMachine):
        partials = ("",)                             # without what yours cannot do
        logging = (False,)
        def make_manager(self, num_blocks, tokens_per_block, reuse): ...
        def cached_blocks(self): ...
        def snapshot(self): ...

    TestMyPolicy = MyPolicyMachine.TestCase          # collected by pytest
    print(run_machine(MyPolicyMachine, steps=10_000))

`AllocatorMachine` has every operation; the other machines (`SharingMachine`, `ReuseMachine`, …) have those of one
concern, and so find its bugs in fewer steps. A subclass adds operations with `allocator.rules.operation.operation`.
Pools are tiny, prompts made of two symbols: everything collides.

The oracle (`allocator.oracle`, with what a subclass may replace) does not know how a manager works. It compares
with a shadow of the pool:

    every running sequence reads exactly its own history, at every position, hits included
    a lookup finds the longest cached prefix, and never the last token
    OutOfBlocks comes exactly when more blocks are needed than are free or evictable, and changes nothing
    copy lists can run in parallel; counters agree with a recount; nothing leaks

What `ManagerMachine` asks of a manager of your own (KVCacheManager's docstrings say what each call means):

    num_blocks, tokens_per_block, available_blocks, now
    lookup(content, salt), is_current(match), blocks_needed(match, n), can_admit(match, n)
    admit(content, n, match, salt), extend(sequence, n), append(sequences, tokens), release(sequence), batch()
    prefill_slots(sequence), pending_copies(), stats() -> CacheStats, check_invariants()
    of a match       content, hit_tokens, hit_blocks, query_blocks, miss_blocks; and, 0 or None where it has no such
                     thing, copied_blocks, evictable_blocks, repeated_blocks, partial_tokens, host_blocks, partial,
                     computed_by
    of a sequence    num_tokens, hit_tokens, block_table, content(num_tokens)
    of what batch() returns
                     what a list has, and add and remove

`append` raises OutOfBlocks before it changes anything, with the blocks needed for all sequences together. Bad input
(`misuse`: truncate and reorder_beams, too) is refused with ValueError. What yours cannot do is taken out by a weight of
0, or by setting the operation to None: `weights = {"misuse": 0}`, `decode = None`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from allocator.oracle import Tally
from allocator.rules.base import ManagerMachine
from allocator.rules.batch import BatchRules
from allocator.rules.cost import CostRules
from allocator.rules.events import EventRules
from allocator.rules.partial import PartialRules
from allocator.rules.policies import PolicyRules
from allocator.rules.quotas import QuotaRules
from allocator.rules.retention import RetainedBatchRules, RetentionRules
from allocator.rules.reuse import ReuseRules
from allocator.rules.serving import ServingRules
from allocator.rules.sharing import SharingRules
from allocator.rules.tiers import TierRules
from allocator.rules.windows import WindowRules

__all__ = [
    "AllocatorMachine",
    "BatchMachine",
    "CostMachine",
    "EventsMachine",
    "ManagerMachine",
    "PartialMachine",
    "PolicyMachine",
    "QuotaMachine",
    "RetentionMachine",
    "RetentionSharingMachine",
    "ReuseMachine",
    "SharingMachine",
    "Tally",
    "TierEventsMachine",
    "TierMachine",
    "TierPartialMachine",
    "WindowEventsMachine",
    "WindowMachine",
    "WindowPartialMachine",
    "WindowRetentionMachine",
    "WindowTierEventsMachine",
    "WindowTierMachine",
    "run_machine",
]


class ReuseMachine(ReuseRules):
    """Prefix reuse and eviction."""


class SharingMachine(SharingRules):
    """Fork, beams, truncation, copy-on-write."""


class BatchMachine(BatchRules, SharingRules):
    """Batches, and the copies that their members need."""


class QuotaMachine(QuotaRules, SharingRules, BatchRules):
    """Tenants with quotas."""


class TierMachine(TierRules, RetentionRules):
    """A host tier: offloading of what is retained dearly enough, onboarding, swapping."""


class TierPartialMachine(TierRules, PartialRules, SharingRules):
    """Hits that end within a block, before a host tier; both ways of partial reuse."""

    partials = ("copy", "steal")

    def begin(self, num_blocks: int, tokens_per_block: int, reuse: bool, *others: Any, **more: Any) -> None:
        super().begin(num_blocks, 4 if num_blocks % 2 else 2, True, *others, **more)


class EventsMachine(EventRules, SharingRules, BatchRules):
    """The event log, of every program."""

    logging = (True,)


class WindowEventsMachine(EventRules, WindowRules, SharingRules, BatchRules):
    """The event log of a windowed cache, of every program."""

    logging = (True,)
    partials = ("", "copy", "steal")

    def choose_window(self, drawn: int) -> int | None:
        """Return a window."""
        return 2 + drawn % 8


class TierEventsMachine(EventRules, TierRules, SharingRules):
    """The event log of a host tier, of every program."""

    logging = (True,)


class WindowTierEventsMachine(EventRules, WindowRules, TierRules, SharingRules):
    """The event log of a host tier behind a windowed cache, of every program."""

    logging = (True,)
    partials = ("", "copy")

    def choose_window(self, drawn: int) -> int | None:
        """Return a window."""
        return 2 + drawn % 8


class RetentionMachine(PolicyRules, ServingRules, ReuseRules):
    """Priorities and durations of cached blocks, and the policy that honours them."""

    policies = ("priority",)


class WindowRetentionMachine(WindowRules, RetentionMachine):
    """Priorities and durations of the blocks of windowed caches."""

    def choose_window(self, drawn: int) -> int | None:
        """Return a window."""
        return 2 + drawn % 8


class RetentionSharingMachine(RetainedBatchRules, SharingRules):
    """Forks, beams, batches and truncated sequences, and how their blocks are to be kept."""


class PartialMachine(ReuseRules, EventRules, PartialRules):
    """Hits that end within a block; both ways of partial reuse, blocks of four tokens."""

    partials = ("copy", "steal")

    def begin(self, num_blocks: int, tokens_per_block: int, reuse: bool, *others: Any, **more: Any) -> None:
        super().begin(num_blocks, 4, True, *others, **more)


class WindowMachine(WindowRules, ReuseRules, SharingRules, BatchRules):
    """Attention windows of 2 to 9 tokens with up to 3 sinks, in every program."""

    def choose_window(self, drawn: int) -> int | None:
        """Return a window."""
        return 2 + drawn % 8


class WindowTierMachine(WindowRules, TierRules, SharingRules, BatchRules):
    """A host tier behind a windowed cache, in every program."""

    partials = ("", "copy", "steal")

    def choose_window(self, drawn: int) -> int | None:
        """Return a window."""
        return 2 + drawn % 8


class WindowPartialMachine(WindowRules, PartialRules, ReuseRules, SharingRules):
    """Hits that end within a block of a windowed cache; both ways of partial reuse."""

    partials = ("copy", "steal")

    def choose_window(self, drawn: int) -> int | None:
        """Return a window."""
        return 2 + drawn % 8

    def begin(self, num_blocks: int, tokens_per_block: int, reuse: bool, *others: Any, **more: Any) -> None:
        super().begin(num_blocks, 4, True, *others, **more)


class CostMachine(CostRules):
    """What operations cost, counted in lines. Each program takes about a second."""

    extend = append = decode = misuse = admit_again = None  # type: ignore[assignment]


class PolicyMachine(PolicyRules, ServingRules):
    """Each policy's contract, and each eviction beside the published algorithm."""


class AllocatorMachine(
    WindowRules,
    ReuseRules,
    SharingRules,
    BatchRules,
    QuotaRules,
    TierRules,
    EventRules,
    ServingRules,
    PartialRules,
):
    """Everything at once."""

    partials = ("", "", "copy", "steal")
    weights: ClassVar[Mapping[str, int]] = {
        "admit": 3,
        "admit_again": 2,
        "admit_halves": 2,
        "admit_retained": 2,
        "admit_with_match": 5,
        "append": 3,
        "append_batch": 4,
        "come_back": 18,
        "decode": 3,
        "extend": 4,
        "finish_transfers": 24,
        "follow": 4,
        "fork": 3,
        "join_or_leave": 5,
        "part": 6,
        "pass_time": 8,
        "preempt": 2,
        "press": 4,
        "race": 2,
        "readmit": 7,
        "rebuild": 3,
        "release": 4,
        "release_swapped": 26,
        "reorder_beams": 2,
        "sample": 3,
        "serve": 3,
        "search": 3,
        "slide": 2,
        "swap_in": 18,
        "swap_out": 6,
        "truncate": 3,
    }
    """What can seldom be done would hardly be."""


BATCH = 9
"""Programs of one call of Hypothesis. From the tenth on, it would rather vary those that it has run than draw new ones:
five in six would do nearly the same as another."""


def run_machine(
    machine: type[ManagerMachine],
    steps: int,
    seed_: int = 0,
    *,
    steps_per_program: int = 80,
    tally: Tally | None = None,
    shrink: bool = False,
) -> Tally:
    """Run programs of a machine until `steps` steps are done; return what they did.

    The same seed runs the same programs. A failure is raised with the program in its notes: as it was found, or,
    with `shrink`, as short as it can be made, which may take minutes. `tally`, if given, then says after how many
    steps.
    """
    tally = Tally() if tally is None else tally
    began = time.perf_counter()
    counted = type(machine.__name__, (machine,), {"tally": tally})
    try:
        for batch in itertools.count():
            if tally.steps >= steps:
                break
            programs = min(max(1, (steps - tally.steps) // (steps_per_program + 1)), BATCH)
            run_state_machine_as_test(
                seed(seed_ * 1_000_003 + batch)(counted),
                settings=settings(
                    max_examples=programs,
                    stateful_step_count=steps_per_program,
                    deadline=None,
                    database=None,
                    report_multiple_bugs=False,
                    phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
                    suppress_health_check=list(HealthCheck),
                ),
            )
    finally:
        tally.seconds = time.perf_counter() - began
    return tally
