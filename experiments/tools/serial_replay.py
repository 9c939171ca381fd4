"""Replay a trace through the prefix cache alone, one request after the other, beside the offline bound.

There is no engine here and no time: a request is admitted, holds its blocks, and is released before the next one.
Each content chunk of the trace (a hash id) is one full block, the last, partial one too, and a prompt cached
whole is hit whole. What is left is the eviction policy: `replay` runs it in the real pool, `offline_bound` says
what no policy can exceed.

    python -m experiments.tools.serial_replay conversation_trace.jsonl --num-blocks 1000 3000 --policies lru belady
"""

from __future__ import annotations

if __name__ == "__main__":
    from sim.command_line import begin_command

    begin_command(__spec__)

import heapq
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from allocator.checks import require_int
from allocator.config import CacheConfig
from allocator.content import ChunkContent
from allocator.eviction import Belady, EvictionPolicy, WeightedBelady, make_policy
from allocator.manager import KVCacheManager, OutOfBlocks
from experiments.tools._table import print_uncut
from sim.command_line import parse_dataclass, run_command
from sim.traces import Trace, read_trace
from sim.user_code import blaming

FORESIGHT: dict[str, type[Belady]] = {"belady": Belady, "weighted_belady": WeightedBelady}
"""The policies that are told the requests first."""

Requests = Sequence[NDArray[np.int64]]
"""The blocks of each prompt, int64 [blocks], not negative: equal ids behind equal ids, equal content."""


def blocks_of(trace: Trace) -> list[NDArray[np.int64]]:
    """Return the content chunks of each prompt. Raises ValueError for a trace that does not name any."""
    found = []
    for request in trace:
        if request.chunk_ids is None:
            raise ValueError(
                f"trace {trace.name} (request {request.request_id}) must name its content chunks"
            )
        found.append(request.chunk_ids[: -(-request.prompt_tokens // request.granularity)])
    return found


def replay(requests: Requests, num_blocks: int, policy: EvictionPolicy) -> int:
    """Return how many blocks are hit when requests come one by one to a pool that holds `num_blocks` of theirs.

    A running request's blocks are pinned, as in any engine. A Belady policy is told the requests first. Raises
    ValueError if one has more blocks than the pool.
    """
    # One token more than the chunks have, in a block of its own that never fills: it is the last token, which
    # is always computed, so that all the chunks can be hit. One block more in the pool is for it.
    contents = [ChunkContent(np.append(ids, 0), 2, 2 * len(ids) + 1) for ids in requests]
    manager = KVCacheManager(num_blocks + 1, 2, CacheConfig(), policy=policy, ghost_blocks=0)
    if isinstance(policy, Belady):
        for content in contents:
            policy.foresee(content, 2)
    hits = 0
    for number, content in enumerate(contents):
        if isinstance(policy, Belady):
            policy.begin(number)
        match = manager.lookup(content)
        try:
            sequence = manager.admit(content, content.num_prompt_tokens - match.hit_tokens, match)
        except OutOfBlocks:
            blocks = len(requests[number])
            raise ValueError(f"num_blocks ({num_blocks}) must hold request {number} of {blocks}") from None
        hits += sequence.hit_blocks
        manager.release(sequence)
    return hits


def offline_bound(requests: Requests, num_blocks: int) -> int:
    """Return the most blocks that any policy can hit in this replay with `num_blocks` blocks, future known.

    A request is cached whole, whatever the size, and then the cache is trimmed to `num_blocks`, farthest next use
    first; so what is not worth keeping passes by without pushing anything out. As a prefix is used whenever what
    follows it is, this is Belady's policy on a list of single blocks, and optimal.
    """
    paths = _named(requests)
    next_use = [len(requests)] * (1 + max((name for path in paths for name in path), default=0))
    coming: list[list[int]] = []
    for number in range(len(paths) - 1, -1, -1):
        coming.append([next_use[name] for name in paths[number]])
        for name in paths[number]:
            next_use[name] = number
    coming.reverse()

    hits = 0
    cached: dict[int, int] = {}  # when each is used next
    farthest: list[tuple[int, int, int]] = []  # a heap of (−next use, −depth, name); entries may be stale
    for path, uses in zip(paths, coming, strict=True):
        hits += sum(name in cached for name in path)
        for depth, (name, use) in enumerate(zip(path, uses, strict=True)):
            cached[name] = use
            heapq.heappush(farthest, (-use, -depth, name))
        while len(cached) > num_blocks:
            use, _, name = heapq.heappop(farthest)
            if cached.get(name) == -use:
                del cached[name]
    return hits


def _named(requests: Requests) -> list[list[int]]:
    """Number the blocks such that equal numbers mean equal content behind an equal prefix."""
    names: dict[tuple[int, int], int] = {}
    paths = []
    for ids in requests:
        name, path = -1, []
        for block in ids.tolist():
            name = names.setdefault((name, block), len(names))
            path.append(name)
        paths.append(path)
    return paths


@dataclass(frozen=True)
class Config:
    """Which share of a trace's blocks do eviction policies hit, and which share could be hit?

    The trace is replayed through the prefix cache alone, one request after the other, each content chunk a block.
    """

    trace: Annotated[Path, tyro.conf.Positional]
    """A trace that names content chunks: Mooncake, Qwen-Bailian, or native Parquet."""
    num_requests: int | None = None
    """Replay so many requests at most."""
    num_blocks: tuple[int, ...] = (1000, 3000, 10_000, 30_000)
    """Sizes of the pool, in blocks of one content chunk."""
    policies: tuple[str, ...] = ("lru", "belady")
    """Eviction policies, by name or as package.module:Class; also belady and weighted_belady, which know the future.
    The weighted one saves computation, in which a block counts for more the deeper it lies, rather than blocks."""


def run(config: Config, console: Console) -> None:
    """Print the table: a row for each policy, a column for each pool size, the bound last."""
    for size in config.num_blocks:
        require_int("num_blocks", size, 1)
    requests = blocks_of(read_trace(config.trace, num_requests=config.num_requests))
    total = sum(map(len, requests))
    table = Table("policy", *(f"{size:,} blocks" for size in config.num_blocks), box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in config.policies:
        policies = [FORESIGHT[name]() if name in FORESIGHT else make_policy(name) for _ in config.num_blocks]
        with blaming(policy=name):
            hits = [replay(requests, *each) for each in zip(config.num_blocks, policies, strict=True)]
        table.add_row(name, *(f"{count / total:.4f}" for count in hits))
    table.add_row(
        "offline bound", *(f"{offline_bound(requests, size) / total:.4f}" for size in config.num_blocks)
    )
    console.print(f"{len(requests):,} requests, {total:,} blocks; share of blocks hit", highlight=False)
    print_uncut(table, console)


def main(arguments: list[str]) -> int:
    """Do what the command line says and return the exit status."""
    prog = "python -m experiments.tools.serial_replay"
    return run_command(lambda: run(parse_dataclass(Config, prog, arguments), Console()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
