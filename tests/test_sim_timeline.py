"""The timeline's derived columns against a row-by-row oracle, however the rows are packed."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sim.records import TIMELINE_COLUMNS
from sim.timeline import Timeline

NUM_BLOCKS, SIZE = 50, 4
small = st.integers(0, 9)


def _row(draw: st.DrawFn, evicted: int) -> dict[str, int]:
    steps = draw(st.integers(1, 9))
    free = draw(st.integers(0, NUM_BLOCKS))
    evictable = draw(st.integers(0, NUM_BLOCKS - free))
    return {
        "start_ps": draw(st.integers(0, 10**15)),
        "steps": steps,
        "running": draw(small),
        "waiting": draw(small),
        "decode_sequences": draw(small),
        "prefill_sequences": draw(small),
        "prefill_tokens": draw(small),
        "first_step_ps": draw(st.integers(0, 10**10)),
        "step_increment_ps": draw(st.integers(0, 10**6)),
        "free_blocks": free,
        "evictable_blocks": evictable,
        "logical_blocks": draw(st.integers(0, 2 * NUM_BLOCKS)),
        "logical_tokens": draw(st.integers(0, 2 * NUM_BLOCKS * SIZE)),
        "later": draw(small),
        "evicted": evicted + draw(small),
    }


@st.composite
def _runs(draw: st.DrawFn) -> list[tuple[dict[str, int], list[int] | None, bool]]:
    """Rows, what is noted of each apart (nothing of most), and whether they are packed after it."""
    rows: list[tuple[dict[str, int], list[int] | None, bool]] = []
    evicted = 0
    for _ in range(draw(st.integers(0, 12))):
        row = _row(draw, evicted)
        evicted = row["evicted"]
        extras = [draw(small) for _ in range(6)] if draw(st.booleans()) else None
        rows.append((row, extras, draw(st.booleans())))
    return rows


def _expected(row: dict[str, int], extras: list[int] | None, evicted_before: int) -> dict[str, int]:
    late, shared_slots, later_tokens, beside, preemptions, out_of_blocks = extras or [0] * 6
    steps, decoding = row["steps"], row["decode_sequences"]
    referenced = NUM_BLOCKS - row["free_blocks"] - row["evictable_blocks"]
    written = referenced * SIZE - (row["logical_blocks"] * SIZE - row["logical_tokens"]) + shared_slots
    durations = (row["first_step_ps"] + j * row["step_increment_ps"] for j in range(steps))
    return row | {
        "end_ps": row["start_ps"] + sum(durations),
        "itl_tokens": decoding - late,
        "referenced_blocks": referenced,
        "referenced_blocks_first": referenced - row["later"],
        "saved_blocks": row["logical_blocks"] - referenced + beside,
        "kv_tokens": written,
        "kv_tokens_first": written - (steps - 1) * decoding + later_tokens,
        "preemptions": preemptions,
        "out_of_block_steps": out_of_blocks,
        "evicted_blocks": row["evicted"] - evicted_before,
    }


@given(_runs())
def test_columns_are_derived_row_by_row_however_they_are_packed(run: list[tuple[Any, ...]]) -> None:
    timeline = Timeline(NUM_BLOCKS, SIZE)
    expected, evicted = [], 0
    for row, extras, packs in run:
        if extras is not None:
            timeline.note(*extras)
        timeline.append(tuple(row.values()))
        expected.append(_expected(row, extras, evicted))
        evicted = row["evicted"]
        if packs:
            timeline.rows.pack(1)
    assert len(timeline.rows) == len(run)
    found = timeline.rows.columns()
    assert tuple(found) == TIMELINE_COLUMNS
    for name, column in found.items():
        assert column.dtype == np.int64
        assert column.tolist() == [row[name] for row in expected], name
