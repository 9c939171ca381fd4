"""What operations cost: counted, in a pool and in one a hundred times as full."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import strategies as st

from allocator.content import TokenContent
from allocator.eviction import POLICIES, make_policy
from allocator.manager import KVCacheManager
from allocator.retention import RetentionConfig
from allocator.rules.base import ManagerMachine
from allocator.rules.operation import operation

_PACKAGE = str(Path(__file__).parent.parent)
_FEW, _MANY = 60, 6000
"""Extents cached in the pools that are compared."""


def lines_run(policy: str, num_extents: int, blocks: int) -> int:
    """Return how many lines of the package serve 16 requests in a pool full of cached extents, half of them hits."""
    manager = KVCacheManager(num_extents * blocks, 1, policy=make_policy(policy))
    old = [TokenContent([i] * blocks) for i in range(num_extents)]
    new = [TokenContent([num_extents + i] * blocks) for i in range(8)]
    retention = RetentionConfig.whole(50, 1000)
    for content in old:
        manager.release(manager.admit(content, blocks, retention=retention))
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal lines
        if event == "call" and not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for i, content in enumerate(new):
            for each in (old[num_extents // 2 + i], content):
                match = manager.lookup(each)
                tokens = each.num_prompt_tokens - match.hit_tokens
                sequence = manager.admit(each, tokens, match, retention=retention)
                manager.append([sequence])
                manager.now += 1
                manager.release(sequence)
    finally:
        sys.settrace(before)
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
