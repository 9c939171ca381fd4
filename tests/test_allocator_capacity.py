"""The arithmetic of admission: by hand, and against what a manager really takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.capacity import blocks_to_finish, blocks_to_prefill, blocks_to_step
from allocator.config import CacheConfig
from allocator.content import UniqueContent
from allocator.manager import KVCacheManager


def test_a_request_of_four_beams_by_hand() -> None:
    # 37 tokens in blocks of 16: two full ones for all, a partial one for each beam, which 48 tokens fill; with 20
    # tokens to come each beam needs a fourth
    assert blocks_to_prefill(37, 16, beam_width=4) == 2 + 4
    assert blocks_to_finish(37, 56, 0, 16, beam_width=4) == 2 + 2 * 4
    assert blocks_to_finish(37, 56, 1, 16, beam_width=4) == 1 + 2 * 4
    assert blocks_to_finish(37, 56, 3, 16, beam_width=4) == 4
    assert blocks_to_finish(37, 56, 4, 16, beam_width=4) == 0
    assert blocks_to_step(48, 49, 16, beam_width=4) == 4
    assert blocks_to_step(47, 48, 16, beam_width=4) == 0


def test_a_window_bounds_what_a_request_needs() -> None:
    assert blocks_to_finish(1000, 2000, 0, 16, window=256) == 16
    assert blocks_to_finish(1000, 2000, 20, 16, window=256) == 0
    assert blocks_to_finish(100, 2000, 0, 16, window=256) == 16


@given(
    size=st.sampled_from([1, 2, 4, 16]),
    prompt=st.integers(1, 60),
    output=st.integers(1, 60),
    width=st.integers(1, 4),
    chunk=st.integers(1, 60),
)
def test_a_request_takes_what_was_said(size: int, prompt: int, output: int, width: int, chunk: int) -> None:
    final = prompt + output - 1
    manager = KVCacheManager(1000, size, CacheConfig(enable_block_reuse=False))
    whole = blocks_to_finish(prompt, final, 0, size, beam_width=width)
    if final == prompt and prompt % size:
        whole -= width - 1  # beams that never write share the prompt's last block too
    first = min(chunk, prompt)
    sequence = manager.admit(UniqueContent(prompt), first)
    assert manager.remaining_blocks(sequence, final, beam_width=width) + sequence.num_blocks == whole
    taken = 1000 - manager.available_blocks
    if first < prompt:
        manager.extend(sequence, prompt - first)
        taken += blocks_to_step(first, prompt, size)
    assert 1000 - manager.available_blocks == taken
    beams = [sequence, *(manager.fork(sequence, width - 1) if width > 1 else [])]
    for past in range(prompt, final):
        expected = sum(blocks_to_step(past, past + 1, size) for _ in beams)
        if past == prompt and prompt % size:
            expected += width - 1  # all but one of the beams leave the last block of the prompt
        assert manager.blocks_to_advance(beams) == expected
        manager.append(beams)
    held = {block for beam in beams for block in beam.table}
    assert len(held) == whole
    assert all(manager.remaining_blocks(beam, final) == 0 for beam in beams if final > prompt)


@given(size=st.sampled_from([1, 4, 16]), prompt=st.integers(1, 60), more=st.integers(0, 60))
def test_what_remains_falls_by_what_is_taken(size: int, prompt: int, more: int) -> None:
    manager = KVCacheManager(200, size)
    sequence = manager.admit(UniqueContent(prompt), prompt)
    while True:
        remaining = manager.remaining_blocks(sequence, prompt + more)
        assert sequence.num_blocks + remaining == -(-(prompt + more) // size)
        if sequence.num_tokens == prompt + more:
            break
        manager.append([sequence])
    assert remaining == 0


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ((10, 9, 0, 16), r"final_tokens \(9\) must be at least 10"),
        ((0, 9, 0, 16), r"prompt_tokens \(0\) must be at least 1"),
        ((1, 9, -1, 16), r"allocated_blocks \(-1\) must be at least 0"),
        ((1, 9, 0, 0), r"tokens_per_block \(0\) must be at least 1"),
    ],
)
def test_bad_counts_are_named(arguments: tuple[int, int, int, int], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        blocks_to_finish(*arguments)


def test_a_request_does_not_shrink() -> None:
    with pytest.raises(ValueError, match=r"next_tokens \(3\) must be at least 4"):
        blocks_to_step(4, 3, 16)


def test_remaining_blocks_counts_the_copy_of_a_shared_tail() -> None:
    manager = KVCacheManager(10, 4)
    sequence = manager.admit(UniqueContent(6), 6)
    (child,) = manager.fork(sequence)
    assert manager.remaining_blocks(child, 8) == 1
    manager.append([child])
    assert manager.remaining_blocks(child, 8) == 0
    assert manager.remaining_blocks(sequence, 8) == 0
