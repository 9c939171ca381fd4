"""Queries, keys and values that give away which token they belong to, and everything before it.

In a model, a token's key and value depend on the token, its position and the whole prefix. Here they are drawn from
a hash of exactly that, so an attention output is right only if every key that it read was the right one: a wrong
block, a wrong slot, a stale reuse or a missed copy changes it.
"""

from __future__ import annotations

from itertools import accumulate
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from sim.scheduler.job import Job

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15

UInt64 = NDArray[np.uint64]


def mix(values: UInt64) -> UInt64:
    """Scramble 64-bit words (SplitMix64's finaliser; Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = values + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _tag(*parts: object) -> int:
    """Return a number for a run of tokens of which nothing but the origin is known."""
    text = repr(parts).encode()
    return crc32(text) << 32 | crc32(text[::-1])


def token_identities(job: Job, first: int, last: int) -> UInt64:
    """Return what distinguishes tokens first … last − 1 of a job's sequence, uint64 [last − first].

    Read off the request alone, not off the allocator: named tokens by their ids, all others by the request, and
    generated ones by the sample too.
    """
    request = job.request
    named = request.prompt_tokens if job.sample else max(request.named_tokens, request.prompt_tokens)
    positions = np.arange(first, last, dtype=np.int64)
    prompt = positions[positions < named]
    if request.token_ids is not None:
        known = request.token_ids[prompt].astype(np.uint64)
    elif request.chunk_ids is not None:
        offsets = (prompt % request.granularity).astype(np.uint64)
        known = mix(request.chunk_ids[prompt // request.granularity].astype(np.uint64)) + offsets
    else:
        known = np.full(prompt.size, _tag("unique", request.request_id), np.uint64)
    generated = np.full(
        positions.size - prompt.size, _tag("generated", request.request_id, job.sample), np.uint64
    )
    return np.concatenate([known, generated])


def chain(identities: UInt64, before: int) -> UInt64:
    """Return a hash of each token and all before it, given that of the last token before them."""
    words = (int(word) for word in mix(identities))
    hashes = accumulate(words, lambda seen, word: ((seen ^ word) * _GOLDEN + 1) & _MASK, initial=before)
    next(hashes)
    return np.fromiter(hashes, np.uint64, len(identities))


def values(hashes: UInt64, purpose: str, shape: tuple[int, ...], amplitude: float) -> NDArray[np.float32]:
    """Return float32 `[len(hashes), *shape]`, uniform in ±amplitude, a function of hash, purpose and place."""
    places = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(crc32(purpose.encode()) << 32)
    words = mix(hashes[:, None] ^ mix(places)[None, :])
    unit = (words >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)
    return (unit * np.float32(amplitude)).reshape(len(hashes), *shape)
