"""Transfers: the blocks that have to move between the GPU and the host, and what they hold meanwhile.

Each step, after all has been scheduled and before anything is computed, the lists are executed in this order:

    1. swap_outs     GPU → host     `pending_swaps()`
    2. swap_ins      host → GPU
    3. copies        GPU → GPU      `pending_copies()`
    4. the step's writes, and what reads them

and what belongs to one step comes after the lists of the steps before. Within one list all entries may run in
parallel: no destination appears twice, and no block is both read and written. Across lists a block may well be:
the source of a swap-out can be written right after, because it was evicted to make room for that, and what is
offloaded and hit in the same step goes out and comes back in. A stream that keeps this order needs nothing else.

Until `transfers_done`, both ends of a transfer are pinned: a block that is freed meanwhile stays *in transfer*
and is given to nobody, cached content is not evicted. (Unless it was written in since, by a sequence that was swapped
in, and only then cached: the write came after the transfer, however late that is said to be done.) Content that
arrives can be referenced, hit, forked and copied at once, as it is there before whatever comes later in the order; a
second hit shares it without another transfer. Whoever runs transfers beside the computation has to wait for them where
the order says so.
"""

from __future__ import annotations

from array import array
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from allocator.event_log import ARRIVED, LET_GO, NOBODY, SENT, EventLog
from allocator.host import HostPool
from allocator.pool import BlockPool
from allocator.prefix import Extent

_NO_SWAPS = np.zeros((0, 2), dtype=np.int32)
_NO_SWAPS.flags.writeable = False


@dataclass(frozen=True, eq=False)
class Transfers:
    """What one step has to move between the tiers, until it is handed to `transfers_done`.

    swap_outs  int32 [n, 2]: source block on the GPU, destination block on the host; executed first
    swap_ins   int32 [n, 2]: source block on the host, destination block on the GPU; executed second
    """

    number: int
    swap_outs: NDArray[np.int32]
    swap_ins: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.swap_outs) + len(self.swap_ins)


class _Group:
    """The transfers of one list: pairs of source and destination, and the extents that must stay."""

    __slots__ = ("gpu_held", "host_held", "swap_ins", "swap_outs")

    def __init__(self) -> None:
        self.swap_outs: list[tuple[int, int]] = []
        self.swap_ins: list[tuple[int, int]] = []
        self.gpu_held: list[Extent] = []
        self.host_held: dict[Extent, int] = {}  # how often


class TransferQueue:
    """Transfers that are pending (in no list yet) or in flight (taken, and not done)."""

    def __init__(self, pool: BlockPool, host: HostPool) -> None:
        self._pool = pool
        self._host = host
        self._pending = _Group()
        self._in_flight: dict[int, _Group] = {}
        self._next = 0
        self.events: EventLog | None = None

    def __len__(self) -> int:
        return len(self._pending.swap_outs) + len(self._pending.swap_ins)

    def out(self, gpu_ids: array[int], host_ids: array[int]) -> None:
        """Move blocks to the host."""
        self._pool.pin_all(gpu_ids)
        self._host.pin_all(host_ids)
        self._pending.swap_outs.extend(zip(gpu_ids, host_ids, strict=True))

    def back(self, host_ids: array[int], gpu_ids: array[int]) -> None:
        """Move blocks to the GPU."""
        self._host.pin_all(host_ids)
        self._pool.pin_all(gpu_ids)
        self._pending.swap_ins.extend(zip(host_ids, gpu_ids, strict=True))

    def hold(self, extent: Extent) -> None:
        """Keep what both tiers hold of an extent and above until the pending list is done."""
        self._host.acquire_path(extent)
        self.keep(extent)
        self._pool.acquire_path(extent)
        self._pending.gpu_held.append(extent)

    def keep(self, extent: Extent) -> None:
        """Keep what the host holds of an extent, acquired already, until the pending list is done."""
        held = self._pending.host_held
        held[extent] = held.get(extent, 0) + 1

    def release_host(self, extent: Extent) -> None:
        """Stop holding an extent on the host, as its content is out of reach; its blocks stay pinned."""
        if self.events is not None:
            assert extent.host is not None
            self.events.add_block(LET_GO, NOBODY, -1, -1, extent.host[-1])
        for group in self._groups():
            for _ in range(group.host_held.pop(extent, 0)):
                self._host.drop_path(extent)

    def reanchor(self, extent: Extent, below: Extent) -> None:
        """Hold `below`, which was cut off the end of an extent, where the extent was held on the host."""
        for group in self._groups():
            if extent in group.host_held:
                group.host_held[below] = group.host_held.pop(extent)

    def take(self) -> Transfers:
        """Return what is pending; it is in flight from now on."""
        group = self._pending
        if not len(self):
            return Transfers(-1, _NO_SWAPS, _NO_SWAPS)
        self._pending = _Group()
        number = self._next
        self._next += 1
        self._in_flight[number] = group
        if self.events is not None:
            self.events.add(SENT, value=number)
        return Transfers(number, _pairs(group.swap_outs), _pairs(group.swap_ins))

    def done(self, transfers: Transfers) -> None:
        """Unpin both ends. Raises ValueError unless the transfers are in flight; an empty list is always done."""
        if not len(transfers):
            return
        group = self._in_flight.pop(transfers.number, None)
        if group is None:
            raise ValueError(f"transfers ({transfers.number}) must be in flight")
        if self.events is not None:
            self.events.add(ARRIVED, value=transfers.number)
        for pairs, source, destination in (
            (group.swap_outs, self._pool, self._host),
            (group.swap_ins, self._host, self._pool),
        ):
            source.unpin_all([pair[0] for pair in pairs])
            destination.unpin_all([pair[1] for pair in pairs])
        for extent in group.gpu_held:
            self._pool.drop_path(extent)
        for extent, times in group.host_held.items():
            for _ in range(times):
                self._host.drop_path(extent)

    def _groups(self) -> list[_Group]:
        return [*self._in_flight.values(), self._pending]

    def pending_swap_ins(self) -> list[tuple[int, int]]:
        """Return the pending transfers to the GPU: what they fill cannot be a source yet."""
        return list(self._pending.swap_ins)

    def arriving(self) -> set[int]:
        """Return the GPU blocks into which a transfer goes that is not done."""
        return {block for group in self._groups() for _, block in group.swap_ins}

    def ends(self) -> tuple[Counter[int], Counter[int]]:
        """Return how many transfers read or write each GPU block and each host block."""
        gpu, host = Counter[int](), Counter[int]()
        for group in self._groups():
            for block, host_block in group.swap_outs:
                gpu[block] += 1
                host[host_block] += 1
            for host_block, block in group.swap_ins:
                gpu[block] += 1
                host[host_block] += 1
        return gpu, host

    def gpu_held(self) -> list[Extent]:
        """Return the extents that transfers hold on the GPU; each stands for one reference on its path."""
        return [extent for group in self._groups() for extent in group.gpu_held]

    def host_held(self) -> list[Extent]:
        """Return the extents that transfers hold on the host; each stands for one reference on its path."""
        return [
            extent
            for group in self._groups()
            for extent, times in group.host_held.items()
            for _ in range(times)
        ]


def _pairs(pairs: list[tuple[int, int]]) -> NDArray[np.int32]:
    return np.array(pairs, dtype=np.int32).reshape(-1, 2)
