"""The operations on a paged KV cache: check the arrays, choose the grid, launch the kernel.

NumPy arrays run on the CPU runner, CuPy arrays on the GPU; the arrays of one call live in one place. Every
function takes the pool's `CacheLayout` first where it touches a pool, and `kernels.reference` has the same
signatures.
"""

from kernels.ops.attention import merge_attention, paged_attention, paged_prefill
from kernels.ops.cache import copy_blocks, gather_kv, swap_blocks, write_kv

__all__ = [
    "copy_blocks",
    "gather_kv",
    "merge_attention",
    "paged_attention",
    "paged_prefill",
    "swap_blocks",
    "write_kv",
]
