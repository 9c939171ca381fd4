"""What the event log says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import invariant

from allocator.events import CacheState, EventLog, Replayer, rebuild
from allocator.rules.base import ManagerMachine
from allocator.rules.operation import operation


class EventRules(ManagerMachine):
    """The log beside the manager: what it says now, after every step, and what it says of any step before."""

    logging: ClassVar[Sequence[bool]] = (False, False, True)

    def begin(self, *configuration: Any, **more: Any) -> None:
        """Begin to follow the log, too."""
        super().begin(*configuration, **more)
        self.replayer = Replayer()
        self.remembered: list[tuple[int, CacheState]] = []

    @invariant()
    def check_log(self) -> None:
        """Apply the new events; compare what they say with how the manager stands."""
        if not getattr(self, "keeps_log", False):
            return
        log = self.manager.events
        self.replayer.apply(log)
        said, found = self.replayer.state(), CacheState.of(self.manager)
        assert said == found, f"said, found: {said.differences(found)}"
        counted = said.counts()
        stats = self.manager.stats()
        assert counted["free"] == stats.free_blocks
        assert counted["evictable"] == stats.evictable_blocks
        assert counted["referenced"] == stats.referenced_blocks
        assert counted["in transfer"] == stats.in_transfer_blocks
        if stats.host is not None:
            counted = said.host_counts()
            assert counted["free"] == stats.host.free_blocks
            assert counted["evictable"] == stats.host.evictable_blocks
            assert counted["referenced"] == stats.host.held_blocks
            assert counted["in transfer"] == stats.host.in_transfer_blocks
        self.remembered.append((len(log), found))

    @operation(
        when=lambda self: self.keeps_log and self.remembered,
        place=st.integers(0, 999),
        by_columns=st.booleans(),
    )
    def rebuild(self, place: int, by_columns: bool) -> None:
        """Rebuild an earlier state from the log, or from what its columns say."""
        log = self.manager.events
        if by_columns:
            log = EventLog.from_columns(log.columns())
            assert str(log) == str(self.manager.events)
        length, found = self.remembered[place % len(self.remembered)]
        said = rebuild(log, length)
        assert said == found, f"said, found: {said.differences(found)}"
        self.did("rebuild")
