"""How large the pool of a RunSpec is, and which option is to blame where it comes out too small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from allocator.config import MAX_BLOCKS, BuildConfig, CacheConfig, MemoryBudget
from sim.manifest import RunSpec
from sim.scheduler.scheduler import require_batch_fits

_MOST = MAX_BLOCKS
"""No size beyond this is of interest."""
_SHARES = 10**4
"""Shares of memory are told in ten-thousandths."""


def memory_budget(spec: RunSpec) -> MemoryBudget:
    """Size the pool.

    Raises ValueError, with the numbers, when it cannot hold one sequence of max_seq_len, or when the two limits that
    may be given for it contradict each other. If one option alone is to blame, it says so, and how far it can go.
    """
    blocks, size, most = spec.cache.num_blocks, spec.build.tokens_per_block, spec.cache.max_tokens
    require_batch_fits(spec.build)
    if blocks is not None and most is not None and blocks * size > most:
        raise ValueError(
            f"num_blocks ({blocks}) of {size} tokens must hold at most max_tokens ({most}), or one of them be left out"
        )
    try:
        budget = _compute(spec)
    except (ValueError, OverflowError) as error:
        raise ValueError(_blamed(spec) + _reason(error)) from None
    host = spec.cache.host_cache_bytes
    if budget.num_host_blocks and not budget.paged:
        raise ValueError(f"host_cache_bytes ({host}) must be 0 when paging is off")
    if budget.num_host_blocks > MAX_BLOCKS:
        raise ValueError(
            f"host_cache_bytes ({host}) must be at most {MAX_BLOCKS} blocks of {budget.block_bytes} bytes"
        )
    return budget


def _compute(spec: RunSpec) -> MemoryBudget:
    return MemoryBudget.compute(spec.model, spec.build, spec.cache, gpu_memory_bytes=spec.gpu.memory_bytes)


def _reason(error: Exception) -> str:
    if isinstance(error, OverflowError):  # a size that is too large to be told as a float
        return "it comes to more bytes than there are"
    return str(error)


Put = Callable[[RunSpec, int], RunSpec]


def _build(name: str) -> Put:
    def put(spec: RunSpec, value: int) -> RunSpec:
        changes: Any = {name: value}
        return replace(spec, build=replace(spec.build, **changes))

    return put


def _cache(name: str) -> Put:
    def put(spec: RunSpec, value: int) -> RunSpec:
        changes: Any = {name: value}
        return replace(spec, cache=replace(spec.cache, **changes))

    return put


def _share(spec: RunSpec, parts: int) -> RunSpec:
    share = min(parts, _SHARES) / _SHARES
    return replace(spec, build=replace(spec.build, kv_cache_free_gpu_mem_fraction=share))


_OPTIONS: tuple[tuple[str, bool, Put], ...] = (
    ("max_tokens", True, _cache("max_tokens")),
    ("num_blocks", True, _cache("num_blocks")),
    ("max_batch_size", False, _build("max_batch_size")),
    ("max_num_tokens", False, _build("max_num_tokens")),
    ("kv_cache_free_gpu_mem_fraction", True, _share),
)
"""What sizes the pool, or what is left for it: name, whether the pool grows with it, and how to set it."""


def _blamed(spec: RunSpec) -> str:
    """Return what to say of the one option that is not at its default, and with another value of which all would be
    well; nothing if there is none.
    """
    defaults = {**vars(BuildConfig()), **vars(CacheConfig())}
    given = {**vars(spec.build), **vars(spec.cache)}
    for name, grows, put in _OPTIONS:
        if given[name] is None or given[name] == defaults[name]:
            continue
        limit = _limit(spec, grows, put)
        if limit is not None:
            rule = "at least" if grows else "at most"
            told = limit / _SHARES if put is _share else limit
            return f"{name} ({given[name]}) must be {rule} {told}: "
    return ""


def _limit(spec: RunSpec, grows: bool, put: Put) -> int | None:
    """Return the least value, or the most, of an option with which a pool is large enough; None if none is."""
    works, fails = (_MOST, 0) if grows else (1, _MOST)
    if not _works(put(spec, works)):
        return None
    while abs(works - fails) > 1:
        middle = (works + fails) // 2
        if _works(put(spec, middle)):
            works = middle
        else:
            fails = middle
    return works


def _works(spec: RunSpec) -> bool:
    try:
        _compute(spec)
    except (ValueError, OverflowError):
        return False
    return True
