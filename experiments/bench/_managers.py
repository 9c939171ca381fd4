"""The managers of the head-to-head, each behind the calls of `_serving.Server`."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from allocator.config import CacheConfig
from allocator.content import TokenContent, UniqueContent
from allocator.manager import KVCacheManager, KVSequence
from experiments.bench._serving import OUTPUT_TOKENS, TOKENS_PER_BLOCK, Run, Workload, schedule


class Ours:
    """KVCacheManager with block reuse and LRU, the default."""

    name = "allocator"

    def __init__(self, num_blocks: int) -> None:
        self.manager = KVCacheManager(num_blocks, TOKENS_PER_BLOCK)
        self._batch = self.manager.batch()

    def admit(self, prompt: list[int]) -> tuple[KVSequence, int]:
        """Look the prompt up, and admit all that is missing."""
        manager, content = self.manager, TokenContent(prompt)
        match = manager.lookup(content)
        sequence = manager.admit(content, len(prompt) - match.hit_tokens, match)
        self._batch.add(sequence)
        return sequence, match.hit_tokens

    def append(self, tokens: list[int]) -> NDArray[np.int64]:
        """Append to all; return the slots, int64 [len(tokens)]."""
        return self.manager.append(self._batch, tokens)

    def free(self, request: KVSequence) -> None:
        """Release a sequence."""
        self.manager.release(request)

    def verify(self, workload: Workload, run: Run) -> None:
        """Do with a shadow pool what the tables and slots of a run said; raise AssertionError where KV is wrong.

        Each slot holds what was written into it last: a 64-bit digest of all tokens up to the one in question. A
        block that was hit must hold the prompt's prefix, and a freed request must find all it ever wrote.
        """
        self.manager.check_invariants()
        shadow = np.zeros(workload.num_blocks * TOKENS_PER_BLOCK, dtype=np.uint64)
        texts = [prefix_digests(p + o) for p, o in zip(workload.prompts, workload.outputs, strict=True)]
        slots = [_slots_of(request) for request in run.requests]
        written: dict[int, int] = {}
        steps = iter(run.slots)
        for event, requests in schedule(len(workload.prompts), workload.max_running):
            if event == "append":
                answered = next(steps)
                at = [written[request] for request in requests]
                expected = [slots[request][position] for request, position in zip(requests, at, strict=True)]
                assert answered.tolist() == expected, "a slot is not where the table says"
                shadow[answered] = [texts[request][p] for request, p in zip(requests, at, strict=True)]
                for request in requests:
                    written[request] += 1
                continue
            (request,) = requests
            own, text = slots[request], texts[request]
            if event == "admit":
                hit, prompt = run.hits[request], len(workload.prompts[request])
                assert (shadow[own[:hit]] == text[:hit]).all(), f"request {request} hit other content"
                shadow[own[hit:prompt]] = text[hit:prompt]
                written[request] = prompt
            else:
                assert (shadow[own] == text).all(), f"request {request} lost KV"


def prefix_digests(tokens: list[int]) -> NDArray[np.uint64]:
    """Return a digest of each prefix, uint64 [len(tokens)]: Σ token[i] · r^i modulo 2^64, for an odd r."""
    with np.errstate(over="ignore"):
        factors = np.full(len(tokens), 6_364_136_223_846_793_005, dtype=np.uint64)
        powers: NDArray[np.uint64] = np.multiply.accumulate(factors)
        return np.cumsum(np.array(tokens, dtype=np.uint64) * powers, dtype=np.uint64)


def _slots_of(sequence: KVSequence) -> NDArray[np.int64]:
    """Return the slots of all tokens of a sequence, by its table, int64 [tokens]."""
    table = sequence.block_table.astype(np.int64)
    slots = table[:, None] * TOKENS_PER_BLOCK + np.arange(TOKENS_PER_BLOCK)
    return slots.ravel()[: sequence.num_tokens]


_ALLOCATED_BLOCKS = 65_536


def our_blocks_per_s(chunk: int) -> float:
    """Return how many blocks a second are taken, `chunk` of them a call, and given back; nothing is reused."""
    manager = KVCacheManager(_ALLOCATED_BLOCKS, TOKENS_PER_BLOCK, CacheConfig(enable_block_reuse=False))
    prompt, tokens = UniqueContent(_ALLOCATED_BLOCKS * TOKENS_PER_BLOCK), chunk * TOKENS_PER_BLOCK
    calls = _ALLOCATED_BLOCKS // chunk
    taken = 0.0
    for _ in range(
        2
    ):  # the second time, blocks come from the free ones, as in a server that has run for a while
        sequence = manager.admit(prompt, tokens)
        start = perf_counter()
        for _ in range(calls - 1):
            manager.prefill(sequence, tokens)
        manager.release(sequence)
        taken = perf_counter() - start
    manager.check_invariants()
    return (calls - 1) * chunk / taken


def vllm_blocks_per_s(chunk: int) -> float:
    """Return the same for vLLM's manager, its caching switched off."""
    from vllm.v1.request import Request

    server = VLLM(_ALLOCATED_BLOCKS, caching=False)
    manager, tokens = server.manager, chunk * TOKENS_PER_BLOCK
    calls = _ALLOCATED_BLOCKS // chunk
    request = Request("0", [1] * (_ALLOCATED_BLOCKS * TOKENS_PER_BLOCK), server.sampling, None)
    start = perf_counter()
    for _ in range(calls - 1):
        manager.allocate_slots(request, tokens)
        request.num_computed_tokens += tokens
    manager.free(request)
    return (calls - 1) * chunk / (perf_counter() - start)


class VLLM:
    """vLLM's KVCacheManager (0.33): CPU torch and the vllm wheel without its dependencies are enough."""

    name = "vllm"

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        import torch
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_manager import KVCacheManager as VLLMManager
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request

        init_none_hash(sha256)
        spec = FullAttentionSpec(
            block_size=TOKENS_PER_BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float16
        )
        config = KVCacheConfig(  # block 0 is reserved
            num_blocks=num_blocks + 1,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        )
        self.manager: Any = VLLMManager(
            config,
            max_model_len=_ALLOCATED_BLOCKS * TOKENS_PER_BLOCK,
            scheduler_block_size=TOKENS_PER_BLOCK,
            hash_block_size=TOKENS_PER_BLOCK,
            enable_caching=caching,
        )
        self._request = Request
        self.sampling = SamplingParams(max_tokens=OUTPUT_TOKENS)
        self._hasher = get_request_block_hasher(TOKENS_PER_BLOCK, sha256)
        self._requests = 0
        self._running: dict[Any, None] = {}

    def admit(self, prompt: list[int]) -> tuple[Any, int]:
        """Make the request (which hashes its blocks), look it up, allocate what is missing."""
        manager = self.manager
        self._requests += 1
        request = self._request(str(self._requests), prompt, self.sampling, None, block_hasher=self._hasher)
        blocks, hit = manager.get_computed_blocks(request)[
            :2
        ]  # the third is for models with several kinds of layers
        given = manager.allocate_slots(request, len(prompt) - hit, hit, blocks)
        assert given is not None, "out of blocks"
        request.num_computed_tokens = len(prompt)
        self._running[request] = None
        return request, hit

    def append(self, tokens: list[int]) -> None:
        """Append to all, one by one, as its scheduler does; it computes no slots."""
        manager = self.manager
        for request, token in zip(self._running, tokens, strict=True):
            request.append_output_token_ids(token)
            given = manager.allocate_slots(request, 1)
            assert given is not None, "out of blocks"
            request.num_computed_tokens += 1

    def free(self, request: Any) -> None:
        """Free a request."""
        self.manager.free(request)
        del self._running[request]

    def verify(self, workload: Workload, run: Run) -> None:
        """Check that nothing leaked; what is in its tables, its own tests have to say."""
        free = self.manager.block_pool.get_num_free_blocks()
        assert free == workload.num_blocks, f"{workload.num_blocks - free} blocks leaked"
