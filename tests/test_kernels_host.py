"""The CPU runner gives kernels CUDA's semantics, in any order of threads and blocks."""

from __future__ import annotations

import math
import os
import threading
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.compile import KernelError, Module, backend_available, compile_source

pytestmark = pytest.mark.skipif(not backend_available("cpu"), reason="no C++ compiler or no CUDA headers")

SEEDS = st.one_of(st.none(), st.integers(0, 2**64 - 1))
FEW = settings(max_examples=25)


@cache
def compiled(source: str, name: str = "test.cu") -> Module:
    return compile_source(source, backend="cpu", name=name)


def run(source: str, kernel: str, threads: int, *args: object, blocks: int = 1, **options: object) -> None:
    compiled(source).launch(kernel, (blocks, 1, 1), (threads, 1, 1), args, **options)


# --- where a thread is --------------------------------------------------------------------------------------------

PLACES = """
extern "C" __global__ void places(int* out) {
    const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int* row = out + 6ll * (block * blockDim.x * blockDim.y * blockDim.z + thread);
    row[0] = threadIdx.x; row[1] = threadIdx.y; row[2] = threadIdx.z;
    row[3] = blockIdx.x; row[4] = blockIdx.y; row[5] = blockIdx.z;
}
"""


@FEW
@given(
    grid=st.tuples(*[st.integers(1, 4)] * 3),
    block=st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
    seed=SEEDS,
)
def test_every_thread_of_every_block_runs_once(
    grid: tuple[int, int, int], block: tuple[int, int, int], seed: int | None
) -> None:
    out = np.full((math.prod(grid), math.prod(block), 6), -1, np.int32)
    compiled(PLACES).launch("places", grid, block, [out], seed=seed)
    gz, gy, gx = np.indices(grid[::-1]).reshape(3, -1)
    bz, by, bx = np.indices(block[::-1]).reshape(3, -1)
    for axis, expected in enumerate((bx, by, bz)):
        np.testing.assert_array_equal(out[:, :, axis], np.broadcast_to(expected, out.shape[:2]))
    for axis, expected in enumerate((gx, gy, gz)):
        np.testing.assert_array_equal(out[:, :, 3 + axis], np.broadcast_to(expected[:, None], out.shape[:2]))


ORDER = """
extern "C" __global__ void order(int* ticket, int* out) {
    out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(ticket, 1);
}
"""


def test_threads_run_in_index_order_unless_a_seed_shuffles_them() -> None:
    module = compile_source(ORDER, backend="cpu")
    module.workers = 1  # type: ignore[attr-defined]

    def order(seed: int | None) -> list[int]:
        ticket, out = np.zeros(1, np.int32), np.zeros(8 * 64, np.int32)
        module.launch("order", (8, 1, 1), (64, 1, 1), [ticket, out], seed=seed)
        assert sorted(out) == list(range(512))
        return [int(x) for x in out]

    assert order(None) == list(range(512))
    first, second = order(1), order(2)
    assert first == order(1)
    assert first != second
    starts = [min(first[block * 64 : block * 64 + 64]) for block in range(8)]
    assert starts != sorted(starts), "blocks keep their order"
    lanes = first[:32]
    assert lanes != sorted(lanes), "lanes keep their order"


# --- shared memory and barriers -----------------------------------------------------------------------------------

SUMS = """
extern "C" __global__ void static_sum(const int* x, int* out) {
    __shared__ int part[1024];
    part[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    int sum = 0;
    for (int i = 0; i < blockDim.x; i++) sum += part[(i + threadIdx.x) % blockDim.x];
    __syncthreads();
    part[threadIdx.x] = sum;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void dynamic_sum(const int* x, int* out) {
    extern __shared__ __align__(16) int part[];
    part[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
    for (int width = 1; width < blockDim.x; width *= 2) {
        __syncthreads();
        const int other = threadIdx.x + width < blockDim.x ? part[threadIdx.x + width] : 0;
        __syncthreads();
        part[threadIdx.x] += other;
    }
    out[blockIdx.x * blockDim.x + threadIdx.x] = part[threadIdx.x];  // of this thread and all after it
}
extern "C" __global__ void votes(const int* x, int* out) {
    const int mine = x[threadIdx.x];
    const int count = __syncthreads_count(mine > 0);
    const int all = __syncthreads_and(mine > 0);
    const int any = __syncthreads_or(mine > 2);
    out[threadIdx.x] = count * 4 + all * 2 + any;
}
"""


@FEW
@given(threads=st.integers(1, 300), blocks=st.integers(1, 9), seed=SEEDS, data=st.randoms())
def test_a_barrier_orders_shared_memory(threads: int, blocks: int, seed: int | None, data: object) -> None:
    x = np.random.default_rng(threads).integers(-1000, 1000, (blocks, threads), dtype=np.int32)
    out = np.zeros_like(x)
    run(SUMS, "static_sum", threads, x, out, blocks=blocks, seed=seed)
    np.testing.assert_array_equal(out, np.broadcast_to(x.sum(1, keepdims=True), x.shape))
    run(SUMS, "dynamic_sum", threads, x, out, blocks=blocks, seed=seed, shared_bytes=4 * threads)
    np.testing.assert_array_equal(out, np.cumsum(x[:, ::-1], axis=1)[:, ::-1])


@FEW
@given(x=st.lists(st.integers(0, 3), min_size=1, max_size=200), seed=SEEDS)
def test_barriers_count_and_vote(x: list[int], seed: int | None) -> None:
    values = np.array(x, np.int32)
    out = np.zeros_like(values)
    run(SUMS, "votes", len(x), values, out, seed=seed)
    expected = int((values > 0).sum()) * 4 + int((values > 0).all()) * 2 + int((values > 2).any())
    assert set(out.tolist()) == {expected}


NAMED = """
extern "C" __global__ void pipeline(int* out, int rounds) {
    // The first warp produces, the second consumes; each pair of barriers is the other's turn.
    __shared__ int item[32];
    const int lane = threadIdx.x % 32;
    for (int round = 0; round < rounds; round++) {
        if (threadIdx.x < 32) {
            item[lane] = round * 100 + lane;
            cuda_host::named_barrier(1, 64, {__FILE__, __LINE__});
            cuda_host::named_barrier(2, 64, {__FILE__, __LINE__});
        } else if (threadIdx.x < 64) {
            cuda_host::named_barrier(1, 64, {__FILE__, __LINE__});
            out[round * 32 + lane] = item[31 - lane];
            cuda_host::named_barrier(2, 64, {__FILE__, __LINE__});
        }
    }
}
"""


@FEW
@given(seed=SEEDS)
def test_named_barriers_join_some_warps_of_a_block(seed: int | None) -> None:
    out = np.zeros((5, 32), np.int32)
    run(NAMED, "pipeline", 96, out, 5, seed=seed)
    np.testing.assert_array_equal(out, np.arange(5)[:, None] * 100 + np.arange(31, -1, -1))


POISON = """
extern "C" __global__ void poison(unsigned* out, int write) {
    __shared__ unsigned fixed[64];
    extern __shared__ unsigned sized[];
    out[(blockIdx.x * 2) * blockDim.x + threadIdx.x] = fixed[threadIdx.x];
    out[(blockIdx.x * 2 + 1) * blockDim.x + threadIdx.x] = sized[threadIdx.x];
    __syncthreads();
    fixed[threadIdx.x] = sized[threadIdx.x] = 7;
}
"""


def test_each_block_starts_with_poisoned_shared_memory() -> None:
    out = np.zeros(20 * 2 * 64, np.uint32)
    run(POISON, "poison", 64, out, 1, blocks=20, shared_bytes=256)
    assert set(out.tolist()) == {0xFFFFFFFF}
    assert np.isnan(out.view(np.float32)).all()
    assert np.isnan(out.view(np.float16)).all()
    assert np.isnan(out.view(ml_dtypes.bfloat16).astype(np.float32)).all()


# --- warp operations ----------------------------------------------------------------------------------------------

SHUFFLE_TYPES = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "float": np.float32,
    "double": np.float64,
    "__half": np.float16,
    "__nv_bfloat16": ml_dtypes.bfloat16,
}
SHUFFLES = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n" + "".join(
    f"""
extern "C" __global__ void shuffle_{index}(const {kind}* x, {kind}* out, unsigned mask, const int* by,
                                            int width, int way) {{
    const int lane = threadIdx.x % 32;
    if (!(mask >> lane & 1)) return;
    {kind} value = x[threadIdx.x];
    const int how = by[threadIdx.x];
    if (way == 0) value = __shfl_sync(mask, value, how, width);
    if (way == 1) value = __shfl_up_sync(mask, value, how, width);
    if (way == 2) value = __shfl_down_sync(mask, value, how, width);
    if (way == 3) value = __shfl_xor_sync(mask, value, how, width);
    out[threadIdx.x] = value;
}}
"""
    for index, kind in enumerate(SHUFFLE_TYPES)
)


def shuffle_source(way: int, lane: int, by: int, width: int) -> int:
    """Return the lane that `lane` reads, from the CUDA programming guide's description."""
    first = lane // width * width
    if way == 0:
        return first + by % width
    target = {1: lane - by, 2: lane + by, 3: lane ^ by}[way]
    if way == 3:
        return target if target < first + width else lane
    return target if first <= target < first + width else lane


@given(
    index=st.integers(0, len(SHUFFLE_TYPES) - 1),
    way=st.integers(0, 3),
    width=st.sampled_from([1, 2, 4, 8, 16, 32]),
    by=st.lists(st.integers(0, 31), min_size=32, max_size=32),
    mask=st.one_of(st.just(2**32 - 1), st.integers(1, 2**32 - 1)),
    seed=SEEDS,
)
def test_shuffles_move_what_the_guide_says(
    index: int, way: int, width: int, by: list[int], mask: int, seed: int | None
) -> None:
    lanes = [lane for lane in range(32) if mask >> lane & 1]
    amounts = np.array(by, np.int32)
    for lane in lanes:  # a lane may only read lanes of the mask: let the others read themselves
        if shuffle_source(way, lane, by[lane], width) not in lanes:
            amounts[lane] = lane % width if way == 0 else 0
    sources = [shuffle_source(way, lane, int(amounts[lane]), width) for lane in range(32)]
    dtype = np.dtype(list(SHUFFLE_TYPES.values())[index])
    x = np.random.default_rng(mask).integers(1, 255, 64 * dtype.itemsize, dtype=np.uint8).view(dtype)
    if dtype.kind not in "iu":
        x = np.arange(1, 65).astype(dtype)
    out = np.zeros(64, dtype)
    arguments = (x, out, mask, np.tile(amounts, 2), width, way)
    run(SHUFFLES, f"shuffle_{index}", 64, *arguments, seed=seed)
    for warp in (0, 32):
        for lane in range(32):
            expected = x[warp + sources[lane]] if lane in lanes else 0
            assert out[warp + lane] == expected


VOTES = """
extern "C" __global__ void vote(const int* x, long long* out, unsigned mask) {
    const int lane = threadIdx.x;
    if (!(mask >> lane & 1)) return;
    const int mine = x[lane];
    int equal = 0;
    long long* row = out + lane * 12;
    row[0] = __ballot_sync(mask, mine);
    row[1] = __any_sync(mask, mine > 2);
    row[2] = __all_sync(mask, mine > 0);
    row[3] = __match_any_sync(mask, mine);
    row[4] = __match_all_sync(mask, mine, &equal);
    row[5] = equal;
    row[6] = __reduce_add_sync(mask, mine - 2);
    row[7] = __reduce_min_sync(mask, mine - 2);
    row[8] = __reduce_max_sync(mask, mine - 2);
    row[9] = __reduce_max_sync(mask, static_cast<unsigned>(mine - 2));
    row[10] = __reduce_or_sync(mask, 1u << mine);
    row[11] = __reduce_xor_sync(mask, 1u << mine) | __reduce_and_sync(mask, 8u | 1u << mine) << 8;
}
"""


@given(
    x=st.lists(st.integers(0, 4), min_size=1, max_size=32),
    mask=st.integers(1, 2**32 - 1),
    seed=SEEDS,
)
def test_votes_matches_and_reductions(x: list[int], mask: int, seed: int | None) -> None:
    mask = mask & (2 ** len(x) - 1) or 1
    values = {lane: value for lane, value in enumerate(x) if mask >> lane & 1}
    out = np.full((len(x), 12), -1, np.int64)
    run(VOTES, "vote", len(x), np.array(x, np.int32), out, mask, seed=seed)
    group = list(values.values())
    same = len(set(group)) == 1
    xor = 0
    for value in group:
        xor ^= 1 << value
    intersection = 8 | (1 << group[0] if same else 0)
    for lane in range(len(x)):
        if lane not in values:
            assert (out[lane] == -1).all()
            continue
        assert out[lane].tolist() == [
            sum(1 << other for other, value in values.items() if value),
            any(value > 2 for value in group),
            all(value > 0 for value in group),
            sum(1 << other for other, value in values.items() if value == values[lane]),
            mask if same else 0,
            same,
            sum(group) - 2 * len(group),
            min(group) - 2,
            max(group) - 2,
            max((value - 2) % 2**32 for value in group),
            sum(1 << value for value in set(group)),
            xor | intersection << 8,
        ]


GROUPS = """
extern "C" __global__ void halves(int* out) {
    const int lane = threadIdx.x;
    int x = lane;
    if (lane < 16) {
        for (int i = 0; i < 3; i++) x = __shfl_xor_sync(0x0000ffffu, x, 1);
        __syncwarp(0x0000ffffu);
    } else {
        x += __shfl_down_sync(0xffff0000u, x, 1, 16);
    }
    __syncwarp();
    out[lane] = x + __shfl_sync(0xffffffffu, x, 31);
}
extern "C" __global__ void converged(unsigned* out) {
    const int lane = threadIdx.x;
    if (lane % 3 == 0) out[lane] = __activemask();
    else out[lane] = __activemask() | 1u;
}
"""


@FEW
@given(seed=SEEDS)
def test_parts_of_a_warp_go_their_own_ways(seed: int | None) -> None:
    out = np.zeros(32, np.int32)
    run(GROUPS, "halves", 32, out, seed=seed)
    x = np.arange(32)
    x[:16] ^= 1
    x[16:31] += np.arange(17, 32)
    x[31] += 31
    np.testing.assert_array_equal(out, x + x[31])
    masks = np.zeros(32, np.uint32)
    run(GROUPS, "converged", 32, masks, seed=seed)
    thirds = sum(1 << lane for lane in range(0, 32, 3))
    expected = [thirds if lane % 3 == 0 else (2**32 - 1) ^ thirds | 1 for lane in range(32)]
    assert masks.tolist() == expected


# --- atomics ------------------------------------------------------------------------------------------------------

ATOMICS = """
extern "C" __global__ void sums(int* i, unsigned* u, unsigned long long* q, float* f, double* d) {
    __shared__ int inside;
    if (threadIdx.x == 0) inside = 0;
    __syncthreads();
    atomicAdd(i, -2); atomicSub(u, 3u); atomicAdd(q, 1ull << 33); atomicAdd(f, 0.5f); atomicAdd(d, 0.25);
    atomicAdd_block(&inside, 1);
    __syncthreads();
    if (threadIdx.x == 0) i[1 + blockIdx.x] = inside;
}
extern "C" __global__ void others(int* low, int* high, unsigned* wrap, unsigned* down, unsigned* bits, int* swaps,
                                  long long* wide) {
    const int id = blockIdx.x * blockDim.x + threadIdx.x;
    atomicMin(low, id - 7); atomicMax(high, id * 3); atomicInc(wrap, 4u); atomicDec(down, 6u);
    atomicOr(bits, 1u << id % 32); atomicAnd(bits + 1, ~(1u << id % 5)); atomicXor(bits + 2, 1u << id % 32);
    atomicMax(wide, 1ll << (id % 40));
    // A chain of exchanges passes every id on exactly once.
    swaps[1 + id] = atomicExch(swaps, id);
}
extern "C" __global__ void locked(int* lock, int* count) {
    bool done = false;
    while (!done) {
        if (atomicCAS(lock, 0, 1) == 0) {
            const int seen = *(volatile int*)count;
            __nanosleep(20);
            *(volatile int*)count = seen + 1;
            __threadfence();
            atomicExch(lock, 0);
            done = true;
        }
    }
}
"""


@FEW
@given(threads=st.integers(1, 100), blocks=st.integers(1, 12), seed=SEEDS)
def test_atomics_lose_nothing(threads: int, blocks: int, seed: int | None) -> None:
    n = threads * blocks
    i, u, q = np.zeros(1 + blocks, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    f, d = np.zeros(1, np.float32), np.zeros(1, np.float64)
    run(ATOMICS, "sums", threads, i, u, q, f, d, blocks=blocks, seed=seed)
    assert (i[0], u[0], q[0], f[0], d[0]) == (-2 * n, (-3 * n) % 2**32, n << 33, n / 2, n / 4)
    assert (i[1:] == threads).all()

    low, high = np.full(1, 5, np.int32), np.zeros(1, np.int32)
    wrap, down = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    bits = np.array([0, 2**32 - 1, 0], np.uint32)
    swaps, wide = np.full(1 + n, -1, np.int32), np.zeros(1, np.int64)
    run(ATOMICS, "others", threads, low, high, wrap, down, bits, swaps, wide, blocks=blocks, seed=seed)
    ids = range(n)
    xor = 0
    for index in ids:
        xor ^= 1 << index % 32
    assert (low[0], high[0], wrap[0], down[0]) == (-7, 3 * (n - 1), n % 5, -n % 7)
    assert bits.tolist() == [
        sum(1 << b for b in {index % 32 for index in ids}),
        2**32 - 1 - sum(1 << b for b in {index % 5 for index in ids}),
        xor,
    ]
    assert wide[0] == max(1 << (index % 40) for index in ids)
    assert sorted([*swaps[1:], swaps[0]]) == [-1, *ids]


@FEW
@given(threads=st.integers(1, 70), blocks=st.integers(1, 4), seed=SEEDS)
def test_a_lock_that_threads_spin_for_is_handed_on(threads: int, blocks: int, seed: int | None) -> None:
    lock, count = np.zeros(1, np.int32), np.zeros(1, np.int32)
    run(ATOMICS, "locked", threads, lock, count, blocks=blocks, seed=seed)
    assert count[0] == threads * blocks


FLAG = """
extern "C" __global__ void wait_for(volatile int* flag, int* out) {
    if (threadIdx.x == 0) {
        while (flag[0] == 0) {}
        out[0] = 1;
    } else if (threadIdx.x == blockDim.x - 1) {
        flag[0] = 1;
    }
}
"""


@pytest.mark.parametrize("threads", [2, 32, 33, 200])
@pytest.mark.parametrize("seed", [None, 5])
def test_a_loop_on_a_volatile_word_lets_others_run(threads: int, seed: int | None) -> None:
    # Both runtimes are loaded before either runs.
    modules = [
        compile_source(FLAG, backend="cpu", sanitize=mode, name="flag.cu") for mode in (None, "memory")
    ]
    for module in modules:
        flag, out = np.zeros(1, np.int32), np.zeros(1, np.int32)
        module.launch("wait_for", (1, 1, 1), (threads, 1, 1), [flag, out], seed=seed)
        assert out[0] == 1


# --- the runner in its process -------------------------------------------------------------------------------------

DIVERGENT = """
extern "C" __global__ void divergent() {
    if (threadIdx.x < 40) __syncthreads();
}
"""


def test_a_failed_launch_leaves_the_runner_usable() -> None:
    for _ in range(3):
        with pytest.raises(KernelError):
            run(DIVERGENT, "divergent", 64, blocks=50)
        out = np.zeros(8 * 64, np.int32)
        run(ORDER, "order", 64, np.zeros(1, np.int32), out, blocks=8)
        assert sorted(out.tolist()) == list(range(512))


def test_launches_from_several_python_threads() -> None:
    x = np.arange(300 * 40, dtype=np.int32).reshape(40, 300)
    outs = [np.zeros_like(x) for _ in range(6)]

    def work(out: np.ndarray) -> None:
        for _ in range(5):
            run(SUMS, "static_sum", 300, x, out, blocks=40)

    threads = [threading.Thread(target=work, args=(out,)) for out in outs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outs:
        np.testing.assert_array_equal(out, np.broadcast_to(x.sum(1, keepdims=True), x.shape))


def test_a_forked_child_can_launch() -> None:
    x = np.ones((8, 64), np.int32)
    run(SUMS, "static_sum", 64, x, np.zeros_like(x), blocks=8)
    child = os.fork()
    if child == 0:
        out = np.zeros_like(x)
        run(SUMS, "static_sum", 64, x, out, blocks=8)
        os._exit(0 if (out == 64).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
