"""What sharing saves: blocks of all tables, counted once for each table, against the blocks that are there.

    logical     every table's blocks, a shared one once for each table
    physical    the blocks that tables name, each once
    saved       the difference

Not every referenced block is in a table. A sequence that computed what was cached already has a block of its own
in its table, and holds the cached one beside it; and a pending copy keeps its source, whoever lets go of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from allocator.prefix import Extent
from allocator.sequence import KVSequence
from allocator.tables import Tables


def blocks_in_no_table(tables: Tables) -> int:
    """Return how many referenced blocks stand in no table. O(extents of the sequences that hold twins)."""
    if not tables.twinned and not tables.copies.num_held:
        return 0
    tier = tables.pool.tier
    if not tables.holds_prefixes:
        sources = Counter(tables.copies.held_extents())
        moved = Counter(() if tier is None else tier.queue.gpu_held())
        return sum(
            len(extent.ids) for extent, times in sources.items() if times + moved[extent] == extent.references
        )
    copying = _references(tables.copies.held_extents())
    moving = _references(() if tier is None else tier.queue.gpu_held())
    beside = _twins(tables.twinned)
    hidden = 0
    for extent in copying.keys() | beside.keys():
        in_table = extent.references - copying[extent] - moving[extent]  # or beside a block of the table
        if in_table:
            hidden += sum(times == in_table for times in beside.get(extent, {}).values())
        else:
            hidden += len(extent.ids)
    return hidden


def _references(extents: Iterable[Extent]) -> Counter[Extent]:
    """Return how often each extent is referenced by holding these, each with its path."""
    counts: Counter[Extent] = Counter()
    for extent in extents:
        counts.update(extent.path())
    return counts


def _twins(sequences: Iterable[KVSequence]) -> dict[Extent, Counter[int]]:
    """Return, by extent and position, how many sequences have a block of their own beside the cached one."""
    found: dict[Extent, Counter[int]] = {}
    for sequence in sequences:
        positions = sorted(sequence.twins)
        for extent in sequence.anchor.path():
            while positions and positions[-1] >= extent.start:
                found.setdefault(extent, Counter())[positions.pop()] += 1
    return found
