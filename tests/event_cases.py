"""What the tests of event logs have in common."""

from __future__ import annotations

import polars as pl

from allocator.events import EventLog, Replayer


def assert_states_match(log: EventLog, timeline: pl.DataFrame) -> None:
    """Compare the log with the timeline at the end of every stretch, before what finishes then is released."""
    replayer = Replayer()
    for row in timeline.iter_rows(named=True):
        replayer.apply(log, log.at_time(row["end_ps"] - 1))
        state = replayer.state()
        counts = state.counts()
        assert counts["free"] == row["free_blocks"]
        assert counts["evictable"] == row["evictable_blocks"]
        assert counts["referenced"] == row["referenced_blocks"]
        assert sum(len(one.table) for one in state.sequences.values()) == row["logical_blocks"]
        held = (one.num_tokens - one.left * replayer.tokens_per_block for one in state.sequences.values())
        assert sum(held) == row["logical_tokens"]
