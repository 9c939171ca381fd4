"""Programs that fuzzing found, and that showed the oracle or the manager wrong."""

from __future__ import annotations

import pytest

from allocator.config import CacheConfig
from allocator.content import TokenContent
from allocator.fuzz import AllocatorMachine
from allocator.manager import KVCacheManager
from allocator.retention import Retention, RetentionConfig, TokenRange
from allocator.shadow import PromptSpec


def machine(num_blocks: int, *, partial: int = 0) -> AllocatorMachine:
    """Return a machine with a pool of blocks of two tokens, begun."""
    state = AllocatorMachine()
    state.start(num_blocks, 2, reuse=True, policy=0, ghosts=None, log=0, partial=partial)
    return state


def test_found_block_filled_again_with_what_was_cut_off() -> None:
    """The oracle expected it to be kept as before."""
    state = machine(6)
    whole = RetentionConfig.whole(50)
    state.admit_retained(PromptSpec("tokens", [0, 1, 0, 0, 1]), again=0, salt="", chunk=99, retention=whole)
    state.check()
    state.release(index=0, count=1)
    state.admit_again(index=0, salt="", chunk=99)
    state.truncate(index=0, keep=2)
    state.check()
    state.append(chosen=1, count=1, bits=0, wait=0)
    state.check()
    state.teardown()


def test_found_block_stolen_and_filled_with_the_same() -> None:
    """Likewise; the prompt's last token is computed in the block that holds it."""
    state = machine(3, partial=2)
    whole = RetentionConfig((TokenRange(0, None, 50),))
    state.admit_retained(PromptSpec("tokens", [0, 1]), again=0, salt="", chunk=99, retention=whole)
    state.check()
    state.release(index=0, count=1)
    state.check()
    state.admit_again(index=0, salt="", chunk=99)
    state.check()
    state.teardown()


def test_found_fork_that_says_the_same_without_reuse() -> None:
    """The beams' blocks are twins of the one that is cut and written in again; the oracle knew of no copy for them."""
    state = AllocatorMachine()
    state.start(7, 4, reuse=False, policy=0, ghosts=None, log=0, window=11)
    state.admit(
        prompt=PromptSpec(kind="runs", symbols=[0], cut=1, named=False, granularity=1), salt="", chunk=3
    )
    state.check()
    state.serve(symbols=[0, 1, 1], salt="", chunk=1, count=1, in_batch=False)
    state.check()
    state.release(index=0, count=1)
    state.check()
    state.admit(
        prompt=PromptSpec(kind="tokens", symbols=[0], cut=0, named=False, granularity=1), salt="", chunk=3
    )
    state.check()
    state.release(index=0, count=1)
    state.check()
    state.search(index=0, n=1, parents=(0, 0, 0, 0), bits=None)
    state.check()
    state.sample(index=0, n=1, bits=None, wait=0, ends=False)
    state.check()
    state.search(index=0, n=3, parents=(0, 0, 0, 0), bits=12)
    state.check()
    state.truncate(index=0, keep=1)
    state.check()
    state.decode(bits=None, wait=0)
    state.check()
    state.teardown()


def test_found_beam_that_takes_over_a_longer_table_than_its_quota_leaves() -> None:
    """Of two beams of four tokens, one has let go of what its window of two passed; then both have four blocks."""
    state = AllocatorMachine()
    state.start(10, 1, reuse=True, policy=0, ghosts=None, log=0, window=11)
    state.admit(PromptSpec("unique", [0] * 4), salt="", chunk=99)
    state.admit(PromptSpec("unique", [0] * 3), salt="", chunk=99)
    state.check()
    state.append(chosen=2, count=1, bits=None, wait=0)
    state.check()
    state.set_quota(salt="", quota=1)
    before = state.manager.tenant_blocks("")
    state.reorder_beams(index=0, width=2, parents=(0, 0, 0, 0))
    state.check()
    assert state.manager.tenant_blocks("") > before
    state.teardown()


def test_found_swapped_in_block_that_is_written_in_evicted_and_filled_anew() -> None:
    """All before the manager is told that the first transfer is done: the oracle took that for a reuse too early."""
    state = AllocatorMachine()
    state.start(7, 2, reuse=True, policy=1, ghosts=0, log=0, host_blocks=4, lag=True)
    wish = RetentionConfig((), 0, 1)
    state.race(symbols=[0, 0, 0, 0, 0], wishes=(wish, wish), count=0)
    state.check()
    state.press(blocks=1, symbol=0, ends=2)
    state.check()
    state.admit(PromptSpec("runs", [1, 0, 0], cut=3), salt="", chunk=3)
    state.check()
    state.part(index=0, keep=0, bits=0)
    state.check()
    state.swap_in(index=0)
    state.check()
    sequence = list(state.manager.sequences)[-1]
    filled = sequence.table[-1]
    state.append(chosen=11, count=1, bits=None, wait=0)
    state.check()
    state.come_back(index=1, salt="", chunk=1, leaves=False)
    assert filled in state.manager.host_tier.queue.arriving()
    state.check()
    state.teardown()


def test_found_block_filled_up_by_the_step_that_swaps_it_in() -> None:
    """It is cached when the transfers are run, and written only then: the oracle took that for a stray write."""
    state = AllocatorMachine()
    state.start(4, 2, reuse=False, policy=0, ghosts=0, log=0, host_blocks=2, lag=True, window=11)
    state.admit(PromptSpec("unique", [0]), salt="", chunk=2)
    state.check()
    state.decode(bits=None, wait=3)
    state.check()
    state.swap_out(index=0, blocks=None)
    state.check()
    state.swap_in(index=0)
    state.check()
    state.search(index=0, n=1, parents=(0, 0, 0, 0), bits=0)
    state.check()
    state.teardown()


def test_found_retained_block_that_only_a_copy_holds_for_a_moment() -> None:
    """It is kept for as long as was said from then on; the oracle counted from when the last sequence let go of it."""
    state = AllocatorMachine()
    state.start(3, 2, reuse=True, policy=0, ghosts=0, log=0, partial=2, window=11)
    state.admit(PromptSpec("tokens", [1, 0]), salt="", chunk=2)
    state.check()
    kept = RetentionConfig((TokenRange(0, 1, 0, duration=2),), 0, 1)
    state.race(symbols=[1, 0], wishes=(RetentionConfig((), 0), kept), count=0)
    state.check()
    state.release(index=0, count=2)
    state.check()
    assert state.manager.next_expiry() == 2
    state.pass_time(by=1)
    state.check()
    state.admit(PromptSpec("runs", [1, 0], cut=2), salt="", chunk=1)
    assert len(state.manager.tables.copies) == 1
    assert state.manager.next_expiry() is None
    state.check()
    assert state.manager.next_expiry() == 3
    state.teardown()


def test_found_block_swapped_out_again_before_it_has_come_back() -> None:
    """Without reuse a fork indexes what is shared, which the manager then took for something that is there."""
    manager = KVCacheManager(4, 2, CacheConfig(enable_block_reuse=False), num_host_blocks=4)
    sequence = manager.admit(TokenContent([1, 2]), 2)
    manager.swap_out(sequence)
    manager.transfers_done(manager.pending_swaps())
    manager.swap_in(sequence)
    (fork,) = manager.fork(sequence)
    for arriving in (sequence, fork):
        with pytest.raises(ValueError, match=r"block 0 is still to be filled: take pending_swaps\(\)"):
            manager.swap_out(arriving)
    manager.check_invariants()
    manager.transfers_done(manager.pending_swaps())
    manager.swap_out(sequence)
    assert manager.pending_swaps().swap_outs.tolist() == [[0, 0]]
    manager.check_invariants()


def test_found_beams_of_what_has_not_come_back() -> None:
    """The same, as the machine found it."""
    state = AllocatorMachine()
    state.start(4, 2, reuse=False, policy=0, ghosts=None, log=0, host_blocks=4, lag=True)
    state.admit(PromptSpec("tokens", [0]), salt="", chunk=1)
    state.append(chosen=0, count=1, bits=0, wait=4)
    state.check()
    state.swap_out(index=0, blocks=4)
    state.check()
    state.check()
    state.search(index=0, n=2, parents=(0, 0, 0, 0), bits=None)
    state.check()
    state.decode(bits=None, wait=2)
    state.check()
    state.check()
    state.swap_out(index=0, blocks=3)
    state.check()
    state.teardown()


def test_found_part_stolen_once_what_built_on_it_is_evicted() -> None:
    """A hit that comes back from the host took the place of the block that built on the part's source.

    The oracle, which had looked before, expected a copy.
    """
    short_lived = RetentionConfig(
        (TokenRange(0, 1, priority=0, duration=1), TokenRange(3, None, priority=0, duration=1)), 0, 1
    )
    state = AllocatorMachine()
    state.start(
        10,
        2,
        policy=0,
        window=11,
        num_sinks=3,
        partial=6,
        host_blocks=1,
        ghosts=0,
        log=0,
        lag=False,
        reuse=True,
    )
    state.admit(PromptSpec("tokens", [0, 1, 0, 0]), salt="", chunk=2)
    state.check()
    state.race([0, 0, 0, 0], (short_lived, RetentionConfig((), 0)), count=4)
    state.check()
    state.come_back(index=0, salt="other", chunk=1, leaves=True)
    assert state.manager.stats().stolen_blocks == 1
    state.check()
    state.teardown()


def test_found_wish_for_a_block_that_a_sequence_was_cut_within() -> None:
    """Coming back from the host it was said again, though for blocks that are not full nothing is said elsewhere."""
    manager = KVCacheManager(2, 2, CacheConfig(policy="priority"), num_host_blocks=3)
    sequence = manager.admit(TokenContent([1, 2, 3, 4]), 4, retention=RetentionConfig.whole(0, duration=5))
    assert [extent.retention for extent in manager.index.extents()] == [Retention(0, 5)]
    manager.truncate(sequence, 3)
    manager.swap_out(sequence)
    manager.transfers_done(manager.pending_swaps())
    manager.release(manager.admit(TokenContent([5, 6, 7]), 3))  # takes both blocks
    manager.swap_in(sequence)
    manager.transfers_done(manager.pending_swaps())
    kept = {extent.start: extent.retention for extent in sequence.anchor.path()}
    assert kept == {0: Retention(0, 5), 1: None}
    manager.check_invariants()


def test_found_block_that_was_filled_twice() -> None:
    """A node that is needed by those below it kept the date of the block that it had lost."""
    state = AllocatorMachine()
    state.start(5, 1, reuse=False, policy=0, ghosts=0, log=0, window=11)
    assert state.manager.pool.lifetimes is not None
    state.admit_halves(
        prompt=PromptSpec(kind="chunks", symbols=[0, 0, 0, 0], cut=2, named=False, granularity=1),
        salt="",
        chunk=1,
    )
    state.fork(index=0, n=1)
    state.extend(index=0, count=1)
    state.slide(index=0, count=2, bits=0, in_batch=False)
    state.extend(index=0, count=1)
    state.check()
    state.teardown()


def test_found_salt_whose_last_block_went_while_others_were_looked_through() -> None:
    """The eviction of its block was settled by the very look-up that went through the salts."""
    state = AllocatorMachine()
    state.start(2, 1, reuse=True, policy=21, ghosts=1, log=0, lag=True)
    state.serve(symbols=[1], salt="other", chunk=1, count=1, in_batch=True)
    state.preempt(index=0)
    state.serve(symbols=[0, 0, 0, 0], salt="", chunk=1, count=0, in_batch=False)
    state.preempt(index=0)
    short_lived = RetentionConfig((TokenRange(0, 2, 0, 1), TokenRange(2, None, 0)), 0, 1)
    state.race([1, 0, 0, 0, 0], (RetentionConfig((), 0), short_lived), count=0)
    state.check()
    state.teardown()
