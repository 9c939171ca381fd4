"""KVSequence: one sequence's block table and what it knows about its content."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from allocator.content import Content, History
from allocator.event_log import NOBODY
from allocator.prefix import Extent
from allocator.retention import RetentionPlan

if TYPE_CHECKING:
    from allocator.batch import Batch
    from allocator.quotas import Tenant


_NO_TWINS: Final[set[int]] = set()  # what most sequences have: never added to
_NOT_WINDOWED: Final[list[Extent | None]] = []


class KVSequence:
    """The KV cache of one sequence, from admission to release. Only the manager changes it.

        tokens   0 ………………………………………… num_tokens
        table    [ b7 | b2 | b9 | b4 | b1 ]          ceil(num_tokens / tokens_per_block) blocks
                   └─ anchored ───┘ └ private ┘

    The *anchor* is the deepest extent whose blocks say what the first `anchored` blocks of this sequence say;
    the sequence holds a reference on it and on every extent above. Blocks beyond are private: the last one
    while it fills, and any that a fork shares until somebody writes. A *twin* is an anchored position whose
    block is private all the same: this sequence computed what was in the cache already, so its own block
    stays uncached, and the cached one is held only to keep what it will add below within reach.

    In a windowed cache, blocks that no later query needs have left the table, front first but for those of sinks:

        tokens   0 … sinks ……………………………………… num_tokens
        table    [ b7 |              b4 | b1 | b8 ]          sink_blocks, then those after `left` blocks
        context  0 …………………………………………… context_len        num_tokens − left · tokens_per_block

    A kernel takes the table as it stands, with context_len as the number of keys, and masks with the same window
    and sinks: what a query attends to has not moved relative to it, and sinks are the first keys. Blocks leave
    when the sequence next grows, which says that its last step is done, and only those that the first query of
    the growth does not need. A *position*, in tokens or in blocks, always counts what has left.
    """

    __slots__ = (
        "anchor",
        "base_tokens",
        "batch",
        "cow_copies",
        "held",
        "hit_blocks",
        "host",
        "left",
        "num_prompt_tokens",
        "number",
        "partial_tokens",
        "released",
        "retention",
        "root",
        "salt",
        "settled_history",
        "sink_blocks",
        "table",
        "tenant",
        "twins",
    )

    def __init__(
        self,
        history: History,
        salt: Hashable,
        num_prompt_tokens: int,
        anchor: Extent,
        table: array[int],
        num_tokens: int,
    ) -> None:
        self.settled_history = history  # lacks what the batch it is in has not settled yet
        self.salt = salt
        self.num_prompt_tokens = num_prompt_tokens
        self.anchor = anchor
        self.table = table
        self.twins = _NO_TWINS
        self.hit_blocks = 0
        self.partial_tokens = 0
        self.cow_copies = 0
        self.host: array[int] | None = None  # swapped out: the host blocks of what the index does not know
        self.batch: Batch | None = None
        self.released = False
        self.tenant: Tenant | None = None
        self.number = NOBODY  # in the event log, if there is one
        self.retention: RetentionPlan | None = None
        self.base_tokens = num_tokens  # what it has, or, in a batch, would have had at tick 0
        self.left = 0
        # Of a windowed cache alone: what is held of the index, a node (None for a twin) for each anchored block.
        self.sink_blocks = 0
        self.held = _NOT_WINDOWED
        self.root: Extent | None = None

    def catch_up(self) -> None:
        """Let the index have all blocks that it has filled while it is in a batch."""
        if self.batch is not None:
            self.batch.settle(self)

    @property
    def history(self) -> History:
        """Return what it says, complete up to its last token."""
        if self.batch is not None:
            self.batch.settle(self)
        return self.settled_history

    @history.setter
    def history(self, history: History) -> None:
        if self.batch is not None:
            self.batch.replace_history(self, history)
        self.settled_history = history

    @property
    def num_tokens(self) -> int:
        """Return how many tokens have a slot: written, or to be written by the step being scheduled."""
        return self.base_tokens if self.batch is None else self.base_tokens + self.batch.tick

    @num_tokens.setter
    def num_tokens(self, tokens: int) -> None:
        self.base_tokens = tokens if self.batch is None else tokens - self.batch.tick

    def add_twins(self, positions: Iterable[int]) -> None:
        """Note positions whose blocks are private though the content is cached."""
        if not self.twins:
            self.twins = set()
        self.twins.update(positions)

    @property
    def num_blocks(self) -> int:
        """Return the length of its block table."""
        return len(self.table)

    @property
    def context_len(self) -> int:
        """Return how many tokens its table's blocks hold: what kernels count as the context."""
        return self.num_tokens - self.left * self.settled_history.tokens_per_block

    def index_of(self, position: int) -> int:
        """Return where in its table the block at a position stands, which must not have left."""
        return position if position < self.sink_blocks else position - self.left

    @property
    def anchored(self) -> int:
        """Return how many of its blocks, from the first on, the prefix index knows."""
        if self.anchor.grower is not None:
            self.catch_up()
        return self.anchor.end

    @property
    def hit_tokens(self) -> int:
        """Return how many tokens its admission found in the cache."""
        return self.hit_blocks * self.settled_history.tokens_per_block + self.partial_tokens

    @property
    def block_table(self) -> NDArray[np.int32]:
        """Return its block table, int32 [num_blocks], as a copy."""
        return np.array(self.table, dtype=np.int32)

    def content(self, num_tokens: int | None = None) -> Content:
        """Return its first `num_tokens` tokens as a prompt, to be computed again after a preemption.

        The default is all that have a slot, and the rest of the prompt if its prefill is incomplete; one more
        includes the token sampled last. Raises ValueError for more than that, or less than 1.
        """
        most = max(self.num_tokens, self.num_prompt_tokens)
        if num_tokens is None:
            num_tokens = most
        elif not 1 <= num_tokens <= most + 1:
            raise ValueError(f"num_tokens ({num_tokens}) must be in 1..{most + 1}")
        return self.history.content(num_tokens)

    def slots(self, first: int, last: int) -> NDArray[np.int64]:
        """Return the slots of tokens first … last − 1, int64 [last − first].

        Raises ValueError for tokens that have no slot, or none any more.
        """
        if not 0 <= first <= last <= self.num_tokens:
            raise ValueError(f"tokens {first} to {last} must lie within the sequence's {self.num_tokens}")
        size = self.settled_history.tokens_per_block
        positions = np.arange(first, last, dtype=np.int64)
        blocks = np.frombuffer(self.table, np.int32).astype(np.int64)
        at = positions // size
        if self.left and last > first:
            beyond = at >= self.sink_blocks
            at[beyond] -= self.left
            if (at[beyond] < self.sink_blocks).any():
                raise ValueError(
                    f"tokens {first} to {last} must not lie in one of {self.left} blocks that have left"
                )
        return blocks[at] * size + positions % size

    def __repr__(self) -> str:
        return f"<KVSequence {self.num_tokens} tokens in blocks {self.table.tolist()}>"
