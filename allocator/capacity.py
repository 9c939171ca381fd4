"""Capacity: how many blocks sequences are still going to take, as an engine's admission counts them.

The arithmetic is that of TensorRT-LLM's capacity scheduler (`getRemainingBlocksToCompletion` and
`getNeededBlocksOneStep` of its KV cache manager), for beams that share the full blocks of their prompt:

    GUARANTEED_NO_EVICT   admit while blocks_to_finish of the newcomer ≤ available − Σ blocks_to_finish of the running
    MAX_UTILIZATION       admit while blocks_to_prefill of the newcomer ≤ available; decode while blocks_to_step are

Tokens are counted by the KV that they leave: a sequence that samples O tokens after a prompt of P ends with
P + O − 1, as the last one sampled is never written. Every function is O(1).
"""

from __future__ import annotations

from allocator.checks import as_int


def blocks_to_finish(
    prompt_tokens: int,
    final_tokens: int,
    allocated_blocks: int,
    tokens_per_block: int,
    *,
    beam_width: int = 1,
    window: int | None = None,
) -> int:
    """Return how many blocks a request still takes until each of its beams holds `final_tokens`.

    allocated_blocks  what each beam's table has now
    window            tokens that a query attends to; no beam ever needs more than its blocks

    The prompt's full blocks are taken once for all beams, its last, partial one and all that follow by each
    beam. Raises ValueError if a count is too small or the request ends before its prompt does.
    """
    size = as_int("tokens_per_block", tokens_per_block, 1)
    prompt = as_int("prompt_tokens", prompt_tokens, 1)
    final = as_int("final_tokens", final_tokens, prompt)
    allocated = as_int("allocated_blocks", allocated_blocks, 0)
    width = as_int("beam_width", beam_width, 1)
    if window is not None:
        window = as_int("window", window, 1)
        prompt, final = min(prompt, window), min(final, window)
    shared = prompt // size
    total = -(-final // size)
    if allocated < shared:
        return shared - allocated + (total - shared) * width
    return max(total - allocated, 0) * width


def blocks_to_prefill(prompt_tokens: int, tokens_per_block: int, *, beam_width: int = 1) -> int:
    """Return how many blocks a prompt takes: the full ones once, a last, partial one for each beam.

    Raises ValueError if a count is not positive.
    """
    full, rest = divmod(
        as_int("prompt_tokens", prompt_tokens, 1), as_int("tokens_per_block", tokens_per_block, 1)
    )
    return full + (rest > 0) * as_int("beam_width", beam_width, 1)


def blocks_to_step(past_tokens: int, next_tokens: int, tokens_per_block: int, *, beam_width: int = 1) -> int:
    """Return how many blocks a running request takes to grow from `past_tokens` to `next_tokens` a beam.

    Raises ValueError if a count is negative or the request would shrink.
    """
    size = as_int("tokens_per_block", tokens_per_block, 1)
    past = as_int("past_tokens", past_tokens, 0)
    following = as_int("next_tokens", next_tokens, past)
    return (-(-following // size) + -past // size) * as_int("beam_width", beam_width, 1)
