"""Swapping: the part of the manager that moves sequences and cached content between the GPU and host memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from allocator.blocks import OutOfBlocks
from allocator.event_log import FREED
from allocator.sequence import KVSequence
from allocator.sharing import Sharing
from allocator.tiers import HostTier
from allocator.transfers import Transfers


class Swapping(Sharing):
    """The part of the manager that serves a host tier; see `allocator.transfers` for what is executed when."""

    @property
    def host_tier(self) -> HostTier:
        """Return the host tier. Raises ValueError if there is none."""
        tier = self.pool.tier
        if tier is None:
            raise ValueError("num_host_blocks (0) must be at least 1 to swap")
        return tier

    def swap_out(self, sequence: KVSequence) -> None:
        """Move all that a sequence holds to the host, and let go of its GPU blocks. See `pending_swaps`.

        Its tokens survive there, whatever happens on the GPU, until it is swapped in or released. A block that
        the host holds already is not moved again. What it has on the GPU is in transfer until `transfers_done`,
        then free, or evictable where it is cached. Call it between steps that the sequence takes part in.
        Raises OutOfBlocks if the host has too few blocks, and ValueError for a sequence that is in a batch, or
        one of whose blocks a pending copy or transfer is still to fill, or without a host tier.
        """
        tier = self.host_tier
        self._check_live(sequence)
        if sequence.batch is not None:
            raise ValueError(f"{sequence} must leave its batch before it is swapped out")
        awaited = {block for _, block in tier.queue.pending_swap_ins()}
        moved = [*self.tables.swapped_alone(sequence)]
        if awaited:  # a fork may have indexed what came back with a sequence, and the host has no copy of
            moved += [b for e in self.tables.held_extents(sequence) if e.host is None for b in e.ids]
        for block in moved:
            if block in awaited or self.tables.copies.is_destination(block):
                raise ValueError(
                    f"block {block} is still to be filled: take pending_swaps() and pending_copies() first"
                )
        needed, available = tier.blocks_to_swap_out(sequence), tier.host.available
        if needed > available:
            raise OutOfBlocks(needed, available, tier.host.name)
        tier.save(sequence)
        self.tables.vacate(sequence)
        self.logical_blocks -= len(sequence.table)
        self.logical_tokens -= sequence.context_len
        if sequence.tenant is not None:
            sequence.tenant.blocks -= len(sequence.table)
        self._note_prefilling(sequence, False)
        del sequence.table[:]
        del self.sequences[sequence]

    def swap_in(self, sequence: KVSequence) -> None:
        """Bring a swapped-out sequence back: take GPU blocks for what the GPU no longer holds, and refill them.

        Raises OutOfBlocks if the GPU has too few blocks, QuotaExceeded if its tenant has, and ValueError unless
        the sequence is swapped out.
        """
        tier = self.host_tier
        self._check_swapped(sequence)
        needed, available = self.blocks_to_swap_in(sequence), self.pool.available
        if needed > available:
            raise OutOfBlocks(needed, available)
        if sequence.tenant is not None:
            blocks = -(-sequence.context_len // self.tokens_per_block)
            sequence.tenant.require(blocks)
            sequence.tenant.blocks += blocks
        tier.restore(sequence)
        if sequence.retention is not None:
            self.tables.retain_held(sequence, sequence.retention)
        self.sequences[sequence] = None
        self.logical_blocks += len(sequence.table)
        self.logical_tokens += sequence.context_len
        self._note_prefilling(sequence, sequence.num_tokens < sequence.num_prompt_tokens)

    def blocks_to_swap_out(self, sequence: KVSequence) -> int:
        """Return how many host blocks `swap_out` would take. O(extents it holds).

        Raises ValueError without a host tier, or for a sequence that is not running.
        """
        self._check_live(sequence)
        return self.host_tier.blocks_to_swap_out(sequence)

    def blocks_to_swap_in(self, sequence: KVSequence) -> int:
        """Return by how many GPU blocks `swap_in` would lessen what is available. O(extents it holds).

        Raises ValueError unless the sequence is swapped out.
        """
        self._check_swapped(sequence)
        return sum(self.host_tier.blocks_to_swap_in(sequence))

    def _check_swapped(self, sequence: KVSequence) -> None:
        if sequence not in self.host_tier.swapped:
            raise ValueError(f"{sequence} must be swapped out")

    def _release_swapped(self, sequence: KVSequence) -> None:
        if (
            not isinstance(sequence, KVSequence)
            or sequence.host is None
            or self.pool.tier is None
            or sequence not in self.pool.tier.swapped
        ):
            super()._release_swapped(sequence)
            return
        root = self.tables.root_of(sequence)
        if self.events is not None:
            self.events.add(FREED, sequence.number)
        self.pool.tier.forget(sequence)
        self.tables.uproot(sequence, root)
        sequence.released = True

    def is_arriving(self, sequence: KVSequence) -> bool:
        """Return whether a transfer into one of a sequence's blocks is not done yet. O(blocks).

        Its KV must not be read before. Raises ValueError for a sequence that is not running.
        """
        self._check_live(sequence)
        tier = self.pool.tier
        return tier is not None and not tier.queue.arriving().isdisjoint(sequence.table)

    def pending_swaps(self) -> Transfers:
        """Return and forget the transfers to execute before this step's copies and writes.

        `swap_outs` are rows of block and host block, `swap_ins` of host block and block, int32 [n, 2] each; all
        swap-outs are executed before any swap-in. They are in flight until they are handed to `transfers_done`. Take
        the list before `pending_copies`, once the step is scheduled. Raises ValueError without a host tier.
        """
        return self.host_tier.queue.take()

    def transfers_done(self, transfers: Transfers) -> None:
        """Note that transfers have been executed: their blocks are no longer in transfer.

        Raises ValueError if they are not in flight, for instance done already, or without a host tier.
        """
        self.host_tier.queue.done(transfers)

    def pending_copies(self) -> NDArray[np.int32]:
        """Return and forget the copies to execute before this step's writes, int32 [n, 3].

        Columns: source block, destination block, valid tokens (the slots to copy). They may run in parallel.
        Raises ValueError while transfers are pending, which come first.
        """
        if self.pool.tier is not None and len(self.pool.tier.queue):
            raise ValueError(
                "pending_swaps() must be taken before pending_copies(): swaps are executed first"
            )
        return super().pending_copies()
