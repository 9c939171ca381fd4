"""Timeline: the rows of a run's steps, noted by what cannot be computed afterwards."""

from __future__ import annotations

import numpy as np

from sim.records import TIMELINE_COLUMNS
from sim.rows import IntRows, Table
from sim.stored import ColumnFiles

_NOTED = (
    "start_ps",
    "steps",
    "running",
    "waiting",
    "decode_sequences",
    "prefill_sequences",
    "prefill_tokens",
    "first_step_ps",
    "step_increment_ps",
    "free_blocks",
    "evictable_blocks",
    "logical_blocks",
    "logical_tokens",
    "later_blocks",
    "evicted_so_far",
)
"""What the engine notes of a stretch: columns of the timeline, then the referenced blocks that it added after its first
step, and the blocks evicted since the run began."""

_EXTRAS = (
    "late_tokens",
    "shared_slots",
    "later_tokens",
    "blocks_beside",
    "preemptions",
    "out_of_block_steps",
)
"""What is nought in most rows, and noted apart:

late_tokens     tokens a step that do not come a step after the one before
shared_slots    by how much kv_tokens exceeds what it is where every table's last block is its own
later_tokens    by how much kv_tokens at the first step exceeds what it is where each decoding sequence adds one a step
blocks_beside   referenced blocks that are in no table
"""


class Timeline:
    """Rows in the making, of a pool of `num_blocks` blocks of which no transfer holds any at the end of a step.

    append(row)  adds a row of numbers, in the order of _NOTED
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, files: ColumnFiles | None = None) -> None:
        self._num_blocks = num_blocks
        self._tokens_per_block = tokens_per_block
        self._evicted = 0
        self._completed = 0  # rows
        self._extras: list[tuple[int, ...]] = []
        self.rows = IntRows(TIMELINE_COLUMNS, files, width=len(_NOTED), complete=self._complete)
        self.append = self.rows.append

    def note(self, *extras: int) -> None:
        """Note of the row that is appended next what is nought as a rule, in the order of _EXTRAS."""
        self._extras.append((len(self.rows), *extras))

    def _complete(self, table: Table) -> Table:
        """Return rows as TIMELINE_COLUMNS has them."""
        noted = dict(zip(_NOTED, table.T, strict=True))
        for name in _EXTRAS:
            noted[name] = np.zeros(len(table), dtype=np.int64)
        if self._extras:
            rows, *columns = np.array(self._extras, dtype=np.int64).T
            for name, column in zip(_EXTRAS, columns, strict=True):
                noted[name][rows - self._completed] = column
            self._extras.clear()
        self._completed += len(table)

        steps, decoding, size = noted["steps"], noted["decode_sequences"], self._tokens_per_block
        triangle = steps * (steps - 1) // 2
        noted["end_ps"] = (
            noted["start_ps"] + steps * noted["first_step_ps"] + noted["step_increment_ps"] * triangle
        )
        noted["itl_tokens"] = decoding - noted["late_tokens"]
        referenced = self._num_blocks - noted["free_blocks"] - noted["evictable_blocks"]
        noted["referenced_blocks"] = referenced
        noted["referenced_blocks_first"] = referenced - noted["later_blocks"]
        noted["saved_blocks"] = noted["logical_blocks"] - referenced + noted["blocks_beside"]
        unwritten = noted["logical_blocks"] * size - noted["logical_tokens"]
        noted["kv_tokens"] = referenced * size - unwritten + noted["shared_slots"]
        noted["kv_tokens_first"] = noted["kv_tokens"] - (steps - 1) * decoding + noted["later_tokens"]
        so_far = noted["evicted_so_far"]
        noted["evicted_blocks"] = np.diff(so_far, prepend=self._evicted)
        self._evicted = int(so_far[-1])
        return np.stack([noted[name] for name in TIMELINE_COLUMNS], axis=1)
