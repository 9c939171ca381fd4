"""AttentionWindow: which blocks a query needs where it attends to the last tokens and the first ones only.

    position  0 ……………………………………………………………………………… q
    attended  [ sinks ]                   [ … window … q ]
    blocks    [ b0 ][ b1 ]  have left     [ b5 ][ b6 ][ b7 ]        b1 holds sinks and others: kept whole

A table without the blocks that have left still serves kernels as it is, because all that a query attends to keeps
its place relative to it: they see a context of `context_len` tokens, mask with the same window, and find the
sinks at the same first positions.
"""

from __future__ import annotations


class AttentionWindow:
    """The blocks of `tokens_per_block` that a window, itself included, and the first `num_sinks` tokens span.

    sink_blocks  first blocks that hold a sink token, and so never leave
    reach        tokens before its own that a query needs; at least 1 (a window of 1 is kept like one of 2), so
                 that a hit always ends in a block that is there
    most_blocks  most blocks, those of sinks apart, that the keys of one query lie in
    """

    def __init__(self, window: int, num_sinks: int, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self.sink_blocks = -(-num_sinks // tokens_per_block)
        self.reach = max(window - 1, 1)
        self.most_blocks = -(-self.reach // tokens_per_block) + 1

    def first_needed(self, position: int) -> int:
        """Return the first block beyond the sinks' that the query at `position` needs."""
        return max((position - self.reach) // self.tokens_per_block, self.sink_blocks)

    def left(self, position: int) -> int:
        """Return how many blocks no query from `position` on needs."""
        return max((position - self.reach) // self.tokens_per_block - self.sink_blocks, 0)

    def least_tokens(self, left: int) -> int:
        """Return the least length of a sequence of which `left` blocks have left: the next query needs none."""
        return (self.sink_blocks + left) * self.tokens_per_block + self.reach if left else 1

    def blocks_held(self, num_tokens: int, step_tokens: int = 1) -> int:
        """Return the most blocks that a sequence ever holds until `num_tokens`, at `step_tokens` a step."""
        size = self.tokens_per_block
        span = -(-(self.reach + step_tokens - 1) // size) + 1
        return min(-(-num_tokens // size), self.sink_blocks + span)
