"""What a cached block costs in memory: keys, ids, tree and eviction order, by the resident set of a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import allocator

PROGRAM = """
import json, sys
import numpy as np
from allocator.content import TokenContent
from allocator.manager import KVCacheManager

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

blocks, extent = map(int, sys.argv[1:])
size = 16
rng = np.random.default_rng(0)
warm = KVCacheManager(1000, size)
for _ in range(10):
    content = TokenContent(rng.integers(0, 2**31, 8 * size))
    warm.release(warm.admit(content, content.num_prompt_tokens))
before = resident()
manager = KVCacheManager(blocks, size)
for _ in range(blocks // extent):
    content = TokenContent(rng.integers(0, 2**31, extent * size))
    manager.release(manager.admit(content, content.num_prompt_tokens))
after = resident()
stats = manager.stats()
print(json.dumps({"evictable": stats.evictable_blocks, "bytes": after - before}))
"""


@pytest.mark.parametrize("extent", [pytest.param(8, marks=pytest.mark.slow), 64])
def test_a_block_takes_at_most_200_bytes(extent: int) -> None:
    """A million blocks of 16 tokens, 64 bytes of ids each, in extents of 8 blocks and more."""
    blocks = 1_000_000 // extent * extent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(blocks), str(extent)],
        cwd=Path(allocator.__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["evictable"] == blocks
    print(f"{found['bytes'] / blocks:.0f} bytes a block in extents of {extent}")
    assert found["bytes"] <= 200 * blocks
    assert found["bytes"] >= 68 * blocks, "less than its token ids and its own id take"
