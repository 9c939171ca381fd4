"""What operations cost: counted, in a pool and in one a hundred times as full."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from hypothesis import strategies as st

from allocator.content import TokenContent
from allocator.eviction import POLICIES, make_policy
from allocator.manager import KVCacheManager
from allocator.retention import RetentionConfig
from allocator.rules.base import ManagerMachine
from allocator.rules.operation import operation

_FEW, _MANY = 60, 6000
"""Extents cached in the pools that are compared."""


def count_lines(call: Callable[[], object]) -> int:
    """Return how many lines of Python a call executes, those of what it calls included."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    gc.disable()  # what runs when garbage is collected (Hypothesis has a callback) would count as well
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
        gc.enable()
    return lines


def lines_run(policy: str, num_extents: int, blocks: int) -> int:
    """Return how many lines serve 16 requests in a pool full of cached extents, half of them hits."""
    manager = KVCacheManager(num_extents * blocks, 1, policy=make_policy(policy))
    old = [TokenContent([i] * blocks) for i in range(num_extents)]
    new = [TokenContent([num_extents + i] * blocks) for i in range(8)]
    retention = RetentionConfig.whole(50, 1000)
    for content in old:
        manager.release(manager.admit(content, blocks, retention=retention))

    def serve() -> None:
        for i, content in enumerate(new):
            for each in (old[num_extents // 2 + i], content):
                match = manager.lookup(each)
                tokens = each.num_prompt_tokens - match.hit_tokens
                sequence = manager.admit(each, tokens, match, retention=retention)
                manager.append([sequence])
                manager.now += 1
                manager.release(sequence)

    lines = count_lines(serve)
    assert manager.stats().evicted_blocks >= 8
    return lines


class CostRules(ManagerMachine):
    """Nothing costs more where more is cached: a scan of what is evictable would."""

    counted = False

    @operation(
        when=lambda self: not self.counted, policy=st.sampled_from(sorted(POLICIES)), blocks=st.integers(1, 3)
    )
    def count(self, policy: str, blocks: int) -> None:
        """Compare the lines run in a small and in a large pool; heaps may grow by their logarithm."""
        self.counted = True
        few, many = lines_run(policy, _FEW, blocks), lines_run(policy, _MANY, blocks)
        assert many < 1.5 * few, f"{policy}: {few} lines with {_FEW} extents, {many} with {_MANY}"
        self.did("count")
