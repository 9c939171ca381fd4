"""How much of a trace's content repeats: hits of an infinite cache, and how far apart the uses are."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sim.request import Request

TOKENS_PER_CHUNK = 16
"""Granularity at which token ids are compared here."""

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Sharing:
    """Content of a trace, replayed one request after the other into a cache that never evicts.

    Each prompt is looked up chunk by chunk, then stored with whatever output the trace names. Chunks are the
    trace's own (token ids are cut into chunks of TOKENS_PER_CHUNK); the prompt's last one counts with the tokens
    it has. No token has to be recomputed: this is the bound, not what an engine can reach.
    """

    prompt_chunks: int
    hit_chunks: int
    prompt_tokens: int
    hit_tokens: int
    distinct_chunks: int
    """Chunks that differ, where equal chunks behind different prefixes do differ."""
    reused_chunks: int
    """Of them, those that are hit at least once."""
    reuse_gaps_ps: Ints
    """Picoseconds since the chunk's previous use, int64 [hit_chunks], in the order of use."""
    reuse_distances: Ints
    """Distinct other chunks used since the chunk's previous use, int64 [hit_chunks]: an LRU cache hits it if it
    holds more chunks than that."""


def sharing(requests: Iterable[Request]) -> Sharing:
    """Measure the sharing of the requests that have content ids; the others have no part in it."""
    identities: dict[tuple[int, Hashable], int] = {}
    last_use: list[int] = []  # by identity: its last use, counted over the uses of all
    last_time: list[int] = []
    hit_before: set[int] = set()
    previous: list[int] = []  # by hit: when the chunk was used before, on the clock of uses
    now: list[int] = []
    gaps: list[int] = []
    prompt_chunks = prompt_tokens = hit_tokens = clock = 0
    for request in requests:
        granularity, chunks = _chunks(request)
        if not granularity:
            continue
        in_prompt = -(-request.prompt_tokens // granularity)
        prompt_chunks += in_prompt
        prompt_tokens += request.prompt_tokens
        # Contents of different granularity, or with different salts, never compare equal.
        node = identities.setdefault((-1, (request.salt, request.granularity)), -2 - len(identities))
        for index, chunk in enumerate(chunks):
            key = (node, chunk)
            found = identities.get(key)
            if found is None:
                node = identities[key] = len(last_use)
                last_use.append(clock)
                last_time.append(request.arrival_ps)
            else:
                node = found
                if index < in_prompt:
                    hit_tokens += min(granularity, request.prompt_tokens - index * granularity)
                    hit_before.add(node)
                    previous.append(last_use[node])
                    now.append(clock)
                    gaps.append(request.arrival_ps - last_time[node])
                last_use[node] = clock
                last_time[node] = request.arrival_ps
            clock += 1
    return Sharing(
        prompt_chunks=prompt_chunks,
        hit_chunks=len(now),
        prompt_tokens=prompt_tokens,
        hit_tokens=hit_tokens,
        distinct_chunks=len(last_use),
        reused_chunks=len(hit_before),
        reuse_gaps_ps=np.array(gaps, dtype=np.int64),
        reuse_distances=stack_distances(np.array(now, dtype=np.int64), np.array(previous, dtype=np.int64)),
    )


def _chunks(request: Request) -> tuple[int, Iterator[Hashable]]:
    """Return the granularity of a request's content (0 without any) and its chunks in order."""
    if request.chunk_ids is not None:
        return request.granularity, iter(request.chunk_ids.tolist())
    if request.token_ids is not None:
        text = np.ascontiguousarray(request.token_ids, dtype=np.int32).tobytes()
        width = 4 * TOKENS_PER_CHUNK
        return TOKENS_PER_CHUNK, (text[at : at + width] for at in range(0, len(text), width))
    return 0, iter(())


def stack_distances(now: Ints, previous: Ints) -> Ints:
    """Return how many distinct others were used between `previous[i]` and `now[i]`, int64 [n].

    `now` ascends and lists every use that is not its item's first; `previous` is the use before it of the same
    item. Of the now[i] − previous[i] − 1 uses in between, those count that are not repeated in between: all but
    the uses j < now[i] whose own predecessor lies behind previous[i] (Mattson et al., 1970, counted offline). So
    the rest is to count, for each i, earlier entries of `previous` that are larger: bit by bit of their ranks,
    a pair differs first in one bit, and is counted there.
    """
    size = len(now)
    ranks = np.empty(size, dtype=np.int64)
    ranks[np.argsort(previous)] = np.arange(size)
    larger = np.zeros(size, dtype=np.int64)
    for bit in range(size.bit_length()):
        order = np.argsort(ranks >> (bit + 1), kind="stable")
        group = ranks[order] >> (bit + 1)
        ones = (ranks[order] >> bit) & 1
        before = np.cumsum(ones) - ones
        start = np.searchsorted(group, group)  # first entry of the same group
        larger[order] += np.where(ones == 0, before - before[start], 0)
    return now - previous - 1 - larger
