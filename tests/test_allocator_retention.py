"""Retention: which blocks a request's wishes reach, how long they last, and what is kept for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.config import CacheConfig
from allocator.content import TokenContent, UniqueContent
from allocator.eviction import Priority
from allocator.eviction.protecting import protecting
from allocator.manager import KVCacheManager, KVSequence
from allocator.retention import Retention, RetentionConfig, TokenRange
from allocator.rules.retention import RETENTIONS, Keeping, wish_of


def manager_of(num_blocks: int, size: int = 2) -> KVCacheManager:
    return KVCacheManager(num_blocks, size, CacheConfig(policy="priority"))


def serve(manager: KVCacheManager, ids: list[int], retention: RetentionConfig | None = None) -> None:
    content = TokenContent(ids)
    match = manager.lookup(content)
    manager.release(manager.admit(content, len(ids) - match.hit_tokens, match, retention=retention))


def hits(manager: KVCacheManager, ids: list[int]) -> int:
    return manager.lookup(TokenContent([*ids, 9])).hit_blocks


def priorities(sequence: KVSequence) -> list[int]:
    path = reversed(list(sequence.anchor.path()))
    return [35 if e.retention is None else e.retention.priority for e in path for _ in e.ids]


def test_a_session_is_pinned_across_a_tool_call() -> None:
    """Its blocks outlive the traffic while the tool runs, and are like all others once its time is over."""

    def traffic(first: int) -> None:
        for i in range(first, first + 10):
            serve(manager, [i] * 4)

    session = list(range(100, 108))
    for retention, kept in ((None, 0), (RetentionConfig.whole(100, duration=60), 4)):
        manager = manager_of(8)
        serve(manager, session, retention)
        manager.now = 30
        traffic(0)
        assert hits(manager, session) == kept
    assert manager.next_expiry() == 60
    serve(manager, session, retention)  # it is back, and calls again: its time begins anew
    assert manager.next_expiry() == 90
    manager.now = 89
    traffic(20)
    assert hits(manager, session) == 4
    manager.now = 90
    assert manager.next_expiry() is None
    traffic(40)
    assert hits(manager, session) == 0
    manager.check_invariants()


def test_a_part_that_is_protected_expires_with_the_rest() -> None:
    """Of two blocks that nobody references, the first is cut off to be protected, and let go; then both expire."""
    policy = protecting(Priority())
    manager = KVCacheManager(3, 2, policy=policy)
    serve(manager, [1, 1, 2, 2], RetentionConfig.whole(100, duration=10))
    (extent, blocks), *_ = manager.lookup(TokenContent([1, 1, 3])).path
    assert blocks < len(extent.ids)
    head = manager.pool.split(extent, blocks)
    policy.protect("somebody", [head])
    policy.unprotect("somebody")
    serve(manager, [5, 5])
    manager.now = 10
    assert manager.next_expiry() is None
    assert head.retention is extent.retention is None
    serve(
        manager, [6] * 4
    )  # what has expired is used later than what was released at 0, the tail before the head
    assert hits(manager, [1, 1]) == 1


def test_a_block_has_the_range_of_its_first_token() -> None:
    retention = RetentionConfig((TokenRange(6, None, 80), TokenRange(1, 5, 60)), decode_priority=10)
    sequence = manager_of(12).admit(TokenContent([1] * 11), 11, retention=retention)
    assert priorities(sequence) == [35, 60, 60, 80, 80]


def test_what_is_generated_has_the_decode_priority() -> None:
    manager = manager_of(12)
    retention = RetentionConfig((TokenRange(0, None, 80),), decode_priority=10, decode_duration=5)
    sequence = manager.admit(TokenContent([1, 2, 3]), 3, retention=retention)
    child = manager.fork(sequence)[0]
    for _ in range(5):
        manager.append([sequence, child])
    assert priorities(sequence) == priorities(child) == [80, 80, 10, 10]
    manager.pending_copies()
    manager.truncate(sequence, 3)
    for _ in range(3):
        manager.append([sequence])
    assert priorities(sequence) == [80, 80, 10]  # by position, not by who wrote it


def test_the_newest_word_counts_and_silence_changes_nothing() -> None:
    manager = manager_of(12)
    ids = [1, 1, 2, 2, 3, 3, 4]
    for retention, expected in (
        (RetentionConfig((TokenRange(0, 4, 80),)), [80, 80, 35]),
        (None, [80, 80, 35]),
        (RetentionConfig((TokenRange(2, 4, 20), TokenRange(4, None, 50))), [80, 20, 50]),
        (RetentionConfig((TokenRange(0, 2, 35),)), [35, 20, 50]),
    ):
        content = TokenContent(ids)
        match = manager.lookup(content)
        sequence = manager.admit(content, len(ids) - match.hit_tokens, match, retention=retention)
        assert priorities(sequence) == expected
        manager.release(sequence)
        manager.check_invariants()


def test_what_has_left_a_window_is_kept_as_its_request_wants() -> None:
    manager = KVCacheManager(8, 2, CacheConfig(policy="priority", window=3))
    wishes = RetentionConfig((TokenRange(0, 4, 90), TokenRange(4, 8, 10), TokenRange(8, 12, 80, 5)))
    sequence = manager.admit(TokenContent(range(12)), 12, retention=wishes)
    manager.append(
        [sequence]
    )  # its query needs the sixth block; the five before leave, the last for 5 units of time

    def kept() -> list[int]:
        return [node.start for node in reversed(list(sequence.anchor.path())) if node.ids]

    assert (sequence.left, manager.next_expiry()) == (5, 5)
    other = manager.admit(UniqueContent(6), 6)  # one block is free, two have to go
    assert kept() == [0, 1, 4, 5]
    manager.now = 5
    assert manager.next_expiry() is None
    manager.release(other)
    manager.admit(UniqueContent(2), 2)
    assert kept() == [0, 1, 5]
    manager.check_invariants()


def test_in_a_window_too_the_newest_word_counts() -> None:
    """Of what is hit, of what is computed beside the cached block, and of that when it is swapped in: nothing then."""
    manager = KVCacheManager(12, 2, CacheConfig(policy="priority", window=8), num_host_blocks=8)
    first = manager.admit(TokenContent([1] * 4), 1, retention=RetentionConfig.whole(20))
    second = manager.admit(TokenContent([1] * 4), 4, retention=RetentionConfig.whole(70))
    assert priorities(second) == [70, 70]
    manager.extend(first, 3)
    assert first.twins == {0, 1}
    assert priorities(second) == [20, 20]
    third = manager.admit(TokenContent([1] * 5), 1, retention=RetentionConfig((TokenRange(0, 2, 50),)))
    assert priorities(third) == [50, 20]
    for sequence in (first, second):
        manager.swap_out(sequence)
        manager.transfers_done(manager.pending_swaps())
        manager.swap_in(sequence)
        assert priorities(third) == ([50, 20] if sequence is first else [70, 70])
    manager.check_invariants()


def test_a_block_that_is_written_in_again_is_a_new_one() -> None:
    """Whether it was cut or stolen for it, nothing is left of what was said of its old content, even if equal."""
    retention = RetentionConfig((TokenRange(0, None, priority=90),))
    manager = manager_of(4)
    serve(manager, [1, 2, 3, 4, 5], retention)
    content = TokenContent([1, 2, 3, 4, 5])
    sequence = manager.admit(content, 1)
    assert priorities(sequence) == [90, 90]
    manager.truncate(sequence, 3)
    manager.append([sequence], [4])
    assert list(sequence.block_table) == [0, 1]
    assert priorities(sequence) == [90, 35]

    manager = KVCacheManager(4, 2, CacheConfig(policy="priority", enable_partial_reuse=True))
    serve(manager, [1, 2], retention)
    manager.pending_copies()  # the step is run
    sequence = manager.admit(
        TokenContent([1, 2]), 1
    )  # the last token is always computed, here in the same block
    assert manager.stats().stolen_blocks == 1
    assert list(sequence.block_table) == [0]
    assert priorities(sequence) == [35]


def test_the_lowest_priority_goes_first_and_the_oldest_of_equals() -> None:
    manager = manager_of(5)
    for i, priority in enumerate((50, 0, 35, 0, 100)):
        serve(manager, [i, i], RetentionConfig.whole(priority))
    gone = []
    while len(gone) < 5:
        manager.pool.take(1)
        gone += [i for i in range(5) if i not in gone and not hits(manager, [i, i])]
    assert gone == [1, 3, 2, 0, 4]


def test_what_expires_is_the_most_recently_used_of_the_default() -> None:
    manager = manager_of(4)
    serve(manager, [0, 0], RetentionConfig.whole(0, duration=5))
    serve(manager, [1, 1])
    manager.now = 5
    serve(manager, [2, 2])
    gone = []
    while len(gone) < 3:
        manager.pool.take(1)
        gone += [i for i in range(3) if i not in gone and not hits(manager, [i, i])]
    assert gone == [1, 0, 2]


@given(retention=RETENTIONS, prompt=st.integers(1, 24), size=st.sampled_from([1, 2, 4]))
def test_a_plan_says_block_by_block_what_the_ranges_say(
    retention: RetentionConfig, prompt: int, size: int
) -> None:
    plan, wish = retention.plan(prompt, size), wish_of(retention, prompt, size)
    for block in range(30):
        assert (plan.at(block)[0] if plan is not None else None) == wish(block)


def test_the_oracle_stays_in_doubt_of_two_wishes_at_once_whatever_time_it_is() -> None:
    state = 7
    keeping = Keeping()
    keeping.say({state: {Retention(20, 5), Retention(100)}})
    keeping.settle({state: 0}, set())
    keeping.pass_time(9)
    assert state in keeping.in_doubt
    keeping.say({state: {Retention(50, 1)}})
    keeping.touch([state])
    keeping.settle({state: 0}, set())
    assert keeping.said == {state: Retention(50, 1)}
    keeping.pass_time(10)
    assert not keeping.said
    assert not keeping.in_doubt


def test_time_does_not_run_back() -> None:
    manager = manager_of(4)
    manager.now = 7
    with pytest.raises(ValueError, match=r"now \(6\) must be at least 7"):
        manager.now = 6
    with pytest.raises(ValueError, match=r"now \(3\) must be at least 7"):
        manager.admit(TokenContent([1]), 1, now=3)
    manager.admit(TokenContent([1]), 1, now=9)
    assert manager.now == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenRange(-1, 4), r"start \(-1\) must be at least 0"),
        (lambda: TokenRange(4, 4), r"end \(4\) must be greater than start \(4\)"),
        (lambda: TokenRange(0, None, 101), r"priority \(101\) must be at most 100"),
        (lambda: TokenRange(0, None, 5, 0), r"duration \(0\) must be at least 1"),
        (
            lambda: RetentionConfig((TokenRange(3, 9), TokenRange(0, 4))),
            r"ranges \(0 to 4, from 3\) must not",
        ),
        (lambda: RetentionConfig((TokenRange(0, None), TokenRange(5, 9))), r"ranges \(0 to None, from 5\)"),
        (lambda: RetentionConfig(([0, 4, 35],)), r"ranges .* must be TokenRanges"),  # type: ignore[arg-type]
        (lambda: RetentionConfig(decode_priority=-1), r"decode_priority \(-1\) must be at least 0"),
        (lambda: RetentionConfig(decode_duration=0), r"decode_duration \(0\) must be at least 1"),
        (
            lambda: manager_of(4).admit(TokenContent([1]), 1, retention=Retention(5)),  # type: ignore[arg-type]
            r"retention \(Retention\(priority=5, duration=None\)\) must be a RetentionConfig",
        ),
    ],
)
def test_broken_rules_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("chunks", [(9,), (8, 1), (3, 5, 1)])
def test_what_a_batch_decodes_is_kept_as_said_even_if_the_last_chunk_fills_no_block(
    chunks: tuple[int, ...],
) -> None:
    """It was kept as the prompt before it: the extent was left open for the batch to prolong."""
    manager = KVCacheManager(8, 2)
    wish = RetentionConfig((), decode_priority=80)
    sequence = manager.admit(TokenContent([0] * 9), chunks[0], retention=wish)
    for chunk in chunks[1:]:
        manager.extend(sequence, chunk)
    batch = manager.batch()
    batch.add(sequence)
    for _ in range(5):
        manager.append(batch, [1])
    said = {e.end: e.retention for e in manager.index.extents()}
    assert said == {5: None, 7: Retention(80)} or said == {4: None, 5: None, 7: Retention(80)}
